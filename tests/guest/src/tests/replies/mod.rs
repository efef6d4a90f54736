// SPDX-License-Identifier: GPL-2.0

//! Replies that are wrong, and replies that are unusual. After a wrong one the connection is ended, the
//! requests in flight fail, and the device can be connected again.

mod cut_short;
mod invalid;
mod unusual;

use std::io;
use std::os::unix::fs::FileExt;
use std::thread;

use rustix::io::Errno;

use crate::device::{Plan, Rig, assert_usable, errno};
use crate::harness::Test;
use crate::proto::Request;
use crate::server::{Conn, Transport};
use crate::sys::Buffer;

pub fn tests() -> Vec<Test> {
    [cut_short::tests(), invalid::tests(), unusual::tests()]
        .into_iter()
        .flatten()
        .collect()
}

const KIB: usize = 1 << 10;

/// Connects to a server with this script, reads 4 KiB in vain, and lets go of everything.
fn read_fails(
    plan: &Plan,
    script: impl Fn(&mut Conn, &Request) -> io::Result<()> + Send + Sync + 'static,
) {
    let mut rig = plan.attach();
    rig.server.script(script);
    let direct = rig.direct();
    let read = direct.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(errno(read), Err(Errno::IO));
    drop(direct);
    rig.client.wait_lost();
}

fn each_transport(act: impl Fn(&Plan)) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        act(&Plan::new(1 << 20).transport(transport));
    }
    assert_usable(0);
}

/// Lets `count` threads read a block each, and answers how they fared.
fn read_together(rig: &Rig, count: u64) -> Vec<Result<(), Errno>> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|index| {
                let direct = rig.direct();
                scope.spawn(move || {
                    errno(direct.read_exact_at(&mut Buffer::new(4096), index * 8192))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// A script that keeps every reply back until `count` have come, then does as `then` says.
fn when_all_are_here(
    count: usize,
    then: impl Fn(&mut Conn, Vec<Request>) -> io::Result<()>,
) -> impl Fn(&mut Conn, &Request) -> io::Result<()> {
    move |conn, first| {
        let mut requests = vec![first.clone()];
        while requests.len() < count {
            requests.push(conn.next_request()?);
        }
        then(conn, requests)
    }
}
