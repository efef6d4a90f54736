// SPDX-License-Identifier: GPL-2.0

//! Sends that are interrupted or go out in small parts: the stream must stay whole.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::thread::gettid;

use crate::device::{Plan, Rig, SOON, assert_pattern, assert_usable, pattern, store_pattern};
use crate::harness::{Guest, Test, Until};
use crate::programs::{Daemon, sh};
use crate::server::Transport;
use crate::sys::{self, Buffer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(tiny_send_buffers),
        test!(tiny_send_buffers_and_concurrent_writers),
        test!(storm_of_signals_while_writing),
        test!(storm_of_signals_while_reading),
        test!(writers_are_killed),
        test!(a_server_that_does_not_read_any_more_sends_none),
    ]
}

const KIB: usize = 1 << 10;

/// A device whose requests are issued by the tasks that make them, not by a worker: only then can
/// a signal interrupt a send. Its sends do not fit into the socket's buffer.
fn narrow(transport: Transport) -> Rig {
    let rig = Plan::new(16 << 20)
        .transport(transport)
        .send_buffer(4 * KIB)
        .attach();
    fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
    rig
}

fn write_and_check(rig: &Rig, seed: u64, offset: u64, len: usize) {
    let direct = rig.direct();
    direct
        .write_all_at(
            &Buffer::filled(len, |data| pattern(seed, offset, data)),
            offset,
        )
        .unwrap();
    assert_pattern(seed, offset, &rig.server.peek(offset, len));
}

fn tiny_send_buffers(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let mut rig = narrow(transport);
        for (round, len) in [4 * KIB, 100 * KIB, 1024 * KIB].into_iter().enumerate() {
            write_and_check(&rig, round as u64, 4096, len);
        }
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

fn tiny_send_buffers_and_concurrent_writers(_: &Guest) {
    let mut rig = narrow(Transport::Tcp4);
    thread::scope(|scope| {
        for thread in 0..6 {
            let rig = &rig;
            scope.spawn(move || {
                for round in 0..6 {
                    let len = (4 * KIB) << round;
                    write_and_check(rig, thread * 10 + round, thread * (2 << 20), len);
                }
            });
        }
    });
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Does `act` in a thread that is sent a signal every millisecond or so.
fn in_a_storm(act: impl FnOnce() + Send) {
    sys::handle_and_ignore(libc::SIGUSR1, false);
    let done = AtomicBool::new(false);
    let (tell, told) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let victim = scope.spawn(|| {
            tell.send(gettid()).unwrap();
            act();
            done.store(true, Ordering::Relaxed);
        });
        let tid = told.recv().unwrap();
        while !done.load(Ordering::Relaxed) && !victim.is_finished() {
            sys::signal_thread(tid, libc::SIGUSR1);
            thread::sleep(Duration::from_millis(1));
        }
    });
}

fn storm_of_signals_while_writing(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let mut rig = narrow(transport);
        // A server that reads in small gulps.
        rig.server.script(|conn, request| {
            let mut data = Vec::new();
            while data.len() < request.len as usize {
                let gulp = (request.len as usize - data.len()).min(16 * KIB);
                data.extend(conn.read_bytes(gulp)?);
                thread::sleep(Duration::from_micros(500));
            }
            conn.store(request, &data);
            conn.send(&crate::server::ok(request))
        });
        in_a_storm(|| {
            for round in 0..8 {
                write_and_check(&rig, round, round << 20, 768 * KIB);
            }
        });
        rig.server.be_honest();
        assert_eq!(rig.disconnect(), Ok(0), "{transport:?}");
    }
    assert_usable(0);
}

fn storm_of_signals_while_reading(_: &Guest) {
    let mut rig = narrow(Transport::Tcp4);
    store_pattern(&rig.server, 9, 0, 1 << 20);
    in_a_storm(|| {
        let direct = rig.direct();
        let mut data = Buffer::new(256 * KIB);
        for round in 0..60 {
            let offset = round % 4 * data.len() as u64;
            direct.read_exact_at(&mut data, offset).unwrap();
            assert_pattern(9, offset, &data);
        }
    });
    assert_eq!(rig.disconnect(), Ok(0));
}

fn writers_are_killed(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let mut rig = narrow(transport);
        rig.server.script(|conn, request| {
            thread::sleep(Duration::from_millis(2));
            conn.serve(request)
        });
        for round in 0..5 {
            let mut writer = Daemon::start(
                "dd if=/dev/zero of=/dev/nbd0 bs=1M count=14 oflag=direct conv=notrunc",
            );
            thread::sleep(Duration::from_millis(40 + round * 25));
            writer.kill();
        }
        rig.server.be_honest();
        write_and_check(&rig, 11, 15 << 20, 512 * KIB);
        assert!(rig.client.still_runs_after(Duration::from_millis(1)));
        assert_eq!(rig.disconnect(), Ok(0), "within {SOON:?}");
    }
}

/// Who writes where nobody reads gets a signal, but not who writes to a disk.
fn a_server_that_does_not_read_any_more_sends_none(_: &Guest) {
    const DD: &str = "dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 oflag=direct conv=notrunc";
    let mut rig = narrow(Transport::Unix);
    let done = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&done);
    rig.server.script(move |conn, request| {
        conn.serve(request)?;
        conn.stop_reading()?;
        while !told.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(5));
        }
        conn.close()
    });
    let _done = Until(&done);
    sh(DD);
    sh(&format!("{DD} && exit 9 || test $? = 1"));
    done.store(true, Ordering::Relaxed);
    rig.client.wait_lost();
    assert_usable(0);
}
