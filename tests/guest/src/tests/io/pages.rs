// SPDX-License-Identifier: GPL-2.0

//! The pages into which TCP copies what is sent: they are used again once the network has let go of them,
//! and given up when a connection does not need them any more.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::pipe::{SpliceFlags, pipe, splice};

use super::MIB;
use crate::device::{self, Plan, Rig, assert_pattern, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::server::{Transport, ok};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(hold_the_right_data).limit_seconds(180),
        test!(of_a_packet_that_somebody_keeps),
        test!(are_given_up),
    ]
}

const SIZE: u64 = 32 << 20;

fn plan() -> Plan {
    Plan::new(SIZE).transport(Transport::Tcp4)
}

/// Writes the pattern of `seed` to all of the device, with several requests of several sizes at a time.
fn write_all(rig: &Rig, seed: u64) {
    const LEN: usize = 4 * MIB;
    let direct = rig.direct();
    thread::scope(|scope| {
        for part in 0..SIZE / LEN as u64 {
            let direct = &direct;
            scope.spawn(move || {
                let mut data = Buffer::new(LEN);
                let start = part * LEN as u64;
                pattern(seed, start, &mut data);
                let mut random = Rng::with_seed(seed * 256 + part);
                let mut at = 0;
                while at < LEN {
                    let len = [4096, 12288, 65536, MIB][random.usize(..4)].min(LEN - at);
                    let offset = start + at as u64;
                    direct
                        .write_all_at(&data[at..at + len], offset)
                        .expect("to write");
                    at += len;
                }
            });
        }
    });
}

/// The server reads at its own pace, so that much is in flight at times, and little at others.
fn hold_the_right_data(_: &Guest) {
    let rig = plan().attach();
    let random = Mutex::new(Rng::with_seed(4));
    rig.server.script(move |conn, request| {
        if random.lock().unwrap().u32(..16) == 0 {
            thread::sleep(Duration::from_millis(20));
        }
        conn.serve(request)
    });
    for seed in 1..5 {
        write_all(&rig, seed);
        assert_pattern(seed, 0, &rig.server.peek(0, SIZE as usize));
    }
}

/// On loopback the server's socket holds the pages themselves, and a pipe can keep them for as long as it
/// likes.
fn of_a_packet_that_somebody_keeps(_: &Guest) {
    const KEPT: usize = 32 << 10;
    let rig = plan().attach();
    let (out, into): (OwnedFd, OwnedFd) = pipe().expect("a pipe");
    let kept = Mutex::new(Some(into));
    rig.server.script(move |conn, request| {
        let Some(into) = kept
            .lock()
            .unwrap()
            .take_if(|_| request.len as usize >= KEPT)
        else {
            return conn.serve(request);
        };
        let mut left = KEPT;
        while left > 0 {
            left -= splice(conn.socket(), None, &into, None, left, SpliceFlags::MOVE)?;
        }
        conn.read_bytes(request.len as usize - KEPT)?;
        conn.send(&ok(request))
    });
    let mut data = Buffer::new(MIB);
    pattern(9, 0, &mut data);
    rig.direct().write_all_at(&data, 0).expect("to write");
    for seed in 1..4 {
        write_all(&rig, seed);
        assert_pattern(
            seed,
            MIB as u64,
            &rig.server.peek(MIB as u64, SIZE as usize - MIB),
        );
    }
    let mut found = vec![0; KEPT];
    rustix::io::read(&out, &mut found).expect("to read from the pipe");
    assert_pattern(9, 0, &found[..4096]);
}

/// A connection that has sent much keeps no pages when it sends nothing.
fn are_given_up(guest: &Guest) {
    if guest.expected("debugfs-shows-connections") == Driver::Nbd {
        return;
    }
    let rig = plan().attach();
    let pages_kib = || {
        let path = format!("{}/connections", device::debugfs(rig.index));
        let text = fs::read_to_string(path).expect("the connections");
        let value = text.split("send_pages_kib=").nth(1).expect("the pages");
        let value = value.split_whitespace().next().unwrap();
        value.parse::<usize>().expect("a number")
    };
    let used = wait_until(Duration::from_secs(20), || {
        write_all(&rig, 1);
        pages_kib() > 0
    });
    assert!(used.is_ok(), "no pages were kept");
    let given_up = wait_until(Duration::from_secs(10), || pages_kib() == 0);
    assert!(given_up.is_ok(), "{} KiB are kept", pages_kib());
}
