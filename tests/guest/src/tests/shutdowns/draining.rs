// SPDX-License-Identifier: GPL-2.0

//! Requests that are in flight, or are not sent yet, when the server starts to shut down.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{
    DIFFERENCE, ESHUTDOWN, MIB, commands_on, failures, hold_back, refusal, refuse_one_of_three,
    wait_for_goodbye, wait_for_three_requests, while_reading,
};
use crate::debug_kernel;
use crate::device::{self, SOON, assert_pattern, errno, pattern, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, complain, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::proto::Command;
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(replies_in_flight_are_awaited),
        test!(a_write_is_sent_to_its_end),
        test!(what_was_not_begun_goes_elsewhere),
        test!(a_server_that_says_no_more_is_replaced),
        test!(a_server_that_says_no_more_times_out),
    ]
}

/// The state of each connection, as debugfs shows it.
pub fn connection_states(index: u32) -> Vec<String> {
    let path = format!("{}/connections", device::debugfs(index));
    let shown = fs::read_to_string(path).unwrap();
    let states = shown.lines().filter_map(|line| line.split(' ').nth(1));
    states.map(str::to_owned).collect()
}

/// Replies that still come are used, and the goodbye is sent after the last one.
fn replies_in_flight_are_awaited(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let setup = Setup::new(MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        hold_back(&link.server, 6, |conn, requests| {
            conn.send(&refusal(&requests[0]))?;
            if conn.readable_within(Duration::from_millis(300))? {
                complain("something came while replies were outstanding".into());
            }
            conn.send(&refusal(&requests[5]))?;
            for request in &requests[1..5] {
                let data = conn.stored(request);
                conn.send(&crate::server::ok(request))?;
                let (first, rest) = data.split_at(10_000);
                conn.send(first)?;
                if conn.readable_within(Duration::from_millis(100))? {
                    complain("something came in the middle of a reply".into());
                }
                conn.send(rest)?;
            }
            Ok(())
        });
        let expected = guest.expected(DIFFERENCE);
        let results = while_reading(&link, 6, || {
            if expected == Driver::Rnbd {
                assert_eq!(news.expect_dead_link(), link.index);
                wait_for_goodbye(&link.server, 0);
                assert_eq!(link.revive(), Ok(()));
            }
        });
        match expected {
            Driver::Nbd => assert_eq!(failures(&results), 2),
            Driver::Rnbd => {
                assert_eq!(failures(&results), 0);
                assert_eq!(commands_on(&link.server, 1), [Command::Read; 2]);
                assert_eq!(news.dead_link(), None);
            }
        }
    }
}

/// Some servers refuse a write before they have read its data. The data is still sent to its end.
fn a_write_is_sent_to_its_end(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let setup = Setup::new(16 * MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        link.server.script(|conn, request| {
            if conn.index > 0 || request.command != Command::Write {
                return conn.serve(request);
            }
            conn.send(&refusal(request))?;
            thread::sleep(Duration::from_millis(200));
            conn.read_data(request).map(drop)
        });
        let direct = link.direct();
        let data = Buffer::filled(8 << 20, |data| pattern(3, 0, data));
        thread::scope(|scope| {
            let writer = scope.spawn(|| errno(direct.write_all_at(&data, 0)));
            if guest.expected(DIFFERENCE) == Driver::Nbd {
                assert_eq!(writer.join().unwrap(), Err(Errno::IO));
                return;
            }
            assert_eq!(news.expect_dead_link(), link.index);
            wait_for_goodbye(&link.server, 0);
            assert_eq!(link.revive(), Ok(()));
            assert_eq!(writer.join().unwrap(), Ok(()));
            assert_pattern(3, 0, &link.server.peek(0, data.len()));
        });
    }
}

/// The socket is full. Only what is in it, and what one call sends next, still goes over this connection.
fn what_was_not_begun_goes_elsewhere(guest: &Guest) {
    const WRITES: u64 = 120;
    const LEN: usize = 64 << 10;
    for transport in [Transport::Tcp4, Transport::Unix] {
        let setup = Setup::new(16 * MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        let read = Mutex::new(None);
        link.server.script(move |conn, request| {
            if conn.index > 0 {
                return conn.serve(request);
            }
            if request.command == Command::Read {
                *read.lock().unwrap() = Some(request.clone());
                return Ok(());
            }
            if let Some(read) = read.lock().unwrap().take() {
                thread::sleep(debug_kernel::patient(Duration::from_secs(1)));
                conn.send(&refusal(&read))?;
                thread::sleep(debug_kernel::patient(Duration::from_millis(300)));
            }
            conn.refuse(request, ESHUTDOWN)
        });
        let expected = guest.expected(DIFFERENCE);
        let direct = link.direct();
        let failed = thread::scope(|scope| {
            let direct = &direct;
            let reader = scope.spawn(|| read_page(direct, 15 * MIB));
            link.server.wait_for_command(Command::Read);
            let write = |number: u64| {
                let offset = number * 2 * LEN as u64;
                let data = Buffer::filled(LEN, |data| pattern(number, offset, data));
                errno(direct.write_all_at(&data, offset))
            };
            let writers: Vec<_> = (0..WRITES)
                .map(|number| scope.spawn(move || write(number)))
                .collect();
            if expected == Driver::Rnbd {
                assert_eq!(news.expect_dead_link(), link.index);
                wait_for_goodbye(&link.server, 0);
                assert_eq!(link.revive(), Ok(()));
            }
            let all = writers.into_iter().chain([reader]);
            let results: Vec<_> = all.map(|thread| thread.join().unwrap()).collect();
            failures(&results)
        });
        if expected == Driver::Nbd {
            assert!(failed > 0);
            continue;
        }
        assert_eq!(failed, 0);
        let begun = commands_on(&link.server, 0).len() as u64 - 2;
        assert!(begun < WRITES - 10, "{begun} writes were sent");
        for number in 0..WRITES {
            let offset = number * 2 * LEN as u64;
            assert_pattern(number, offset, &link.server.peek(offset, LEN));
        }
    }
}

fn a_server_that_says_no_more_is_replaced(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let setup = Setup::new(MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        refuse_one_of_three(&link.server);
        let expected = guest.expected(DIFFERENCE);
        let results = while_reading(&link, 3, || {
            wait_for_three_requests(&link.server);
            if expected == Driver::Nbd {
                thread::sleep(Duration::from_millis(300));
                assert_eq!(link.revive(), Ok(()));
                assert_eq!(news.dead_link(), None);
                return link.disconnect().unwrap();
            }
            assert_eq!(news.expect_dead_link(), link.index);
            assert_eq!(connection_states(link.index), ["state=draining"]);
            let unusable = Setup::change(link.index).sockets([{
                let (ended, peer) = std::os::unix::net::UnixStream::pair().unwrap();
                drop(peer);
                ended.into()
            }]);
            assert_eq!(link.netlink.reconfigure(&unusable), Err(Errno::NOTCONN));
            assert_eq!(connection_states(link.index), ["state=draining"]);
            let began = Instant::now();
            assert_eq!(link.revive(), Ok(()));
            assert!(began.elapsed() < Duration::from_secs(2), "it waited");
        });
        match expected {
            Driver::Nbd => assert_eq!(failures(&results), 3),
            Driver::Rnbd => {
                assert_eq!(failures(&results), 0);
                assert_eq!(connection_states(link.index), ["state=alive"]);
                assert_eq!(news.dead_link(), None, "a second message");
            }
        }
    }
}

fn a_server_that_says_no_more_times_out(guest: &Guest) {
    let setup = Setup::new(MIB).dead_timeout(20).timeout(1);
    let link = setup.attach().settle();
    let news = Netlink::listen();
    refuse_one_of_three(&link.server);
    let results = while_reading(&link, 3, || {
        wait_for_three_requests(&link.server);
        assert_eq!(news.expect_dead_link(), link.index);
        // The other two time out after a second.
        let ended = wait_until(SOON, || link.server.living() == 0);
        assert!(ended.is_ok(), "the connection lives on");
        // nbd.ko can mistake the end of the old connection for the end of the new one.
        thread::sleep(Duration::from_millis(300));
        assert_eq!(link.revive(), Ok(()));
    });
    match guest.expected(DIFFERENCE) {
        Driver::Nbd => assert!(failures(&results) > 0),
        Driver::Rnbd => assert_eq!(failures(&results), 0),
    }
    assert_eq!(news.dead_link(), None, "a second message");
}
