// SPDX-License-Identifier: GPL-2.0

//! A server that breaks the protocol. The connection is ended, what was in flight fails, and the
//! device can be connected again.

use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::debug_kernel::patient;
use crate::device::{Plan, Rig, SOON, assert_pattern, assert_usable, errno, pattern};
use crate::harness::{Guest, Test};
use crate::proto::{Command, REPLY_LEN, REPLY_MAGIC, Request, reply};
use crate::server::{Conn, Transport, ok};
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
        test!(wrong_magic),
        test!(request_magic),
        test!(structured_reply),
        test!(unknown_cookies),
        test!(cookie_of_an_older_request),
        test!(double_reply_to_a_read),
        test!(double_reply_to_a_write),
        test!(double_reply_while_others_are_in_flight),
        test!(reply_to_a_write_before_its_data_was_read),
        test!(reply_to_a_write_whose_data_is_never_read),
        test!(reply_without_a_request),
        test!(garbage_after_a_reply),
        test!(random_garbage_instead_of_replies),
        test!(data_after_an_error_reply),
        test!(half_a_header_then_the_rest),
        test!(half_the_data_then_the_rest),
        test!(urgent_bytes_in_between),
        test!(descriptors_along_with_it),
    ]
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
    let mut stored = vec![0; 64 * KIB];
    pattern(30, 0, &mut stored);
    rig.server.poke(0, &stored);
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
