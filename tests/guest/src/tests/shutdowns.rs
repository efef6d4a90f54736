// SPDX-License-Identifier: GPL-2.0

//! Servers that shut down in an orderly way: they answer commands with ESHUTDOWN.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::netlink::{move_data, read_one};
use crate::debug_kernel;
use crate::device::{Plan, SOON, USUAL_FLAGS, assert_pattern, assert_usable, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, complain, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::sh;
use crate::proto::{self, CAN_MULTI_CONN, Command, Request};
use crate::server::{Conn, Server, Transport};
use crate::sys::{Buffer, SysResult, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(the_only_connection_is_replaced),
        test!(another_connection_takes_over),
        test!(an_ioctl_session_ends),
        test!(replies_in_flight_are_awaited),
        test!(a_write_is_sent_to_its_end),
        test!(what_was_not_begun_goes_elsewhere),
        test!(a_server_that_says_no_more_is_replaced),
        test!(a_server_that_says_no_more_times_out),
        test!(a_disconnect_while_it_drains),
        test!(clear_sock_while_it_drains),
        test!(nbd_disconnect_while_it_drains),
        test!(after_a_disconnect),
        test!(one_command_is_refused_twice),
        test!(everything_is_refused),
        test!(one_server_after_the_other),
    ]
}

const MIB: u64 = 1 << 20;
const ESHUTDOWN: u32 = 108;
const DIFFERENCE: &str = "shutting-down-is-not-an-error";

/// The way of each kind of socket: its callback, its sender, and the worker.
const TRANSPORTS: [Transport; 3] = [Transport::Tcp4, Transport::Unix, Transport::Tls];

/// The first connections shut down at the first command, the others are honest.
fn first_shut_down(count: usize) -> impl Fn(&mut Conn, &Request) -> io::Result<()> {
    move |conn, request| {
        if conn.index < count {
            conn.refuse(request, ESHUTDOWN)
        } else {
            conn.serve(request)
        }
    }
}

/// What came by one connection.
fn seen_on(server: &Server, connection: usize) -> Vec<Command> {
    let requests = server.requests().into_iter();
    let ours = requests.filter(|request| request.connection == connection);
    ours.map(|request| request.command).collect()
}

fn wait_for_goodbye(server: &Server, connection: usize) {
    server.wait_for("a goodbye", |requests| {
        let mut ours = requests.iter().filter(|r| r.connection == connection);
        ours.any(|request| request.command == Command::Disconnect)
    });
}

/// What debugfs says of each connection.
fn states(index: u32) -> Vec<String> {
    let path = format!("/sys/kernel/debug/nbd/nbd{index}/connections");
    let shown = fs::read_to_string(path).unwrap();
    let states = shown.lines().filter_map(|line| line.split(' ').nth(1));
    states.map(str::to_owned).collect()
}

fn the_only_connection_is_replaced(guest: &Guest) {
    sh("modprobe tls");
    for transport in TRANSPORTS {
        let setup = Setup::new(MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        let direct = link.direct();
        link.server.script(first_shut_down(1));
        if guest.expected(DIFFERENCE) == Driver::Nbd {
            assert_eq!(read_one(&direct, 0), Err(Errno::IO));
            assert_eq!(news.dead_link(), None);
            link.server.be_honest();
            assert_eq!(read_one(&direct, 0), Ok(()));
            continue;
        }
        thread::scope(|scope| {
            let reader = scope.spawn(|| read_one(&direct, 0));
            assert_eq!(news.expect_dead_link(), link.index);
            wait_for_goodbye(&link.server, 0);
            assert!(!reader.is_finished(), "it was to wait");
            assert_eq!(link.revive(), Ok(()));
            assert_eq!(reader.join().unwrap(), Ok(()));
        });
        move_data(&direct, 0, 1);
        let seen = seen_on(&link.server, 0);
        assert_eq!(seen, [Command::Read, Command::Disconnect]);
        assert_eq!(news.dead_link(), None, "one is enough");
    }
}

fn two_connections() -> Link {
    let setup = Setup::new(4 * MIB).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    setup
        .attach_over(&[Transport::Tcp4, Transport::Unix])
        .settle()
}

fn another_connection_takes_over(guest: &Guest) {
    for victim in [0, 1] {
        let link = two_connections();
        let news = Netlink::listen();
        link.server.script(move |conn, request| {
            if conn.index == victim {
                conn.refuse(request, ESHUTDOWN)
            } else {
                conn.serve(request)
            }
        });
        let failed = AtomicUsize::new(0);
        thread::scope(|scope| {
            for worker in 0..8 {
                let (direct, failed) = (link.direct(), &failed);
                scope.spawn(move || {
                    crate::harness::run_on(worker % 2);
                    for round in 0..20 {
                        let offset = (worker as u64 * 20 + round) * 8192;
                        let written = direct.write_all_at(&Buffer::new(8192), offset);
                        failed.fetch_add(usize::from(written.is_err()), Ordering::Relaxed);
                    }
                });
            }
        });
        let failed = failed.into_inner();
        if guest.expected(DIFFERENCE) == Driver::Nbd {
            assert!(failed > 0);
            continue;
        }
        assert_eq!(failed, 0);
        assert_eq!(news.expect_dead_link(), link.index);
        wait_for_goodbye(&link.server, victim);
        let seen = seen_on(&link.server, victim);
        assert_eq!(seen.last(), Some(&Command::Disconnect), "{seen:?}");
        let ended = wait_until(SOON, || link.server.living() == 1);
        assert!(ended.is_ok());
        assert_eq!(news.dead_link(), None, "one is enough");
    }
}

/// Nothing is there to wait for.
fn an_ioctl_session_ends(guest: &Guest) {
    let mut rig = Plan::new(MIB).attach();
    let direct = rig.direct();
    rig.server.script(first_shut_down(1));
    assert_eq!(read_one(&direct, 0), Err(Errno::IO));
    match guest.expected(DIFFERENCE) {
        Driver::Nbd => {
            rig.server.be_honest();
            assert_eq!(read_one(&direct, 0), Ok(()));
        }
        Driver::Rnbd => {
            wait_for_goodbye(&rig.server, 0);
            let _ = rig.client.wait();
            assert_eq!(read_one(&direct, 0), Err(Errno::IO));
            let seen = seen_on(&rig.server, 0);
            assert_eq!(seen, [Command::Read, Command::Disconnect]);
        }
    }
    drop((direct, rig));
    assert_usable(0);
}

/// Requests that a script has kept back.
type Kept = Arc<Mutex<Vec<Request>>>;

/// Keeps the requests of connection 0 until there are `count`, and then lets `act` do something about
/// them. Other connections are honest.
fn keep(
    server: &Server,
    count: usize,
    act: impl Fn(&mut Conn, &[Request]) -> io::Result<()> + Send + Sync + 'static,
) -> Kept {
    let kept = Kept::default();
    let ours = Arc::clone(&kept);
    server.script(move |conn, request| {
        if conn.index > 0 {
            return conn.serve(request);
        }
        if request.command == Command::Write {
            conn.read_data(request)?;
        }
        let mut requests = ours.lock().unwrap();
        requests.push(request.clone());
        let all = requests.clone();
        drop(requests);
        if all.len() == count {
            act(conn, &all)
        } else {
            Ok(())
        }
    });
    kept
}

/// Reads 32 KiB each, with gaps, from threads of their own, until `meanwhile` has returned.
fn while_reading(link: &Link, readers: u64, meanwhile: impl FnOnce()) -> Vec<SysResult<()>> {
    const LEN: usize = 32 << 10;
    for reader in 0..readers {
        let offset = reader * 2 * LEN as u64;
        let mut stored = vec![0; LEN];
        pattern(1, offset, &mut stored);
        link.server.poke(offset, &stored);
    }
    let direct = link.direct();
    let read = |offset| {
        let mut back = Buffer::new(LEN);
        errno(direct.read_exact_at(&mut back, offset))?;
        assert_pattern(1, offset, &back);
        Ok(())
    };
    thread::scope(|scope| {
        let read = &read;
        let threads: Vec<_> = (0..readers)
            .map(|reader| scope.spawn(move || read(reader * 2 * LEN as u64)))
            .collect();
        meanwhile();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    })
}

fn failures(results: &[SysResult<()>]) -> usize {
    let failed = results.iter().filter(|result| result.is_err());
    failed.count()
}

fn refusal(request: &Request) -> [u8; proto::REPLY_LEN] {
    proto::reply(proto::REPLY_MAGIC, ESHUTDOWN, request.cookie)
}

/// What the server still does counts, and it hears the goodbye when it has done everything.
fn replies_in_flight_are_awaited(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let setup = Setup::new(MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        keep(&link.server, 6, |conn, requests| {
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
                assert_eq!(seen_on(&link.server, 1), [Command::Read; 2]);
                assert_eq!(news.dead_link(), None);
            }
        }
    }
}

/// Some servers answer before they have read the data; the stream stays whole all the same.
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

/// The socket is full. What is in it, and what one call is to send next, still comes; nothing else does.
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
            let reader = scope.spawn(|| read_one(direct, 15 * MIB));
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
        let begun = seen_on(&link.server, 0).len() as u64 - 2;
        assert!(begun < WRITES - 10, "{begun} writes were sent");
        for number in 0..WRITES {
            let offset = number * 2 * LEN as u64;
            assert_pattern(number, offset, &link.server.peek(offset, LEN));
        }
    }
}

/// Refuses the first of three commands, and says nothing more. nbd.ko has not understood: without help
/// the other two hang.
fn refuse_one_of_three(link: &Link) -> Kept {
    keep(&link.server, 3, |conn, requests| {
        conn.send(&refusal(&requests[0]))?;
        // It still reads.
        Ok(())
    })
}

fn wait_for_three(link: &Link) {
    link.server
        .wait_for("three reads", |requests| requests.len() >= 3);
}

fn a_server_that_says_no_more_is_replaced(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let setup = Setup::new(MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        refuse_one_of_three(&link);
        let expected = guest.expected(DIFFERENCE);
        let results = while_reading(&link, 3, || {
            wait_for_three(&link);
            if expected == Driver::Nbd {
                thread::sleep(Duration::from_millis(300));
                assert_eq!(link.revive(), Ok(()));
                assert_eq!(news.dead_link(), None);
                return link.disconnect().unwrap();
            }
            assert_eq!(news.expect_dead_link(), link.index);
            assert_eq!(states(link.index), ["state=draining"]);
            let unusable = Setup::change(link.index).sockets([{
                let (ended, peer) = std::os::unix::net::UnixStream::pair().unwrap();
                drop(peer);
                ended.into()
            }]);
            assert_eq!(link.netlink.reconfigure(&unusable), Err(Errno::NOTCONN));
            assert_eq!(states(link.index), ["state=draining"]);
            let began = Instant::now();
            assert_eq!(link.revive(), Ok(()));
            assert!(began.elapsed() < Duration::from_secs(2), "it waited");
        });
        match expected {
            Driver::Nbd => assert_eq!(failures(&results), 3),
            Driver::Rnbd => {
                assert_eq!(failures(&results), 0);
                assert_eq!(states(link.index), ["state=alive"]);
                assert_eq!(news.dead_link(), None, "one is enough");
            }
        }
    }
}

fn a_server_that_says_no_more_times_out(guest: &Guest) {
    let setup = Setup::new(MIB).dead_timeout(20).timeout(1);
    let link = setup.attach().settle();
    let news = Netlink::listen();
    refuse_one_of_three(&link);
    let results = while_reading(&link, 3, || {
        wait_for_three(&link);
        assert_eq!(news.expect_dead_link(), link.index);
        // The time of the others is up after a second.
        let ended = wait_until(SOON, || link.server.living() == 0);
        assert!(ended.is_ok(), "the connection lives on");
        // nbd.ko can take the end of the old connection for that of the new one.
        thread::sleep(Duration::from_millis(300));
        assert_eq!(link.revive(), Ok(()));
    });
    match guest.expected(DIFFERENCE) {
        Driver::Nbd => assert!(failures(&results) > 0),
        Driver::Rnbd => assert_eq!(failures(&results), 0),
    }
    assert_eq!(news.dead_link(), None, "one is enough");
}

fn a_disconnect_while_it_drains(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    refuse_one_of_three(&link);
    let results = while_reading(&link, 3, || {
        wait_for_three(&link);
        thread::sleep(Duration::from_millis(200));
        let began = Instant::now();
        assert_eq!(link.disconnect(), Ok(()));
        assert!(began.elapsed() < Duration::from_secs(2), "it waited");
    });
    assert_eq!(results, [Err(Errno::IO); 3]);
    link.wait_free();
}

/// A device with three reads in flight, of which one has been refused.
fn ioctl_session(act: impl FnOnce(&mut crate::device::Rig)) -> Vec<SysResult<()>> {
    let mut rig = Plan::new(MIB).attach();
    keep(&rig.server, 3, |conn, requests| {
        conn.send(&refusal(&requests[0]))
    });
    let results = thread::scope(|scope| {
        let readers = [0, 1, 2].map(|reader| {
            let direct = rig.direct();
            scope.spawn(move || read_one(&direct, reader * 65536))
        });
        rig.server
            .wait_for("three reads", |requests| requests.len() >= 3);
        let refused = wait_until(SOON, || readers.iter().any(|r| r.is_finished()));
        assert!(refused.is_ok(), "nobody may wait");
        act(&mut rig);
        readers.map(|reader| reader.join().unwrap())
    });
    let _ = rig.client.wait();
    drop(rig);
    assert_usable(0);
    results.to_vec()
}

fn clear_sock_while_it_drains(_: &Guest) {
    let results = ioctl_session(|rig| {
        assert_eq!(
            ioctl_number(rig.open_to_read(), proto::CLEAR_SOCK, 0),
            Ok(0)
        );
    });
    assert_eq!(results, [Err(Errno::IO); 3]);
}

/// The server is told at once, and once.
fn nbd_disconnect_while_it_drains(_: &Guest) {
    let results = ioctl_session(|rig| {
        for _ in 0..2 {
            let device = rig.open_to_read();
            assert_eq!(ioctl_number(device, proto::DISCONNECT, 0), Ok(0));
        }
        wait_for_goodbye(&rig.server, 0);
    });
    assert_eq!(results, [Err(Errno::IO); 3]);
}

/// As nbdkit does it: what is in flight when the goodbye comes is refused.
fn after_a_disconnect(_: &Guest) {
    let news = Netlink::listen();
    let mut rig = Plan::new(MIB).attach();
    rig.server.script(|conn, request| {
        let goodbye = conn.next_request()?;
        assert_eq!(goodbye.command, Command::Disconnect);
        conn.refuse(request, ESHUTDOWN)?;
        if conn.readable_within(Duration::from_millis(200))? && conn.next_request().is_ok() {
            complain("something came after the goodbye".into());
        }
        conn.close()
    });
    thread::scope(|scope| {
        let direct = rig.direct();
        let reader = scope.spawn(move || read_one(&direct, 0));
        rig.server.wait_for_command(Command::Read);
        assert_eq!(rig.disconnect(), Ok(0));
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    assert_eq!(news.dead_link(), None, "it was asked to end");
    drop(rig);
    assert_usable(0);
}

fn one_command_is_refused_twice(guest: &Guest) {
    // nbd.ko leaves what was in flight to its timeout.
    let setup = Setup::new(MIB).dead_timeout(20).timeout(1);
    let link = setup.attach().settle();
    let news = Netlink::listen();
    link.server.script(|conn, request| {
        if conn.index > 0 {
            return conn.serve(request);
        }
        conn.send(&[refusal(request), refusal(request)].concat())
    });
    let results = while_reading(&link, 3, || {
        assert_eq!(news.expect_dead_link(), link.index);
        assert_eq!(link.revive(), Ok(()));
    });
    match guest.expected(DIFFERENCE) {
        Driver::Nbd => assert!(failures(&results) > 0),
        Driver::Rnbd => assert_eq!(failures(&results), 0),
    }
    assert_eq!(news.dead_link(), None, "one is enough");
}

/// There is nobody else to ask, and no time to wait for somebody.
fn everything_is_refused(guest: &Guest) {
    let link = two_connections();
    let news = Netlink::listen();
    link.server.script(first_shut_down(2));
    let results = while_reading(&link, 12, || ());
    assert_eq!(results, [Err(Errno::IO); 12]);
    if guest.expected(DIFFERENCE) == Driver::Rnbd {
        for connection in [0, 1] {
            assert_eq!(news.expect_dead_link(), link.index);
            wait_for_goodbye(&link.server, connection);
        }
        assert_eq!(read_one(&link.direct(), 0), Err(Errno::IO));
        for _ in 0..2 {
            assert_eq!(link.revive(), Ok(()));
        }
        move_data(&link.direct(), 0, 1);
    }
    assert_eq!(news.dead_link(), None);
}

/// Each connection serves a few commands, and then shuts down in one way or another.
fn one_server_after_the_other(guest: &Guest) {
    if guest.expected(DIFFERENCE) == Driver::Nbd {
        // It fails requests and has no reason to look for another server.
        return;
    }
    let setup = Setup::new(16 * MIB)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .timeout(2)
        .dead_timeout(60);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    let link = link.settle();
    let news = Netlink::listen();
    let served: Arc<[AtomicUsize; 80]> = Arc::new([const { AtomicUsize::new(0) }; 80]);
    link.server.script(move |conn, request| {
        let Some(served) = served.get(conn.index) else {
            return conn.serve(request);
        };
        let already = served.fetch_add(1, Ordering::Relaxed);
        match (already < 10 + conn.index % 7, conn.index % 4) {
            (true, _) => conn.defer(request),
            // Some do not wait for the goodbye.
            (_, 3) if already > 20 => conn.close(),
            (_, 2) if already % 3 == 0 => conn.defer(request),
            _ => conn.refuse(request, ESHUTDOWN),
        }
    });
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for worker in 0..4 {
            let (direct, done) = (link.direct(), &done);
            scope.spawn(move || {
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    move_data(&direct, worker * 4 * MIB + ((round % 32) << 16), round);
                    round += 1;
                }
            });
        }
        let _done = Until(&done);
        let replace = |number: usize| {
            let socket = link.server.connect(TRANSPORTS[number % 2]);
            let setup = Setup::change(link.index).sockets([socket]);
            assert_eq!(link.netlink.reconfigure(&setup), Ok(()));
        };
        for connection in 2..60 {
            assert_eq!(news.expect_dead_link(), link.index);
            replace(connection);
        }
        link.server.be_honest();
        for connection in 0..20 {
            thread::sleep(Duration::from_millis(20));
            if news.dead_link().is_some() {
                replace(connection);
            }
        }
    });
    move_data(&link.direct(), 0, 1);
}
