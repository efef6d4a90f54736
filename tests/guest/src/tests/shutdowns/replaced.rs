// SPDX-License-Identifier: GPL-2.0

//! Refused requests are sent over another connection, if there is one or a new one comes.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::{
    DIFFERENCE, ESHUTDOWN, MIB, commands_on, failures, refusal, refuse_on_first, wait_for_goodbye,
    while_reading,
};
use crate::device::{SOON, USUAL_FLAGS, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::sh;
use crate::proto::{CAN_MULTI_CONN, Command};
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;
use crate::tests::netlink::{move_data, under_load};

pub fn tests() -> Vec<Test> {
    vec![
        test!(the_only_connection_is_replaced),
        test!(another_connection_takes_over),
        test!(one_command_is_refused_twice),
        test!(everything_is_refused),
        test!(one_server_after_the_other),
    ]
}

fn two_connections() -> Link {
    let setup = Setup::new(4 * MIB).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    setup
        .attach_over(&[Transport::Tcp4, Transport::Unix])
        .settle()
}

/// Replies are received in the callback of a TCP socket, in the sender of a UNIX one, and by a worker with
/// TLS.
const TRANSPORTS: [Transport; 3] = [Transport::Tcp4, Transport::Unix, Transport::Tls];

fn the_only_connection_is_replaced(guest: &Guest) {
    sh("modprobe tls");
    for transport in TRANSPORTS {
        let setup = Setup::new(MIB).dead_timeout(20);
        let link = setup.attach_over(&[transport]).settle();
        let news = Netlink::listen();
        let direct = link.direct();
        link.server.script(refuse_on_first(1));
        if guest.expected(DIFFERENCE) == Driver::Nbd {
            assert_eq!(read_page(&direct, 0), Err(Errno::IO));
            assert_eq!(news.dead_link(), None);
            link.server.be_honest();
            assert_eq!(read_page(&direct, 0), Ok(()));
            continue;
        }
        thread::scope(|scope| {
            let reader = scope.spawn(|| read_page(&direct, 0));
            assert_eq!(news.expect_dead_link(), link.index);
            wait_for_goodbye(&link.server, 0);
            assert!(!reader.is_finished(), "the read did not wait");
            assert_eq!(link.revive(), Ok(()));
            assert_eq!(reader.join().unwrap(), Ok(()));
        });
        move_data(&direct, 0, 1);
        let seen = commands_on(&link.server, 0);
        assert_eq!(seen, [Command::Read, Command::Disconnect]);
        assert_eq!(news.dead_link(), None, "a second message");
    }
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
        let seen = commands_on(&link.server, victim);
        assert_eq!(seen.last(), Some(&Command::Disconnect), "{seen:?}");
        let ended = wait_until(SOON, || link.server.living() == 1);
        assert!(ended.is_ok());
        assert_eq!(news.dead_link(), None, "a second message");
    }
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
    assert_eq!(news.dead_link(), None, "a second message");
}

/// Both connections refuse everything, and there is no dead_conn_timeout to wait for a third one.
fn everything_is_refused(guest: &Guest) {
    let link = two_connections();
    let news = Netlink::listen();
    link.server.script(refuse_on_first(2));
    let results = while_reading(&link, 12, || ());
    assert_eq!(results, [Err(Errno::IO); 12]);
    if guest.expected(DIFFERENCE) == Driver::Rnbd {
        for connection in [0, 1] {
            assert_eq!(news.expect_dead_link(), link.index);
            wait_for_goodbye(&link.server, connection);
        }
        assert_eq!(read_page(&link.direct(), 0), Err(Errno::IO));
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
        // It fails the requests, and does not ask for another connection.
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
            // Some close the connection before the goodbye comes.
            (_, 3) if already > 20 => conn.close(),
            (_, 2) if already % 3 == 0 => conn.defer(request),
            _ => conn.refuse(request, ESHUTDOWN),
        }
    });
    under_load(&link, || {
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
