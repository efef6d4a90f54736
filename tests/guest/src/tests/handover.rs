// SPDX-License-Identifier: GPL-2.0

//! Connections that are handed over to new sockets while they are alive, by the family "rnbd".

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use neli::types::Buffer as Bytes;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::events::{CLOSED, Heard, Listener, REPLACED};
use super::outages::{Attached, Host, Storage, under_fio};
use super::shutdowns::draining::connection_states;
use crate::debug_kernel::patient;
use crate::device::{
    Plan, SOON, USUAL_FLAGS, assert_pattern, errno, pattern, read_page, store_pattern,
};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, say, skip, wait_until};
use crate::netlink::{Attr, Link, Netlink, Setup, attr, number};
use crate::proto::{CAN_MULTI_CONN, Command, Request};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(one_connection_under_load).limit_seconds(120),
        test!(all_connections_under_load).limit_seconds(120),
        test!(at_once_under_load).limit_seconds(120),
        test!(blue_and_green).limit_seconds(300),
        test!(replies_in_flight_are_awaited),
        test!(a_server_that_owes_nothing_hears_goodbye),
        test!(a_silent_server),
        test!(a_silent_server_at_once),
        test!(a_write_that_is_not_read),
        test!(requests_time_out_while_it_drains),
        test!(a_dead_connection),
        test!(a_server_that_shuts_down),
        test!(the_new_server_dies),
        test!(while_another_has_not_finished),
        test!(of_a_device_that_is_disconnected),
        test!(against_disconnects).limit_seconds(120),
        test!(by_ioctl),
        test!(refusals),
        test!(without_privilege),
    ]
}

const MIB: u64 = 1 << 20;

const CONNECTION_GET: u8 = 2;
const HANDOVER: u8 = 8;

/// Attributes of the command.
const DEVICE: u16 = 1;
const CONNECTION: u16 = 2;
const SOCKETS: u16 = 3;
const DRAIN: u16 = 4;
const BACKEND: u16 = 5;

/// Attributes of a connection in a list, and its states.
const INDEX: u16 = 2;
const STATE: u16 = 3;
const IN_FLIGHT: u16 = 8;
const RECONNECTS: u16 = 14;
const ALIVE: u32 = 0;
const DRAINING: u32 = 1;

/// A socket to talk to the family with.
fn open(guest: &Guest) -> Netlink {
    if guest.driver == Driver::Nbd {
        skip("the family is rnbd's");
    }
    let rnbd = Netlink::try_open_family("rnbd").expect("the family rnbd");
    rnbd.request_ext_ack();
    rnbd
}

fn sockets_attr(sockets: &[OwnedFd]) -> Attr {
    let numbers: Vec<u8> = sockets
        .iter()
        .flat_map(|socket| socket.as_raw_fd().to_ne_bytes())
        .collect();
    attr(SOCKETS, Bytes::from(numbers))
}

/// Hands connections of device 0 over: one of them, or all.
fn hand_over(
    rnbd: &Netlink,
    connection: Option<u32>,
    sockets: &[OwnedFd],
    drain_ms: u32,
) -> SysResult<()> {
    let mut attrs = vec![
        attr(DEVICE, 0u32),
        sockets_attr(sockets),
        attr(DRAIN, drain_ms),
    ];
    attrs.extend(connection.map(|connection| attr(CONNECTION, connection)));
    rnbd.ask(HANDOVER, attrs).map(drop)
}

fn connect(server: &Server, transport: Transport, count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| server.connect(transport)).collect()
}

/// Whether the last that came over a connection of the server is a goodbye.
fn has_said_goodbye(server: &Server, connection: usize) -> bool {
    let requests = server.requests();
    let last = requests.iter().rfind(|r| r.connection == connection);
    last.is_some_and(|request| request.command == Command::Disconnect)
}

fn commands_on(server: &Server, connection: usize) -> Vec<Command> {
    let requests = server.requests().into_iter();
    let ours = requests.filter(|request| request.connection == connection);
    ours.map(|request| request.command).collect()
}

fn wait_for_end(server: &Server, living: usize) {
    let ended = wait_until(SOON, || server.living() == living);
    assert!(ended.is_ok(), "{} connections are left", server.living());
}

/// Writes to a device and reads it back, each in its own part, while `act` runs. No operation may fail.
fn under_load(link: &Link, act: impl FnOnce()) {
    let server = &link.server;
    const PART: u64 = 2 * MIB;
    const LEN: usize = 64 << 10;
    let done = AtomicBool::new(false);
    let operations = AtomicU64::new(0);
    let longest = AtomicU64::new(0);
    thread::scope(|scope| {
        for worker in 0..3u64 {
            let direct = link.direct();
            let (done, operations, longest) = (&done, &operations, &longest);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(worker);
                let mut seed = worker << 32;
                while !done.load(Ordering::Relaxed) {
                    seed += 1;
                    let offset = worker * PART + random.u64(0..(PART - LEN as u64) / 4096) * 4096;
                    let data = Buffer::filled(LEN, |data| pattern(seed, offset, data));
                    let began = Instant::now();
                    direct.write_all_at(&data, offset).expect("to write");
                    let mut back = Buffer::new(LEN);
                    direct.read_exact_at(&mut back, offset).expect("to read");
                    let took = began.elapsed().as_millis() as u64;
                    longest.fetch_max(took, Ordering::Relaxed);
                    assert_pattern(seed, offset, &back);
                    assert_pattern(seed, offset, &server.peek(offset, LEN));
                    operations.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _done = Until(&done);
        act();
    });
    let operations = operations.into_inner();
    say(&format!(
        "{operations} operations, the longest took {} ms",
        longest.into_inner()
    ));
    assert!(operations > 3);
}

fn one_connection_under_load(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix, Transport::Tls] {
        let setup = Setup::new(8 * MIB)
            .index(0)
            .flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let link = setup.attach_over(&[transport; 2]).settle();
        let news = Netlink::listen();
        under_load(&link, || {
            for round in 0..12 {
                let sockets = connect(&link.server, transport, 1);
                assert_eq!(hand_over(&rnbd, Some(round % 2), &sockets, 5000), Ok(()));
                // The old one ends, and there are two again.
                wait_for_end(&link.server, 2);
                thread::sleep(Duration::from_millis(120));
            }
        });
        for connection in 0..12 {
            assert!(has_said_goodbye(&link.server, connection), "{connection}");
        }
        assert_eq!(news.dead_link(), None, "nobody need dial");
        link.disconnect_and_wait();
    }
}

fn all_connections_under_load(guest: &Guest) {
    let rnbd = open(guest);
    for (transport, count) in [(Transport::Tcp4, 1), (Transport::Unix, 4)] {
        let setup = Setup::new(8 * MIB)
            .index(0)
            .flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let link = setup.attach_over(&vec![transport; count]).settle();
        let news = Netlink::listen();
        under_load(&link, || {
            for _ in 0..15 {
                let sockets = connect(&link.server, transport, count);
                assert_eq!(hand_over(&rnbd, None, &sockets, 5000), Ok(()));
                wait_for_end(&link.server, count);
                thread::sleep(Duration::from_millis(120));
            }
        });
        for connection in 0..15 * count {
            assert!(has_said_goodbye(&link.server, connection), "{connection}");
        }
        assert_eq!(news.dead_link(), None, "nobody need dial");
        link.disconnect_and_wait();
    }
}

/// What is in flight is sent again.
fn at_once_under_load(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix, Transport::Tls] {
        let setup = Setup::new(8 * MIB)
            .index(0)
            .flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let link = setup.attach_over(&[transport; 2]).settle();
        let news = Netlink::listen();
        under_load(&link, || {
            for _ in 0..25 {
                let sockets = connect(&link.server, transport, 2);
                assert_eq!(hand_over(&rnbd, None, &sockets, 0), Ok(()));
                thread::sleep(Duration::from_millis(150));
            }
        });
        wait_for_end(&link.server, 2);
        assert_eq!(news.dead_link(), None, "nobody need dial");
        link.disconnect_and_wait();
    }
}

/// Two nbdkits on one file, each of which is restarted while the other serves.
fn blue_and_green(guest: &Guest) {
    let rnbd = open(guest);
    let _storage = Storage::new();
    let mut hosts = ["blue", "green"].map(Host::local);
    let attached = Attached::to([&hosts[0], &hosts[0]]);
    under_fio(|| {
        for round in 0..20 {
            let (old, new) = (round % 2, (round + 1) % 2);
            let sockets = [hosts[new].dial().socket, hosts[new].dial().socket];
            assert_eq!(hand_over(&rnbd, None, &sockets, 3000), Ok(()));
            // It ends when its clients have left it.
            hosts[old].shut_down();
            hosts[old].revive();
        }
    });
    assert_eq!(attached.news.dead_link(), None, "nobody need dial");
}

/// Reads 32 KiB in each of `count` threads, while `act` runs. They are in flight on connection 0 by then, and none
/// fails.
fn while_reading(link: &Link, count: u64, act: impl FnOnce()) {
    const LEN: usize = 32 << 10;
    for reader in 0..count {
        store_pattern(&link.server, 1, reader * 2 * LEN as u64, LEN);
    }
    let direct = link.direct();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..count)
            .map(|reader| {
                let direct = &direct;
                scope.spawn(move || {
                    let offset = reader * 2 * LEN as u64;
                    let mut back = Buffer::new(LEN);
                    errno(direct.read_exact_at(&mut back, offset))?;
                    assert_pattern(1, offset, &back);
                    Ok(())
                })
            })
            .collect();
        link.server
            .wait_for("all requests", |requests| requests.len() as u64 >= count);
        act();
        for reader in readers {
            let read: SysResult<()> = reader.join().unwrap();
            assert_eq!(read, Ok(()));
        }
    });
}

/// Connection 0 of the server answers nothing, and the others are honest.
fn first_is_silent(server: &Server) {
    server.script(|conn, request| match conn.index {
        0 if request.command == Command::Read => Ok(()),
        _ => conn.serve(request),
    });
}

fn replies_in_flight_are_awaited(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix] {
        let listener = Listener::new(guest, 0);
        let link = Setup::new(MIB).index(0).attach_over(&[transport]).settle();
        assert_eq!(listener.next(), Heard::Connected);
        link.server.script(|conn, request| {
            if conn.index > 0 {
                return conn.serve(request);
            }
            conn.defer(request)?;
            match conn.deferred() {
                4 => {
                    thread::sleep(patient(Duration::from_millis(600)));
                    conn.send_deferred()
                }
                _ => Ok(()),
            }
        });
        // Replies that are kept are sent after a while in any case.
        while_reading(&link, 4, || {
            let sockets = connect(&link.server, transport, 1);
            let began = Instant::now();
            assert_eq!(hand_over(&rnbd, None, &sockets, 60_000), Ok(()));
            let took = began.elapsed();
            assert!(
                took < patient(Duration::from_millis(400)),
                "it waited: {took:?}"
            );
            assert_eq!(listener.next(), Heard::Reconnected(0, 1));
            // The new one serves meanwhile.
            assert_eq!(read_page(&link.direct(), MIB - 4096), Ok(()));
        });
        assert_eq!(listener.next(), Heard::Dead(0, 0, REPLACED));
        let mut commands = vec![Command::Read; 4];
        commands.push(Command::Disconnect);
        assert_eq!(
            commands_on(&link.server, 0),
            commands,
            "one goodbye at the end"
        );
        assert_eq!(commands_on(&link.server, 1), [Command::Read]);
        link.disconnect_and_wait();
    }
}

fn a_server_that_owes_nothing_hears_goodbye(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix, Transport::Tls] {
        for drain_ms in [0, 1000, u32::MAX] {
            let link = Setup::new(MIB).index(0).attach_over(&[transport]).settle();
            let sockets = connect(&link.server, transport, 1);
            assert_eq!(hand_over(&rnbd, None, &sockets, drain_ms), Ok(()));
            wait_for_end(&link.server, 1);
            let goodbye = [Command::Disconnect];
            assert_eq!(
                commands_on(&link.server, 0),
                goodbye,
                "{transport:?} {drain_ms}"
            );
            assert_eq!(read_page(&link.direct(), 0), Ok(()));
            link.disconnect_and_wait();
        }
    }
}

/// What it owes is sent again when the time is over, and not before.
fn a_silent_server(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix] {
        let listener = Listener::new(guest, 0);
        let link = Setup::new(MIB).index(0).attach_over(&[transport]).settle();
        assert_eq!(listener.next(), Heard::Connected);
        first_is_silent(&link.server);
        let mut began = Instant::now();
        while_reading(&link, 3, || {
            let sockets = connect(&link.server, transport, 1);
            began = Instant::now();
            assert_eq!(hand_over(&rnbd, Some(0), &sockets, 800), Ok(()));
            assert_eq!(listener.next(), Heard::Reconnected(0, 1));
            thread::sleep(Duration::from_millis(400));
            assert_eq!(commands_on(&link.server, 1), [], "too early");
            assert_eq!(link.server.living(), 2);
            let list = rnbd.list(CONNECTION_GET, vec![]).expect("a list");
            let shown = |kind| list.iter().map(move |c| number::<u32>(c, kind).unwrap());
            assert_eq!(shown(INDEX).collect::<Vec<_>>(), [0, 0]);
            assert_eq!(shown(STATE).collect::<Vec<_>>(), [ALIVE, DRAINING]);
            assert_eq!(shown(RECONNECTS).collect::<Vec<_>>(), [1, 0]);
            assert_eq!(number::<u64>(&list[1], IN_FLIGHT), Some(3));
            assert_eq!(connection_states(0), ["state=alive", "state=draining"]);
        });
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(790), "{took:?}");
        assert!(took < patient(Duration::from_millis(2500)), "{took:?}");
        assert_eq!(listener.next(), Heard::Dead(0, 0, REPLACED));
        assert_eq!(
            commands_on(&link.server, 0),
            [Command::Read; 3],
            "no goodbye"
        );
        assert_eq!(commands_on(&link.server, 1), [Command::Read; 3]);
        wait_for_end(&link.server, 1);
        link.disconnect_and_wait();
    }
}

fn a_silent_server_at_once(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix] {
        let link = Setup::new(MIB).index(0).attach_over(&[transport]).settle();
        first_is_silent(&link.server);
        let mut began = Instant::now();
        while_reading(&link, 3, || {
            let sockets = connect(&link.server, transport, 1);
            began = Instant::now();
            assert_eq!(hand_over(&rnbd, None, &sockets, 0), Ok(()));
        });
        let took = began.elapsed();
        assert!(took < patient(Duration::from_millis(700)), "{took:?}");
        wait_for_end(&link.server, 1);
        link.disconnect_and_wait();
    }
}

/// A part of it is in the old socket, and the server reads that later. It gets no more than that.
fn a_write_that_is_not_read(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix] {
        let link = Setup::new(16 * MIB)
            .index(0)
            .attach_over(&[transport])
            .settle();
        link.server.script(|conn, request| {
            if conn.index > 0 {
                return conn.serve(request);
            }
            thread::sleep(patient(Duration::from_millis(1500)));
            conn.serve(request)
        });
        let direct = link.direct();
        let data = Buffer::filled(8 << 20, |data| pattern(3, 0, data));
        let newer = Buffer::filled(8 << 20, |data| pattern(4, 0, data));
        thread::scope(|scope| {
            let writer = scope.spawn(|| errno(direct.write_all_at(&data, 0)));
            link.server.wait_for_command(Command::Write);
            let sockets = connect(&link.server, transport, 1);
            assert_eq!(hand_over(&rnbd, None, &sockets, 200), Ok(()));
            assert_eq!(writer.join().unwrap(), Ok(()));
        });
        assert_pattern(3, 0, &link.server.peek(0, data.len()));
        direct.write_all_at(&newer, 0).expect("to write");
        wait_for_end(&link.server, 1);
        assert_pattern(4, 0, &link.server.peek(0, data.len()));
        drop(direct);
        link.disconnect_and_wait();
    }
}

fn requests_time_out_while_it_drains(guest: &Guest) {
    let rnbd = open(guest);
    let link = Setup::new(MIB).index(0).timeout(1).attach().settle();
    let news = Netlink::listen();
    first_is_silent(&link.server);
    while_reading(&link, 2, || {
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, None, &sockets, 600_000), Ok(()));
    });
    wait_for_end(&link.server, 1);
    assert_eq!(news.dead_link(), None, "nobody need dial");
}

fn a_dead_connection(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.dead_timeout(20).attach_over(&[Transport::Unix; 2]);
    let link = link.settle();
    let listener = Listener::new(guest, 0);
    link.server.kill_connection(1);
    assert_eq!(listener.next(), Heard::Dead(1, 0, CLOSED));
    let sockets = connect(&link.server, Transport::Unix, 1);
    assert_eq!(hand_over(&rnbd, Some(1), &sockets, 1000), Ok(()));
    assert_eq!(listener.next(), Heard::Reconnected(1, 1));
    // All of them are dead, and requests wait.
    link.server.kill();
    let mut dead = [listener.next(), listener.next()];
    dead.sort_by_key(|event| matches!(event, Heard::Dead(1, ..)));
    assert_eq!(dead, [Heard::Dead(0, 0, CLOSED), Heard::Dead(1, 1, CLOSED)]);
    let direct = link.direct();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished());
        let sockets = connect(&link.server, Transport::Unix, 2);
        assert_eq!(hand_over(&rnbd, None, &sockets, 1000), Ok(()));
        assert_eq!(reader.join().unwrap(), Ok(()));
    });
    assert_eq!(listener.next(), Heard::Reconnected(0, 1));
    assert_eq!(listener.next(), Heard::Reconnected(1, 2));
    listener.expect_silence();
}

/// It drains already.
fn a_server_that_shuts_down(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).dead_timeout(20);
    let link = setup.attach().settle();
    let refused = AtomicBool::new(false);
    link.server.script(move |conn, request| match conn.index {
        0 if refused.swap(true, Ordering::Relaxed) => Ok(()),
        0 => conn.refuse(request, libc::ESHUTDOWN as u32),
        _ => conn.serve(request),
    });
    while_reading(&link, 2, || {
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, None, &sockets, 300), Ok(()));
    });
    wait_for_end(&link.server, 1);
}

/// Another one can take its place while the old one still drains.
fn the_new_server_dies(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).dead_timeout(20);
    let link = setup.attach().settle();
    let listener = Listener::new(guest, 0);
    first_is_silent(&link.server);
    while_reading(&link, 2, || {
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, None, &sockets, 1500), Ok(()));
        assert_eq!(listener.next(), Heard::Reconnected(0, 1));
        link.server.kill_connection(1);
        assert_eq!(listener.next(), Heard::Dead(0, 1, CLOSED));
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, Some(0), &sockets, 1500), Ok(()));
        assert_eq!(listener.next(), Heard::Reconnected(0, 2));
        link.server.kill_connection(2);
        assert_eq!(listener.next(), Heard::Dead(0, 2, CLOSED));
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(listener.next(), Heard::Reconnected(0, 3));
    });
    assert_eq!(listener.next(), Heard::Dead(0, 0, REPLACED));
    listener.expect_silence();
}

fn while_another_has_not_finished(guest: &Guest) {
    let rnbd = open(guest);
    let link = Setup::new(MIB).index(0).attach().settle();
    first_is_silent(&link.server);
    let again = |drain_ms| {
        let sockets = connect(&link.server, Transport::Unix, 1);
        hand_over(&rnbd, None, &sockets, drain_ms)
    };
    while_reading(&link, 2, || {
        assert_eq!(again(1000), Ok(()));
        assert_eq!(again(0), Err(Errno::BUSY));
        let words = rnbd.ext_ack();
        let words = words.as_deref();
        assert_eq!(
            words,
            Some("an earlier handover of the connection has not finished")
        );
    });
    let finished = wait_until(SOON, || again(1000).is_ok());
    assert!(finished.is_ok(), "it does not finish");
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
}

/// It waits neither for the server nor for the time that this has.
fn of_a_device_that_is_disconnected(guest: &Guest) {
    let rnbd = open(guest);
    let link = Setup::new(MIB).index(0).attach().settle();
    let listener = Listener::new(guest, 0);
    first_is_silent(&link.server);
    let direct = link.direct();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        link.server.wait_for_command(Command::Read);
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, None, &sockets, u32::MAX), Ok(()));
        let began = Instant::now();
        assert_eq!(link.disconnect(), Ok(()));
        assert!(
            began.elapsed() < patient(Duration::from_secs(2)),
            "it waited"
        );
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    assert_eq!(listener.next(), Heard::Reconnected(0, 1));
    assert_eq!(listener.next(), Heard::Disconnected);
    // The device is still open, but not connected any more.
    let sockets = connect(&link.server, Transport::Unix, 1);
    assert_eq!(hand_over(&rnbd, None, &sockets, 0), Err(Errno::NOTCONN));
    assert_eq!(
        rnbd.ext_ack().as_deref(),
        Some("the device is being disconnected")
    );
    drop(direct);
    link.wait_free();
    assert_eq!(hand_over(&rnbd, None, &sockets, 0), Err(Errno::NOTCONN));
    assert_eq!(
        rnbd.ext_ack().as_deref(),
        Some("the device is not connected")
    );
    listener.expect_silence();
}

fn against_disconnects(guest: &Guest) {
    drop(open(guest));
    let mut done = 0;
    for round in 0..60 {
        let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let link = setup.attach_over(&[Transport::Unix; 2]);
        let sockets = connect(&link.server, Transport::Unix, 2);
        let direct = link.direct();
        thread::scope(|scope| {
            scope.spawn(|| {
                // It fails with the device.
                while read_page(&direct, 0).is_ok() {}
            });
            let handover = scope.spawn(|| {
                let rnbd = Netlink::try_open_family("rnbd").expect("the family");
                thread::sleep(Duration::from_millis(round % 5));
                hand_over(&rnbd, None, &sockets, (round % 3) as u32 * 10_000)
            });
            thread::sleep(Duration::from_millis(round % 7));
            assert_eq!(link.disconnect(), Ok(()));
            match handover.join().unwrap() {
                Ok(()) => done += 1,
                Err(errno) => assert_eq!(errno, Errno::NOTCONN),
            }
        });
        drop(direct);
        link.wait_free();
    }
    say(&format!("{done} of 60 handed over"));
}

fn by_ioctl(guest: &Guest) {
    let rnbd = open(guest);
    let mut rig = Plan::new(MIB).attach();
    let sockets = connect(&rig.server, Transport::Unix, 1);
    assert_eq!(hand_over(&rnbd, None, &sockets, 1000), Ok(()));
    wait_for_end(&rig.server, 1);
    assert_eq!(read_page(&rig.direct(), 0), Ok(()));
    assert!(rig.client.still_runs_after(Duration::from_millis(300)));
    let open = rig.open_to_read();
    rig.server.kill();
    rig.client.wait_lost();
    let sockets = connect(&rig.server, Transport::Unix, 1);
    assert_eq!(hand_over(&rnbd, None, &sockets, 0), Err(Errno::NOTCONN));
    drop((open, rig));

    let mut rig = Plan::new(MIB).attach();
    let sockets = connect(&rig.server, Transport::Unix, 1);
    assert_eq!(hand_over(&rnbd, None, &sockets, 0), Ok(()));
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Each leaves the device as it was.
fn refusals(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup
        .backend("b")
        .attach_over(&[Transport::Tcp4, Transport::Unix]);
    let link = link.settle();
    let other = Setup::new(MIB).index(1).attach();
    let new = |count| connect(&link.server, Transport::Unix, count);
    let refused = |attrs: Vec<Attr>, errno: Errno, words: &str| {
        assert_eq!(rnbd.ask(HANDOVER, attrs).map(drop), Err(errno), "{words}");
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
    };
    let device = || attr(DEVICE, 0u32);
    let backend = || attr(BACKEND, "b");
    let all = |sockets: &[OwnedFd]| vec![device(), backend(), sockets_attr(sockets)];
    let one = |index: u32, sockets: &[OwnedFd]| {
        let mut attrs = all(sockets);
        attrs.push(attr(CONNECTION, index));
        attrs
    };
    let raw = |bytes: &[u8]| vec![device(), backend(), attr(SOCKETS, Bytes::from(bytes))];
    let two = new(2);
    refused(vec![], Errno::INVAL, "the index of a device is needed");
    refused(
        vec![device()],
        Errno::INVAL,
        "at least one socket is needed",
    );
    let numbers = "the sockets must be numbers of 32 bits";
    refused(raw(&[]), Errno::INVAL, numbers);
    refused(raw(&[1, 2, 3]), Errno::INVAL, numbers);
    let nowhere = vec![attr(DEVICE, 77u32), sockets_attr(&two)];
    refused(nowhere, Errno::NODEV, "there is no such device");
    let another = "the device has another backend";
    refused(vec![device(), sockets_attr(&two)], Errno::INVAL, another);
    let wrong = vec![device(), attr(BACKEND, "c"), sockets_attr(&two)];
    refused(wrong, Errno::INVAL, another);
    let count = "there must be as many sockets as the device has connections";
    refused(all(&two[..1]), Errno::INVAL, count);
    refused(all(&new(3)), Errno::INVAL, count);
    refused(
        one(1, &two),
        Errno::INVAL,
        "one connection needs one socket",
    );
    let index = "the device has no connection with this index";
    refused(one(2, &two[..1]), Errno::INVAL, index);
    refused(one(u32::MAX, &two[..1]), Errno::INVAL, index);
    refused(
        raw(&[0xff; 8]),
        Errno::BADF,
        "a file descriptor is not open",
    );
    let file = std::fs::File::open("/proc/version").expect("a file");
    let not_a_socket = [OwnedFd::from(file), new(1).remove(0)];
    let words = "a file descriptor is not that of a socket";
    refused(all(&not_a_socket), Errno::NOTSOCK, words);
    let datagram = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
    let words = "a socket must be TCP, MPTCP, vsock or UNIX";
    refused(one(0, &[datagram.into()]), Errno::INVAL, words);
    let ended = [new(1).remove(0), link.server.connect_and_end()];
    refused(all(&ended), Errno::NOTCONN, "a socket is not connected");
    let twice = new(1).remove(0);
    let twice = [twice.try_clone().expect("dup"), twice];
    refused(all(&twice), Errno::BUSY, "a socket is in use");
    let taken = connect(&other.server, Transport::Unix, 1);
    let used = taken[0].try_clone().expect("dup");
    let change = Setup::change(1).sockets(taken);
    other.server.kill_connection(0);
    let revived = wait_until(SOON, || {
        other.netlink.reconfigure(&change).is_ok() && other.server.living() == 1
    });
    assert!(revived.is_ok());
    let mut pair = new(1);
    pair.push(used);
    let in_use = wait_until(SOON, || {
        rnbd.ask(HANDOVER, all(&pair)).map(drop) == Err(Errno::BUSY)
    });
    assert!(in_use.is_ok());
    let short = vec![attr(DEVICE, 0u8), sockets_attr(&two)];
    assert_eq!(rnbd.ask(HANDOVER, short).map(drop), Err(Errno::INVAL));
    let unknown = vec![device(), sockets_attr(&two), attr(9, 1u32)];
    assert_eq!(rnbd.ask(HANDOVER, unknown).map(drop), Err(Errno::INVAL));
    let list = rnbd.list(CONNECTION_GET, vec![device(), attr(DRAIN, 1u32)]);
    assert_eq!(list.err(), Some(Errno::INVAL), "it is another command's");

    let connections = rnbd.list(CONNECTION_GET, vec![device()]).expect("a list");
    let numbers = |kind| {
        connections
            .iter()
            .map(move |c| number::<u32>(c, kind).unwrap())
    };
    // Alive, and never replaced.
    assert_eq!(numbers(3).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(numbers(14).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
    let requests = link.server.requests();
    let old = |request: &Request| request.connection < 2;
    let is_goodbye = |request: &Request| request.command == Command::Disconnect;
    assert!(!requests.iter().any(|r| old(r) && is_goodbye(r)));
    assert_eq!(rnbd.ask(HANDOVER, all(&two)).map(drop), Ok(()));
    drop(other);
}

fn without_privilege(guest: &Guest) {
    drop(open(guest));
    let link = Setup::new(MIB).index(0).attach().settle();
    let sockets = connect(&link.server, Transport::Unix, 1);
    // Capabilities belong to a thread.
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut sets = capabilities(None).unwrap();
            sets.effective = CapabilitySet::all() - CapabilitySet::SYS_ADMIN;
            sets.effective &= sets.permitted;
            set_capabilities(None, sets).unwrap();
            let rnbd = Netlink::try_open_family("rnbd").expect("the family");
            hand_over(&rnbd, None, &sockets, 0)
        });
        assert_eq!(thread.join().unwrap(), Err(Errno::PERM));
    });
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
    assert_eq!(commands_on(&link.server, 1), []);
}
