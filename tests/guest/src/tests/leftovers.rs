// SPDX-License-Identifier: GPL-2.0

//! What a session leaves behind for the next one on the same device.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::device::{self, Plan, Rig, USUAL_FLAGS, errno};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::READ_ONLY;
use crate::server::{Server, Transport};
use crate::sys::{Buffer, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(the_read_only_mark),
        test!(a_read_only_export_stays_read_only),
    ]
}

const SIZE: u64 = 8 << 20;

const BLKROSET: u32 = 0x125d;
const BLKROGET: u32 = 0x125e;

/// A session by either front end.
enum Session {
    Ioctl(Rig),
    Netlink(Link),
}

#[derive(Clone, Copy, PartialEq)]
enum Front {
    Ioctl,
    Netlink,
}

const FRONTS: [Front; 2] = [Front::Ioctl, Front::Netlink];

impl Front {
    /// Starts a session on nbd0.
    fn start(self, server: Server, flags: u64) -> Session {
        match self {
            Self::Ioctl => Session::Ioctl(Plan::new(SIZE).flags(flags).attach_to(server)),
            Self::Netlink => Session::Netlink(connect(server, flags)),
        }
    }
}

fn connect(server: Server, flags: u64) -> Link {
    let setup = Setup::new(SIZE).index(0).flags(flags);
    let netlink = Netlink::open();
    let socket = server.connect(Transport::Unix);
    let index = netlink.connect(&setup.sockets([socket])).unwrap();
    let link = Link {
        server,
        netlink,
        index,
    };
    link.settle()
}

impl Session {
    /// Ends it, and waits until the device is free.
    fn end(self) {
        match self {
            Self::Ioctl(mut rig) => assert_eq!(rig.disconnect(), Ok(0)),
            Self::Netlink(link) => {
                link.disconnect().unwrap();
                link.wait_free();
            }
        }
    }
}

// --- Read-only ----------------------------------------------------------------

fn set_read_only(device: &File, on: bool) {
    ioctl_pointer(device, BLKROSET, &mut i32::from(on)).expect("BLKROSET");
}

fn is_read_only(device: &File) -> bool {
    let mut on = 0;
    ioctl_pointer(device, BLKROGET, &mut on).expect("BLKROGET");
    on != 0
}

fn write_one(device: &File) -> Result<usize, Errno> {
    errno(device.write_at(&Buffer::new(4096), 0))
}

/// Each session decides whether it is read-only, by its flags or by BLKROSET.
fn the_read_only_mark(guest: &Guest) {
    let stays = guest.expected("read-only-ends-with-the-session") == Driver::Nbd;
    for first in FRONTS {
        for next in FRONTS {
            let session = first.start(Server::new(), USUAL_FLAGS);
            let device = device::open(0, libc::O_DIRECT).unwrap();
            set_read_only(&device, true);
            assert_eq!(write_one(&device), Err(Errno::PERM));
            drop(device);
            // With the session, not with the close of somebody else.
            assert_eq!(device::sysfs(0, "ro"), "1");
            session.end();
            assert_eq!(device::sysfs(0, "ro"), if stays { "1" } else { "0" });
            let session = next.start(Server::new(), USUAL_FLAGS);
            let device = device::open(0, libc::O_DIRECT).unwrap();
            assert_eq!(is_read_only(&device), stays);
            assert_eq!(write_one(&device).is_err(), stays);
            set_read_only(&device, false);
            assert_eq!(write_one(&device), Ok(4096));
            drop(device);
            session.end();
        }
    }
    // Nor does the mark of a read-only export stay.
    for front in FRONTS {
        let session = front.start(Server::new(), USUAL_FLAGS | READ_ONLY);
        assert_eq!(device::sysfs(0, "ro"), "1");
        session.end();
        assert_eq!(device::sysfs(0, "ro"), if stays { "1" } else { "0" });
        let session = front.start(Server::new(), USUAL_FLAGS);
        assert_eq!(device::sysfs(0, "ro"), "0");
        session.end();
    }
}

/// BLKROSET (`blockdev --setrw`) takes away only what it has set.
fn a_read_only_export_stays_read_only(_: &Guest) {
    for front in FRONTS {
        let session = front.start(Server::new(), USUAL_FLAGS | READ_ONLY);
        let device = device::open(0, libc::O_DIRECT).unwrap();
        set_read_only(&device, true);
        set_read_only(&device, false);
        assert!(is_read_only(&device));
        assert_eq!(write_one(&device), Err(Errno::PERM));
        drop(device);
        session.end();
    }
}
