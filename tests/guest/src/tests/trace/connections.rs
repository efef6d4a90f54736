// SPDX-License-Identifier: GPL-2.0

//! Trace events of connections.

use std::os::fd::OwnedFd;

use super::MIB;
use crate::device::{SOON, USUAL_FLAGS, read_page};
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::{CAN_MULTI_CONN, Request};
use crate::server::{Conn, Transport};
use crate::test;
use crate::tests::handover::hand_over;
use crate::tracefs::Tracefs;

pub fn tests() -> Vec<Test> {
    vec![test!(that_die), test!(that_are_replaced)]
}

/// Waits for the next events of connections, and clears the trace.
fn expect_lines(tracefs: &Tracefs, wanted: &[&str]) {
    let lines = || {
        let lines = tracefs.lines().into_iter();
        let ours = lines.filter(|(name, _)| name.starts_with("nbd_connection_"));
        ours.map(|(_, text)| text).collect::<Vec<_>>()
    };
    let _ = wait_until(SOON, || lines().len() >= wanted.len());
    assert_eq!(lines(), wanted);
    tracefs.clear();
}

/// Traces what happens to connections.
fn trace_connections() -> Tracefs {
    let tracefs = Tracefs::new();
    for what in ["born", "dead", "replaced"] {
        tracefs.switch(Some(&format!("nbd_connection_{what}")), true);
    }
    tracefs
}

fn that_die(_: &Guest) {
    let tracefs = trace_connections();
    let dies = |transport, end: &dyn Fn(&Link), how: &str| {
        let link = Setup::new(MIB)
            .index(0)
            .timeout(1)
            .attach_over(&[transport]);
        let link = link.settle();
        expect_lines(&tracefs, &["nbd0: connection 0: born, reconnects 0"]);
        end(&link);
        expect_lines(
            &tracefs,
            &[&format!("nbd0: connection 0: dead, reconnects 0, {how}")],
        );
        link.disconnect_and_wait();
        assert_eq!(tracefs.lines(), []);
    };
    dies(
        Transport::Unix,
        &|link| link.server.kill(),
        "reason closed, error 0",
    );
    let reset = format!("reason receive-failed, error {}", libc::ECONNRESET);
    dies(Transport::Tcp4, &|link| link.server.abort(), &reset);
    let answer = |script: fn(&mut Conn, &Request) -> std::io::Result<()>| {
        move |link: &Link| {
            link.server.script(script);
            let _ = read_page(&link.direct(), 0);
        }
    };
    let lie = answer(|conn, _| conn.send(&[7; 16]));
    dies(Transport::Unix, &lie, "reason protocol-violated, error 0");
    let stall = answer(|conn, _| conn.stall());
    dies(Transport::Tcp4, &stall, "reason timed-out, error 0");

    let link = Setup::new(MIB).index(0).attach().settle();
    link.disconnect_and_wait();
    let lines = [
        "nbd0: connection 0: born, reconnects 0",
        "nbd0: connection 0: dead, reconnects 0, reason ended, error 0",
    ];
    expect_lines(&tracefs, &lines);
}

fn that_are_replaced(_: &Guest) {
    let tracefs = trace_connections();
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.dead_timeout(20).attach().settle();
    link.kill_server();
    assert_eq!(link.revive(), Ok(()));
    let lines = [
        "nbd0: connection 0: born, reconnects 0",
        "nbd0: connection 0: dead, reconnects 0, reason closed, error 0",
        "nbd0: connection 0: born, reconnects 1",
        "nbd0: connection 0: replaced by reconnect, reconnects 1",
    ];
    expect_lines(&tracefs, &lines);
    let rnbd = Netlink::try_open_family("rnbd").expect("the family rnbd");
    let socket: OwnedFd = link.server.connect(Transport::Unix);
    assert_eq!(hand_over(&rnbd, Some(0), &[socket], 5000), Ok(()));
    let lines = [
        "nbd0: connection 0: born, reconnects 2",
        "nbd0: connection 0: replaced by handover, reconnects 2",
        "nbd0: connection 0: dead, reconnects 1, reason replaced, error 0",
    ];
    expect_lines(&tracefs, &lines);
}
