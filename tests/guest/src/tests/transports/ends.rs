// SPDX-License-Identifier: GPL-2.0

//! The ends of connections over MPTCP and vsock, by whomever, and new connections in their place.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::{KIB, MIB, SESSIONS, direct, over_each, plan, setup, write_and_read_back};
use crate::debug_kernel::patient;
use crate::device::{SOON, assert_usable, errno, read_page};
use crate::harness::{Guest, Test, Until, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::programs::sh;
use crate::proto::{self, Command, REPLY_LEN, Request};
use crate::server::{Conn, Transport};
use crate::sys::{Buffer, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(the_goodbye_is_heard),
        test!(closed_in_the_middle_of_the_data),
        test!(half_closed),
        test!(a_server_that_stops_reading),
        test!(stuck_servers_time_out),
        test!(cleared_with_unsent_data),
        test!(connections_are_replaced_under_load),
        test!(the_only_connection_is_replaced),
    ]
}

fn the_goodbye_is_heard(_: &Guest) {
    over_each(|kind| {
        for start in SESSIONS {
            let session = start(kind);
            write_and_read_back(session.server(), &direct(), 1, 0, 64 * KIB);
            let server = session.server();
            assert_eq!(server.living(), 2);
            ioctl_number(direct(), proto::DISCONNECT, 0).expect("NBD_DISCONNECT");
            let ended = wait_until(SOON, || server.living() == 0);
            assert!(ended.is_ok(), "a server heard no goodbye");
            assert_eq!(server.requests_of(Command::Disconnect).len(), 2);
            drop(session);
            assert_usable(0);
        }
    });
}

/// Answers with the first `len` bytes, then does as `then` says.
fn after(
    len: usize,
    then: fn(&mut Conn) -> io::Result<()>,
) -> impl Fn(&mut Conn, &Request) -> io::Result<()> {
    move |conn, request| {
        let reply = conn.answer(request)?;
        conn.send(&reply[..len])?;
        then(conn)
    }
}

fn closed_in_the_middle_of_the_data(_: &Guest) {
    over_each(|kind| {
        for len in [0, 7, REPLY_LEN, REPLY_LEN + 1000] {
            for then in [Conn::close, Conn::reset] {
                let mut rig = plan(kind).attach();
                rig.server.script(after(len, then));
                let read = rig.direct().read_exact_at(&mut Buffer::new(64 * KIB), 0);
                assert_eq!(errno(read), Err(Errno::IO), "after {len} bytes");
                rig.client.wait_lost();
            }
        }
    });
    assert_usable(0);
}

/// The end of the stream is the end, also where the server goes on reading.
fn half_closed(_: &Guest) {
    over_each(|kind| {
        let mut rig = plan(kind).attach();
        rig.server.script(after(7, |conn| {
            conn.half_close()?;
            conn.stall()
        }));
        let read = rig.direct().read_exact_at(&mut Buffer::new(64 * KIB), 0);
        assert_eq!(errno(read), Err(Errno::IO));
        rig.client.wait_lost();
    });
    assert_usable(0);
}

/// vsock tells the other side that nothing is read any more. A write that waits for room must not hang.
fn a_server_that_stops_reading(_: &Guest) {
    sh("modprobe vsock_loopback");
    let mut rig = plan(Transport::Vsock).attach();
    rig.server.script(|conn, _| {
        // The socket is full by then.
        thread::sleep(Duration::from_millis(500));
        conn.stop_reading()?;
        conn.stall()
    });
    let direct = rig.direct();
    let write = thread::spawn(move || errno(direct.write_all_at(&Buffer::new(8 * MIB), 0)));
    let ended = wait_until(patient(SOON), || write.is_finished());
    assert!(ended.is_ok(), "the write hangs");
    assert_eq!(write.join().unwrap(), Err(Errno::IO));
    let _ = rig.client.wait();
    drop(rig);
    assert_usable(0);
}

fn stuck_servers_time_out(_: &Guest) {
    over_each(|kind| {
        let mut rig = plan(kind).timeout(1).attach();
        rig.server.script(after(7, Conn::stall));
        let read = rig.direct().read_exact_at(&mut Buffer::new(64 * KIB), 0);
        assert_eq!(errno(read), Err(Errno::IO));
        rig.client.wait_lost();
        // Here the request cannot even be sent.
        let mut rig = plan(kind).timeout(1).attach();
        rig.server.script(|conn, _| conn.stall());
        let written = rig.direct().write_all_at(&Buffer::new(8 * MIB), 0);
        assert_eq!(errno(written), Err(Errno::IO));
        rig.client.wait_lost();
    });
    assert_usable(0);
}

fn cleared_with_unsent_data(_: &Guest) {
    over_each(|kind| {
        let mut rig = plan(kind).attach();
        rig.server.script(|conn, _| conn.stall());
        let (writer, direct) = (rig.direct(), rig.direct());
        let write = thread::spawn(move || errno(writer.write_all_at(&Buffer::new(8 * MIB), 0)));
        rig.server.wait_for_command(Command::Write);
        thread::sleep(Duration::from_millis(100));
        assert!(!write.is_finished());
        ioctl_number(&direct, proto::CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
        assert_eq!(write.join().unwrap(), Err(Errno::IO));
        drop(direct);
        let _ = rig.client.wait();
        let left = wait_until(SOON, || rig.server.is_deserted());
        assert!(left.is_ok(), "the server is not told");
    });
    assert_usable(0);
}

/// One of two connections goes, again and again. No request fails.
fn connections_are_replaced_under_load(_: &Guest) {
    over_each(|kind| {
        let link = setup().attach_over(&[kind; 2]).settle();
        let news = Netlink::listen();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for thread in 0..4 {
                let (server, done) = (&link.server, &done);
                scope.spawn(move || {
                    let direct = direct();
                    for round in 0.. {
                        let (seed, len) = (thread * 10000 + round, (4 * KIB) << (round % 7));
                        write_and_read_back(server, &direct, seed, thread * 2 * MIB as u64, len);
                        if done.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                });
            }
            let _done = Until(&done);
            for victim in 0..20 {
                thread::sleep(Duration::from_millis(30));
                link.server.kill_connection(victim);
                assert_eq!(news.expect_dead_link(), 0);
                let change = Setup::change(0).sockets([link.server.connect(kind)]);
                link.netlink.reconfigure(&change).expect("to reconfigure");
            }
        });
        assert_eq!(news.dead_link(), None, "one each");
        link.disconnect_and_wait();
    });
}

/// Requests wait for it.
fn the_only_connection_is_replaced(_: &Guest) {
    over_each(|kind| {
        let link = setup().dead_timeout(20).attach_over(&[kind]).settle();
        let direct = link.direct();
        for _ in 0..3 {
            link.kill_server();
            thread::scope(|scope| {
                let reader = scope.spawn(|| read_page(&direct, 0));
                thread::sleep(Duration::from_millis(200));
                assert!(!reader.is_finished(), "it was to wait");
                let change = Setup::change(0).sockets([link.server.connect(kind)]);
                link.netlink.reconfigure(&change).expect("to reconfigure");
                assert_eq!(reader.join().unwrap(), Ok(()));
            });
        }
        drop(direct);
        link.disconnect_and_wait();
    });
}
