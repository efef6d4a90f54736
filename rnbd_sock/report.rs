// SPDX-License-Identifier: GPL-2.0
//! What a connection tells about itself, in debugfs and over netlink.

#![forbid(unsafe_code)]

use super::{
    traffic::Totals,
    Connection,
    ALIVE,
    DRAINING, //
};
use crate::kapi::{
    net::{
        address::{
            Address,
            Side, //
        },
        sock::Socket, //
    },
    task, //
};
use kernel::{
    fmt,
    sync::atomic::Acquire, //
};

/// Whether requests are sent on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Alive,
    /// Replies are awaited, and no request is sent.
    Draining,
    Dead,
}

/// The addresses of a connection. They are kept, because a connection that has died has none any more.
pub(crate) struct Addresses {
    pub(crate) local: Option<Address>,
    pub(crate) peer: Option<Address>,
}

impl Addresses {
    /// Returns the addresses of a socket.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn of(socket: &Socket) -> Self {
        Addresses {
            local: socket.address(Side::Local),
            peer: socket.address(Side::Peer),
        }
    }
}

impl Connection {
    /// Returns whether requests are sent on the connection. The answer may be outdated immediately.
    pub(crate) fn life(&self) -> Life {
        match self.state.load(Acquire) {
            ALIVE => Life::Alive,
            DRAINING => Life::Draining,
            _ => Life::Dead,
        }
    }

    /// Returns the counters.
    pub(crate) fn totals(&self) -> Totals {
        self.traffic.totals()
    }

    /// Returns for how long the server has owed replies and been silent, in milliseconds; 0 if it owes none.
    pub(crate) fn silent_ms(&self) -> u64 {
        task::jiffies_to_ms(self.stuck_jiffies())
    }

    /// Returns the addresses that the socket had when it was taken over.
    pub(crate) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Returns the protocol of the socket (`IPPROTO_*`), 0 for UNIX and vsock.
    pub(crate) fn protocol(&self) -> u32 {
        self.socket.protocol()
    }

    /// Returns whether an upper layer protocol, such as TLS, is on top of the socket.
    pub(crate) fn has_upper_layer(&self) -> bool {
        self.socket.has_upper_layer()
    }

    /// Writes the connection's state and counters as `name=value` pairs.
    pub(crate) fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.life() {
            Life::Alive => "state=alive ",
            Life::Draining => "state=draining ",
            Life::Dead => "state=dead ",
        })?;
        self.traffic.describe(f)?;
        write!(f, " send_pages_kib={}", self.pages_kib())
    }
}
