// SPDX-License-Identifier: GPL-2.0

//! Chunks that no server may send. The connection is ended, with a line in the log; what was asked for is
//! sent to another one, or fails.

use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{once, plan, setup, store_with_zeroes};
use crate::device::{SOON, errno};
use crate::harness::{Guest, Test, wait_until};
use crate::klog::Klog;
use crate::netlink::Link;
use crate::proto::{Command, REPLY_MAGIC, Request, reply};
use crate::server::chunks::{
    DONE, ERROR, NONE, OFFSET_DATA, OFFSET_HOLE, chunk, data, error, header, hole, none,
};
use crate::server::{Server, Transport};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(end_the_only_connection),
        test!(have_reads_sent_again),
        test!(after_the_last_chunk),
        test!(content_for_a_write),
    ]
}

/// How long the reads are that are lied about, and where they are.
const LEN: u32 = 4096;
const AT: u64 = 64 << 10;

type Lie = (&'static str, fn(&Request) -> Vec<u8>);

/// Data that is stored nowhere.
fn junk(request: &Request, flags: u16, skip: i64, len: usize) -> Vec<u8> {
    let offset = request.offset.wrapping_add_signed(skip);
    data(flags, request.cookie, offset, &vec![0xee; len])
}

/// A hole within the request, or not.
fn gap(request: &Request, flags: u16, skip: i64, len: u32) -> Vec<u8> {
    let offset = request.offset.wrapping_add_signed(skip);
    hole(flags, request.cookie, offset, len)
}

/// Any chunk about the request.
fn any(request: &Request, kind: u16, payload: &[u8]) -> Vec<u8> {
    chunk(DONE, kind, request.cookie, payload)
}

/// Content that has more separate pieces than a client may be asked to remember.
fn crumbs(request: &Request) -> Vec<u8> {
    let crumbs = (0..200).rev().map(|crumb| junk(request, 0, crumb * 2, 1));
    crumbs.flatten().collect()
}

const LIES: &[Lie] = &[
    ("data twice", |r| {
        [junk(r, 0, 0, 100), junk(r, 0, 0, 100)].concat()
    }),
    ("overlap of a byte", |r| {
        [junk(r, 0, 0, 100), junk(r, 0, 99, 2)].concat()
    }),
    ("overlap from below", |r| {
        [junk(r, 0, 100, 100), junk(r, 0, 99, 2)].concat()
    }),
    ("overlap of two", |r| {
        let two = [junk(r, 0, 0, 100), junk(r, 0, 200, 100)].concat();
        [two, junk(r, 0, 50, 200)].concat()
    }),
    ("hole over data", |r| {
        [junk(r, 0, 0, 100), gap(r, 0, 0, LEN)].concat()
    }),
    ("data over a hole", |r| {
        [gap(r, 0, 0, LEN), junk(r, 0, 512, 512)].concat()
    }),
    ("a byte too early", |r| junk(r, 0, -1, 2)),
    ("a byte too late", |r| junk(r, 0, LEN as i64 - 1, 2)),
    ("behind the end", |r| junk(r, 0, LEN.into(), 1)),
    ("far away", |r| junk(r, DONE, 1 << 40, LEN as usize)),
    ("more than was asked for", |r| {
        junk(r, DONE, 0, LEN as usize + 1)
    }),
    ("hole behind the end", |r| gap(r, DONE, 0, LEN + 1)),
    ("hole of 4 GiB", |r| gap(r, DONE, 0, u32::MAX)),
    ("hole that wraps", |r| {
        hole(DONE, r.cookie, u64::MAX - 10, 4096)
    }),
    ("gap of a byte at the end", |r| {
        junk(r, DONE, 0, LEN as usize - 1)
    }),
    ("gap of a byte at the start", |r| {
        junk(r, DONE, 1, LEN as usize - 1)
    }),
    ("gap of a byte within", |r| {
        let rest = LEN as usize - 1001;
        [junk(r, 0, 0, 1000), junk(r, DONE, 1001, rest)].concat()
    }),
    ("gap before NONE", |r| {
        [junk(r, 0, 0, 2048), none(DONE, r.cookie)].concat()
    }),
    ("overlap and gap of the same size", |r| {
        [junk(r, 0, 0, 2048), junk(r, DONE, 1024, 2048)].concat()
    }),
    ("nothing", |r| none(DONE, r.cookie)),
    ("type 3", |r| any(r, 3, &[0; 8])),
    ("block status", |r| any(r, 5, &[0; 12])),
    ("type 0x7fff", |r| any(r, 0x7fff, &[])),
    ("NONE that is not the last", |r| none(0, r.cookie)),
    ("NONE with something", |r| any(r, NONE, &[0])),
    ("data of 0 bytes", |r| {
        any(r, OFFSET_DATA, &r.offset.to_be_bytes())
    }),
    ("data without an offset", |r| any(r, OFFSET_DATA, &[0; 4])),
    ("data of 4 GiB", |r| {
        let header = header(DONE, OFFSET_DATA, r.cookie, u32::MAX);
        [header, r.offset.to_be_bytes().to_vec()].concat()
    }),
    ("hole of 0 bytes", |r| gap(r, 0, 0, 0)),
    ("hole without a length", |r| {
        any(r, OFFSET_HOLE, &r.offset.to_be_bytes())
    }),
    ("hole with more", |r| any(r, OFFSET_HOLE, &[0; 13])),
    ("error without words' length", |r| {
        any(r, ERROR, &[0, 0, 0, 5])
    }),
    ("error of 4 GiB", |r| {
        let header = header(DONE, ERROR, r.cookie, u32::MAX);
        [header, vec![0, 0, 0, 5, 0xff, 0xff]].concat()
    }),
    ("error 0", |r| error(DONE, r.cookie, 0, b"fine")),
    ("crumbs", crumbs),
    ("cookie of nobody", |r| {
        data(DONE, r.cookie ^ (1 << 40), r.offset, &[0xee; 512])
    }),
    ("simple reply among chunks", |r| {
        let simple = reply(REPLY_MAGIC, 0, r.cookie);
        [&junk(r, 0, 0, 100)[..], &simple, &[0xee; 4096]].concat()
    }),
    ("simple error among chunks", |r| {
        [&junk(r, 0, 0, 100)[..], &reply(REPLY_MAGIC, 5, r.cookie)].concat()
    }),
];

fn read(link: &Link) -> (Result<(), Errno>, Buffer) {
    let mut back = Buffer::filled(LEN as usize, |data| data.fill(0xa5));
    let direct = link.direct();
    (errno(direct.read_exact_at(&mut back, AT)), back)
}

/// Has every lie told, each for the next read of a session, and a connection brought in place of the one
/// that the lie has ended.
fn tell(connections: usize, assert_read: impl Fn(&str, &Link)) {
    // Of one session's lines in the log, no more than 10 within 5 s are printed.
    for lies in LIES.chunks(4) {
        let server = Server::new();
        store_with_zeroes(&server);
        let transports = vec![Transport::Unix; connections];
        // A lie that is not noticed is not waited for.
        let setup = setup().timeout(2);
        let link = setup
            .try_attach_to(server, &transports)
            .expect("to connect");
        let link = link.settle();
        for (name, lie) in lies {
            link.server.script(once(move |conn, request| {
                conn.send(&lie(request))?;
                conn.stall()
            }));
            let mut log = Klog::from_now();
            assert_read(name, &link);
            assert_accused(name, &mut log);
            let ended = wait_until(SOON, || link.server.living() == connections - 1);
            assert!(ended.is_ok(), "{name}: the connection lives on");
            link.revive().expect("to bring a new connection");
        }
        link.disconnect_and_wait();
    }
}

/// The lines that say what a server has done.
fn accusations(log: &mut Klog) -> Vec<String> {
    let mut lines = log.read();
    lines.retain(|line| line.contains("closing it"));
    lines
}

fn assert_accused(name: &str, log: &mut Klog) {
    let mut lines = Vec::new();
    let logged = wait_until(SOON, || {
        lines.extend(accusations(log));
        !lines.is_empty()
    });
    assert!(logged.is_ok(), "{name}: nothing is logged");
    lines.extend(accusations(log));
    assert_eq!(lines.len(), 1, "{name}: {lines:?}");
}

fn end_the_only_connection(_: &Guest) {
    tell(1, |name, link| {
        assert_eq!(read(link).0, Err(Errno::IO), "{name}");
    });
}

/// Nothing of the lie is left.
fn have_reads_sent_again(_: &Guest) {
    tell(2, |name, link| {
        let (answer, back) = read(link);
        assert_eq!(answer, Ok(()), "{name}");
        assert!(link.server.peek(AT, back.len()) == *back, "{name}");
    });
}

/// What was read before is not touched any more.
fn after_the_last_chunk(_: &Guest) {
    let mut rig = plan().attach();
    store_with_zeroes(&rig.server);
    rig.server.script(once(|conn, request| {
        let stored = conn.stored(request);
        conn.send(&data(DONE, request.cookie, request.offset, &stored))?;
        conn.send(&junk(request, DONE, 0, LEN as usize))?;
        conn.stall()
    }));
    let direct = rig.direct();
    let mut back = Buffer::new(LEN as usize);
    direct.read_exact_at(&mut back, AT).expect("to read");
    drop(direct);
    rig.client.wait_lost();
    assert!(rig.server.peek(AT, back.len()) == *back);
}

fn content_for_a_write(_: &Guest) {
    let contents: [fn(&Request) -> Vec<u8>; 2] =
        [|r| junk(r, DONE, 0, 512), |r| gap(r, DONE, 0, 512)];
    for content in contents {
        let mut rig = plan().attach();
        rig.server.script(move |conn, request| {
            if request.command == Command::Write {
                conn.read_data(request)?;
                conn.send(&content(request))?;
                return conn.stall();
            }
            conn.serve(request)
        });
        let direct = rig.direct();
        let mut written = Buffer::filled(LEN as usize, |data| data.fill(0x11));
        let answer = errno(direct.write_all_at(&written, AT));
        assert_eq!(answer, Err(Errno::IO));
        assert!(
            written.iter().all(|byte| *byte == 0x11),
            "it was written to"
        );
        written.fill(0);
        drop(direct);
        rig.client.wait_lost();
    }
}
