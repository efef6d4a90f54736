// SPDX-License-Identifier: GPL-2.0

//! Whose device it is: messages that are meant for another one than the index leads to by now.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{MIB, move_data};
use crate::device::{self, Plan};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::netlink::{Netlink, Setup};
use crate::programs::sh;
use crate::server::{Server, Transport};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(disconnect_names_the_image),
        test!(disconnect_names_an_image_where_there_is_none),
        test!(disconnect_of_the_one_before),
        test!(nbd_client_disconnects_an_image_with_a_name),
    ]
}

/// Lines of the kernel about a refused disconnect.
fn refusals(guest: &Guest) -> usize {
    let ours = |line: &&String| line.contains("nbd0: not disconnected");
    guest.log().iter().filter(ours).count()
}

/// Whether a device can be read. One that was disconnected may have no size.
fn is_alive(device: &File) -> bool {
    let read = device.read_at(&mut Buffer::new(4096), 0);
    read.is_ok_and(|len| len == 4096)
}

fn disconnect_names_the_image(guest: &Guest) {
    let netlink = Netlink::open();
    netlink.want_words();
    for name in [b"image-7".as_slice(), b"\xff\xfe", b"\0"] {
        let link = Setup::new(MIB)
            .index(0)
            .backend_bytes(name)
            .attach()
            .settle();
        let others = [
            b"image-8".as_slice(),
            b"image-",
            b"image-77",
            b"\xff",
            b"\0x",
        ];
        for (refused, other) in others.iter().enumerate() {
            let before = refusals(guest);
            let answer = netlink.disconnect_backend(0, other);
            if guest.expected("disconnect-is-for-the-image") == Driver::Nbd {
                assert_eq!(answer, Ok(()), "{other:x?}: not looked at");
                return;
            }
            assert_eq!(answer, Err(Errno::INVAL), "{other:x?} of {name:x?}");
            let words = netlink.words();
            assert_eq!(words.as_deref(), Some("the device has another backend"));
            assert_eq!(refusals(guest), before + 1, "a line for number {refused}");
        }
        move_data(&link.direct(), 0, 1);
        assert_eq!(link.server.living(), 1);
        // The zeroes at the end are no part of it.
        let right = [name, b"\0\0"].concat();
        assert_eq!(netlink.disconnect_backend(0, &right), Ok(()));
        link.wait_free();
    }
}

/// What has no name is not the image that is meant.
fn disconnect_names_an_image_where_there_is_none(guest: &Guest) {
    let netlink = Netlink::open();
    let answer = match guest.expected("disconnect-is-for-the-image") {
        Driver::Nbd => Ok(()),
        Driver::Rnbd => Err(Errno::INVAL),
    };
    assert_eq!(netlink.disconnect_backend(0, b"image-7"), answer, "free");
    let open = device::open(0, 0).unwrap();
    assert_eq!(netlink.disconnect_backend(0, b"image-7"), answer, "open");
    drop(open);
    let rig = Plan::new(MIB).attach();
    assert_eq!(netlink.disconnect_backend(0, b"image-7"), answer, "ioctl");
    assert_eq!(is_alive(&rig.direct()), answer.is_err());
    drop(rig);
    let link = Setup::new(MIB).index(0).attach().settle();
    for name in [b"image-7".as_slice(), b"\0"] {
        assert_eq!(netlink.disconnect_backend(0, name), answer, "no name");
    }
    assert_eq!(is_alive(&link.direct()), answer.is_err());
    // Without a name the index is enough, as ever.
    assert_eq!(link.disconnect(), Ok(()));
    link.wait_free();
}

/// Two programs, and an index that went from one to the other.
fn disconnect_of_the_one_before(guest: &Guest) {
    let setup = Setup::new(MIB).index(0);
    let first = setup.clone().backend("image of A").attach();
    first.disconnect().unwrap();
    first.wait_free();
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    let second = setup.backend("image of B").sockets([socket]);
    let netlink = Netlink::open();
    assert_eq!(netlink.connect(&second), Ok(0));
    // The first one cleans up, late.
    let answer = netlink.disconnect_backend(0, b"image of A");
    let open = device::open(0, libc::O_DIRECT).unwrap();
    match guest.expected("disconnect-is-for-the-image") {
        Driver::Nbd => {
            assert_eq!(answer, Ok(()));
            assert!(!is_alive(&open), "somebody else's");
        }
        Driver::Rnbd => {
            assert_eq!(answer, Err(Errno::INVAL));
            assert!(is_alive(&open));
            // Also while it is open: what the name belongs to is known until the last close.
            assert_eq!(netlink.disconnect_backend(0, b"image of B"), Ok(()));
            assert_eq!(netlink.disconnect_backend(0, b"image of B"), Ok(()));
            assert!(!is_alive(&open));
            drop(open);
            first.wait_free();
        }
    }
}

/// Its `-d` names no image.
fn nbd_client_disconnects_an_image_with_a_name(_: &Guest) {
    let link = Setup::new(MIB).index(0).backend("image-7").attach();
    sh("nbd-client -d /dev/nbd0");
    link.wait_free();
}
