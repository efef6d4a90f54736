// SPDX-License-Identifier: GPL-2.0

//! Connections that die, and others that take their place.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{MIB, move_data, under_load};
use crate::device::{
    self, Plan, SOON, USUAL_FLAGS, assert_pattern, pattern, read_page, store_pattern,
};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, run_on, say, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::{self, CAN_MULTI_CONN, Command, Request};
use crate::server::{Conn, Transport};
use crate::sys::{Buffer, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(news_of_dead_connections),
        test!(news_under_load),
        test!(reconfigure_revives_a_device),
        test!(a_device_revived_after_nbd_disconnect_is_as_new),
        test!(requests_fail_with_the_only_connection),
        test!(reads_wait_for_a_new_connection),
        test!(requests_in_flight_are_sent_again),
        test!(requests_wait_no_longer_than_told),
        test!(disconnect_ends_waiting),
        test!(one_of_two_connections_comes_back),
        test!(connections_come_and_go_under_load),
        test!(a_stuck_connection_is_replaced).parameters("nbds_max=1 replace_stuck=1"),
        test!(a_connection_that_is_not_read_is_replaced).parameters("nbds_max=1 replace_stuck=1"),
    ]
}

fn news_of_dead_connections(_: &Guest) {
    let news = Netlink::listen();
    let link = Setup::new(MIB).attach().settle();
    link.disconnect_and_wait();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(news.dead_link(), None, "it was asked to end");
    let setup = Setup::new(MIB).index(1).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    for victim in [1, 0] {
        link.server.kill_connection(victim);
        assert_eq!(news.expect_dead_link(), 1);
    }
    thread::sleep(Duration::from_millis(200));
    assert_eq!(news.dead_link(), None, "one each");
    // Ioctls make no difference.
    let rig = Plan::new(MIB).attach();
    rig.server.kill();
    assert_eq!(news.expect_dead_link(), 0);
}

/// Whoever is to redial has to hear of each death, also where a request finds out first that there is no
/// connection left.
fn news_under_load(guest: &Guest) {
    // nbd.ko leaves what was in flight to its timeout.
    let link = Setup::new(MIB).timeout(1).attach().settle();
    let news = Netlink::listen();
    let done = AtomicBool::new(false);
    let mut untold = 0;
    thread::scope(|scope| {
        for _ in 0..4 {
            let (direct, done) = (link.direct(), &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    // It fails while there is no connection.
                    let _ = read_page(&direct, 0);
                }
            });
        }
        let _done = Until(&done);
        for _ in 0..80 {
            thread::sleep(Duration::from_millis(10));
            link.kill_server();
            let told = wait_until(SOON, || news.dead_link() == Some(link.index));
            untold += u32::from(told.is_err());
            assert_eq!(link.revive(), Ok(()));
        }
    });
    match guest.expected("each-dead-link-is-told") {
        Driver::Nbd => say(&format!("{untold} untold")),
        Driver::Rnbd => assert_eq!(untold, 0, "no news of a dead connection"),
    }
    assert_eq!(news.dead_link(), None, "one each");
}

/// The user's wish to disconnect is fulfilled with the last connection.
fn a_device_revived_after_nbd_disconnect_is_as_new(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    let direct = link.direct();
    ioctl_number(&direct, proto::DISCONNECT, 0).expect("NBD_DISCONNECT");
    let ended = wait_until(SOON, || link.server.living() == 0);
    assert!(ended.is_ok(), "the server heard no goodbye");
    // Until the driver has seen the end of the stream there is nothing to replace.
    let revived = wait_until(SOON, || {
        link.revive().expect("RECONFIGURE");
        link.server.living() == 1 && read_page(&direct, 0).is_ok()
    });
    assert!(revived.is_ok(), "it was not revived");
    let news = Netlink::listen();
    link.kill_server();
    assert_eq!(news.expect_dead_link(), link.index);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        thread::sleep(Duration::from_millis(400));
        assert!(!reader.is_finished(), "it was to wait");
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(reader.join().unwrap(), Ok(()));
    });
}

fn reconfigure_revives_a_device(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    let direct = link.direct();
    for round in 0..3 {
        move_data(&direct, round << 18, round);
        link.kill_server();
        assert_eq!(read_page(&direct, 0), Err(Errno::IO));
        assert_eq!(link.revive(), Ok(()));
    }
    move_data(&direct, 0, 9);
    let mut back = Buffer::new(64 << 10);
    direct.read_exact_at(&mut back, 2 << 18).unwrap();
    assert_pattern(2, 2 << 18, &back);
}

fn reads_wait_for_a_new_connection(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    store_pattern(&link.server, 1, 0, 4096);
    let direct = link.direct();
    for _ in 0..3 {
        link.kill_server();
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut back = Buffer::new(4096);
                direct.read_exact_at(&mut back, 0).unwrap();
                assert_pattern(1, 0, &back);
            });
            thread::sleep(Duration::from_millis(400));
            assert!(!reader.is_finished(), "it was to wait");
            let began = Instant::now();
            assert_eq!(link.revive(), Ok(()));
            reader.join().unwrap();
            assert!(began.elapsed() < Duration::from_secs(5));
        });
    }
}

fn requests_in_flight_are_sent_again(_: &Guest) {
    const LEN: usize = 32 << 10;
    // With gaps between them, or the block layer makes one of two.
    let offsets = [0, 1, 2, 3].map(|n| n * 2 * LEN as u64);
    // nbd.ko sends them again when their time is up.
    let setup = Setup::new(MIB).dead_timeout(20).timeout(2);
    let link = setup.attach().settle();
    for offset in offsets {
        store_pattern(&link.server, 1, offset, LEN);
    }
    link.server.script(|conn, request| {
        if request.command == Command::Write {
            conn.read_data(request)?;
        }
        Ok(())
    });
    let direct = link.direct();
    thread::scope(|scope| {
        for offset in offsets {
            let direct = &direct;
            scope.spawn(move || {
                let mut back = Buffer::new(LEN);
                direct.read_exact_at(&mut back, offset).unwrap();
                assert_pattern(1, offset, &back);
            });
            let offset = offset + MIB / 2;
            scope.spawn(move || {
                let data = Buffer::filled(LEN, |data| pattern(2, offset, data));
                direct.write_all_at(&data, offset).unwrap();
            });
        }
        link.server
            .wait_for("all requests", |requests| requests.len() == 8);
        link.kill_server();
        link.server.be_honest();
        thread::sleep(Duration::from_millis(200));
        assert_eq!(link.revive(), Ok(()));
    });
    for offset in offsets.map(|offset| MIB / 2 + offset) {
        assert_pattern(2, offset, &link.server.peek(offset, LEN));
    }
    let sent_again = link.server.requests();
    let sent_again = sent_again.iter().filter(|request| request.connection == 1);
    assert_eq!(sent_again.count(), 8);
}

fn requests_wait_no_longer_than_told(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(1).attach().settle();
    let direct = link.direct();
    link.kill_server();
    let began = Instant::now();
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    let took = began.elapsed().as_secs_f32();
    assert!((0.8..6.0).contains(&took), "{took} s");
    let began = Instant::now();
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    let took = began.elapsed().as_secs_f32();
    assert!(took < 0.7, "there is nothing left to wait for: {took} s");
    // It is not too late for the device, and the next time it waits as long.
    for seed in [1, 2] {
        assert_eq!(link.revive(), Ok(()));
        move_data(&direct, 0, seed);
        link.kill_server();
        let began = Instant::now();
        assert_eq!(read_page(&direct, 0), Err(Errno::IO));
        let took = began.elapsed().as_secs_f32();
        assert!((0.8..6.0).contains(&took), "{took} s");
    }
    assert_eq!(link.revive(), Ok(()));
    // The time can be changed.
    let change = Setup::change(link.index).dead_timeout(0);
    assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    link.kill_server();
    let began = Instant::now();
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    let took = began.elapsed().as_secs_f32();
    assert!(took < 0.7, "{took} s");
}

fn disconnect_ends_waiting(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    let direct = link.direct();
    link.kill_server();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished());
        assert_eq!(link.disconnect(), Ok(()));
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    drop(direct);
    link.wait_free();
}

/// The connections that requests of all processors come by.
fn used_connections(link: &Link, direct: &File) -> HashSet<usize> {
    link.server.forget_requests();
    for processor in 0..thread::available_parallelism().unwrap().get() {
        thread::scope(|scope| {
            scope.spawn(|| {
                run_on(processor);
                read_page(direct, 0).unwrap();
            });
        });
    }
    let requests = link.server.requests();
    requests.iter().map(|request| request.connection).collect()
}

fn one_of_two_connections_comes_back(guest: &Guest) {
    let setup = Setup::new(MIB).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix, Transport::Unix]);
    let link = link.settle();
    let news = Netlink::listen();
    let direct = link.direct();
    assert_eq!(used_connections(&link, &direct), HashSet::from([0, 1]));
    for (victim, other, new) in [(0, 1, 2), (1, 2, 3), (2, 3, 4)] {
        link.server.kill_connection(victim);
        assert_eq!(news.expect_dead_link(), link.index);
        assert_eq!(used_connections(&link, &direct), HashSet::from([other]));
        assert_eq!(link.revive(), Ok(()));
        let used = used_connections(&link, &direct);
        assert_eq!(used, HashSet::from([other, new]));
    }
    if guest.expected("debugfs-shows-connections") == Driver::Rnbd {
        let path = format!("{}/connections", device::debugfs(link.index));
        let shown = fs::read_to_string(path).unwrap();
        let reconnects: Vec<&str> = shown
            .lines()
            .filter_map(|line| line.split(" reconnects=").nth(1))
            .collect();
        assert_eq!(reconnects, ["2", "1"], "{shown}");
    }
}

fn connections_come_and_go_under_load(_: &Guest) {
    let setup = Setup::new(16 * MIB)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .timeout(2)
        .dead_timeout(30);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    let link = link.settle();
    let news = Netlink::listen();
    under_load(&link, || {
        // The server numbers connections in the order in which they are made.
        let kill = |connection| {
            link.server.kill_connection(connection);
            assert_eq!(news.expect_dead_link(), link.index);
        };
        for connection in 0..3 {
            thread::sleep(Duration::from_millis(200));
            kill(connection);
            assert_eq!(link.revive(), Ok(()));
        }
        thread::sleep(Duration::from_millis(200));
        // For a moment there is none.
        kill(3);
        kill(4);
        thread::sleep(Duration::from_millis(100));
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(link.revive(), Ok(()));
        thread::sleep(Duration::from_millis(300));
    });
}

/// Neither a timeout nor dead_conn_timeout is set.
fn requests_fail_with_the_only_connection(guest: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    let direct = link.direct();
    link.server.script(|conn, _| conn.stall());
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        link.server.wait_for_command(Command::Read);
        link.kill_server();
        let ended = wait_until(Duration::from_secs(3), || reader.is_finished()).is_ok();
        match guest.expected("requests-of-a-lost-connection-do-not-hang") {
            Driver::Nbd => {
                assert!(!ended);
                link.disconnect().expect("to disconnect");
            }
            Driver::Rnbd => assert!(ended, "the read hangs"),
        }
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
}

/// A write that does not fit into the socket is never sent to its last byte.
fn a_connection_that_is_not_read_is_replaced(_: &Guest) {
    let link = Setup::new(16 * MIB).attach().settle();
    let direct = link.direct();
    link.server.script(|conn, _| conn.stall());
    let data = Buffer::filled(8 << 20, |data| pattern(5, 0, data));
    thread::scope(|scope| {
        let writer = scope.spawn(|| direct.write_all_at(&data, 0));
        link.server.wait_for_command(Command::Write);
        thread::sleep(Duration::from_millis(1500));
        assert!(!writer.is_finished());
        link.server.be_honest();
        assert_eq!(link.revive(), Ok(()));
        writer.join().unwrap().expect("to write");
    });
    assert_pattern(5, 0, &link.server.peek(0, data.len()));
}

fn unconnected() -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap()
}

fn a_stuck_connection_is_replaced(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    let direct = link.direct();
    let first_only_stalls = |conn: &mut Conn, request: &Request| match conn.index {
        0 => conn.stall(),
        _ => conn.serve(request),
    };
    // It has been silent for long, but it owes nothing.
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(link.revive(), Ok(()));
    read_page(&direct, 0).unwrap();
    assert_eq!(link.server.requests().last().unwrap().connection, 0);
    link.server.script(first_only_stalls);
    thread::sleep(Duration::from_millis(1200));
    let data = Buffer::filled(64 << 10, |data| pattern(3, 0, data));
    thread::scope(|scope| {
        let writer = scope.spawn(|| direct.write_all_at(&data, 0));
        link.server.wait_for_command(Command::Write);
        // It owes a reply, but not for as long as it has been silent.
        assert_eq!(link.revive(), Ok(()));
        thread::sleep(Duration::from_millis(1200));
        assert!(!writer.is_finished());
        // A socket that cannot be used ends nothing.
        let other = Setup::new(MIB).attach();
        other.kill_server();
        let used = other.server.connect(Transport::Unix);
        let taken = Setup::change(other.index).sockets([used.try_clone().unwrap()]);
        other.netlink.reconfigure(&taken).unwrap();
        let setup = Setup::change(link.index).sockets([used]);
        assert_eq!(link.netlink.reconfigure(&setup), Err(Errno::BUSY));
        let (ended, peer) = UnixStream::pair().unwrap();
        drop(peer);
        for unusable in [ended.into(), unconnected()] {
            let setup = Setup::change(link.index).sockets([unusable]);
            assert_eq!(link.netlink.reconfigure(&setup), Err(Errno::NOTCONN));
        }
        thread::sleep(Duration::from_millis(100));
        assert!(!writer.is_finished());
        let news = Netlink::listen();
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(news.dead_link(), None, "whoever replaces it knows");
        writer.join().unwrap().unwrap();
    });
    link.server.be_honest();
    assert_eq!(link.server.requests().last().unwrap().connection, 3);
    let mut back = Buffer::new(data.len());
    direct.read_exact_at(&mut back, 0).unwrap();
    assert_pattern(3, 0, &back);
    // Nothing waits for a replacement any more.
    link.kill_server();
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
}
