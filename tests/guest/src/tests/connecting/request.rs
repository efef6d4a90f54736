// SPDX-License-Identifier: GPL-2.0

//! Asks the family "rnbd" to connect nbd0.

use std::os::fd::{AsRawFd, OwnedFd};

use neli::types::Buffer as Bytes;

use crate::device::USUAL_FLAGS;
use crate::driver::Driver;
use crate::harness::{Guest, skip};
use crate::netlink::{Attr, Link, Netlink, attr, number};
use crate::proto::CAN_MULTI_CONN;
use crate::server::{Server, Transport};
use crate::sys::SysResult;

/// Commands.
pub const DEVICE_GET: u8 = 1;
pub const HANDOVER: u8 = 8;
pub const CONNECT: u8 = 9;

/// Attributes of the command.
pub const DEVICE: u16 = 1;
pub const CONNECTION: u16 = 2;
pub const SOCKETS: u16 = 3;
pub const DRAIN: u16 = 4;
pub const BACKEND: u16 = 5;
pub const SIZE: u16 = 6;
pub const FLAGS: u16 = 7;
pub const TIMEOUT: u16 = 8;
pub const DEAD_CONN_TIMEOUT: u16 = 9;
pub const MINIMUM_BLOCK_SIZE: u16 = 10;
pub const PREFERRED_BLOCK_SIZE: u16 = 11;
pub const MAXIMUM_PAYLOAD: u16 = 12;
pub const NO_PARTITION_SCAN: u16 = 13;
pub const TLS: u16 = 14;
pub const OWNED: u16 = 15;
pub const DISCONNECT_ON_CLOSE: u16 = 16;
pub const DESTROY_ON_DISCONNECT: u16 = 17;

/// A socket to talk to the family with.
pub fn open(guest: &Guest) -> Netlink {
    if guest.driver == Driver::Nbd {
        skip("the family is rnbd's");
    }
    let rnbd = Netlink::try_open_family("rnbd").expect("the family rnbd");
    rnbd.request_ext_ack();
    rnbd
}

pub fn sockets_attr(sockets: &[OwnedFd]) -> Attr {
    let numbers = sockets.iter().map(|socket| socket.as_raw_fd());
    let numbers: Vec<u8> = numbers.flat_map(i32::to_ne_bytes).collect();
    attr(SOCKETS, Bytes::from(numbers))
}

pub fn flag(kind: u16) -> Attr {
    attr(kind, Bytes::new())
}

/// Connects nbd0 to a server.
pub fn connect_to(
    rnbd: &Netlink,
    server: Server,
    transports: &[Transport],
    more: &[Attr],
) -> SysResult<Link> {
    let sockets: Vec<OwnedFd> = transports.iter().map(|how| server.connect(*how)).collect();
    let mut attrs = vec![
        attr(DEVICE, 0_u32),
        sockets_attr(&sockets),
        attr(SIZE, 8_u64 << 20),
        attr(FLAGS, USUAL_FLAGS | CAN_MULTI_CONN),
    ];
    attrs.extend(more.iter().cloned());
    let answer = rnbd.ask(CONNECT, attrs)?.expect("a reply");
    assert_eq!(*answer.cmd(), CONNECT);
    assert_eq!(number(answer.attrs().as_ref(), DEVICE), Some(0_u32));
    Ok(Link {
        server,
        netlink: Netlink::open(),
        index: 0,
    })
}

/// Connects nbd0 to a new, honest server.
pub fn connect(rnbd: &Netlink, more: &[Attr]) -> Link {
    let connected = connect_to(rnbd, Server::new(), &[Transport::Unix], more);
    connected.unwrap_or_else(|errno| panic!("{errno}: {:?}", rnbd.ext_ack()))
}
