// SPDX-License-Identifier: GPL-2.0

//! Connections that die, or say nothing more, in the middle of a reply in chunks.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::io::Errno;

use super::{KIB, once, plan, setup, store_with_zeroes};
use crate::device::errno;
use crate::harness::{Guest, Test, seed};
use crate::netlink::Netlink;
use crate::proto::{Command, Request};
use crate::server::{Conn, Server, Transport, chunks};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(half_a_reply_is_asked_for_again),
        test!(half_a_reply_of_the_only_connection),
        test!(connections_die_under_load),
        test!(silence_between_chunks),
        test!(silence_moves_the_read_to_another_connection),
        test!(chunks_that_trickle_in),
        test!(chunks_that_tell_nothing_new),
    ]
}

const LEN: usize = 64 << 10;
const AT: u64 = 4096;

/// Chunks for the first half and for a bit at the end: none of it is what is stored.
fn half(request: &Request) -> Vec<u8> {
    let piece = |skip: usize, len: usize| {
        let offset = request.offset + skip as u64;
        chunks::data(0, request.cookie, offset, &vec![0xee; len])
    };
    [piece(0, LEN / 2), piece(LEN - 3000, 3000)].concat()
}

/// The whole reply, in chunks.
fn serve_in_chunks(conn: &mut Conn, request: &Request) -> std::io::Result<()> {
    if request.command != Command::Read {
        return conn.serve(request);
    }
    let data = conn.stored(request);
    let mut random = Rng::with_seed(request.cookie);
    conn.send(&chunks::cut(&mut random, request, &data).concat())
}

fn server() -> Server {
    let server = Server::new();
    store_with_zeroes(&server);
    server
}

fn assert_read(direct: &std::fs::File, server: &Server) {
    let mut back = Buffer::filled(LEN, |data| data.fill(0xa5));
    direct.read_exact_at(&mut back, AT).expect("to read");
    assert!(server.peek(AT, LEN) == *back, "wrong data");
}

/// What came before counts for nothing, whether the other server answers by a chunk or by many.
fn half_a_reply_is_asked_for_again(_: &Guest) {
    let ends: [fn(&mut Conn) -> std::io::Result<()>; 2] =
        [|conn| conn.close(), |conn| conn.reset()];
    for transport in [Transport::Tcp4, Transport::Unix] {
        for end in ends {
            let link = setup()
                .try_attach_to(server(), &[transport; 2])
                .unwrap()
                .settle();
            link.server.script(once(move |conn, request| {
                conn.send(&half(request))?;
                end(conn)
            }));
            let direct = link.direct();
            assert_read(&direct, &link.server);
            link.server.script(serve_in_chunks);
            assert_read(&direct, &link.server);
            drop(direct);
            link.disconnect_and_wait();
        }
    }
}

fn half_a_reply_of_the_only_connection(_: &Guest) {
    let setup = setup().dead_timeout(60);
    let link = setup
        .try_attach_to(server(), &[Transport::Tcp4])
        .unwrap()
        .settle();
    link.server.script(|conn, request| {
        conn.send(&half(request))?;
        conn.close()
    });
    let news = Netlink::listen();
    thread::scope(|scope| {
        let (direct, server) = (link.direct(), &link.server);
        scope.spawn(move || assert_read(&direct, server));
        // Before the driver knows of the death there is no place for a new connection, which is no error.
        news.expect_dead_link();
        link.server.script(serve_in_chunks);
        link.revive().expect("to bring a new connection");
    });
    link.disconnect_and_wait();
}

/// Each reply may be the last of its connection, and may be cut anywhere. A new one takes its place.
fn connections_die_under_load(_: &Guest) {
    const READS: u64 = 60;
    let setup = setup().dead_timeout(60);
    let link = setup
        .try_attach_to(server(), &[Transport::Tcp4; 2])
        .unwrap()
        .settle();
    let seed = seed();
    link.server.script(move |conn, request| {
        let mut random = Rng::with_seed(seed ^ request.cookie);
        if request.command != Command::Read || random.u8(..10) > 0 {
            return serve_in_chunks(conn, request);
        }
        let data = conn.stored(request);
        let reply = chunks::cut(&mut random, request, &data).concat();
        conn.send(&reply[..random.usize(..reply.len())])?;
        conn.close()
    });
    thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let direct = link.direct();
                let server = &link.server;
                scope.spawn(move || (0..READS).for_each(|_| assert_read(&direct, server)))
            })
            .collect();
        while readers.iter().any(|reader| !reader.is_finished()) {
            if link.server.living() < 2 {
                let _ = link.revive();
            }
            thread::sleep(Duration::from_millis(5));
        }
    });
    link.disconnect_and_wait();
}

fn silence_between_chunks(_: &Guest) {
    let mut rig = plan().timeout(1).attach_to(server());
    rig.server.script(|conn, request| {
        conn.send(&half(request))?;
        conn.stall()
    });
    let direct = rig.direct();
    let began = Instant::now();
    let read = errno(direct.read_exact_at(&mut Buffer::new(LEN), AT));
    assert_eq!(read, Err(Errno::IO));
    let took = began.elapsed();
    assert!(took > Duration::from_millis(800), "{took:?}");
    drop(direct);
    rig.client.wait_lost();
}

fn silence_moves_the_read_to_another_connection(_: &Guest) {
    let setup = setup().timeout(1);
    let link = setup
        .try_attach_to(server(), &[Transport::Unix; 2])
        .unwrap()
        .settle();
    link.server.script(once(|conn, request| {
        conn.send(&half(request))?;
        conn.stall()
    }));
    let direct = link.direct();
    assert_read(&direct, &link.server);
    drop(direct);
    link.disconnect_and_wait();
}

/// A reply may take longer than the timeout, if something of it comes now and then.
fn chunks_that_trickle_in(_: &Guest) {
    let mut rig = plan().timeout(1).attach_to(server());
    rig.server.script(|conn, request| {
        if request.command != Command::Read {
            return conn.serve(request);
        }
        let data = conn.stored(request);
        for (index, piece) in data.chunks(8 * KIB).enumerate() {
            let offset = request.offset + (index * 8 * KIB) as u64;
            conn.send(&chunks::data(0, request.cookie, offset, piece))?;
            thread::sleep(Duration::from_millis(300));
        }
        conn.send(&chunks::none(chunks::DONE, request.cookie))
    });
    let direct = rig.direct();
    assert_read(&direct, &rig.server);
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

/// A server that only repeats itself is not at work: the read times out. Once it has told an error, errors and
/// content in more pieces than the driver remembers may be repeated.
fn chunks_that_tell_nothing_new(_: &Guest) {
    let repeated: [fn(&Request) -> Vec<u8>; 2] = [
        |request| chunks::error(0, request.cookie, 5, b"again"),
        |request| chunks::data(0, request.cookie, request.offset + 8, &[0xee]),
    ];
    for repeated in repeated {
        let mut rig = plan().timeout(1).attach_to(server());
        rig.server.script(move |conn, request| {
            for at in [0, 2, 4, 6] {
                let offset = request.offset + at;
                conn.send(&chunks::data(0, request.cookie, offset, &[0xee]))?;
            }
            conn.send(&chunks::error(0, request.cookie, 5, b"bad"))?;
            loop {
                conn.send(&repeated(request))?;
                thread::sleep(Duration::from_millis(100));
            }
        });
        let direct = rig.direct();
        let began = Instant::now();
        let read = errno(direct.read_exact_at(&mut Buffer::new(LEN), AT));
        assert_eq!(read, Err(Errno::IO));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?}");
        drop(direct);
        rig.client.wait_lost();
    }
}
