// SPDX-License-Identifier: GPL-2.0

//! Connections that the server ends before a reply is complete.

use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{KIB, each_transport, read_fails, read_together, when_all_are_here};
use crate::device::{Plan, assert_usable, errno};
use crate::harness::{Guest, Test};
use crate::proto::{REPLY_LEN, Request};
use crate::server::{Conn, Transport};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(closed_instead_of_a_reply),
        test!(closed_at_every_byte_of_a_header),
        test!(closed_at_every_kind_of_byte_of_the_data),
        test!(reset_in_the_middle_of_the_data),
        test!(closed_while_it_reads_a_write),
        test!(closed_with_many_requests_in_flight),
    ]
}

fn closed_instead_of_a_reply(_: &Guest) {
    each_transport(|plan| read_fails(plan, |conn, _| conn.close()));
}

fn close_after(len: usize) -> impl Fn(&mut Conn, &Request) -> io::Result<()> {
    move |conn, request| {
        let reply = conn.answer(request)?;
        conn.send(&reply[..len])?;
        conn.close()
    }
}

fn closed_at_every_byte_of_a_header(_: &Guest) {
    let plan = Plan::new(1 << 20);
    for len in 1..REPLY_LEN {
        read_fails(&plan, close_after(len));
    }
    assert_usable(0);
}

fn closed_at_every_kind_of_byte_of_the_data(_: &Guest) {
    let plan = Plan::new(1 << 20).transport(Transport::Tcp4);
    for len in [0, 1, 511, 512, 513, 2048, 4095] {
        read_fails(&plan, close_after(REPLY_LEN + len));
    }
    assert_usable(0);
}

fn reset_in_the_middle_of_the_data(_: &Guest) {
    let plan = Plan::new(1 << 20).transport(Transport::Tcp4);
    read_fails(&plan, |conn, request| {
        let reply = conn.answer(request)?;
        conn.send(&reply[..1000])?;
        conn.reset()
    });
    assert_usable(0);
}

fn closed_while_it_reads_a_write(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        for read in [0, 1, 100 * KIB] {
            let mut rig = Plan::new(4 << 20).transport(transport).attach();
            rig.server.script(move |conn, _| {
                conn.read_bytes(read)?;
                conn.close()
            });
            let direct = rig.direct();
            let write = direct.write_all_at(&Buffer::new(1024 * KIB), 0);
            assert_eq!(
                errno(write),
                Err(Errno::IO),
                "{transport:?}, closed after {read} bytes"
            );
            drop(direct);
            rig.client.wait_lost();
        }
    }
    assert_usable(0);
}

fn closed_with_many_requests_in_flight(_: &Guest) {
    each_transport(|plan| {
        let mut rig = plan.attach();
        rig.server.script(when_all_are_here(16, |conn, requests| {
            // A third is answered, and one half.
            for request in &requests[..5] {
                conn.serve(request)?;
            }
            close_after(1000)(conn, &requests[5])
        }));
        let answers = read_together(&rig, 16);
        let (done, failed): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        assert_eq!(done.len(), 5);
        assert!(failed.iter().all(|answer| *answer == Err(Errno::IO)));
        rig.client.wait_lost();
    });
}
