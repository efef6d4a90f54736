// SPDX-License-Identifier: GPL-2.0

//! A server that does not answer.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::device::{Plan, Rig, assert_pattern, assert_usable, errno, pattern, store_pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{BLKDISCARD, Command, REPLY_LEN, SET_TIMEOUT};
use crate::server::Transport;
use crate::sys::{Buffer, ioctl_number, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(end_a_single_connection),
        test!(end_writes_flushes_and_trims_too),
        test!(end_many_requests_at_once),
        test!(of_a_slow_server_are_not_reached),
        test!(move_requests_to_another_connection),
        test!(of_all_connections_end_the_device),
        test!(of_0_wait_and_warn),
        test!(of_0_move_requests_to_another_connection),
        test!(can_be_set_while_connected),
        test!(in_the_middle_of_a_header),
        test!(in_the_middle_of_the_data),
        test!(are_not_reached_while_data_trickles_in),
        test!(of_a_server_that_does_not_read),
        test!(of_a_server_that_does_not_read_move_writes_to_another_connection),
    ]
}

const KIB: usize = 1 << 10;

/// Whether something took about as long as a timeout of this many seconds; the block layer looks
/// at its timers but now and then.
fn assert_took(began: Instant, seconds: u64) {
    let took = began.elapsed().as_secs_f32();
    let seconds = seconds as f32;
    assert!(
        took > seconds * 0.8 && took < seconds * 2.0 + 2.0,
        "{took} s, not about {seconds} s"
    );
}

fn stuck(plan: Plan) -> Rig {
    let rig = plan.attach();
    rig.server.script(|conn, _| conn.stall());
    rig
}

/// A read of `len` bytes fails after a second, and the device ends.
fn assert_read_times_out(mut rig: Rig, len: usize) {
    let direct = rig.direct();
    let began = Instant::now();
    assert_eq!(
        errno(direct.read_exact_at(&mut Buffer::new(len), 0)),
        Err(Errno::IO)
    );
    assert_took(began, 1);
    drop(direct);
    rig.client.wait_lost();
}

fn end_a_single_connection(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let rig = stuck(Plan::new(1 << 20).timeout(1).transport(transport));
        assert_read_times_out(rig, 4096);
    }
    guest.expect_logged("Connection timed out", "connection 0 timed out");
    assert_usable(0);
}

fn end_writes_flushes_and_trims_too(_: &Guest) {
    for kind in ["write", "flush", "trim"] {
        let mut rig = stuck(Plan::new(1 << 20).timeout(1));
        let direct = rig.direct();
        let began = Instant::now();
        let answer = match kind {
            "write" => errno(direct.write_all_at(&Buffer::new(4096), 0)),
            "flush" => errno(direct.sync_all()),
            _ => ioctl_pointer(&direct, BLKDISCARD, &mut [0, 4096_u64]).map(drop),
        };
        assert_eq!(answer, Err(Errno::IO), "{kind}");
        assert_took(began, 1);
        drop(direct);
        rig.client.wait_lost();
    }
}

fn end_many_requests_at_once(_: &Guest) {
    let mut rig = stuck(Plan::new(4 << 20).timeout(1));
    let began = Instant::now();
    thread::scope(|scope| {
        for index in 0..32 {
            let direct = rig.direct();
            scope.spawn(move || {
                let read = direct.read_exact_at(&mut Buffer::new(4096), index * 65536);
                assert_eq!(errno(read), Err(Errno::IO));
            });
        }
    });
    assert_took(began, 1);
    rig.client.wait_lost();
    assert_usable(0);
}

fn of_a_slow_server_are_not_reached(_: &Guest) {
    let mut rig = Plan::new(1 << 20).timeout(2).attach();
    rig.server.script(|conn, request| {
        thread::sleep(Duration::from_millis(900));
        conn.serve(request)
    });
    let direct = rig.direct();
    for _ in 0..4 {
        direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
    }
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

/// The first request that comes is answered only when it is too late; all others at once.
fn first_is_late(rig: &Rig) {
    let seen = AtomicBool::new(false);
    rig.server.script(move |conn, request| {
        if !seen.swap(true, Ordering::SeqCst) {
            thread::sleep(Duration::from_secs(3));
        }
        conn.serve(request)
    });
}

fn move_requests_to_another_connection(guest: &Guest) {
    let mut rig = Plan::new(1 << 20).timeout(1).connections(2).attach();
    store_pattern(&rig.server, 1, 0, 4096);
    first_is_late(&rig);
    let direct = rig.direct();
    let began = Instant::now();
    let mut back = Buffer::new(4096);
    direct.read_exact_at(&mut back, 0).unwrap();
    assert_took(began, 1);
    assert_pattern(1, 0, &back);
    let requests = rig.server.requests();
    assert_eq!(requests.len(), 2);
    assert_ne!(requests[0].connection, requests[1].connection);
    assert_ne!(requests[0].cookie, requests[1].cookie);
    let ended = wait_until(Duration::from_secs(5), || rig.server.living() == 1);
    assert!(ended.is_ok(), "the stuck connection was ended");
    guest.expect_logged(
        "Connection timed out, retrying (2/2 alive)",
        "timed out, retrying (1/2 alive)",
    );
    // A write next, over what is left.
    direct.write_all_at(&back, 8192).unwrap();
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
}

fn of_all_connections_end_the_device(_: &Guest) {
    let mut rig = stuck(Plan::new(1 << 20).timeout(1).connections(2));
    let direct = rig.direct();
    assert_eq!(
        errno(direct.read_exact_at(&mut Buffer::new(4096), 0)),
        Err(Errno::IO)
    );
    drop(direct);
    assert_eq!(
        rig.server.requests_of(Command::Read).len(),
        2,
        "each was tried"
    );
    rig.client.wait_lost();
    assert_usable(0);
}

fn of_0_wait_and_warn(guest: &Guest) {
    let mut rig = Plan::new(1 << 20).timeout(0).attach();
    // The block layer is to ask after a second, not after 30.
    fs::write("/sys/block/nbd0/queue/io_timeout", "1000").unwrap();
    rig.server.script(|conn, request| {
        // It asks every second or two.
        thread::sleep(Duration::from_secs(7));
        conn.serve(request)
    });
    let direct = rig.direct();
    direct.read_exact_at(&mut Buffer::new(4096), 8192).unwrap();
    drop(direct);
    guest.expect_logged(
        "control (read@8192,4096B). Runtime 1 seconds",
        "possible stuck request: read of 4096 bytes at 8192",
    );
    // It asks again and again.
    let log = guest.log();
    let warnings = log
        .iter()
        .filter(|line| line.contains("ossible stuck request"));
    assert!(warnings.count() > 1);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Where there is another connection, the block layer's own time is up some time.
fn of_0_move_requests_to_another_connection(_: &Guest) {
    let mut rig = Plan::new(1 << 20).connections(2).attach();
    fs::write("/sys/block/nbd0/queue/io_timeout", "1000").unwrap();
    let seen = AtomicBool::new(false);
    rig.server.script(
        move |conn, request| match seen.swap(true, Ordering::SeqCst) {
            false => conn.stall(),
            true => conn.serve(request),
        },
    );
    let began = Instant::now();
    let direct = rig.direct();
    direct
        .read_exact_at(&mut Buffer::new(4096), 0)
        .expect("to read");
    assert_took(began, 1);
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn can_be_set_while_connected(_: &Guest) {
    let mut rig = stuck(Plan::new(1 << 20).timeout(0));
    let direct = rig.direct();
    assert_eq!(ioctl_number(&direct, SET_TIMEOUT, 1), Ok(0));
    assert_eq!(rig.sysfs("queue/io_timeout"), "1000");
    let began = Instant::now();
    assert_eq!(
        errno(direct.read_exact_at(&mut Buffer::new(4096), 0)),
        Err(Errno::IO)
    );
    assert_took(began, 1);
    drop(direct);
    rig.client.wait_lost();
}

/// The server sends this much of the reply to a read of 64 KiB, and no more.
fn stuck_after(len: usize) -> Rig {
    let rig = Plan::new(1 << 20).timeout(1).attach();
    rig.server.script(move |conn, request| {
        let reply = conn.answer(request)?;
        conn.send(&reply[..len])?;
        conn.stall()
    });
    rig
}

fn in_the_middle_of_a_header(_: &Guest) {
    assert_read_times_out(stuck_after(7), 64 * KIB);
    assert_usable(0);
}

fn in_the_middle_of_the_data(guest: &Guest) {
    for len in [0, 40_000] {
        let mut rig = stuck_after(REPLY_LEN + len);
        thread::scope(|scope| {
            let direct = rig.direct();
            let read =
                scope.spawn(move || errno(direct.read_exact_at(&mut Buffer::new(64 * KIB), 0)));
            let ended = wait_until(Duration::from_secs(4), || read.is_finished()).is_ok();
            match guest.expected("stuck-data-times-out") {
                Driver::Nbd => assert!(!ended),
                Driver::Rnbd => assert!(ended, "{len} bytes of data came, then nothing"),
            }
            rig.server.kill();
            assert_eq!(read.join().unwrap(), Err(Errno::IO));
        });
        rig.client.wait_lost();
    }
    assert_usable(0);
}

fn are_not_reached_while_data_trickles_in(_: &Guest) {
    let mut rig = Plan::new(1 << 20)
        .timeout(1)
        .transport(Transport::Tcp4)
        .attach();
    rig.server.script(|conn, request| {
        let reply = conn.answer(request)?;
        conn.send(&reply[..REPLY_LEN])?;
        for part in reply[REPLY_LEN..].chunks(8 * KIB) {
            thread::sleep(Duration::from_millis(500));
            conn.send(part)?;
        }
        Ok(())
    });
    let direct = rig.direct();
    direct.read_exact_at(&mut Buffer::new(64 * KIB), 0).unwrap();
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn of_a_server_that_does_not_read(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let plan = Plan::new(16 << 20)
            .timeout(1)
            .transport(transport)
            .send_buffer(16 * KIB);
        let mut rig = stuck(plan);
        let direct = rig.direct();
        let began = Instant::now();
        let write = direct.write_all_at(&Buffer::new(8192 * KIB), 0);
        assert_eq!(errno(write), Err(Errno::IO), "{transport:?}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(8), "{took:?}");
        drop(direct);
        rig.client.wait_lost();
    }
    assert_usable(0);
}

fn of_a_server_that_does_not_read_move_writes_to_another_connection(_: &Guest) {
    let mut rig = Plan::new(16 << 20)
        .timeout(1)
        .connections(2)
        .send_buffer(16 * KIB)
        .attach();
    let seen = AtomicBool::new(false);
    rig.server.script(move |conn, request| {
        if seen.swap(true, Ordering::SeqCst) {
            conn.serve(request)
        } else {
            conn.stall()
        }
    });
    let direct = rig.direct();
    let data = Buffer::filled(1024 * KIB, |data| pattern(2, 0, data));
    direct.write_all_at(&data, 0).unwrap();
    drop(direct);
    assert!(rig.server.peek(0, data.len()) == *data);
    assert_eq!(rig.disconnect(), Ok(0));
}
