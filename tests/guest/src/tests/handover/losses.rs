// SPDX-License-Identifier: GPL-2.0

//! Handovers of connections that are dead, that die meanwhile, or that a user ends.

use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::super::events::listener::{CLOSED, Heard, Listener, REPLACED};
use super::{
    FLAGS, MIB, connect, first_is_silent, hand_over, open, patient_ms, setup, wait_for_end,
    while_reading,
};
use crate::debug_kernel::{enough, patient};
use crate::device::{Plan, read_page};
use crate::harness::{Guest, Test, say};
use crate::netlink::Netlink;
use crate::proto::Command;
use crate::server::Transport;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(a_dead_connection),
        test!(the_new_server_dies),
        test!(the_new_server_dies_at_once).limit_seconds(120),
        test!(of_a_device_that_is_disconnected),
        test!(against_disconnects).limit_seconds(120),
        test!(by_ioctl),
        test!(by_ioctl_the_new_server_dies),
        test!(by_ioctl_the_old_server_dies).limit_seconds(120),
    ]
}

fn a_dead_connection(guest: &Guest) {
    let rnbd = open(guest);
    let setup = setup(MIB).dead_timeout(20);
    let link = setup.attach_over(&[Transport::Unix; 2]).settle();
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

/// Another one can take its place while the old one still drains.
fn the_new_server_dies(guest: &Guest) {
    let rnbd = open(guest);
    let link = setup(MIB).dead_timeout(20).attach().settle();
    let listener = Listener::new(guest, 0);
    first_is_silent(&link.server);
    let drain_ms = patient_ms(3000);
    while_reading(&link, 2, || {
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, None, &sockets, drain_ms), Ok(()));
        assert_eq!(listener.next(), Heard::Reconnected(0, 1));
        link.server.kill_connection(1);
        assert_eq!(listener.next(), Heard::Dead(0, 1, CLOSED));
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, Some(0), &sockets, drain_ms), Ok(()));
        assert_eq!(listener.next(), Heard::Reconnected(0, 2));
        link.server.kill_connection(2);
        assert_eq!(listener.next(), Heard::Dead(0, 2, CLOSED));
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(listener.next(), Heard::Reconnected(0, 3));
    });
    assert_eq!(listener.next(), Heard::Dead(0, 0, REPLACED));
    listener.expect_silence();
}

/// It waits neither for the server nor for the time that this has.
fn of_a_device_that_is_disconnected(guest: &Guest) {
    let rnbd = open(guest);
    let link = setup(MIB).attach().settle();
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
        let link = setup(MIB).attach_over(&[Transport::Unix; 2]);
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
    let mut rig = Plan::new(MIB).flags(FLAGS).attach();
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

    let mut rig = Plan::new(MIB).flags(FLAGS).attach();
    let sockets = connect(&rig.server, Transport::Unix, 1);
    assert_eq!(hand_over(&rnbd, None, &sockets, 0), Ok(()));
    assert_eq!(rig.disconnect(), Ok(0));
}

/// NBD_DO_IT does not wait for the old connections then: only it can start the device again.
fn by_ioctl_the_new_server_dies(guest: &Guest) {
    let rnbd = open(guest);
    let mut rig = Plan::new(MIB).flags(FLAGS).attach();
    let direct = rig.direct();
    assert_eq!(read_page(&direct, 0), Ok(()));
    rig.server.forget_requests();
    first_is_silent(&rig.server);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        rig.server.wait_for_command(Command::Read);
        let sockets = connect(&rig.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, None, &sockets, patient_ms(20_000)), Ok(()));
        rig.server.kill_connection(1);
        rig.client.wait_lost();
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
}

/// While it is replaced. Either the device goes on, or the handover is refused.
fn by_ioctl_the_old_server_dies(guest: &Guest) {
    drop(open(guest));
    let rounds = enough(60, 15);
    let mut done = 0;
    for round in 0..rounds {
        let mut rig = Plan::new(MIB).flags(FLAGS).attach();
        let sockets = connect(&rig.server, Transport::Unix, 1);
        let answer = thread::scope(|scope| {
            let handover = scope.spawn(|| {
                let rnbd = Netlink::try_open_family("rnbd").expect("the family");
                hand_over(&rnbd, None, &sockets, 1000)
            });
            thread::sleep(Duration::from_micros(round % 20 * 200));
            rig.server.kill_connection(0);
            handover.join().unwrap()
        });
        match answer {
            Ok(()) => {
                done += 1;
                assert_eq!(read_page(&rig.direct(), 0), Ok(()));
                assert_eq!(rig.disconnect(), Ok(0));
            }
            Err(errno) => {
                assert_eq!(errno, Errno::NOTCONN);
                rig.client.wait_lost();
            }
        }
    }
    say(&format!("{done} of {rounds} handed over"));
}

/// `NBD_CMD_LINK_DEAD` is sent for a connection that was in use, and not for one that was refused.
fn the_new_server_dies_at_once(guest: &Guest) {
    drop(open(guest));
    let link = setup(MIB).dead_timeout(20).attach().settle();
    let news = Netlink::listen();
    let rounds = enough(60, 15);
    let mut done = 0;
    for round in 0..rounds {
        let sockets = connect(&link.server, Transport::Unix, 1);
        let answer = thread::scope(|scope| {
            let handover = scope.spawn(|| {
                let rnbd = Netlink::try_open_family("rnbd").expect("the family");
                hand_over(&rnbd, None, &sockets, 0)
            });
            thread::sleep(Duration::from_micros(round % 20 * 200));
            link.server.kill_connection(round as usize + 1);
            handover.join().unwrap()
        });
        match answer {
            Ok(()) => {
                done += 1;
                assert_eq!(news.expect_dead_link(), 0);
            }
            Err(errno) => assert!([Errno::NOTCONN, Errno::BUSY].contains(&errno), "{errno}"),
        }
    }
    thread::sleep(patient(Duration::from_millis(200)));
    assert_eq!(news.dead_link(), None, "of one that was refused");
    say(&format!("{done} of {rounds} handed over"));
    assert_eq!(link.revive(), Ok(()));
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
}
