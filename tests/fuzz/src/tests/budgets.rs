// SPDX-License-Identifier: GPL-2.0
//! How much is done for chunks at a time, and that whatever is left is told to the work item.

use crate::{
    OURS,
    connection::Connection,
    kapi::{
        block::request::{Extent, Log, Op, Outcome, Request, Unanswered},
        net::arrival::Arrival,
    },
    pure::cmd::Cookie,
    receiving::WORKER_CALLS,
    rnbd_table::Structured,
    stream::{Mode, Receive},
};

/// Where reads begin.
const START: u64 = 1 << 40;
/// The size of a chunk with a byte of data.
const SMALLEST: usize = 29;

fn extent(len_bytes: u32) -> Extent {
    Extent {
        op: Op::Read,
        offset_bytes: START,
        len_bytes,
        fua: false,
        nounmap: false,
    }
}

/// A chunk with content for a command, and whether it is the last one.
fn chunk(cookie: u64, is_last: bool, offset: u64, content: &Content<'_>) -> Vec<u8> {
    let (kind, rest) = match content {
        Content::Data(data) => (1_u16, data.to_vec()),
        Content::Hole(len) => (2, len.to_be_bytes().to_vec()),
    };
    let mut chunk = vec![0x66, 0x8e, 0x33, 0xef, 0, u8::from(is_last)];
    chunk.extend(kind.to_be_bytes());
    chunk.extend(cookie.to_be_bytes());
    chunk.extend((8 + rest.len() as u32).to_be_bytes());
    chunk.extend(offset.to_be_bytes());
    chunk.extend(rest);
    chunk
}

enum Content<'a> {
    Data(&'a [u8]),
    Hole(u32),
}

/// A connection whose server may send chunks, and its reads of this length, by their cookies.
fn reads(count: usize, len_bytes: u32) -> (Connection, Receive, Log, Vec<u64>) {
    let connection = Connection::new(Structured::Possible);
    let log = Log::default();
    let start = |slot: usize| {
        let request = Request::new(slot as u32, extent(len_bytes), 4096, &log);
        let generation = connection.table.slots[slot].start(OURS, Unanswered(request));
        Cookie::new(generation, slot as u32).0
    };
    let cookies = (0..count).map(start).collect();
    connection.socket.limit.set(usize::MAX);
    let receive = Receive::new(Mode::Structured).unwrap();
    (connection, receive, log, cookies)
}

/// A server could keep a processor busy with small chunks otherwise, in a softirq or in a task that is not the driver's.
#[test]
fn small_chunks_are_left_to_the_work_item() {
    const LEN: u32 = 8192;
    let (connection, mut receive, log, cookies) = reads(1, LEN);
    serve_bytes(&connection, cookies[0], LEN);
    let all = connection.socket.incoming.borrow().len();
    let arrival = Arrival {
        socket: &connection.socket,
        segment_bytes: 1448,
    };
    assert!(connection.receive_in_callback(&mut receive, arrival));
    let received = connection.traffic.received.get();
    assert!((all / 16..all / 7).contains(&received), "{received}");
    let mut run = || connection.receive_up_to(&mut receive, WORKER_CALLS, usize::MAX);
    assert!((0..1000).any(|_| run() == Ok(false)));
    let data = vec![7; LEN as usize];
    assert_eq!(*log.borrow(), [(0, Outcome::SUCCESS, data)]);

    let (connection, mut receive, _, cookies) = reads(1, LEN);
    serve_bytes(&connection, cookies[0], LEN);
    let mut stream = connection.socket.incoming.take();
    let few = 10 * SMALLEST;
    // Each time there is so little that it could be received to its end.
    let calls = (0..LEN / 10).take_while(|_| {
        let mut incoming = connection.socket.incoming.borrow_mut();
        incoming.extend(stream.drain(..few));
        drop(incoming);
        !connection.receive_in_sender(&mut receive)
    });
    let calls = calls.count();
    assert!((50..110).contains(&calls), "{calls}");
}

/// Serves a read byte by byte.
fn serve_bytes(connection: &Connection, cookie: u64, len: u32) {
    let mut incoming = connection.socket.incoming.borrow_mut();
    for at in 0..len {
        let offset = START + u64::from(at);
        incoming.extend(chunk(cookie, at == len - 1, offset, &Content::Data(&[7])));
    }
}

/// The same with large holes, in the work item, which lets other work run then.
#[test]
fn large_holes_are_filled_in_several_runs() {
    const LEN: u32 = 32 << 20;
    let (connection, mut receive, log, cookies) = reads(3, LEN);
    for cookie in &cookies {
        let chunk = chunk(*cookie, true, START, &Content::Hole(LEN));
        connection.socket.incoming.borrow_mut().extend(chunk);
    }
    let mut run = || {
        connection
            .receive_up_to(&mut receive, WORKER_CALLS, usize::MAX)
            .unwrap()
    };
    assert!(run(), "it has to run again");
    assert_eq!(log.borrow().len(), 2);
    assert!((0..10).any(|_| !run()));
    assert_eq!(log.borrow().len(), 3);
    assert!(
        log.borrow()
            .iter()
            .all(|(_, _, data)| data.iter().all(|byte| *byte == 0))
    );
}

/// A hole that was left, and no byte after it.
#[test]
fn a_hole_that_is_left_is_told() {
    let (connection, mut receive, log, cookies) = reads(1, 64 << 10);
    let chunk = chunk(cookies[0], true, START, &Content::Hole(64 << 10));
    connection.socket.incoming.borrow_mut().extend(chunk);
    let arrival = Arrival {
        socket: &connection.socket,
        segment_bytes: 1448,
    };
    assert!(connection.receive_in_callback(&mut receive, arrival));
    assert!(log.borrow().is_empty() && !connection.socket.has_input());
    assert_eq!(
        connection.receive_up_to(&mut receive, WORKER_CALLS, usize::MAX),
        Ok(false)
    );
    assert_eq!(log.borrow().len(), 1);
}
