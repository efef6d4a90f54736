// SPDX-License-Identifier: GPL-2.0

//! A session on nbd0 by either front end.

use crate::device::{Plan, Rig, USUAL_FLAGS};
use crate::netlink::{Link, Netlink, Setup};
use crate::server::{Server, Transport};

/// What a server exports.
#[derive(Clone, Copy)]
pub struct Export {
    pub size: u64,
    pub block_size: u64,
    pub flags: u64,
}

impl Export {
    pub fn new(size: u64) -> Self {
        Self {
            size,
            block_size: 512,
            flags: USUAL_FLAGS,
        }
    }

    pub fn block_size(self, block_size: u64) -> Self {
        Self { block_size, ..self }
    }

    pub fn flags(self, flags: u64) -> Self {
        Self { flags, ..self }
    }
}

/// A session by either front end.
pub enum Session {
    Ioctl(Rig),
    Netlink(Link),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Front {
    Ioctl,
    Netlink,
}

pub const FRONTS: [Front; 2] = [Front::Ioctl, Front::Netlink];

impl Front {
    /// Starts a session on nbd0, and has the partitions looked for.
    pub fn start(self, server: Server, export: &Export) -> Session {
        match self {
            Self::Ioctl => {
                let plan = Plan::new(export.size)
                    .block_size(export.block_size)
                    .flags(export.flags);
                Session::Ioctl(plan.attach_to(server))
            }
            Self::Netlink => Session::Netlink(connect(server, export).settle()),
        }
    }
}

/// Connects nbd0 by netlink.
pub fn connect(server: Server, export: &Export) -> Link {
    let setup = Setup::new(export.size)
        .index(0)
        .block_size(export.block_size)
        .flags(export.flags);
    let netlink = Netlink::open();
    let socket = server.connect(Transport::Unix);
    let index = netlink.connect(&setup.sockets([socket])).unwrap();
    Link {
        server,
        netlink,
        index,
    }
}

impl Session {
    pub fn server(&self) -> &Server {
        match self {
            Self::Ioctl(rig) => &rig.server,
            Self::Netlink(link) => &link.server,
        }
    }

    /// Ends it, and waits until the device is free.
    pub fn end(self) {
        match self {
            Self::Ioctl(mut rig) => assert_eq!(rig.disconnect(), Ok(0)),
            Self::Netlink(link) => {
                link.disconnect().unwrap();
                link.wait_free();
            }
        }
    }
}
