// SPDX-License-Identifier: GPL-2.0

//! Planned handovers between servers of one store, by the command: nothing fails, and nothing waits.

use std::thread;
use std::time::{Duration, Instant};

use super::super::outages::{Host, Namespace, Storage, under_fio};
use super::super::rnbdctl::tool::ok;
use super::{BLUE, Connected, GREEN, expect_alive, expect_connections, only_rnbd};
use crate::device::SOON;
use crate::harness::{Guest, Test, say, wait_until};
use crate::programs::sh;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(handovers),
        test!(handovers_100_times).limit_seconds(1200).on_request(),
        test!(a_host_is_maintained),
    ]
}

/// The old server ends when it has no connection left, and is there again for the next round.
fn take_turns(guest: &Guest, rounds: usize) {
    only_rnbd(guest);
    let _storage = Storage::new();
    let mut hosts = ["blue", "green"].map(Host::local);
    let _connected = Connected::to(&format!("--backend image --connections 2 {BLUE}"));
    let mut longest = Duration::ZERO;
    under_fio(|| {
        for round in 1..=rounds {
            let (old, uri) = [(1, BLUE), (0, GREEN)][round % 2];
            let began = Instant::now();
            ok(&format!("handover nbd0 {uri} --wait"));
            longest = longest.max(began.elapsed());
            expect_connections(["blue", "green"][old], 0);
            hosts[old].shut_down();
            hosts[old].revive();
        }
    });
    expect_alive(2);
    let longest = longest.as_millis();
    say(&format!(
        "{rounds} handovers; the longest took {longest} ms, until the old connections had ended"
    ));
}

fn handovers(guest: &Guest) {
    take_turns(guest, 4);
}

fn handovers_100_times(guest: &Guest) {
    take_turns(guest, 100);
}

/// Two hosts export one store. One is taken down, and comes back.
fn a_host_is_maintained(guest: &Guest) {
    only_rnbd(guest);
    sh("modprobe veth");
    let _storage = Storage::new();
    let namespaces = [Namespace::new("left", 1), Namespace::new("right", 2)];
    let mut left = namespaces[0].host(1);
    let _right = namespaces[1].host(2);
    let _connected = Connected::to("--backend image --connections 2 nbd://10.9.1.2/");
    expect_peers("10.9.1.2");
    under_fio(|| {
        ok("handover nbd0 nbd://10.9.2.2/ --wait");
        expect_peers("10.9.2.2");
        left.shut_down();
        namespaces[0].link("down");
        thread::sleep(Duration::from_secs(1));
        namespaces[0].link("up");
        left.revive();
        ok("handover nbd0 nbd://10.9.1.2/ --wait");
        expect_peers("10.9.1.2");
    });
    expect_alive(2);
}

/// Waits until both connections lead to a host.
fn expect_peers(host: &str) {
    let peer = format!("\"peer\": \"{host}:{}\"", Namespace::PORT);
    let right = wait_until(SOON, || ok("show nbd0 --json").matches(&peer).count() == 2);
    assert!(right.is_ok(), "{}", ok("show nbd0"));
}
