// SPDX-License-Identifier: GPL-2.0

//! What becomes of sockets of MPTCP and vsock that a device is given: which it refuses, what they are like
//! afterwards, and what else a sender's task may be doing.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_tcp_nodelay, tcp_nodelay};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, accept_with, connect, connect_unspec, getsockname,
    listen, socket_with,
};

use super::{MIB, SIZE, over_each, plan, setup};
use crate::debug_kernel::patient;
use crate::device::{self, SOON, assert_usable, read_page, store_pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, say, wait_until};
use crate::netlink::Netlink;
use crate::programs::sh;
use crate::proto::{self, Command};
use crate::server::{MPTCP, Server, Transport, listen_on_vsock, new_socket, tcp_pair};
use crate::stacks;
use crate::sys::{
    Buffer, Mapping, SysResult, connect_vsock, ioctl_number, set_socket_option, socket_option,
};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(others_are_refused),
        test!(they_are_given_back),
        test!(mptcp_that_listens_afterwards),
        test!(mptcp_that_listens_meanwhile),
        test!(requests_in_the_middle_of_a_send),
        test!(mptcp_sends_at_once),
    ]
}

/// `NBD_SET_SOCK`
pub fn set_sock(device: impl AsFd, socket: impl AsFd) -> SysResult {
    ioctl_number(device, proto::SET_SOCK, socket.as_fd().as_raw_fd() as u64)
}

/// Those that are no streams, and those that are not connected.
fn others_are_refused(guest: &Guest) {
    sh("modprobe vsock_loopback");
    let device = device::open(0, 0).unwrap();
    let packets = |family| {
        let flags = SocketFlags::CLOEXEC;
        socket_with(family, SocketType::SEQPACKET, flags, None).expect("a socket")
    };
    for family in [AddressFamily::VSOCK, AddressFamily::UNIX] {
        assert_eq!(set_sock(&device, packets(family)), Err(Errno::INVAL));
    }
    let what = "unsupported socket: should be TCP, MPTCP, vsock or UNIX";
    assert!(wait_until(SOON, || guest.has_logged(what)).is_ok());
    let mptcp = || new_socket(AddressFamily::INET, MPTCP).unwrap();
    let vsock = || new_socket(AddressFamily::VSOCK, None).unwrap();
    let listening = mptcp();
    listen(&listening, 1).unwrap();
    let disconnected = Server::new().connect(Transport::Mptcp);
    connect_unspec(&disconnected).unwrap();
    let failed = vsock();
    assert_eq!(connect_vsock(&failed, 19999), Err(Errno::CONNRESET));
    for (socket, what) in [
        (mptcp(), "a new MPTCP socket"),
        (listening, "an MPTCP socket that listens"),
        (disconnected, "an MPTCP socket that was disconnected"),
        (vsock(), "a new vsock socket"),
        (listen_on_vsock().unwrap().0, "a vsock socket that listens"),
        (failed, "a vsock socket that could not connect"),
    ] {
        assert_eq!(set_sock(&device, socket), Err(Errno::NOTCONN), "{what}");
    }
    drop(device);
    assert_usable(0);
}

/// A program that has lent its socket gets it back as it was, and the module can go before the socket.
fn they_are_given_back(guest: &Guest) {
    const LOW_WATER: u32 = 1000;
    over_each(|kind| {
        for owing in [false, true] {
            let server = Server::new();
            let ours = server.connect(kind);
            let value = LOW_WATER.to_ne_bytes();
            set_socket_option(&ours, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &value).unwrap();
            let netlink = Netlink::open();
            let index = netlink.connect(&setup().sockets([ours.try_clone().unwrap()]));
            assert_eq!(index, Ok(0));
            let device = device::open(0, libc::O_DIRECT).unwrap();
            assert_eq!(read_page(&device, 0), Ok(()));
            let read = owing.then(|| {
                server.forget_requests();
                server.script(|conn, _| conn.stall());
                let device = device.try_clone().unwrap();
                let read = thread::spawn(move || read_page(&device, 0));
                server.wait_for_command(Command::Read);
                read
            });
            drop(device);
            netlink.disconnect(0).expect("to disconnect");
            if let Some(read) = read {
                assert_eq!(read.join().unwrap(), Err(Errno::IO));
            }
            netlink.wait_free(0);
            let low_water = || socket_option(&ours, libc::SOL_SOCKET, libc::SO_RCVLOWAT);
            let given_back = wait_until(SOON, || low_water() == Ok(LOW_WATER));
            assert!(given_back.is_ok(), "{:?}", low_water());
            let unloaded = wait_until(SOON, || guest.driver.unload().is_ok());
            assert!(unloaded.is_ok(), "the module is in use");
            // What is called now is the kernel's own.
            let heard = thread::spawn(move || {
                let mut fds = [PollFd::new(&ours, PollFlags::RDHUP)];
                poll(&mut fds, None)
            });
            wait_until(SOON, stacks::others_wait).expect("poll() waits");
            server.kill();
            let ended = wait_until(SOON, || heard.is_finished());
            assert!(ended.is_ok(), "nothing is heard");
            assert_eq!(heard.join().unwrap(), Ok(1));
            drop(server);
            guest.driver.load("nbds_max=2").expect("to load the module");
        }
    });
    assert_usable(0);
}

/// Makes a socket that was a connection listen, and moves some data over one that it accepts.
fn listen_with(ours: &OwnedFd) -> io::Result<()> {
    listen(ours, 4)?;
    let address = getsockname(ours)?;
    let address = SocketAddr::try_from(address).expect("an IP address");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, address.port()));
    for _ in 0..2 {
        let client = new_socket(AddressFamily::INET, MPTCP).unwrap();
        connect(&client, &address)?;
        let accepted = accept_with(ours, SocketFlags::CLOEXEC)?;
        let mut ends = [client, accepted].map(UnixStream::from);
        let data = vec![7; 100_000];
        for (from, to) in [(0, 1), (1, 0)] {
            let mut from = ends[from].try_clone().unwrap();
            from.set_write_timeout(Some(patient(SOON)))?;
            ends[to].set_read_timeout(Some(patient(SOON)))?;
            thread::scope(|scope| {
                let sent = scope.spawn(|| from.write_all(&data));
                let mut back = vec![0; data.len()];
                let received = ends[to].read_exact(&mut back);
                sent.join().unwrap()?;
                received?;
                assert!(back == data);
                io::Result::Ok(())
            })?;
        }
    }
    Ok(())
}

/// The sockets that it accepts inherit what it has.
fn mptcp_that_listens_afterwards(_: &Guest) {
    for round in 0..20 {
        let server = Server::new();
        let ours = server.connect(Transport::Mptcp);
        let client = plan(Transport::Mptcp).start_over(vec![ours.try_clone().unwrap()]);
        client.wait_ready(SIZE);
        let mut rig = device::Rig {
            server,
            client,
            index: 0,
        };
        // There is something to be discarded, or not.
        if round % 2 == 0 {
            rig.server.script(|conn, _| conn.stall());
            let direct = rig.direct();
            let write = thread::spawn(move || direct.write_all_at(&Buffer::new(MIB), 0));
            rig.server.wait_for_command(Command::Write);
            ioctl_number(rig.open(), proto::CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
            assert!(write.join().unwrap().is_err());
            let _ = rig.client.wait();
        } else {
            assert_eq!(rig.disconnect(), Ok(0));
        }
        connect_unspec(&ours).expect("to undo the connection");
        listen_with(&ours).expect("to listen");
    }
    assert_usable(0);
}

/// The same while the device has it.
fn mptcp_that_listens_meanwhile(_: &Guest) {
    let mut heard = 0;
    for _ in 0..20 {
        let server = Server::new();
        let ours = server.connect(Transport::Mptcp);
        let netlink = Netlink::open();
        let index = netlink.connect(&setup().sockets([ours.try_clone().unwrap()]));
        assert_eq!(index, Ok(0));
        let device = device::open(0, libc::O_DIRECT).unwrap();
        assert_eq!(read_page(&device, 0), Ok(()));
        drop(device);
        connect_unspec(&ours).expect("to undo the connection");
        // Where the driver was quicker, the socket is shut down, and so is what it accepts.
        match listen_with(&ours) {
            Ok(()) => heard += 1,
            Err(error) => assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "it hangs"),
        }
        let _ = netlink.disconnect(0);
        netlink.wait_free(0);
    }
    say(&format!("{heard} times it heard of others"));
    assert_usable(0);
}

/// A task that sends on a socket of its own may have to read from the device what it sends. TCP is then in the
/// middle of copying to the task's page fragment, which the driver's socket must leave alone.
fn requests_in_the_middle_of_a_send(guest: &Guest) {
    const LEN: usize = 4 * MIB;
    let try_over = |kind| {
        let server = Server::new();
        store_pattern(&server, 3, 0, LEN);
        let mut rig = plan(kind).attach_to(server);
        let device = rig.open();
        let mapping = Mapping::new(&device, LEN);
        mapping.read_ahead_nothing();
        let (sender, mut receiver) = tcp_pair((Ipv4Addr::LOCALHOST, 0).into());
        thread::scope(|scope| {
            let received = scope.spawn(move || {
                let mut data = Vec::new();
                receiver.read_to_end(&mut data).expect("to receive");
                data
            });
            for at in (0..LEN).step_by(16 << 10) {
                mapping.send(&sender, at, 16 << 10).expect("to send");
            }
            drop(sender);
            device::assert_pattern(3, 0, &received.join().unwrap());
        });
        assert!(rig.server.requests_of(Command::Read).len() > 200);
        drop((mapping, device));
        assert_eq!(rig.disconnect(), Ok(0));
    };
    for kind in [Transport::Tcp4, Transport::Unix] {
        try_over(kind);
    }
    if guest.driver == Driver::Rnbd {
        over_each(try_over);
    }
}

/// Whatever the program has set, as for TCP (`io::sending::programs_that_forget_tcp_nodelay`).
fn mptcp_sends_at_once(_: &Guest) {
    for kind in [Transport::Mptcp, Transport::MptcpFallback] {
        let server = Server::new();
        let ours = server.connect(kind);
        set_tcp_nodelay(&ours, false).expect("TCP_NODELAY");
        let client = plan(kind).start_over(vec![ours.try_clone().unwrap()]);
        client.wait_ready(SIZE);
        assert_eq!(tcp_nodelay(&ours), Ok(true), "{kind:?}");
        let mut rig = device::Rig {
            server,
            client,
            index: 0,
        };
        assert_eq!(rig.disconnect(), Ok(0));
        assert_eq!(tcp_nodelay(&ours), Ok(true), "it stays");
    }
}
