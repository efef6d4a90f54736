// SPDX-License-Identifier: GPL-2.0

//! What becomes of the old connections.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::events::listener::{Heard, Listener, REPLACED};
use super::super::shutdowns::draining::connection_states;
use super::{
    ALIVE, CONNECTION_GET, DRAINING, IN_FLIGHT, INDEX, MIB, RECONNECTS, STATE, commands_on,
    connect, first_is_silent, hand_over, open, patient_ms, setup, wait_for_end, while_reading,
};
use crate::debug_kernel::patient;
use crate::device::{SOON, assert_pattern, errno, pattern, read_page};
use crate::harness::{Guest, Test, say, wait_until};
use crate::netlink::{Netlink, number};
use crate::proto::Command;
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(replies_in_flight_are_awaited),
        test!(a_server_that_owes_nothing_hears_goodbye),
        test!(a_silent_server),
        test!(a_reply_has_begun),
        test!(a_silent_server_at_once),
        test!(a_write_that_is_not_read),
        test!(requests_time_out_while_it_drains),
        test!(a_server_that_shuts_down),
    ]
}

fn replies_in_flight_are_awaited(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix] {
        let listener = Listener::new(guest, 0);
        let link = setup(MIB).attach_over(&[transport]).settle();
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
        for drain_ms in [1000, u32::MAX] {
            let link = setup(MIB).attach_over(&[transport]).settle();
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
        let link = setup(MIB).attach_over(&[transport]).settle();
        assert_eq!(listener.next(), Heard::Connected);
        first_is_silent(&link.server);
        let drain_ms = patient_ms(2000);
        let mut began = Instant::now();
        while_reading(&link, 3, || {
            let sockets = connect(&link.server, transport, 1);
            began = Instant::now();
            assert_eq!(hand_over(&rnbd, Some(0), &sockets, drain_ms), Ok(()));
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
        let drain = Duration::from_millis(drain_ms.into());
        assert!(took >= drain - Duration::from_millis(10), "{took:?}");
        assert!(took < drain + patient(Duration::from_secs(2)), "{took:?}");
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

/// What the server owes when the time is over is the rest of a reply. That is not waited for as long as a goodbye.
fn a_reply_has_begun(guest: &Guest) {
    let rnbd = open(guest);
    const DRAIN_MS: u32 = 300;
    let mut quickest = Duration::MAX;
    for transport in [Transport::Tcp4, Transport::Unix, Transport::Tls] {
        let link = setup(MIB).attach_over(&[transport]).settle();
        link.server.script(|conn, request| {
            let reply = conn.answer(request)?;
            if conn.index > 0 {
                return conn.send(&reply);
            }
            conn.send(&reply[..reply.len() / 2])?;
            conn.stall()
        });
        let mut began = Instant::now();
        while_reading(&link, 1, || {
            let has_begun = wait_until(SOON, || {
                let list = rnbd.list(CONNECTION_GET, vec![]).expect("a list");
                number::<u64>(&list[0], IN_FLIGHT) == Some(0)
            });
            assert!(has_begun.is_ok(), "its header is not received");
            let sockets = connect(&link.server, transport, 1);
            began = Instant::now();
            assert_eq!(hand_over(&rnbd, None, &sockets, DRAIN_MS), Ok(()));
        });
        quickest = quickest.min(began.elapsed());
        assert_eq!(commands_on(&link.server, 0), [Command::Read], "no goodbye");
        assert_eq!(commands_on(&link.server, 1), [Command::Read]);
        wait_for_end(&link.server, 1);
        link.disconnect_and_wait();
    }
    say(&format!("the quickest took {quickest:?}"));
    // A goodbye has a second more.
    let drain = Duration::from_millis(DRAIN_MS.into());
    assert!(
        quickest < drain + Duration::from_millis(950),
        "{quickest:?}"
    );
}

fn a_silent_server_at_once(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix] {
        let link = setup(MIB).attach_over(&[transport]).settle();
        first_is_silent(&link.server);
        let mut began = Instant::now();
        while_reading(&link, 3, || {
            let sockets = connect(&link.server, transport, 1);
            began = Instant::now();
            assert_eq!(hand_over(&rnbd, None, &sockets, 0), Ok(()));
        });
        let took = began.elapsed();
        assert!(took < patient(Duration::from_secs(2)), "{took:?}");
        wait_for_end(&link.server, 1);
        link.disconnect_and_wait();
    }
}

/// A part of it is in the old socket, and the server reads that later. It gets no more than that.
fn a_write_that_is_not_read(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix] {
        let link = setup(16 * MIB).attach_over(&[transport]).settle();
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
    let link = setup(MIB).timeout(1).attach().settle();
    let news = Netlink::listen();
    first_is_silent(&link.server);
    while_reading(&link, 2, || {
        let sockets = connect(&link.server, Transport::Unix, 1);
        assert_eq!(hand_over(&rnbd, None, &sockets, 600_000), Ok(()));
    });
    wait_for_end(&link.server, 1);
    assert_eq!(news.dead_link(), None, "nobody need dial");
}

/// It drains already.
fn a_server_that_shuts_down(guest: &Guest) {
    let rnbd = open(guest);
    let link = setup(MIB).dead_timeout(20).attach().settle();
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
