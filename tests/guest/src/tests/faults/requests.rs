// SPDX-License-Identifier: GPL-2.0

//! Requests that fail before the driver sees them, and replies that are forgotten after it has.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::Load;
use crate::device::{SOON, USUAL_FLAGS};
use crate::harness::{Guest, Test, Until, say, seed, wait_until};
use crate::injection::Knobs;
use crate::netlink::{Netlink, Setup};
use crate::proto::CAN_MULTI_CONN;
use crate::server::{Server, Transport};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(fail_before_the_driver),
        test!(replies_are_forgotten).limit_seconds(160),
        test!(replies_on_the_only_connection_are_forgotten).limit_seconds(160),
    ]
}

fn sysfs_switch(name: &str, value: u32) {
    fs::write(format!("/sys/block/nbd0/{name}"), value.to_string()).expect(name);
}

/// fail_make_request: of each request a program is told that it failed, and it did.
fn fail_before_the_driver(_: &Guest) {
    let knobs = Knobs::of("fail_make_request");
    let setup = Setup::new(Load::BYTES).index(0).timeout(20);
    let link = setup.attach_over(&[Transport::Tcp4]).settle();
    sysfs_switch("make-it-fail", 1);
    let mut load = Load::new(0, seed());
    let (enough, tally) = load.run(false, |tally| {
        knobs
            .set("times", 60)
            .set("interval", 5)
            .set("probability", 100);
        wait_until(2 * SOON, || knobs.times_left() == 0 && tally.done() > 200)
    });
    sysfs_switch("make-it-fail", 0);
    say(&format!("{tally:?}"));
    assert!(enough.is_ok());
    assert_eq!(tally.failed(), 60);
    load.verify();
    drop(link);
}

/// Puts new connections in the places of dead ones, until `done`.
fn keep_connected(server: &Server, transport: Transport, done: &AtomicBool) -> u32 {
    let (netlink, news) = (Netlink::open(), Netlink::listen());
    let mut reconnected = 0;
    while !done.load(Ordering::Relaxed) {
        if news.dead_link().is_none() {
            thread::sleep(Duration::from_millis(5));
            continue;
        }
        let socket = server.connect(transport);
        let change = Setup::change(0).sockets([socket]);
        assert_eq!(netlink.reconfigure(&change), Ok(()));
        reconnected += 1;
    }
    reconnected
}

/// fail_io_timeout: the driver does as if it had not seen so many replies. Their requests run into
/// their timeout, and are made again.
fn forget(connections: usize, transport: Transport, times: i32) {
    let knobs = Knobs::of("fail_io_timeout");
    let setup = Setup::new(Load::BYTES)
        .index(0)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .timeout(2)
        .dead_timeout(60);
    let link = setup.attach_over(&vec![transport; connections]).settle();
    let done = AtomicBool::new(false);
    let mut load = Load::new(0, seed());
    thread::scope(|scope| {
        let (server, done) = (&link.server, &done);
        let daemon = scope.spawn(move || keep_connected(server, transport, done));
        let until_done = Until(done);
        let (enough, tally) = load.run(false, |tally| {
            thread::sleep(Duration::from_millis(200));
            sysfs_switch("io-timeout-fail", 1);
            // Not all at once, so that there are several timeouts.
            knobs
                .set("times", times)
                .set("interval", 20)
                .set("probability", 100);
            let forgotten = wait_until(4 * SOON, || knobs.times_left() == 0);
            sysfs_switch("io-timeout-fail", 0);
            let before = tally.done();
            forgotten.and_then(|()| wait_until(2 * SOON, || tally.done() > before + 300))
        });
        drop(until_done);
        let reconnected = daemon.join().expect("the daemon");
        say(&format!("{reconnected} new connections; {tally:?}"));
        assert!(
            enough.is_ok(),
            "it has come to a halt: {} replies left",
            knobs.times_left()
        );
        assert_eq!(tally.failed(), 0);
        assert!(reconnected > 0, "no reply was forgotten");
    });
    load.verify();
}

fn replies_are_forgotten(_: &Guest) {
    forget(3, Transport::Tcp4, 6);
}

fn replies_on_the_only_connection_are_forgotten(_: &Guest) {
    forget(1, Transport::Unix, 4);
}
