// SPDX-License-Identifier: GPL-2.0

//! Connections that the kernel encrypts (`CONFIG_TLS`), as a program hands them over after the handshake.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::thread::gettid;

use crate::device::{Plan, Rig, assert_usable, errno, pattern};
use crate::harness::{Guest, Test, Until};
use crate::programs::sh;
use crate::proto::{REPLY_LEN, Request};
use crate::server::{Conn, Server, Transport};
use crate::sys::{self, Buffer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(data_of_many_sizes),
        test!(replies_in_pieces),
        test!(tiny_send_buffers),
        test!(the_end_is_sent_when_there_is_room),
        test!(many_at_a_time),
        test!(closed_in_the_middle_of_the_data),
        test!(stuck_servers_time_out),
        test!(signals_do_no_harm),
    ]
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

fn plan() -> Plan {
    sh("modprobe tls");
    Plan::new(16 << 20).transport(Transport::Tls)
}

fn write_and_read_back(rig: &Rig, seed: u64, offset: u64, len: usize) {
    let direct = rig.direct();
    let data = Buffer::filled(len, |data| pattern(seed, offset, data));
    direct.write_all_at(&data, offset).unwrap();
    assert!(rig.server.peek(offset, len) == *data, "{len} at {offset}");
    let mut back = Buffer::new(len);
    direct.read_exact_at(&mut back, offset).unwrap();
    assert!(*back == *data, "{len} at {offset} read back");
}

fn data_of_many_sizes(_: &Guest) {
    let mut rig = plan().attach();
    // A record has at most 16 KiB.
    for (round, len) in [4, 12, 16, 20, 60, 64, 256, 1024, 8192].iter().enumerate() {
        write_and_read_back(&rig, round as u64, 4096, len * KIB);
    }
    assert_eq!(rig.disconnect(), Ok(0));
}

/// TLS waits for the lock of its senders interruptibly, whatever the flags: somebody else who sends on the
/// socket, and a signal for whoever submits, must not end the connection.
fn signals_do_no_harm(_: &Guest) {
    const ROUNDS: u64 = 600;
    sh("modprobe tls");
    sys::handle_and_ignore(libc::SIGUSR1, false);
    let server = Server::new();
    let plan = plan();
    let socket = server.connect(Transport::Tls);
    let others = socket.try_clone().unwrap();
    let client = plan.start_over(vec![socket]);
    client.wait_ready(16 << 20);
    let rig = Rig {
        server,
        client,
        index: 0,
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _done = Until(&done);
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // Nothing, but with the lock.
                    let _ = rustix::net::send(&others, &[], SendFlags::NOSIGNAL);
                }
            });
        }
        let (say_tid, tid) = mpsc::channel();
        let rig = &rig;
        let writer = scope.spawn(move || {
            let direct = rig.direct();
            say_tid.send(gettid()).unwrap();
            let data = Buffer::new(4 * KIB);
            for round in 0..ROUNDS {
                direct.write_all_at(&data, round * 4096).expect("to write");
            }
        });
        let tid = tid.recv().unwrap();
        while !writer.is_finished() {
            sys::signal_thread(tid, libc::SIGUSR1);
            thread::sleep(Duration::from_micros(100));
        }
        writer.join().unwrap();
    });
}

/// Each piece is a record of its own.
fn replies_in_pieces(_: &Guest) {
    let mut rig = plan().attach();
    for (piece, pause) in [(1, 0), (7, 0), (1000, 1), (5000, 5)] {
        rig.server.script(move |conn, request| {
            let reply = conn.answer(request)?;
            for part in reply.chunks(piece) {
                conn.send(part)?;
                thread::sleep(Duration::from_millis(pause));
            }
            Ok(())
        });
        write_and_read_back(&rig, piece as u64, 0, 20 * KIB);
    }
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn tiny_send_buffers(_: &Guest) {
    let mut rig = plan().send_buffer(4 * KIB).attach();
    for (round, len) in [4, 100, 1024].into_iter().enumerate() {
        write_and_read_back(&rig, round as u64, 4096, len * KIB);
    }
    assert_eq!(rig.disconnect(), Ok(0));
}

/// The end of a request that is encrypted, but finds no room, must not wait for the next request.
fn the_end_is_sent_when_there_is_room(_: &Guest) {
    let mut rig = plan().timeout(5).send_buffer(64 * KIB).attach();
    // The server reads when the buffers are full.
    rig.server.script(|conn, request| {
        thread::sleep(Duration::from_millis(20));
        conn.serve(request)
    });
    let direct = rig.direct();
    for len in (64..=512).step_by(4) {
        let data = Buffer::filled(len * KIB, |data| pattern(len as u64, 0, data));
        assert_eq!(errno(direct.write_all_at(&data, 0)), Ok(()), "{len} KiB");
        assert!(rig.server.peek(0, len * KIB) == *data, "{len} KiB");
    }
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
}

fn many_at_a_time(_: &Guest) {
    let mut rig = plan().connections(2).attach();
    thread::scope(|scope| {
        for thread in 0..6 {
            let rig = &rig;
            scope.spawn(move || {
                for round in 0..20 {
                    let len = (4 * KIB) << (round % 8);
                    write_and_read_back(rig, thread * 100 + round, thread * (2 * MIB as u64), len);
                }
            });
        }
    });
    assert_eq!(rig.disconnect(), Ok(0));
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
    for len in [0, 7, REPLY_LEN, REPLY_LEN + 1000] {
        let mut rig = plan().attach();
        rig.server.script(after(len, Conn::close));
        let read = rig.direct().read_exact_at(&mut Buffer::new(64 * KIB), 0);
        assert_eq!(errno(read), Err(Errno::IO), "after {len} bytes");
        rig.client.wait_lost();
    }
    assert_usable(0);
}

fn stuck_servers_time_out(_: &Guest) {
    let mut rig = plan().timeout(1).attach();
    rig.server.script(after(7, Conn::stall));
    let read = rig.direct().read_exact_at(&mut Buffer::new(64 * KIB), 0);
    assert_eq!(errno(read), Err(Errno::IO));
    rig.client.wait_lost();
    assert_usable(0);
}
