// SPDX-License-Identifier: GPL-2.0

//! Real servers over MPTCP and vsock.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::{fs, io};

use rustix::net::{AddressFamily, connect};

use super::super::user_space::{fio, serve};
use super::{over_each, setup};
use crate::device::SOON;
use crate::harness::{Guest, Test, wait_until};
use crate::negotiate::{Export, negotiate};
use crate::netlink::{Netlink, Setup};
use crate::programs::{Daemon, sh};
use crate::server::{MPTCP, Transport, new_socket, with_subflows_to_join};
use crate::sys::connect_vsock;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(fio_verifies),
        test!(nbdkit_over_vsock),
        test!(nbdkit_over_a_fallback_to_tcp),
        test!(several_subflows),
    ]
}

const PORT: u16 = 10809;

/// Connects device 0 to two connections of a server, and has fio verify it.
fn verify(dial: impl Fn() -> io::Result<Export>) {
    let mut exports = [dial(), dial()].map(|export| export.expect("a server"));
    let setup = Setup::new(exports[0].size).index(0).flags(exports[0].flags);
    let netlink = Netlink::open();
    let sockets = exports
        .each_mut()
        .map(|export| export.socket.try_clone().unwrap());
    drop(exports);
    assert_eq!(netlink.connect(&setup.sockets(sockets)), Ok(0));
    verify_device();
    netlink.disconnect(0).expect("to disconnect");
    netlink.wait_free(0);
}

fn verify_device() {
    fio("--rw=randwrite --bs=4k --ioengine=io_uring --iodepth=32");
    fio("--rw=randrw --bsrange=512-256k --ioengine=libaio --iodepth=16");
}

fn fio_verifies(_: &Guest) {
    over_each(|kind| {
        let link = setup().attach_over(&[kind; 2]).settle();
        verify_device();
        link.disconnect_and_wait();
    });
}

fn nbdkit_over_vsock(_: &Guest) {
    sh("modprobe vsock_loopback");
    let dial = || {
        let socket = new_socket(AddressFamily::VSOCK, None)?;
        connect_vsock(&socket, PORT.into())?;
        negotiate(UnixStream::from(socket))
    };
    let server = Daemon::start(&format!("nbdkit -f --vsock -p {PORT} memory 64M"));
    let listens = wait_until(SOON * 6, || dial().is_ok());
    assert!(listens.is_ok(), "{}", server.said());
    verify(dial);
}

fn nbdkit_over_a_fallback_to_tcp(_: &Guest) {
    let listen = format!("nbdkit -f -p {PORT} -i 127.0.0.1 memory 64M");
    let _server = serve(&listen, &PORT.to_string());
    verify(|| {
        let socket = new_socket(AddressFamily::INET, MPTCP)?;
        connect(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)))?;
        negotiate(UnixStream::from(socket))
    });
}

/// A counter of MPTCP in `/proc/net/netstat`.
fn counter(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/net/netstat").unwrap();
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("MPTcpExt: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, value) = pairs
        .find(|(found, _)| *found == name)
        .expect("the counter");
    value.parse().expect("a number")
}

/// A connection has two paths. One of them is lost, and the connection goes on.
///
/// There is only one connection: where nothing is sent, no path is added.
fn several_subflows(_: &Guest) {
    sh("ip address add 127.0.0.2/8 dev lo
        ip mptcp limits set subflows 2 add_addr_accepted 2
        ip mptcp endpoint add 127.0.0.2 dev lo subflow");
    let joined = || counter("MPJoinAckRx");
    let before = joined();
    with_subflows_to_join(|| {
        let link = setup().attach_over(&[Transport::Mptcp]).settle();
        let news = Netlink::listen();
        let has_joined = wait_until(SOON, || joined() > before);
        assert!(has_joined.is_ok(), "no subflow has joined");
        verify_device();
        // What was sent on that path is sent on the other.
        sh("ss -K src 127.0.0.2");
        verify_device();
        assert_eq!(news.dead_link(), None);
        link.disconnect_and_wait();
    });
    sh("ip mptcp endpoint flush
        ip mptcp limits set subflows 0 add_addr_accepted 0
        ip address del 127.0.0.2/8 dev lo");
}
