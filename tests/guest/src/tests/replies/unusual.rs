// SPDX-License-Identifier: GPL-2.0

//! Replies that come before the data of the write was read, in two parts, or along with something else.

use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::KIB;
use crate::debug_kernel::patient;
use crate::device::{Plan, SOON, assert_pattern, assert_usable, errno, pattern, store_pattern};
use crate::harness::{Guest, Test};
use crate::proto::{Command, REPLY_LEN, Request};
use crate::server::{Conn, Transport, ok};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(reply_to_a_write_before_its_data_was_read),
        test!(reply_to_a_write_whose_data_is_never_read),
        test!(half_a_header_then_the_rest),
        test!(half_the_data_then_the_rest),
        test!(urgent_bytes_in_between),
        test!(descriptors_along_with_it),
    ]
}

fn reply_to_a_write_before_its_data_was_read(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        // A small send buffer, so that the write is still being sent when the reply comes.
        let mut rig = Plan::new(4 << 20)
            .transport(transport)
            .send_buffer(16 * KIB)
            .attach();
        rig.server.script(|conn, request| {
            conn.send(&ok(request))?;
            thread::sleep(Duration::from_millis(30));
            let data = conn.read_data(request)?;
            conn.store(request, &data);
            Ok(())
        });
        let direct = rig.direct();
        for round in 0..4 {
            let offset = round << 20;
            let data = Buffer::filled(1024 * KIB, |data| pattern(round, offset, data));
            direct.write_all_at(&data, offset).unwrap();
            // Freed and used for something else at once: were it still being sent, it would show.
            drop(data);
            let _trap = Buffer::filled(1024 * KIB, |data| data.fill(0xaa));
            thread::sleep(Duration::from_millis(50));
            assert_pattern(round, offset, &rig.server.peek(offset, 1024 * KIB));
        }
        drop(direct);
        rig.server.be_honest();
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

fn reply_to_a_write_whose_data_is_never_read(_: &Guest) {
    let mut rig = Plan::new(4 << 20).send_buffer(16 * KIB).attach();
    rig.server.script(|conn, request| {
        conn.send(&ok(request))?;
        conn.stall()
    });
    thread::scope(|scope| {
        let direct = rig.direct();
        let write = scope.spawn(move || errno(direct.write_all_at(&Buffer::new(1024 * KIB), 0)));
        rig.server.wait_for_command(Command::Write);
        thread::sleep(Duration::from_millis(300));
        assert!(!write.is_finished(), "done with data that nobody can have");
        rig.server.kill();
        assert_eq!(write.join().unwrap(), Err(Errno::IO));
    });
    rig.client.wait_lost();
    assert_usable(0);
}

/// Answers in two parts, with a pause between them.
fn paused_after(len: usize) -> impl Fn(&mut Conn, &Request) -> io::Result<()> {
    move |conn, request| {
        let reply = conn.answer(request)?;
        conn.send(&reply[..len.min(reply.len())])?;
        thread::sleep(Duration::from_millis(20));
        conn.send(&reply[len.min(reply.len())..])
    }
}

fn half_a_header_then_the_rest(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    for len in 1..REPLY_LEN {
        rig.server.script(paused_after(len));
        direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
        direct.write_all_at(&Buffer::new(4096), 0).unwrap();
    }
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
}

fn half_the_data_then_the_rest(_: &Guest) {
    let mut rig = Plan::new(1 << 20).transport(Transport::Tcp4).attach();
    let direct = rig.direct();
    store_pattern(&rig.server, 30, 0, 64 * KIB);
    for len in [0, 1, 511, 4095, 4096, 4097, 40_000, 64 * KIB - 1] {
        rig.server.script(paused_after(REPLY_LEN + len));
        let mut back = Buffer::skewed(64 * KIB, 512);
        direct.read_exact_at(&mut back, 0).unwrap();
        assert_pattern(30, 0, &back);
    }
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Reads blocks of several sizes from a server that answers with `answer`, which is also told where to do
/// what it does to a reply.
fn reads_succeed(
    transport: Transport,
    answer: impl Fn(&mut Conn, &[u8], usize) -> io::Result<()> + Copy + Send + Sync + 'static,
) {
    let mut rig = Plan::new(1 << 20).transport(transport).attach();
    let direct = rig.direct();
    // Received where it arrives, or by a worker.
    for len in [4 * KIB, 256 * KIB] {
        let all = REPLY_LEN + len;
        for at in [
            0,
            1,
            REPLY_LEN - 1,
            REPLY_LEN,
            REPLY_LEN + 1,
            3000,
            all - 1,
            all,
        ] {
            rig.server.script(move |conn, request| {
                let reply = conn.answer(request)?;
                answer(conn, &reply, at)
            });
            let mut data = vec![0; len];
            pattern(at as u64, 0, &mut data);
            rig.server.poke(0, &data);
            let mut read = Buffer::new(len);
            direct.read_exact_at(&mut read, 0).unwrap();
            assert!(*read == *data, "{transport:?}, {len} bytes, at {at}");
        }
    }
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn urgent_bytes_in_between(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        for pause in [Duration::ZERO, Duration::from_millis(10)] {
            reads_succeed(transport, move |conn, reply, at| {
                conn.send(&reply[..at])?;
                conn.send_urgent(b'!')?;
                thread::sleep(pause);
                conn.send(&reply[at..])
            });
        }
    }
}

fn descriptors_along_with_it(_: &Guest) {
    reads_succeed(Transport::Unix, |conn, reply, at| {
        let (reader, writer) = rustix::pipe::pipe()?;
        // Nothing goes without a byte.
        let at = at.min(reply.len() - 1);
        conn.send(&reply[..at])?;
        conn.send_with_descriptor(&reply[at..=at], reader)?;
        conn.send(&reply[at + 1..])?;
        // Whoever received it has closed it.
        let mut fds = [PollFd::new(&writer, PollFlags::empty())];
        let limit = Timespec::try_from(patient(SOON)).expect("a timeout");
        match poll(&mut fds, Some(&limit))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    });
}
