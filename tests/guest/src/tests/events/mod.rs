// SPDX-License-Identifier: GPL-2.0

//! The events of the generic netlink family "rnbd".

pub mod listener;
mod namespaces;

use std::fs::File;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::gettid;

use crate::debug_kernel::patient;
use crate::device::{Plan, USUAL_FLAGS, read_page};
use crate::harness::{Guest, Test};
use crate::netlink::{Attr, DISCONNECT_ON_CLOSE, Link, Netlink, Setup, number, text};
use crate::proto::{self, CAN_MULTI_CONN, CLEAR_SOCK, Command, SET_BLKSIZE, SET_SIZE};
use crate::server::Transport;
use crate::sys::ioctl_number;
use crate::test;
use listener::{
    BACKEND, BLOCK_SIZE, CLOSED, CONNECTED, CONNECTION, CONNECTION_DEAD, CONNECTIONS, DISCONNECTED,
    ERRNO, FLAGS, Heard, INTERFACE, Listener, PID, PROTOCOL_VIOLATED, REASON, RECEIVE_FAILED,
    RECONNECTED, RECONNECTS, REPLACED, RESIZED, SEND_FAILED, SHUTTING_DOWN, SIZE, TIMED_OUT,
};

pub fn tests() -> Vec<Test> {
    [of_all_kinds(), namespaces::tests()]
        .into_iter()
        .flatten()
        .collect()
}

fn of_all_kinds() -> Vec<Test> {
    vec![
        test!(connected_and_disconnected),
        test!(by_ioctl),
        test!(why_connections_die),
        test!(a_server_that_shuts_down),
        test!(a_stuck_connection_is_replaced).parameters("nbds_max=1 replace_stuck=1"),
        test!(reconnected),
        test!(each_of_many_connections),
        test!(after_nbd_disconnect),
        test!(the_last_close_disconnects),
        test!(resized),
        test!(a_connect_that_fails),
        test!(a_listener_that_does_not_listen),
        test!(in_order).limit_seconds(120),
    ]
}

const MIB: u64 = 1 << 20;

fn connected_and_disconnected(guest: &Guest) {
    let listener = Listener::new(guest, 1);
    let flags = USUAL_FLAGS | CAN_MULTI_CONN;
    let setup = Setup::new(3 * MIB).index(1).block_size(4096).flags(flags);
    let setup = setup.backend("an image");
    let link = setup.attach_over(&[Transport::Tcp4, Transport::Unix]);
    let attrs = listener.expect(CONNECTED);
    assert_eq!(text(&attrs, BACKEND).as_deref(), Some("an image"));
    assert_eq!(number::<u64>(&attrs, SIZE), Some(3 * MIB));
    assert_eq!(number::<u32>(&attrs, BLOCK_SIZE), Some(4096));
    assert_eq!(number::<u64>(&attrs, FLAGS), Some(flags));
    assert_eq!(number::<u32>(&attrs, CONNECTIONS), Some(2));
    assert_eq!(number::<u32>(&attrs, INTERFACE), Some(1));
    let tid = gettid().as_raw_nonzero().get() as u32;
    assert_eq!(number::<u32>(&attrs, PID), Some(tid));
    // That the device is still open does not matter.
    let open = File::open("/dev/nbd1").expect("to open it");
    assert_eq!(link.netlink.disconnect_backend(1, b"an image"), Ok(()));
    let attrs = listener.expect(DISCONNECTED);
    assert_eq!(text(&attrs, BACKEND).as_deref(), Some("an image"));
    drop(open);
    link.wait_free();
    listener.expect_silence();
}

fn by_ioctl(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let mut rig = Plan::new(MIB).attach();
    let attrs = listener.expect(CONNECTED);
    assert_eq!(number::<u32>(&attrs, INTERFACE), Some(0));
    assert_eq!(number::<u64>(&attrs, SIZE), Some(MIB));
    assert!(text_is_missing(&attrs, BACKEND));
    assert_eq!(rig.disconnect(), Ok(0));
    assert_eq!(listener.next(), Heard::Disconnected);

    // The server goes, and then the client, which closes the device.
    let mut rig = Plan::new(MIB).attach();
    assert_eq!(listener.next(), Heard::Connected);
    rig.server.kill();
    assert_eq!(listener.next(), Heard::Dead(0, 0, CLOSED));
    rig.client.wait_lost();
    assert_eq!(listener.next(), Heard::Disconnected);

    let rig = Plan::new(MIB).attach();
    assert_eq!(listener.next(), Heard::Connected);
    let open = rig.open_to_read();
    assert_eq!(ioctl_number(&open, CLEAR_SOCK, 0), Ok(0));
    assert_eq!(listener.next(), Heard::Disconnected);
    drop((open, rig));
    listener.expect_silence();
}

fn text_is_missing(attrs: &[Attr], kind: u16) -> bool {
    crate::netlink::find(attrs, kind).is_none()
}

fn why_connections_die(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let dead = |transport, end: &dyn Fn(&Link)| {
        let setup = Setup::new(MIB).index(0).timeout(1).backend("b");
        let link = setup.attach_over(&[transport]).settle();
        assert_eq!(listener.next(), Heard::Connected);
        end(&link);
        let attrs = listener.expect(CONNECTION_DEAD);
        assert_eq!(text(&attrs, BACKEND).as_deref(), Some("b"));
        assert_eq!(number::<u32>(&attrs, CONNECTION), Some(0));
        assert_eq!(number::<u32>(&attrs, RECONNECTS), Some(0));
        link.disconnect_and_wait();
        assert_eq!(listener.next(), Heard::Disconnected);
        (number::<u32>(&attrs, REASON), number::<u32>(&attrs, ERRNO))
    };
    let read = |link: &Link| {
        let _ = read_page(&link.direct(), 0);
    };
    let closed = dead(Transport::Unix, &|link| link.server.kill());
    assert_eq!(closed, (Some(CLOSED), None));
    let reset = dead(Transport::Tcp4, &|link| link.server.abort());
    let errno = libc::ECONNRESET as u32;
    assert_eq!(reset, (Some(RECEIVE_FAILED), Some(errno)));
    let violated = dead(Transport::Unix, &|link| {
        link.server.script(|conn, _| conn.send(&[7; 16]));
        read(link);
    });
    assert_eq!(violated, (Some(PROTOCOL_VIOLATED), None));
    let late = dead(Transport::Tcp4, &|link| {
        link.server.script(|conn, _| conn.stall());
        read(link);
    });
    assert_eq!(late, (Some(TIMED_OUT), None));
    let deaf = dead(Transport::Unix, &|link| {
        link.server.script(|conn, request| {
            conn.stop_reading()?;
            conn.serve(request)?;
            thread::sleep(patient(Duration::from_secs(1)));
            Ok(())
        });
        read(link);
        read(link);
    });
    assert_eq!(deaf, (Some(SEND_FAILED), Some(libc::EPIPE as u32)));
    listener.expect_silence();
}

/// It is told when it begins to shut down, and not again when it has ended.
fn a_server_that_shuts_down(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let setup = Setup::new(MIB).index(0).dead_timeout(20);
    let link = setup.attach().settle();
    assert_eq!(listener.next(), Heard::Connected);
    link.server.script(|conn, request| match conn.index {
        0 => conn.refuse(request, libc::ESHUTDOWN as u32),
        _ => conn.serve(request),
    });
    let direct = link.direct();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        assert_eq!(listener.next(), Heard::Dead(0, 0, SHUTTING_DOWN));
        link.server.wait_for_command(Command::Disconnect);
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(listener.next(), Heard::Reconnected(0, 1));
        assert_eq!(reader.join().unwrap(), Ok(()));
    });
    listener.expect_silence();
}

fn a_stuck_connection_is_replaced(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let link = Setup::new(MIB).index(0).attach().settle();
    assert_eq!(listener.next(), Heard::Connected);
    link.server.script(|conn, request| match conn.index {
        0 => conn.stall(),
        _ => conn.serve(request),
    });
    let direct = link.direct();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        link.server.wait_for_command(Command::Read);
        thread::sleep(Duration::from_millis(1200));
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(reader.join().unwrap(), Ok(()));
    });
    assert_eq!(listener.next(), Heard::Dead(0, 0, REPLACED));
    assert_eq!(listener.next(), Heard::Reconnected(0, 1));
    listener.expect_silence();
}

fn reconnected(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let setup = setup.backend("b");
    let link = setup.attach_over(&[Transport::Unix; 2]).settle();
    assert_eq!(listener.next(), Heard::Connected);
    let revive = || {
        let socket = link.server.connect(Transport::Unix);
        let change = Setup::change(0).backend("b").sockets([socket]);
        assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    };
    for (round, server_connection) in [(0, 1), (1, 2), (2, 3)] {
        link.server.kill_connection(server_connection);
        assert_eq!(listener.next(), Heard::Dead(1, round, CLOSED));
        revive();
        let attrs = listener.expect(RECONNECTED);
        assert_eq!(text(&attrs, BACKEND).as_deref(), Some("b"));
        assert_eq!(number::<u32>(&attrs, CONNECTION), Some(1));
        assert_eq!(number::<u32>(&attrs, RECONNECTS), Some(round + 1));
    }
    listener.expect_silence();
}

fn each_of_many_connections(guest: &Guest) {
    const MANY: u32 = 100;
    let listener = Listener::new(guest, 0);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix; MANY as usize]);
    let link = link.settle();
    assert_eq!(listener.next(), Heard::Connected);
    link.server.kill();
    let mut dead: Vec<u32> = (0..MANY)
        .map(|_| match listener.next() {
            Heard::Dead(index, 0, CLOSED) => index,
            other => panic!("{other:?}"),
        })
        .collect();
    dead.sort_unstable();
    assert_eq!(dead, (0..MANY).collect::<Vec<u32>>());
    listener.expect_silence();
}

/// The wish is fulfilled with the last connection, and a new one begins anew.
fn after_nbd_disconnect(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let link = Setup::new(MIB).index(0).dead_timeout(20).attach().settle();
    assert_eq!(listener.next(), Heard::Connected);
    ioctl_number(link.direct(), proto::DISCONNECT, 0).expect("NBD_DISCONNECT");
    assert_eq!(listener.next(), Heard::Disconnected);
    assert_eq!(link.revive(), Ok(()));
    assert_eq!(listener.next(), Heard::Reconnected(0, 1));
    link.server.kill();
    assert_eq!(listener.next(), Heard::Dead(0, 1, CLOSED));
    link.disconnect_and_wait();
    assert_eq!(listener.next(), Heard::Disconnected);
    listener.expect_silence();
}

fn the_last_close_disconnects(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let setup = Setup::new(MIB).index(0).client_flags(DISCONNECT_ON_CLOSE);
    let link = setup.attach();
    assert_eq!(listener.next(), Heard::Connected);
    drop(link.direct());
    assert_eq!(listener.next(), Heard::Disconnected);
    link.wait_free();
    listener.expect_silence();
}

fn resized(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let link = Setup::new(MIB).index(0).backend("b").attach();
    assert_eq!(listener.next(), Heard::Connected);
    let resize = |size| {
        let change = Setup::change(0).backend("b").size(size);
        assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    };
    resize(5 * MIB);
    let attrs = listener.expect(RESIZED);
    assert_eq!(number::<u64>(&attrs, SIZE), Some(5 * MIB));
    assert_eq!(number::<u32>(&attrs, BLOCK_SIZE), Some(512));
    assert_eq!(text(&attrs, BACKEND).as_deref(), Some("b"));
    // It has that size.
    resize(5 * MIB);
    listener.expect_silence();
    link.disconnect_and_wait();
    assert_eq!(listener.next(), Heard::Disconnected);

    let mut rig = Plan::new(MIB).attach();
    assert_eq!(listener.next(), Heard::Connected);
    let open = rig.open_to_read();
    ioctl_number(&open, SET_SIZE, 2 * MIB).expect("NBD_SET_SIZE");
    assert_eq!(listener.next(), Heard::Resized(2 * MIB));
    ioctl_number(&open, SET_SIZE, 2 * MIB).expect("NBD_SET_SIZE");
    drop(open);
    ioctl_number(rig.direct(), SET_BLKSIZE, 4096).expect("NBD_SET_BLKSIZE");
    let attrs = listener.expect(RESIZED);
    assert_eq!(number::<u32>(&attrs, BLOCK_SIZE), Some(4096));
    listener.expect_silence();

    // What is set up after the end is for the next session.
    let open = rig.open_to_read();
    assert_eq!(rig.disconnect(), Ok(0));
    assert_eq!(listener.next(), Heard::Disconnected);
    ioctl_number(&open, SET_SIZE, 3 * MIB).expect("NBD_SET_SIZE");
    listener.expect_silence();
}

/// Nothing is told of what never was.
fn a_connect_that_fails(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let server = crate::server::Server::new();
    let used = server.connect(Transport::Unix);
    let sockets = [
        server.connect_and_end(),
        server.connect(Transport::Unix),
        used.try_clone().unwrap(),
        used,
    ];
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let netlink = Netlink::open();
    let refused = netlink.connect(&setup.sockets(sockets));
    assert_eq!(refused, Err(Errno::BUSY));
    listener.expect_silence();

    // A connection that was dead before is told of after the device is.
    let sockets = [server.connect_and_end()];
    let connected = netlink.connect(&Setup::new(MIB).index(0).sockets(sockets));
    assert_eq!(connected, Ok(0));
    assert_eq!(listener.next(), Heard::Connected);
    assert!(matches!(listener.next(), Heard::Dead(0, 0, _)));
    assert_eq!(netlink.disconnect(0), Ok(()));
    assert_eq!(listener.next(), Heard::Disconnected);
    netlink.wait_free(0);
}

/// It learns that it has missed something, and keeps nobody else from hearing.
fn a_listener_that_does_not_listen(guest: &Guest) {
    const RESIZES: u64 = 2000;
    let deaf = Listener::new(guest, 0);
    let listener = Listener::new(guest, 0);
    let link = Setup::new(MIB).index(0).attach();
    assert_eq!(listener.next(), Heard::Connected);
    for size in 1..=RESIZES {
        let change = Setup::change(0).size(MIB + (size << 12));
        assert_eq!(link.netlink.reconfigure(&change), Ok(()));
        assert_eq!(listener.next(), Heard::Resized(MIB + (size << 12)));
    }
    let mut heard = 0;
    let mut missed = 0;
    loop {
        match deaf.netlink.told() {
            Ok(Some(_)) => heard += 1,
            Ok(None) => break,
            Err(errno) => {
                assert_eq!(errno, Errno::NOBUFS);
                missed += 1;
            }
        }
    }
    assert!((1..RESIZES).contains(&heard), "{heard}");
    assert_eq!(missed, 1);
    link.disconnect_and_wait();
    assert_eq!(listener.next(), Heard::Disconnected);
    assert_eq!(deaf.next(), Heard::Disconnected);
}

/// Whatever happens at once: each device and each connection begins before it ends.
fn in_order(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    for round in 0..40 {
        let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let link = setup
            .dead_timeout(20)
            .attach_over(&[Transport::Unix, Transport::Tcp4]);
        assert_eq!(listener.next(), Heard::Connected);
        for revival in 0..3 {
            // The other ends at any time during the reconnect.
            link.server.kill_connection(revival);
            let server = &link.server;
            thread::scope(|scope| {
                scope.spawn(|| server.kill_connection(revival + 1));
                // Maybe nothing was dead yet.
                let _ = link.revive();
            });
        }
        link.disconnect_and_wait();
        let mut living = [Some(0), Some(0)];
        loop {
            match listener.next() {
                Heard::Dead(index, reconnects, _) => {
                    let before = living[index as usize].take();
                    assert_eq!(before, Some(reconnects), "round {round}");
                }
                Heard::Reconnected(index, reconnects) => {
                    let before = living[index as usize].replace(reconnects);
                    assert_eq!(before, None, "round {round}");
                }
                Heard::Disconnected => break,
                other => panic!("{other:?}"),
            }
        }
    }
    listener.expect_silence();
}
