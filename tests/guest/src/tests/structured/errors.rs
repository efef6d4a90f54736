// SPDX-License-Identifier: GPL-2.0

//! Error chunks: the server's number, its words, and where it could not read.

use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::super::events::listener::Listener;
use super::{KIB, SIZE, plan, store_with_zeroes};
use crate::device::{Rig, errno};
use crate::front::{Export, FRONTS};
use crate::harness::{Guest, Test, wait_until};
use crate::klog::Klog;
use crate::netlink::{number, text};
use crate::proto::{BLKDISCARD, Command, Request};
use crate::server::chunks::{self, DONE, ERROR, data, error, error_at, hole, none};
use crate::server::{Conn, Server};
use crate::sys::{Buffer, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(of_a_read),
        test!(of_other_commands),
        test!(words_are_logged),
        test!(words_are_told),
        test!(a_part_that_cannot_be_read),
    ]
}

const LEN: usize = 64 << 10;
const AT: u64 = 64 << 10;
const EIO: u32 = 5;
const ENOSPC: u32 = 28;

/// Answers reads by what `reply` says.
fn to_reads(rig: &Rig, reply: impl Fn(&Conn, &Request) -> Vec<u8> + Send + Sync + 'static) {
    rig.server.script(move |conn, request| {
        if request.command != Command::Read {
            return conn.serve(request);
        }
        let reply = reply(conn, request);
        conn.send(&reply)
    });
}

fn read(rig: &Rig) -> Result<(), Errno> {
    errno(rig.direct().read_exact_at(&mut Buffer::new(LEN), AT))
}

type Reply = fn(&Conn, &Request) -> Vec<u8>;

fn whole(conn: &Conn, request: &Request, flags: u16) -> Vec<u8> {
    data(flags, request.cookie, request.offset, &conn.stored(request))
}

/// A read that has had an error fails, whatever else has come of it. The connection lives on.
fn of_a_read(_: &Guest) {
    let mut rig = plan().attach();
    store_with_zeroes(&rig.server);
    let replies: &[(Errno, Reply)] = &[
        (Errno::IO, |_, r| error(DONE, r.cookie, EIO, b"")),
        (Errno::NOSPC, |_, r| error(DONE, r.cookie, ENOSPC, b"full")),
        (Errno::IO, |_, r| {
            error_at(DONE, r.cookie, EIO, b"here", r.offset)
        }),
        (Errno::IO, |_, r| {
            let last = none(DONE, r.cookie);
            [error(0, r.cookie, EIO, b"then nothing"), last].concat()
        }),
        (Errno::IO, |conn, r| {
            let data = whole(conn, r, DONE);
            [error(0, r.cookie, EIO, b"then data"), data].concat()
        }),
        (Errno::IO, |conn, r| {
            let data = whole(conn, r, 0);
            [data, error(DONE, r.cookie, EIO, b"after data")].concat()
        }),
        (Errno::IO, |_, r| {
            let zeroes = hole(0, r.cookie, r.offset, 4096);
            [zeroes, error(DONE, r.cookie, EIO, b"after a hole")].concat()
        }),
        // The first is what counts.
        (Errno::NOSPC, |_, r| {
            let first = error(0, r.cookie, ENOSPC, b"first");
            [first, error(DONE, r.cookie, EIO, b"second")].concat()
        }),
        (Errno::IO, |_, r| {
            error(DONE, r.cookie, EIO, "long ".repeat(800).as_bytes())
        }),
        // nbd-server swaps no bytes of the words' length.
        (Errno::NOSPC, |_, r| {
            let payload = [&ENOSPC.to_be_bytes()[..], &[12, 0], b"twelve bytes"].concat();
            chunks::chunk(DONE, ERROR, r.cookie, &payload)
        }),
        // There may be more than is known of.
        (Errno::NOSPC, |_, r| {
            let payload = [&ENOSPC.to_be_bytes()[..], &[0, 2], b"no", &[7; 30]].concat();
            chunks::chunk(DONE, ERROR, r.cookie, &payload)
        }),
        // A place that the read does not have.
        (Errno::IO, |_, r| error_at(DONE, r.cookie, EIO, b"", 0)),
        // Of a type that is not known.
        (Errno::IO, |_, r| {
            let mut unknown = error(DONE, r.cookie, EIO, b"new");
            unknown[7] = 0x55;
            unknown
        }),
    ];
    for (number, (expected, reply)) in replies.iter().enumerate() {
        to_reads(&rig, reply);
        assert_eq!(read(&rig), Err(*expected), "reply {number}");
        to_reads(&rig, |conn, request| whole(conn, request, DONE));
        assert_eq!(read(&rig), Ok(()), "after reply {number}");
    }
    assert_eq!(rig.disconnect(), Ok(0));
}

fn of_other_commands(_: &Guest) {
    for front in FRONTS {
        let export = Export::new(SIZE).flags(super::FLAGS);
        let session = front.start(Server::new(), &export);
        session.server().script(|conn, request| {
            if request.command == Command::Write {
                conn.read_data(request)?;
            }
            if request.command == Command::Read {
                return conn.serve(request);
            }
            conn.send(&error(DONE, request.cookie, ENOSPC, b"full"))
        });
        let direct = crate::device::open(0, libc::O_DIRECT).unwrap();
        let written = direct.write_all_at(&Buffer::new(LEN), AT);
        assert_eq!(errno(written), Err(Errno::NOSPC));
        assert_eq!(errno(direct.sync_all()), Err(Errno::NOSPC));
        let trimmed = ioctl_pointer(&direct, BLKDISCARD, &mut [0, 4096_u64]);
        assert_eq!(trimmed.map(drop), Err(Errno::NOSPC));
        // A chunk can say that it worked, as well.
        session.server().script(|conn, request| {
            conn.answer(request)?;
            conn.send(&none(DONE, request.cookie))
        });
        let written = direct.write_all_at(&Buffer::new(LEN), AT);
        assert_eq!(errno(written), Ok(()));
        assert_eq!(errno(direct.sync_all()), Ok(()));
        session.server().be_honest();
        drop(direct);
        session.end();
    }
}

/// They cannot break the line, or be mistaken for another one.
fn words_are_logged(_: &Guest) {
    let mut rig = plan().attach();
    to_reads(&rig, |_, r| {
        let words = b"disk \"a\"\nnbd0: fine \x1b[31m\xff";
        error(DONE, r.cookie, EIO, words)
    });
    let mut log = Klog::from_now();
    assert_eq!(read(&rig), Err(Errno::IO));
    let mut lines = Vec::new();
    let logged = wait_until(crate::device::SOON, || {
        lines.extend(log.read());
        lines.iter().any(|line: &String| line.contains("disk "))
    });
    assert!(logged.is_ok(), "{lines:?}");
    lines.retain(|line| line.contains("disk "));
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = &lines[0];
    assert!(
        line.contains("nbd0: server returned error 5 for "),
        "{line}"
    );
    // /dev/kmsg escapes the backslashes once more.
    let escaped = r#"\x5cnnbd0: fine \x5cx1b[31m\x5cxff""#;
    assert!(line.ends_with(escaped), "{line}");
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

/// The event `server-error`, and its attributes.
const SERVER_ERROR: u8 = 10;
const ERROR_NUMBER: u16 = 13;
const TEXT: u16 = 17;
const OFFSET: u16 = 15;
const LENGTH: u16 = 16;

fn words_are_told(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let mut rig = plan().attach();
    to_reads(&rig, |_, r| error(DONE, r.cookie, ENOSPC, b"no room"));
    assert_eq!(read(&rig), Err(Errno::NOSPC));
    let attrs = listener.await_event(SERVER_ERROR);
    assert_eq!(number::<u32>(&attrs, ERROR_NUMBER), Some(ENOSPC));
    assert_eq!(text(&attrs, TEXT).as_deref(), Some("no room"));
    assert_eq!(number::<u64>(&attrs, OFFSET), Some(AT));
    assert_eq!(number::<u32>(&attrs, LENGTH), Some(LEN as u32));
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Only what cannot be read fails, as far as the page cache asks for it; nothing is made up for the rest.
fn a_part_that_cannot_be_read(_: &Guest) {
    const BAD: u64 = AT + 20 * KIB as u64;
    let mut rig = plan().attach();
    store_with_zeroes(&rig.server);
    to_reads(&rig, |conn, request| {
        let end = request.offset + u64::from(request.len);
        if !(request.offset..end).contains(&BAD) {
            return whole(conn, request, DONE);
        }
        let good = (BAD - request.offset) as usize;
        let stored = conn.stored(request);
        let failure = error_at(DONE, request.cookie, EIO, b"bad", BAD);
        match good {
            0 => failure,
            good => {
                let data = chunks::data(0, request.cookie, request.offset, &stored[..good]);
                [data, failure].concat()
            }
        }
    });
    assert_eq!(read(&rig), Err(Errno::IO));
    let device = rig.open_to_read();
    let mut back = vec![0xa5; LEN];
    let mut failed = Vec::new();
    for (index, page) in back.chunks_mut(4096).enumerate() {
        let offset = AT + (index * 4096) as u64;
        if device.read_exact_at(page, offset).is_err() {
            failed.push(offset);
            page.copy_from_slice(&rig.server.peek(offset, 4096));
        }
    }
    assert_eq!(failed, [BAD]);
    assert!(rig.server.peek(AT, LEN) == back);
    drop(device);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}
