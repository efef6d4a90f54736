// SPDX-License-Identifier: GPL-2.0

//! Replies in any order, and in pieces of any size.

use std::os::unix::fs::FileExt;
use std::thread;

use rustix::io::Errno;

use super::{KIB, MIB, written};
use crate::device::{Plan, Rig, assert_pattern, errno, store_pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(replies_out_of_order),
        test!(many_replies_in_one_segment),
        test!(replies_byte_by_byte),
        test!(replies_below_the_low_water_mark),
    ]
}

/// Reads `count` blocks at once, each by a thread of its own, and checks them.
fn read_together(rig: &Rig, seed: u64, count: u64) {
    thread::scope(|scope| {
        for index in 0..count {
            let direct = rig.direct();
            scope.spawn(move || {
                let offset = index * 8192;
                let mut back = Buffer::new(8192);
                direct.read_exact_at(&mut back, offset).unwrap();
                assert_pattern(seed, offset, &back);
            });
        }
    });
}

fn stored_pattern(rig: &Rig, seed: u64, len: usize) {
    store_pattern(&rig.server, seed, 0, len);
}

fn replies_out_of_order(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let rig = Plan::new(1 << 20).transport(transport).attach();
        stored_pattern(&rig, 9, MIB);
        rig.server.script(|conn, request| {
            conn.defer(request)?;
            if conn.deferred() == 5 {
                conn.send_deferred()
            } else {
                Ok(())
            }
        });
        for _ in 0..3 {
            read_together(&rig, 9, 16);
        }
        rig.server.be_honest();
    }
}

fn many_replies_in_one_segment(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let rig = Plan::new(1 << 20).transport(transport).attach();
        stored_pattern(&rig, 10, MIB);
        // Nothing is answered before no request has come for a while.
        rig.server.script(|conn, request| conn.defer(request));
        for _ in 0..3 {
            read_together(&rig, 10, 32);
        }
        rig.server.be_honest();
    }
}

fn replies_byte_by_byte(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let rig = Plan::new(1 << 20).transport(transport).attach();
        stored_pattern(&rig, 11, MIB);
        rig.server.script(|conn, request| {
            let reply = conn.answer(request)?;
            reply.iter().try_for_each(|byte| conn.send(&[*byte]))
        });
        let direct = rig.direct();
        let mut back = Buffer::new(1024);
        for offset in [0, 4096, 8192] {
            direct.read_exact_at(&mut back, offset).unwrap();
            assert_pattern(11, offset, &back);
        }
        direct.write_all_at(&written(12, 4096, 1024), 4096).unwrap();
        rig.server.be_honest();
    }
}

/// A program that has the socket wake it up for much only, and then hands it over.
fn replies_below_the_low_water_mark(guest: &Guest) {
    let mut rig = Plan::new(MIB as u64)
        .transport(Transport::Tcp4)
        .low_water(1000)
        .timeout(2)
        .attach();
    let direct = rig.direct();
    direct.read_exact_at(&mut Buffer::new(4 * KIB), 0).unwrap();
    // Its reply has 16 bytes. What has come in is also looked at when the connection ends by its timeout;
    // then there is none for the second one.
    let write = || errno(direct.write_all_at(&Buffer::new(4 * KIB), 0));
    let written = write().and_then(|()| write());
    drop(direct);
    match guest.expected("low-water-mark-is-reset") {
        Driver::Nbd => {
            assert_eq!(written, Err(Errno::IO));
            let _ = rig.client.wait();
        }
        Driver::Rnbd => {
            assert_eq!(written, Ok(()));
            assert_eq!(rig.disconnect(), Ok(0));
        }
    }
}
