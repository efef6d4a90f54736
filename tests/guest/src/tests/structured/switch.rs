// SPDX-License-Identifier: GPL-2.0

//! How structured replies are switched on.

use std::os::unix::fs::FileExt;

use neli::types::Buffer as Bytes;
use rustix::io::Errno;

use super::super::connecting::request::{self, connect_to};
use super::{FLAGS, SIZE, store_with_zeroes};
use crate::device::{Plan, USUAL_FLAGS, assert_usable, errno};
use crate::driver::Driver;
use crate::front::{Export, FRONTS};
use crate::harness::{Guest, Test};
use crate::netlink::attr;
use crate::proto::{Command, SEND_DF};
use crate::server::{Server, Transport, chunks};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(by_the_flag),
        test!(simple_replies_are_allowed),
        test!(not_without_the_flag),
        test!(the_attribute_is_strict),
    ]
}

/// The attribute `structured-replies` of the command `connect`.
const STRUCTURED_REPLIES: u16 = 18;

fn in_one_chunk(server: &Server) {
    server.script(|conn, request| {
        if request.command != Command::Read {
            return conn.serve(request);
        }
        let data = conn.stored(request);
        conn.send(&chunks::data(
            chunks::DONE,
            request.cookie,
            request.offset,
            &data,
        ))
    });
}

fn by_the_flag(guest: &Guest) {
    if guest.expected("speaks-structured-replies") == Driver::Nbd {
        return assert_refused(guest, FLAGS);
    }
    let export = Export::new(SIZE).flags(FLAGS);
    for front in FRONTS {
        let session = front.start(Server::new(), &export);
        store_with_zeroes(session.server());
        in_one_chunk(session.server());
        let direct = crate::device::open(0, libc::O_DIRECT).unwrap();
        let mut back = Buffer::new(64 << 10);
        let read = errno(direct.read_exact_at(&mut back, 4096));
        assert_eq!(read, Ok(()), "{front:?}");
        assert!(session.server().peek(4096, back.len()) == *back);
        drop(direct);
        session.end();
    }
}

/// As before there were others.
fn simple_replies_are_allowed(_: &Guest) {
    for front in FRONTS {
        let session = front.start(Server::new(), &Export::new(SIZE).flags(FLAGS));
        store_with_zeroes(session.server());
        let direct = crate::device::open(0, libc::O_DIRECT).unwrap();
        let mut back = Buffer::new(64 << 10);
        direct.write_all_at(&back, 1 << 20).expect("to write");
        direct.read_exact_at(&mut back, 4096).expect("to read");
        assert!(session.server().peek(4096, back.len()) == *back);
        drop(direct);
        session.end();
    }
}

fn not_without_the_flag(guest: &Guest) {
    assert_refused(guest, USUAL_FLAGS & !SEND_DF);
    assert_usable(0);
}

/// A chunk ends the connection of a device with these flags.
fn assert_refused(guest: &Guest, flags: u64) {
    let mut rig = Plan::new(SIZE).flags(flags).attach();
    in_one_chunk(&rig.server);
    let direct = rig.direct();
    let read = errno(direct.read_exact_at(&mut Buffer::new(4096), 0));
    assert_eq!(read, Err(Errno::IO));
    drop(direct);
    rig.client.wait_lost();
    guest.expect_logged("Wrong magic (0x668e33ef)", "wrong magic (0x668e33ef)");
}

/// What a server has agreed on, it has to keep to.
fn the_attribute_is_strict(guest: &Guest) {
    let rnbd = request::open(guest);
    let strict = attr(STRUCTURED_REPLIES, Bytes::new());
    let flags = attr(request::FLAGS, FLAGS);
    let connect = || {
        let server = Server::new();
        store_with_zeroes(&server);
        in_one_chunk(&server);
        let more = [flags.clone(), strict.clone()];
        connect_to(&rnbd, server, &[Transport::Unix], &more).expect("to connect")
    };
    let link = connect().settle();
    let direct = link.direct();
    let mut back = Buffer::new(64 << 10);
    direct.read_exact_at(&mut back, 0).expect("to read");
    assert!(link.server.peek(0, back.len()) == *back);
    direct
        .write_all_at(&back, 0)
        .expect("a simple reply to a write");
    link.server.be_honest();
    let read = errno(direct.read_exact_at(&mut back, 0));
    assert_eq!(read, Err(Errno::IO), "a simple reply to a read");
    drop(direct);
    link.disconnect_and_wait();
}
