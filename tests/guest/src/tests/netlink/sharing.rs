// SPDX-License-Identifier: GPL-2.0

//! A socket that one device uses is given to another one.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;

use super::{MIB, move_data};
use crate::device::{self, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::{self, Command};
use crate::server::{Server, Transport};
use crate::sys::ioctl_number;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(given_by_ioctl),
        test!(given_by_connect),
        test!(given_by_reconfigure),
    ]
}

/// Device 0, connected, and the socket that it uses.
fn connected() -> (Link, OwnedFd) {
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    let netlink = Netlink::open();
    let index = netlink
        .connect(&Setup::new(MIB).index(0).sockets([duplicate(&socket)]))
        .expect("to connect");
    let link = Link {
        server,
        netlink,
        index,
    };
    (link.settle(), socket)
}

fn duplicate(socket: &OwnedFd) -> OwnedFd {
    socket.try_clone().expect("dup")
}

/// The device goes on as if nothing had been.
fn assert_untouched(link: &Link) {
    move_data(&link.direct(), 0, 1);
    let goodbyes = link.server.requests_of(Command::Disconnect);
    assert_eq!(goodbyes, [], "somebody else's goodbye");
    assert_eq!(link.server.living(), 1);
}

fn given_by_ioctl(guest: &Guest) {
    let (link, socket) = connected();
    let news = Netlink::listen();
    // However the second device is let go of.
    for last in [proto::CLEAR_SOCK, proto::DISCONNECT, proto::CLEAR_QUE] {
        let second = device::open(1, 0).unwrap();
        let ioctl = |request, argument| ioctl_number(&second, request, argument);
        let number = socket.as_fd().as_raw_fd() as u64;
        assert_eq!(ioctl(proto::SET_SOCK, number), Ok(0), "not looked at yet");
        assert_eq!(ioctl(proto::SET_SIZE, MIB), Ok(0));
        if guest.expected("a-socket-serves-one-device") == Driver::Nbd {
            assert_eq!(ioctl(proto::CLEAR_SOCK, 0), Ok(0));
            assert_eq!(news.expect_dead_link(), 0, "it shuts the socket down");
            assert_eq!(read_page(&link.direct(), 0), Err(Errno::IO));
            return;
        }
        assert_eq!(ioctl(proto::DO_IT, 0), Err(Errno::BUSY));
        assert_untouched(&link);
        assert_eq!(ioctl(last, 0), Ok(0));
        assert_untouched(&link);
        drop(second);
        assert_untouched(&link);
    }
    device::assert_usable(1);
    assert_untouched(&link);
    assert_eq!(news.dead_link(), None);
}

fn given_by_connect(guest: &Guest) {
    let (link, socket) = connected();
    let setup = Setup::new(MIB).index(1);
    let answer = link
        .netlink
        .connect(&setup.clone().sockets([duplicate(&socket)]));
    if guest.expected("a-socket-serves-one-device") == Driver::Nbd {
        assert_eq!(answer, Ok(1));
        link.netlink.disconnect(1).unwrap();
        return;
    }
    assert_eq!(answer, Err(Errno::BUSY));
    assert_untouched(&link);
    assert_eq!(link.netlink.status(Some(1)), [(1, false)]);
    let second = setup.attach().settle();
    move_data(&second.direct(), 0, 2);
    assert_untouched(&link);
}

fn given_by_reconfigure(guest: &Guest) {
    let (link, socket) = connected();
    let second = Setup::new(MIB).index(1).attach().settle();
    second.kill_server();
    let answer = link
        .netlink
        .reconfigure(&Setup::change(1).sockets([duplicate(&socket)]));
    if guest.expected("a-socket-serves-one-device") == Driver::Nbd {
        assert_eq!(answer, Ok(()));
        return;
    }
    assert_eq!(answer, Err(Errno::BUSY));
    assert_untouched(&link);
    assert_eq!(read_page(&second.direct(), 0), Err(Errno::IO));
    assert_eq!(second.revive(), Ok(()), "with one of its own");
    move_data(&second.direct(), 0, 2);
    second.disconnect_and_wait();
    assert_untouched(&link);
}
