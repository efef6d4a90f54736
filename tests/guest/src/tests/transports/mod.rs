// SPDX-License-Identifier: GPL-2.0

//! Connections over MPTCP and vsock: what the other groups try over TCP and UNIX sockets.

mod ends;
mod programs;
mod sockets;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use crate::device::{self, Plan, Rig, USUAL_FLAGS, assert_usable, errno, pattern};
use crate::driver::Driver;
use crate::front::Session;
use crate::harness::{Guest, Test, say};
use crate::netlink::{Netlink, Setup};
use crate::programs::sh;
use crate::proto::{CAN_MULTI_CONN, REPLY_LEN};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, set_socket_option};
use crate::test;

pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        test!(which_are_taken),
        test!(data_of_many_sizes),
        test!(replies_in_pieces),
        test!(little_room_to_send),
        test!(slow_servers),
        test!(many_at_a_time),
    ];
    tests.extend(ends::tests());
    tests.extend(sockets::tests());
    tests.extend(programs::tests());
    tests
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SIZE: u64 = 16 << 20;

/// Calls `run` for each kind of connection.
fn over_each(run: impl Fn(Transport)) {
    sh("modprobe vsock_loopback");
    for kind in [Transport::Mptcp, Transport::MptcpFallback, Transport::Vsock] {
        say(&format!("{kind:?}"));
        run(kind);
    }
}

fn plan(kind: Transport) -> Plan {
    Plan::new(SIZE).transport(kind)
}

/// Device 0, connected by netlink.
fn setup() -> Setup {
    Setup::new(SIZE)
        .index(0)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
}

/// Device 0 with two connections, by each of the front ends.
const SESSIONS: [fn(Transport) -> Session; 2] = [
    |kind| Session::Ioctl(plan(kind).connections(2).attach()),
    |kind| Session::Netlink(setup().attach_over(&[kind; 2]).settle()),
];

fn direct() -> File {
    device::open(0, libc::O_DIRECT).expect("the device")
}

fn write_and_read_back(server: &Server, direct: &File, seed: u64, offset: u64, len: usize) {
    let data = Buffer::filled(len, |data| pattern(seed, offset, data));
    direct.write_all_at(&data, offset).expect("to write");
    assert!(server.peek(offset, len) == *data, "{len} at {offset}");
    let mut back = Buffer::new(len);
    direct.read_exact_at(&mut back, offset).expect("to read");
    assert!(*back == *data, "{len} at {offset} read back");
}

/// `nbd.ko` takes TCP and UNIX sockets only.
fn which_are_taken(guest: &Guest) {
    let expected = match guest.expected("takes-mptcp-and-vsock") {
        Driver::Nbd => Err(Errno::INVAL),
        Driver::Rnbd => Ok(0),
    };
    over_each(|kind| {
        let server = Server::new();
        let device = device::open(0, 0).unwrap();
        let answer = sockets::set_sock(&device, server.connect(kind));
        assert_eq!(answer, expected, "by ioctl");
        drop(device);
        let netlink = Netlink::open();
        let answer = netlink.connect(&setup().sockets([server.connect(kind)]));
        assert_eq!(answer, expected.map(|_| 0), "by netlink");
        if answer.is_ok() {
            netlink.disconnect(0).expect("to disconnect");
            netlink.wait_free(0);
        }
    });
    assert_usable(0);
}

fn data_of_many_sizes(_: &Guest) {
    over_each(|kind| {
        for start in SESSIONS {
            let session = start(kind);
            let direct = direct();
            for (round, len) in [4, 12, 64, 68, 256, 1024, 8192].iter().enumerate() {
                write_and_read_back(session.server(), &direct, round as u64, 4096, len * KIB);
            }
            drop(direct);
            session.end();
        }
    });
}

/// The header byte by byte. The data is in larger pieces: MPTCP (7.3) drops segments when many tiny ones wait to
/// be read, and then delivers a byte every 60 ms.
fn replies_in_pieces(_: &Guest) {
    over_each(|kind| {
        let mut rig = plan(kind).attach();
        let direct = rig.direct();
        for (piece, pause) in [(500, 0), (1000, 1), (5000, 5)] {
            rig.server.script(move |conn, request| {
                let reply = conn.answer(request)?;
                let (header, data) = reply.split_at(REPLY_LEN);
                for part in header.chunks(1).chain(data.chunks(piece)) {
                    conn.send(part)?;
                    thread::sleep(Duration::from_millis(pause));
                }
                Ok(())
            });
            write_and_read_back(&rig.server, &direct, piece as u64, 0, 20 * KIB);
        }
        drop(direct);
        rig.server.be_honest();
        assert_eq!(rig.disconnect(), Ok(0));
    });
}

/// Connects device 0 over a socket that takes `bytes` at a time, or a little more.
fn attach_with_little_room(kind: Transport, bytes: usize) -> Rig {
    // Of the peers of a connection the one with the smaller buffer decides (linux/vm_sockets.h).
    const SO_VM_SOCKETS_BUFFER_SIZE: i32 = 0;
    let server = Server::new();
    let socket: OwnedFd = server.connect(kind);
    if kind == Transport::Vsock {
        let size = (bytes as u64).to_ne_bytes();
        set_socket_option(&socket, libc::AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &size)
            .expect("the size of the buffer");
    } else {
        rustix::net::sockopt::set_socket_send_buffer_size(&socket, bytes).expect("SO_SNDBUF");
    }
    let client = plan(kind).timeout(20).start_over(vec![socket]);
    client.wait_ready(SIZE);
    Rig {
        server,
        client,
        index: 0,
    }
}

/// Each request takes many calls.
fn little_room_to_send(_: &Guest) {
    over_each(|kind| {
        let mut rig = attach_with_little_room(kind, 4 * KIB);
        let direct = rig.direct();
        for (round, len) in [4, 100, 1024].into_iter().enumerate() {
            write_and_read_back(&rig.server, &direct, round as u64, 4096, len * KIB);
        }
        drop(direct);
        assert_eq!(rig.disconnect(), Ok(0));
    });
}

/// They read when nothing more can be sent: the room that they make must be noticed.
fn slow_servers(_: &Guest) {
    over_each(|kind| {
        let mut rig = attach_with_little_room(kind, 64 * KIB);
        rig.server.script(|conn, request| {
            thread::sleep(Duration::from_millis(15));
            conn.serve(request)
        });
        let direct = rig.direct();
        for len in (4..=1024).step_by(36) {
            let data = Buffer::filled(len * KIB, |data| pattern(len as u64, 0, data));
            assert_eq!(errno(direct.write_all_at(&data, 0)), Ok(()), "{len} KiB");
            assert!(rig.server.peek(0, len * KIB) == *data, "{len} KiB");
        }
        drop(direct);
        assert_eq!(rig.disconnect(), Ok(0));
    });
}

fn many_at_a_time(_: &Guest) {
    over_each(|kind| {
        for start in SESSIONS {
            let session = start(kind);
            thread::scope(|scope| {
                for thread in 0..6 {
                    let (server, direct) = (session.server(), direct());
                    scope.spawn(move || {
                        for round in 0..20 {
                            let (seed, len) = (thread * 100 + round, (4 * KIB) << (round % 8));
                            write_and_read_back(
                                server,
                                &direct,
                                seed,
                                thread * 2 * MIB as u64,
                                len,
                            );
                        }
                    });
                }
            });
            session.end();
        }
    });
}
