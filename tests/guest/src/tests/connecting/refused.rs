// SPDX-License-Identifier: GPL-2.0

//! What is refused, and the words for it.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;

use neli::types::Buffer as Bytes;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::request::{
    BACKEND, CONNECT, CONNECTION, DEVICE, DRAIN, FLAGS, HANDOVER, MAXIMUM_PAYLOAD,
    MINIMUM_BLOCK_SIZE, PREFERRED_BLOCK_SIZE, SIZE, SOCKETS, TLS, connect, connect_to, flag, open,
    sockets_attr,
};
use crate::device::{self, assert_usable};
use crate::harness::{Guest, Test};
use crate::netlink::{Attr, Netlink, Setup, attr};
use crate::programs::sh;
use crate::proto::HAS_FLAGS;
use crate::server::{Server, Transport, encrypt_sending, tcp_pair};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(only_over_tls),
        test!(refusals),
        test!(without_privilege),
    ]
}

const MIB: u64 = 1 << 20;

/// Also connections that come later.
fn only_over_tls(guest: &Guest) {
    let rnbd = open(guest);
    sh("modprobe tls");
    let refused = |server: Server, socket: OwnedFd| {
        let sockets = [socket];
        let attrs = vec![
            attr(DEVICE, 0_u32),
            sockets_attr(&sockets),
            attr(SIZE, 8 * MIB),
            attr(FLAGS, HAS_FLAGS),
            flag(TLS),
        ];
        let nokey = Errno::from_raw_os_error(libc::ENOKEY);
        assert_eq!(rnbd.ask(CONNECT, attrs).map(drop), Err(nokey));
        let words = "a socket is not encrypted by TLS in the kernel";
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
        drop(server);
    };
    for transport in [Transport::Tcp4, Transport::Unix] {
        let server = Server::new();
        let socket = server.connect(transport);
        refused(server, socket);
    }
    let (half, served) = tcp_pair(([127, 0, 0, 1], 0).into());
    encrypt_sending(&half);
    refused(Server::new(), half);
    drop(served);

    for version in [Transport::Tls, Transport::Tls13] {
        let server = Server::new();
        let link = connect_to(&rnbd, server, &[version; 2], &[flag(TLS)]).expect("to connect");
        assert_eq!(device::read_page(&link.direct(), 0), Ok(()));
        link.server.kill_connection(0);
        let nokey = Errno::from_raw_os_error(libc::ENOKEY);
        assert_eq!(link.revive(), Err(nokey));
        let sockets: Vec<OwnedFd> = [(); 2]
            .map(|()| link.server.connect(Transport::Tcp4))
            .into();
        let attrs = vec![
            attr(DEVICE, 0_u32),
            sockets_attr(&sockets),
            attr(DRAIN, 100_u32),
        ];
        assert_eq!(rnbd.ask(HANDOVER, attrs).map(drop), Err(nokey));
        let words = "a socket is not encrypted by TLS, as the device's must be";
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
        let change = Setup::change(0).sockets([link.server.connect(version)]);
        assert_eq!(link.netlink.reconfigure(&change), Ok(()));
        assert_eq!(device::read_page(&link.direct(), 0), Ok(()));
        link.disconnect_and_wait();
    }
    // The next session may be without.
    connect(&rnbd, &[]).disconnect_and_wait();
}

/// Each leaves the device as it was.
fn refusals(guest: &Guest) {
    let rnbd = open(guest);
    let server = Server::new();
    let socket = || [server.connect(Transport::Unix)];
    let refused = |attrs: Vec<Attr>, errno: Errno, words: &str| {
        assert_eq!(rnbd.ask(CONNECT, attrs).map(drop), Err(errno), "{words}");
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
    };
    let with = |more: Vec<Attr>, errno: Errno, words: &str| {
        let sockets = socket();
        let mut attrs = vec![sockets_attr(&sockets), attr(SIZE, MIB)];
        attrs.extend(more);
        refused(attrs, errno, words);
    };
    let sockets = socket();
    refused(
        vec![attr(SIZE, MIB)],
        Errno::INVAL,
        "at least one socket is needed",
    );
    refused(
        vec![sockets_attr(&sockets)],
        Errno::INVAL,
        "a size in bytes is needed",
    );
    let too_large = vec![sockets_attr(&sockets), attr(SIZE, 1_u64 << 63)];
    refused(too_large, Errno::INVAL, "the size must be below 2^63 bytes");
    let index = vec![attr(DEVICE, u32::MAX)];
    with(index, Errno::INVAL, "no device can have such an index");
    with(
        vec![attr(FLAGS, 1_u64 << 32)],
        Errno::INVAL,
        "the flags must be below 2^32",
    );
    with(
        vec![attr(BACKEND, Bytes::from(&b"a\0b"[..]))],
        Errno::INVAL,
        "the identifier must not have a zero byte in it",
    );
    let words = "the command does not have this attribute";
    with(vec![attr(CONNECTION, 0_u32)], Errno::INVAL, words);
    with(vec![attr(DRAIN, 0_u32)], Errno::INVAL, words);
    let words =
        "the minimum block size must be a power of two that the kernel supports (512 to 65536)";
    for size in [0_u32, 256, 513, 1 << 17] {
        with(vec![attr(MINIMUM_BLOCK_SIZE, size)], Errno::INVAL, words);
    }
    let words =
        "the preferred block size must be a power of two between the minimum one and 32 MiB";
    for size in [0_u32, 256, 3000, 1 << 26] {
        with(vec![attr(PREFERRED_BLOCK_SIZE, size)], Errno::INVAL, words);
    }
    let sizes = vec![
        attr(MINIMUM_BLOCK_SIZE, 4096_u32),
        attr(PREFERRED_BLOCK_SIZE, 512_u32),
    ];
    with(sizes, Errno::INVAL, words);
    let words = "the maximum payload must be at least a page and the preferred block size";
    with(vec![attr(MAXIMUM_PAYLOAD, 4095_u32)], Errno::INVAL, words);
    let sizes = vec![
        attr(PREFERRED_BLOCK_SIZE, 65536_u32),
        attr(MAXIMUM_PAYLOAD, 65535_u32),
    ];
    with(sizes, Errno::INVAL, words);

    let several = [
        server.connect(Transport::Unix),
        server.connect(Transport::Unix),
    ];
    let words = "the server does not allow several connections (NBD_FLAG_CAN_MULTI_CONN)";
    refused(
        vec![sockets_attr(&several), attr(SIZE, MIB)],
        Errno::INVAL,
        words,
    );
    let raw = |numbers: &[i32]| {
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|number| number.to_ne_bytes())
            .collect();
        vec![attr(SOCKETS, Bytes::from(bytes)), attr(SIZE, MIB)]
    };
    refused(raw(&[-1]), Errno::BADF, "a file descriptor is not open");
    refused(raw(&[12345]), Errno::BADF, "a file descriptor is not open");
    refused(
        raw(&[]),
        Errno::INVAL,
        "the sockets must be numbers of 32 bits",
    );
    let file = File::open("/dev/null").expect("/dev/null");
    let words = "a file descriptor is not that of a socket";
    refused(raw(&[file.as_raw_fd()]), Errno::NOTSOCK, words);
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let words = "a socket must be TCP, MPTCP, vsock or UNIX";
    refused(raw(&[datagrams.as_raw_fd()]), Errno::INVAL, words);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    refused(
        raw(&[listener.as_raw_fd()]),
        Errno::NOTCONN,
        "a socket is not connected",
    );

    let link = connect(&rnbd, &[]);
    with(
        vec![attr(DEVICE, 0_u32)],
        Errno::BUSY,
        "the device is in use",
    );
    link.disconnect_and_wait();
    assert_usable(0);
}

fn without_privilege(guest: &Guest) {
    drop(open(guest));
    // Capabilities belong to a thread.
    thread::scope(|scope| {
        let refused = scope.spawn(|| {
            let mut sets = capabilities(None).expect("capget()");
            sets.effective = CapabilitySet::all() - CapabilitySet::SYS_ADMIN;
            sets.effective &= sets.permitted;
            set_capabilities(None, sets).expect("capset()");
            let rnbd = Netlink::try_open_family("rnbd").expect("the family");
            rnbd.ask(CONNECT, Vec::new()).map(drop)
        });
        assert_eq!(refused.join().unwrap(), Err(Errno::PERM));
    });
}
