// SPDX-License-Identifier: GPL-2.0

//! What a server sends over TLS besides data: alerts, session tickets, key updates.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::Errno;

use super::events::listener::{
    CLOSED, Heard, Listener, PROTOCOL_VIOLATED, RECEIVE_FAILED, WANTS_REKEYING,
};
use crate::device::{Plan, Rig, USUAL_FLAGS, assert_usable, errno, pattern, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::sh;
use crate::proto::{CAN_MULTI_CONN, Command, REPLY_LEN, Request};
use crate::server::{Conn, Server, Transport, decrypt_receiving, encrypt_sending, tcp_pair};
use crate::sys::{Buffer, SysResult, set_socket_option};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(close_notify_is_the_end),
        test!(alerts_end_the_connection),
        test!(what_must_not_come),
        test!(tickets_are_skipped),
        test!(tickets_among_replies_in_pieces),
        test!(tickets_behind_an_empty_record),
        test!(a_flood_of_tickets),
        test!(another_connection_goes_on_after_a_key_update),
        test!(requests_wait_after_a_key_update),
        test!(a_key_update_after_the_last_reply),
        test!(a_key_update_without_another_connection),
    ]
}

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;

/// The versions of TLS.
const VERSIONS: [Transport; 2] = [Transport::Tls, Transport::Tls13];

/// Types of records.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const HEARTBEAT: u8 = 24;

/// Alerts.
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
const USER_CANCELED: [u8; 2] = [1, 90];
const INTERNAL_ERROR: [u8; 2] = [2, 80];

/// The handshake message by which the server changes its key, and wants the client to do so, too.
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 1];

/// A handshake message with a session ticket of this size.
fn ticket(len: u32) -> Vec<u8> {
    let mut message = vec![4];
    message.extend(&len.to_be_bytes()[1..]);
    // The type of a key update, again and again, which means nothing there. The kernel takes it for one at the
    // start of a record, though.
    message.extend([0, 24, 0, 1].iter().cycle().take(len as usize));
    message
}

fn load_tls() {
    sh("modprobe tls");
}

/// Connects a device over TLS by netlink.
fn connect(setup: Setup, transports: &[Transport]) -> Link {
    load_tls();
    let setup = setup.index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    setup.attach_over(transports).settle()
}

/// The server sends a record instead of a reply, and keeps the connection. Returns why it has died.
fn death_after(listener: &Listener, version: Transport, kind: u8, bytes: &[u8]) -> Heard {
    let link = connect(Setup::new(MIB).timeout(30), &[version]);
    assert_eq!(listener.next(), Heard::Connected);
    let news = Netlink::listen();
    let bytes = bytes.to_vec();
    link.server.script(move |conn, _| {
        conn.send_record(kind, &bytes)?;
        conn.stall()
    });
    assert_eq!(read_page(&link.direct(), 0), Err(Errno::IO));
    let heard = listener.next();
    assert_eq!(news.expect_dead_link(), 0);
    link.disconnect_and_wait();
    assert_eq!(listener.next(), Heard::Disconnected);
    heard
}

fn close_notify_is_the_end(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    for version in VERSIONS {
        let heard = death_after(&listener, version, ALERT, &CLOSE_NOTIFY);
        assert_eq!(heard, Heard::Dead(0, 0, CLOSED), "{version:?}");
    }
    assert!(guest.has_logged("connection 0: the server has closed it"));
    assert!(!guest.has_logged("alert"));
}

/// A server that has sent one may keep the socket. Half a reply before it counts for nothing.
fn alerts_end_the_connection(guest: &Guest) {
    load_tls();
    for version in VERSIONS {
        for len in [0, 7, REPLY_LEN, REPLY_LEN + 1000] {
            let mut rig = Plan::new(16 << 20).transport(version).attach();
            rig.server.script(move |conn, request| {
                let reply = conn.answer(request)?;
                conn.send(&reply[..len])?;
                conn.send_record(ALERT, &INTERNAL_ERROR)?;
                conn.stall()
            });
            let read = read_at_start(&rig.direct(), 64 * KIB);
            assert_eq!(read, Err(Errno::IO), "{version:?}, after {len} bytes");
            rig.client.wait_lost();
        }
    }
    guest.expect_logged(
        "Receive control failed (result -5)",
        "connection 0: the server has sent the TLS alert internal_error (80, fatal), closing it",
    );
    assert_usable(0);
}

fn what_must_not_come(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let certificate_request = [13, 0, 0, 3, 0, 0, 0];
    for (kind, bytes, said) in [
        (HEARTBEAT, &[1, 0, 0][..], "unexpected TLS record (type 24)"),
        (ALERT, &[2, 80, 0], "TLS alert of a wrong size"),
        (
            HANDSHAKE,
            &certificate_request,
            "unexpected TLS handshake message (type 13)",
        ),
    ] {
        for version in VERSIONS {
            let heard = death_after(&listener, version, kind, bytes);
            assert_eq!(heard, Heard::Dead(0, 0, PROTOCOL_VIOLATED), "{said}");
        }
        assert!(guest.has_logged(said), "{said}");
    }
    let heard = death_after(&listener, Transport::Tls13, ALERT, &[1, 255]);
    assert_eq!(heard, Heard::Dead(0, 0, RECEIVE_FAILED));
    assert!(guest.has_logged("the TLS alert unknown alert (255, warning)"));
}

fn read_at_start(device: &File, len: usize) -> SysResult<()> {
    errno(device.read_exact_at(&mut Buffer::new(len), 0))
}

/// Writes and reads back, of which the server makes what it likes. With nbd.ko, the first record that is no data
/// ends the connection.
fn goes_on(guest: &Guest, rig: &mut Rig, seed: u64) {
    let direct = rig.direct();
    let goes_on = guest.expected("tls-records-are-understood") == Driver::Rnbd;
    for len in [4 * KIB, 20 * KIB, 256 * KIB] {
        let data = Buffer::filled(len, |data| pattern(seed, 4096, data));
        let mut back = Buffer::new(len);
        let written = errno(direct.write_all_at(&data, 4096));
        if !goes_on {
            // The reply may have come before the record.
            let read = errno(direct.read_exact_at(&mut back, 4096));
            assert_eq!(read, Err(Errno::IO));
            drop(direct);
            return rig.client.wait_lost();
        }
        assert_eq!(written, Ok(()));
        assert_eq!(errno(direct.read_exact_at(&mut back, 4096)), Ok(()));
        assert!(*back == *data, "{len} bytes");
    }
    drop(direct);
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Small ones, one that takes several records, and several in one record.
fn tickets_are_skipped(guest: &Guest) {
    load_tls();
    for version in VERSIONS {
        let mut rig = Plan::new(16 << 20).transport(version).attach();
        rig.server.script(|conn, request| {
            conn.send_record(HANDSHAKE, &ticket(200))?;
            conn.send_record(HANDSHAKE, &ticket(0))?;
            conn.send_record(HANDSHAKE, &ticket(60_000))?;
            conn.send_record(HANDSHAKE, &[ticket(300), ticket(1), ticket(252)].concat())?;
            conn.send_record(ALERT, &USER_CANCELED)?;
            conn.serve(request)
        });
        goes_on(guest, &mut rig, 1);
    }
}

/// One of the tickets is in two records.
fn tickets_among_replies_in_pieces(guest: &Guest) {
    load_tls();
    for version in VERSIONS {
        for piece in [1000, 16 * KIB] {
            let mut rig = Plan::new(16 << 20).transport(version).attach();
            rig.server.script(move |conn, request| {
                let reply = conn.answer(request)?;
                let (header, data) = reply.split_at(REPLY_LEN);
                let long = ticket(500);
                let (first, second) = long.split_at(3);
                // Not a ticket after each piece of much data.
                let often = data.len().div_ceil(piece).div_ceil(20).max(1);
                for (at, part) in header.chunks(7).chain(data.chunks(piece)).enumerate() {
                    conn.send(part)?;
                    if at < 3 || at % often == 0 {
                        conn.send_record(HANDSHAKE, &ticket(100))?;
                        conn.send_record(HANDSHAKE, first)?;
                        conn.send_record(HANDSHAKE, second)?;
                    }
                }
                Ok(())
            });
            goes_on(guest, &mut rig, piece as u64);
        }
    }
}

/// A record of data without any is not the end of the stream, also where only one direction is encrypted.
fn tickets_behind_an_empty_record(guest: &Guest) {
    load_tls();
    for sends_encrypted in [true, false] {
        let (client, served) = tcp_pair(([127, 0, 0, 1], 0).into());
        decrypt_receiving(&client);
        if sends_encrypted {
            encrypt_sending(&client);
            decrypt_receiving(&served);
        }
        let server = Server::new();
        server.serve_socket(served);
        let begun = AtomicBool::new(false);
        server.script(move |conn, request| {
            if begun.swap(true, Ordering::SeqCst) {
                return conn.serve(request);
            }
            // One call is to find both records.
            cork(conn, true)?;
            conn.send_empty_record()?;
            conn.send_record(HANDSHAKE, &ticket(100))?;
            cork(conn, false)?;
            conn.serve(request)
        });
        let setup = Setup::new(MIB).index(0).sockets([client]);
        let netlink = Netlink::open();
        assert_eq!(netlink.connect(&setup), Ok(0));
        let expected = match guest.expected("tls-records-are-understood") {
            Driver::Rnbd => Ok(()),
            Driver::Nbd => Err(Errno::IO),
        };
        let device = File::open("/dev/nbd0").expect("the device");
        assert_eq!(read_page(&device, 0), expected, "{sends_encrypted}");
        drop(device);
        assert_eq!(netlink.disconnect(0), Ok(()));
        netlink.wait_free(0);
    }
}

/// Collects what the server sends, until this is off again.
fn cork(conn: &Conn, on: bool) -> SysResult<()> {
    const TCP_CORK: i32 = 3;
    let on = u32::from(on).to_ne_bytes();
    set_socket_option(conn.socket(), libc::IPPROTO_TCP, TCP_CORK, &on).map(drop)
}

/// A server that sends half a reply and then nothing but tickets does not put off the timeout.
fn a_flood_of_tickets(_: &Guest) {
    load_tls();
    for version in VERSIONS {
        let mut rig = Plan::new(16 << 20).timeout(1).transport(version).attach();
        rig.server.script(|conn, request| {
            let reply = conn.answer(request)?;
            conn.send(&reply[..REPLY_LEN + 100])?;
            loop {
                conn.send_record(HANDSHAKE, &ticket(200))?;
            }
        });
        let read = read_at_start(&rig.direct(), 64 * KIB);
        assert_eq!(read, Err(Errno::IO), "{version:?}");
        rig.client.wait_lost();
    }
    assert_usable(0);
}

/// Sends a key update, after which nothing can be understood.
fn update_key(conn: &mut Conn) -> io::Result<()> {
    conn.send_record(HANDSHAKE, &KEY_UPDATE)?;
    conn.stall()
}

/// Requests in flight are sent again at once. What the server has answered before counts.
fn another_connection_goes_on_after_a_key_update(guest: &Guest) {
    const LEN: usize = 1 << 20;
    let listener = Listener::new(guest, 0);
    let links = Netlink::listen();
    let setup = Setup::new(8 * LEN as u64).timeout(30);
    let link = connect(setup, &[Transport::Tls13; 2]);
    assert_eq!(listener.next(), Heard::Connected);
    let direct = link.direct();
    let updated = AtomicBool::new(false);
    link.server.script(move |conn, request| {
        if updated.swap(true, Ordering::SeqCst) {
            conn.serve(request)
        } else {
            // Not the data of it, if it is a write.
            update_key(conn)
        }
    });
    thread::scope(|scope| {
        for thread in 0..4 {
            let direct = &direct;
            scope.spawn(move || {
                let offset = thread * 2 * LEN as u64;
                let data = Buffer::filled(LEN, |data| pattern(thread, offset, data));
                let mut back = Buffer::new(LEN);
                direct.write_all_at(&data, offset).expect("to write");
                direct.read_exact_at(&mut back, offset).expect("to read");
                assert!(*back == *data, "at {offset}");
            });
        }
    });
    let heard = listener.next();
    let known = [
        Heard::Dead(0, 0, WANTS_REKEYING),
        Heard::Dead(1, 0, WANTS_REKEYING),
    ];
    assert!(known.contains(&heard), "{heard:?}");
    assert_eq!(links.expect_dead_link(), 0);
    listener.expect_silence();
    let said = "the server has changed its TLS key, closing it";
    assert!(guest.has_logged(said));
}

/// If there is no other connection, they wait for a new one.
fn requests_wait_after_a_key_update(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    for version in VERSIONS {
        let link = connect(Setup::new(MIB).dead_timeout(60), &[version]);
        assert_eq!(listener.next(), Heard::Connected);
        link.server.script(|conn, request| match conn.index {
            0 => update_key(conn),
            _ => conn.serve(request),
        });
        let direct = link.direct();
        thread::scope(|scope| {
            let readers = [(); 3].map(|()| scope.spawn(|| read_page(&direct, 0)));
            assert_eq!(listener.next(), Heard::Dead(0, 0, WANTS_REKEYING));
            let socket = link.server.connect(version);
            let change = Setup::change(0).sockets([socket]);
            assert_eq!(link.netlink.reconfigure(&change), Ok(()));
            assert_eq!(listener.next(), Heard::Reconnected(0, 1));
            for reader in readers {
                assert_eq!(reader.join().unwrap(), Ok(()), "{version:?}");
            }
        });
        drop(direct);
        link.disconnect_and_wait();
        assert_eq!(listener.next(), Heard::Disconnected);
    }
}

/// It is noticed although nothing follows it, and the reply that has come with it counts.
fn a_key_update_after_the_last_reply(guest: &Guest) {
    let listener = Listener::new(guest, 0);
    let answered = |conn: &mut Conn, request: &Request| {
        cork(conn, true)?;
        conn.serve(request)?;
        conn.send_record(HANDSHAKE, &KEY_UPDATE)?;
        cork(conn, false)?;
        conn.stall()
    };
    for version in VERSIONS {
        let link = connect(Setup::new(MIB), &[version]);
        assert_eq!(listener.next(), Heard::Connected);
        link.server.script(answered);
        assert_eq!(read_page(&link.direct(), 0), Ok(()), "{version:?}");
        assert_eq!(listener.next(), Heard::Dead(0, 0, WANTS_REKEYING));
        assert_eq!(link.server.requests_of(Command::Read).len(), 1);
        link.disconnect_and_wait();
        assert_eq!(listener.next(), Heard::Disconnected);
    }
}

/// Requests fail, with both drivers.
fn a_key_update_without_another_connection(_: &Guest) {
    load_tls();
    let mut rig = Plan::new(16 << 20).transport(Transport::Tls13).attach();
    rig.server.script(|conn, _| update_key(conn));
    assert_eq!(read_at_start(&rig.direct(), 64 * KIB), Err(Errno::IO));
    rig.client.wait_lost();
    assert_usable(0);
}
