// SPDX-License-Identifier: GPL-2.0

//! Several connections to one server.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::device::{self, Plan, Rig, assert_pattern, errno, pattern, store_pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, run_on, wait_until};
use crate::proto::{self, Command};
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(each_connection_is_a_hardware_queue),
        test!(each_processor_uses_its_own_connection),
        test!(more_connections_than_processors),
        test!(connections_can_differ_in_number_each_time),
        test!(a_dead_connection_is_replaced_by_another),
        test!(requests_of_a_dead_connection_go_to_another),
        test!(writes_of_a_dead_connection_go_to_another),
        test!(half_an_answer_is_asked_for_again),
        test!(every_tag_is_in_flight),
        test!(all_but_one_die_under_load),
        test!(when_all_are_dead_requests_fail),
        test!(a_bad_reply_costs_only_its_connection),
        test!(a_reply_on_another_connection_is_not_taken),
        test!(a_cookie_with_another_spelling_is_not_taken),
    ]
}

fn hardware_queues(index: u32) -> usize {
    fs::read_dir(format!("/sys/block/nbd{index}/mq"))
        .unwrap()
        .count()
}

/// Lets the calling thread run only where the block layer uses this connection.
fn move_to(connection: usize) {
    let processors = device::sysfs(0, &format!("mq/{connection}/cpu_list"));
    let first = processors.split(',').next().unwrap();
    run_on(first.trim().parse().expect("a processor"));
}

fn read_over(connection: usize, device: &File) {
    thread::scope(|scope| {
        scope.spawn(|| {
            move_to(connection);
            device.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
        });
    });
}

fn each_connection_is_a_hardware_queue(_: &Guest) {
    let mut rig = Plan::new(1 << 20).connections(2).attach();
    assert_eq!(hardware_queues(0), 2);
    assert_eq!(rig.disconnect(), Ok(0));
}

fn each_processor_uses_its_own_connection(_: &Guest) {
    let rig = Plan::new(1 << 20).connections(2).attach();
    let direct = rig.direct();
    for connection in [0, 1, 0, 1] {
        rig.server.forget_requests();
        read_over(connection, &direct);
        assert_eq!(rig.server.requests()[0].connection, connection);
    }
}

fn more_connections_than_processors(_: &Guest) {
    let mut rig = Plan::new(1 << 20).connections(5).attach();
    assert_eq!(
        hardware_queues(0),
        thread::available_parallelism().unwrap().get()
    );
    rig.direct()
        .read_exact_at(&mut Buffer::new(4096), 0)
        .unwrap();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn connections_can_differ_in_number_each_time(_: &Guest) {
    for connections in [1, 2, 1, 4, 2, 1] {
        let mut rig = Plan::new(1 << 20).connections(connections).attach();
        assert_eq!(hardware_queues(0), connections.min(2));
        rig.direct()
            .read_exact_at(&mut Buffer::new(4096), 0)
            .unwrap();
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

fn a_dead_connection_is_replaced_by_another(_: &Guest) {
    for (transport, victim) in [(Transport::Tcp4, 0), (Transport::Unix, 1)] {
        let mut rig = Plan::new(1 << 20)
            .connections(2)
            .transport(transport)
            .attach();
        rig.server.kill_connection(victim);
        thread::sleep(Duration::from_millis(100));
        rig.server.forget_requests();
        let direct = rig.direct();
        for connection in 0..2 {
            read_over(connection, &direct);
        }
        drop(direct);
        let used: HashSet<usize> = rig
            .server
            .requests()
            .iter()
            .map(|request| request.connection)
            .collect();
        assert_eq!(used, HashSet::from([1 - victim]));
        assert!(
            rig.client.still_runs_after(Duration::from_millis(10)),
            "one is left"
        );
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

/// The connection that sees the first request of this kind dies of it.
fn first_of_kind_kills(rig: &Rig, command: Command) {
    let seen = AtomicBool::new(false);
    rig.server.script(move |conn, request| {
        if request.command == command && !seen.swap(true, Ordering::SeqCst) {
            return conn.close();
        }
        conn.serve(request)
    });
}

/// nbd.ko leaves requests that were sent on a dead connection to their timeout.
fn assert_failed_over(guest: &Guest, timeout_seconds: u64, began: Instant) {
    let took = began.elapsed();
    match guest.expected("failover-is-immediate") {
        Driver::Nbd => assert!(
            took.as_secs_f32() > timeout_seconds as f32 * 0.7,
            "{took:?}"
        ),
        Driver::Rnbd => assert!(
            took.as_secs_f32() < timeout_seconds as f32 * 0.7,
            "{took:?}"
        ),
    }
}

fn requests_of_a_dead_connection_go_to_another(guest: &Guest) {
    const TIMEOUT: u64 = 2;
    let mut rig = Plan::new(1 << 20).connections(2).timeout(TIMEOUT).attach();
    store_pattern(&rig.server, 1, 0, 4096);
    first_of_kind_kills(&rig, Command::Read);
    let direct = rig.direct();
    let began = Instant::now();
    let mut back = Buffer::new(4096);
    direct.read_exact_at(&mut back, 0).unwrap();
    assert_failed_over(guest, TIMEOUT, began);
    assert_pattern(1, 0, &back);
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn writes_of_a_dead_connection_go_to_another(guest: &Guest) {
    const TIMEOUT: u64 = 2;
    let mut rig = Plan::new(1 << 20).connections(2).timeout(TIMEOUT).attach();
    let seen = AtomicBool::new(false);
    rig.server.script(move |conn, request| {
        if seen.swap(true, Ordering::SeqCst) {
            return conn.serve(request);
        }
        conn.read_data(request)?;
        conn.close()
    });
    let direct = rig.direct();
    let data = Buffer::filled(64 << 10, |data| pattern(2, 0, data));
    let began = Instant::now();
    direct.write_all_at(&data, 0).unwrap();
    assert_failed_over(guest, TIMEOUT, began);
    drop(direct);
    assert_pattern(2, 0, &rig.server.peek(0, data.len()));
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn half_an_answer_is_asked_for_again(guest: &Guest) {
    const TIMEOUT: u64 = 2;
    let mut rig = Plan::new(1 << 20).connections(2).timeout(TIMEOUT).attach();
    store_pattern(&rig.server, 1, 0, 4096);
    let seen = AtomicBool::new(false);
    rig.server.script(move |conn, request| {
        if seen.swap(true, Ordering::SeqCst) {
            return conn.serve(request);
        }
        let reply = conn.answer(request)?;
        conn.send(&reply[..1000])?;
        conn.close()
    });
    let direct = rig.direct();
    let began = Instant::now();
    let mut back = Buffer::new(4096);
    direct.read_exact_at(&mut back, 0).expect("to read");
    assert_failed_over(guest, TIMEOUT, began);
    assert_pattern(1, 0, &back);
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

/// On each hardware queue, as many requests as it has tags. All are answered; the next time, all fail.
fn every_tag_is_in_flight(_: &Guest) {
    const TAGS: usize = 128;
    const QUEUES: usize = 2;
    let rig = Plan::new(4 << 20).connections(QUEUES).timeout(20).attach();
    fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
    // Far apart, so that they are not merged.
    let offsets: Vec<u64> = (0..(TAGS * QUEUES) as u64).map(|nth| nth * 8192).collect();
    for &offset in &offsets {
        let mut stored = [0; 512];
        pattern(offset, offset, &mut stored);
        rig.server.poke(offset, &stored);
    }
    for are_answered in [true, false] {
        rig.server.script(move |conn, request| {
            conn.defer(request)?;
            while conn.deferred() < TAGS {
                let next = conn.next_request()?;
                conn.defer(&next)?;
            }
            if are_answered {
                conn.send_deferred()
            } else {
                conn.close()
            }
        });
        let direct = rig.direct();
        // No reply comes before the last request, and so many threads take seconds on the debug kernel.
        let ready = Barrier::new(TAGS * QUEUES);
        thread::scope(|scope| {
            for (queue, offsets) in offsets.chunks(TAGS).enumerate() {
                for &offset in offsets {
                    let (direct, ready) = (&direct, &ready);
                    scope.spawn(move || {
                        move_to(queue);
                        ready.wait();
                        let mut data = Buffer::new(512);
                        let read = errno(direct.read_exact_at(&mut data, offset));
                        if are_answered {
                            assert_eq!(read, Ok(()));
                            assert_pattern(offset, offset, &data);
                        } else {
                            assert_eq!(read, Err(Errno::IO));
                        }
                    });
                }
            }
        });
    }
}

fn all_but_one_die_under_load(_: &Guest) {
    let mut rig = Plan::new(16 << 20)
        .connections(4)
        .timeout(2)
        .transport(Transport::Tcp4)
        .attach();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..4 {
            let (direct, done) = (rig.direct(), &done);
            scope.spawn(move || {
                let mut data = Buffer::new(16 << 10);
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    let offset = (thread * 256 + round % 256) * data.len() as u64;
                    pattern(round, offset, &mut data);
                    direct.write_all_at(&data, offset).unwrap();
                    data.fill(0);
                    direct.read_exact_at(&mut data, offset).unwrap();
                    assert_pattern(round, offset, &data);
                    round += 1;
                }
            });
        }
        for victim in [1, 0, 3] {
            thread::sleep(Duration::from_millis(300));
            rig.server.kill_connection(victim);
        }
        thread::sleep(Duration::from_millis(300));
        done.store(true, Ordering::Relaxed);
    });
    assert!(rig.client.still_runs_after(Duration::from_millis(10)));
    assert_eq!(rig.disconnect(), Ok(0));
}

fn when_all_are_dead_requests_fail(_: &Guest) {
    let mut rig = Plan::new(1 << 20).connections(2).attach();
    let direct = rig.direct();
    rig.server.kill();
    rig.client.wait_lost();
    let read = direct.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(errno(read), Err(Errno::IO));
    drop(direct);
    device::assert_usable(0);
}

fn a_bad_reply_costs_only_its_connection(guest: &Guest) {
    let mut rig = Plan::new(1 << 20).connections(2).timeout(2).attach();
    let seen = AtomicBool::new(false);
    rig.server.script(move |conn, request| {
        if seen.swap(true, Ordering::SeqCst) {
            return conn.serve(request);
        }
        conn.send(&proto::reply(0x1234_5678, 0, request.cookie))?;
        conn.stall()
    });
    rig.direct()
        .read_exact_at(&mut Buffer::new(4096), 0)
        .unwrap();
    guest.expect_logged("Wrong magic (0x12345678)", "wrong magic (0x12345678)");
    let one_left = wait_until(device::SOON, || rig.server.living() == 1);
    assert!(one_left.is_ok());
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

fn a_reply_on_another_connection_is_not_taken(guest: &Guest) {
    use std::sync::Mutex;
    let mut rig = Plan::new(1 << 20).connections(2).timeout(2).attach();
    // The first request is answered by the connection that gets the second.
    let kept: Arc<Mutex<Option<Vec<u8>>>> = Arc::default();
    let seen = AtomicBool::new(false);
    rig.server.script(move |conn, request| {
        let reply = conn.answer(request)?;
        if !seen.swap(true, Ordering::SeqCst) {
            *kept.lock().unwrap() = Some(reply);
            return conn.stall();
        }
        if let Some(foreign) = kept.lock().unwrap().take() {
            return conn.send(&foreign);
        }
        conn.send(&reply)
    });
    let direct = rig.direct();
    thread::scope(|scope| {
        scope.spawn(|| {
            // One of the two connections ends for it, the other for its timeout: this read may
            // fail, but must not be answered by the wrong side and then go on.
            let _ = direct.read_exact_at(&mut Buffer::new(4096), 0);
        });
        rig.server.wait_for_command(Command::Read);
        let other = 1 - rig.server.requests()[0].connection;
        thread::scope(|scope| {
            scope.spawn(|| {
                move_to(other);
                let _ = direct.read_exact_at(&mut Buffer::new(4096), 8192);
            });
        });
    });
    guest.expect_logged("from different sock", "sent on another connection");
    drop(direct);
    rig.client.wait_lost();
    device::assert_usable(0);
}

/// Half of a cookie is a hardware queue and a tag. One tag more than a queue has is not the next queue's
/// first.
fn a_cookie_with_another_spelling_is_not_taken(guest: &Guest) {
    const TAGS: u64 = 128;
    const FIRST_OF_THE_SECOND_QUEUE: u64 = 1 << 16;
    let mut rig = Plan::new(1 << 20).connections(2).timeout(2).attach();
    // Of four tags each is used soon.
    fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
    fs::write("/sys/block/nbd0/queue/nr_requests", "4").unwrap();
    let told = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&told);
    rig.server.script(move |conn, request| {
        let tag = request.cookie as u32;
        if u64::from(tag) != FIRST_OF_THE_SECOND_QUEUE || done.swap(true, Ordering::SeqCst) {
            // So that several are in flight.
            thread::sleep(Duration::from_millis(2));
            return conn.serve(request);
        }
        let cookie = request.cookie - FIRST_OF_THE_SECOND_QUEUE + TAGS;
        conn.send(&proto::reply(proto::REPLY_MAGIC, 0, cookie))?;
        conn.send(&conn.stored(request))?;
        conn.stall()
    });
    let direct = rig.direct();
    thread::scope(|scope| {
        for offset in (0..8).map(|index| index * 8192) {
            let (direct, told) = (&direct, &told);
            scope.spawn(move || {
                move_to(1);
                let began = Instant::now();
                while !told.load(Ordering::SeqCst) && began.elapsed() < device::SOON {
                    direct
                        .read_exact_at(&mut Buffer::new(512), offset)
                        .expect("to read");
                }
            });
        }
    });
    assert!(told.load(Ordering::SeqCst), "there was no such request");
    guest.expect_logged("Unexpected reply", "unexpected reply");
    let one_left = wait_until(device::SOON, || rig.server.living() == 1);
    assert!(one_left.is_ok());
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}
