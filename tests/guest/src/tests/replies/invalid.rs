// SPDX-License-Identifier: GPL-2.0

//! Replies that the protocol does not allow.

use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{each_transport, read_fails, read_together, when_all_are_here};
use crate::device::{Plan, assert_usable, errno, pattern};
use crate::harness::{Guest, Test};
use crate::proto::{REPLY_LEN, REPLY_MAGIC, Request, reply};
use crate::server::Conn;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(wrong_magic),
        test!(request_magic),
        test!(structured_reply),
        test!(unknown_cookies),
        test!(cookie_of_an_older_request),
        test!(double_reply_to_a_read),
        test!(double_reply_to_a_write),
        test!(double_reply_while_others_are_in_flight),
        test!(reply_without_a_request),
        test!(garbage_after_a_reply),
        test!(random_garbage_instead_of_replies),
        test!(data_after_an_error_reply),
    ]
}

fn wrong_magic(guest: &Guest) {
    each_transport(|plan| {
        read_fails(plan, |conn, request| {
            conn.send(&reply(REPLY_MAGIC ^ 1, 0, request.cookie))?;
            conn.stall()
        });
    });
    guest.expect_logged("Wrong magic (0x67446699)", "wrong magic (0x67446699)");
}

fn request_magic(guest: &Guest) {
    read_fails(&Plan::new(1 << 20), |conn, request| {
        conn.send(&reply(crate::proto::REQUEST_MAGIC, 0, request.cookie))?;
        conn.stall()
    });
    guest.expect_logged("Wrong magic (0x25609513)", "wrong magic (0x25609513)");
    assert_usable(0);
}

fn structured_reply(guest: &Guest) {
    read_fails(&Plan::new(1 << 20), |conn, request| {
        conn.send(&reply(0x668e_33ef, 0, request.cookie))?;
        conn.stall()
    });
    guest.expect_logged("Wrong magic (0x668e33ef)", "wrong magic (0x668e33ef)");
    assert_usable(0);
}

fn unknown_cookies(_: &Guest) {
    let plan = Plan::new(1 << 20);
    // Another tag, another queue, another generation; all ones.
    for difference in [
        1,
        0x7f,
        0x80,
        0xffff,
        1 << 16,
        0xffff_0000,
        1 << 32,
        1 << 63,
        u64::MAX,
    ] {
        read_fails(&plan, move |conn, request| {
            conn.send(&reply(REPLY_MAGIC, 0, request.cookie ^ difference))?;
            conn.stall()
        });
    }
    for cookie in [0, u64::MAX, 0xffff_ffff] {
        read_fails(&plan, move |conn, _| {
            conn.send(&reply(REPLY_MAGIC, 0, cookie))?;
            conn.stall()
        });
    }
    assert_usable(0);
}

fn cookie_of_an_older_request(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
    let old = rig.server.requests()[0].cookie;
    rig.server.script(move |conn, _| {
        conn.send(&reply(REPLY_MAGIC, 0, old))?;
        conn.send(&[0; 4096])?;
        conn.stall()
    });
    assert_eq!(
        errno(direct.read_exact_at(&mut Buffer::new(4096), 0)),
        Err(Errno::IO)
    );
    drop(direct);
    rig.client.wait_lost();
    assert_usable(0);
}

fn send_twice(conn: &mut Conn, request: &Request) -> io::Result<()> {
    let reply = conn.answer(request)?;
    conn.send(&[&*reply, &*reply].concat())?;
    conn.stall()
}

fn double_reply_to_a_read(_: &Guest) {
    each_transport(|plan| {
        let mut rig = plan.attach();
        rig.server.script(send_twice);
        let direct = rig.direct();
        direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
        drop(direct);
        rig.client.wait_lost();
    });
}

fn double_reply_to_a_write(_: &Guest) {
    each_transport(|plan| {
        let mut rig = plan.attach();
        rig.server.script(send_twice);
        let direct = rig.direct();
        direct.write_all_at(&Buffer::new(4096), 0).unwrap();
        drop(direct);
        rig.client.wait_lost();
    });
}

fn double_reply_while_others_are_in_flight(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    rig.server.script(when_all_are_here(8, |conn, requests| {
        for request in &requests[..3] {
            conn.serve(request)?;
        }
        send_twice(conn, &requests[2])
    }));
    let answers = read_together(&rig, 8);
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 3);
    rig.client.wait_lost();
    assert_usable(0);
}

fn reply_without_a_request(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    // With the reply to this one comes another.
    rig.server.script(|conn, request| {
        conn.serve(request)?;
        conn.send(&reply(REPLY_MAGIC, 0, request.cookie + (1 << 32)))?;
        conn.stall()
    });
    direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
    drop(direct);
    rig.client.wait_lost();
    assert_usable(0);
}

fn garbage_after_a_reply(_: &Guest) {
    each_transport(|plan| {
        let mut rig = plan.attach();
        rig.server.script(|conn, request| {
            let mut reply = conn.answer(request)?;
            reply.extend([0xee; 100]);
            conn.send(&reply)?;
            conn.stall()
        });
        let direct = rig.direct();
        direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
        drop(direct);
        rig.client.wait_lost();
    });
}

fn random_garbage_instead_of_replies(_: &Guest) {
    let plan = Plan::new(1 << 20);
    for seed in 0..12 {
        read_fails(&plan, move |conn, request| {
            let mut garbage = vec![0; 8192];
            pattern(seed, 0, &mut garbage);
            // Half of them begin like a reply: the garbage is then data, and what follows it.
            if seed % 2 == 0 {
                garbage[..REPLY_LEN].copy_from_slice(&reply(REPLY_MAGIC, 5, request.cookie));
            }
            conn.send(&garbage)?;
            conn.stall()
        });
    }
    assert_usable(0);
}

fn data_after_an_error_reply(_: &Guest) {
    // There is none after an error, so this is garbage.
    read_fails(&Plan::new(1 << 20), |conn, request| {
        conn.send(&reply(REPLY_MAGIC, 5, request.cookie))?;
        conn.send(&[0; 4096])?;
        conn.stall()
    });
    assert_usable(0);
}
