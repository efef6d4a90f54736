// SPDX-License-Identifier: GPL-2.0

//! The commands handover, reconnect and events.

use std::fs::File;

use rustix::process::Signal;

use super::super::outages::{Host, SIZE, STORAGE, Storage, under_fio};
use super::super::rnbdctl::tool::{fails, ok};
use super::{BLUE, Connected, GREEN, expect_alive, expect_connections, only_rnbd, read_direct};
use crate::device::SOON;
use crate::driver::Driver;
use crate::harness::{Guest, Test, say, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::programs::Daemon;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(handover),
        test!(handovers_that_are_refused),
        test!(reconnect),
        test!(events_for_people),
        test!(events_for_programs),
        test!(missed_events),
    ]
}

fn handover(guest: &Guest) {
    let _storage = Storage::new();
    let _hosts = ["blue", "green"].map(Host::local);
    let options = format!("--backend image --connections 2 {BLUE}");
    let _connected = Connected::to(&options);
    if guest.driver == Driver::Nbd {
        fails(
            &format!("handover nbd0 {GREEN}"),
            1,
            &["nbd.ko replaces no connections", "rnbdctl reconnect"],
        );
        return;
    }
    under_fio(|| {
        let said = ok(&format!("handover nbd0 {GREEN} --wait"));
        assert_eq!(said, "/dev/nbd0: 2 of 2 connections handed over\n");
        expect_connections("blue", 0);
        expect_connections("green", 2);
        let said = ok(&format!(
            "handover /dev/nbd0 {BLUE} --connection 1 --drain 5"
        ));
        assert_eq!(said, "/dev/nbd0: 1 of 2 connections handed over\n");
        expect_connections("blue", 1);
        expect_connections("green", 1);
    });
    expect_alive(2);
}

fn handovers_that_are_refused(guest: &Guest) {
    only_rnbd(guest);
    let _storage = Storage::new();
    let _hosts = ["blue", "green"].map(Host::local);
    fails(
        &format!("handover nbd0 {GREEN}"),
        5,
        &["/dev/nbd0: it is not connected"],
    );
    let connected = Connected::to(&format!("--backend image --connections 2 {BLUE}"));
    fails(
        &format!("handover nbd0 {GREEN} --connection 2"),
        2,
        &["it has no connection 2, but 2 from 0 on"],
    );
    fails(
        "handover nbd0 nbd+unix:///?socket=/tmp/nobody.sock",
        6,
        &["connecting to /tmp/nobody.sock"],
    );
    File::options()
        .write(true)
        .open(STORAGE)
        .unwrap()
        .set_len(SIZE / 2)
        .unwrap();
    fails(
        &format!("handover nbd0 {GREEN}"),
        7,
        &["comparing the export: it has", "another export"],
    );
    File::options()
        .write(true)
        .open(STORAGE)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    expect_alive(2);
    drop(connected);

    let _server = super::super::user_space::serve(
        &format!(
            "nbdkit -f -U /tmp/single.sock --filter=multi-conn file {STORAGE} multi-conn-mode=disable"
        ),
        "/tmp/single.sock",
    );
    let single = "nbd+unix:///?socket=/tmp/single.sock";
    let _connected = Connected::to(&format!("--backend image {single}"));
    fails(
        &format!("handover nbd0 {single}"),
        7,
        &["NBD_FLAG_CAN_MULTI_CONN"],
    );
    read_direct().expect("to read");
}

fn reconnect(guest: &Guest) {
    let _storage = Storage::new();
    let mut host = Host::local("blue");
    let options = "--backend image --connections 2 --dead-conn-timeout 60 --timeout 3";
    let _connected = Connected::to(&format!("{options} {BLUE}"));
    let news = Netlink::listen();
    host.kill();
    for _ in 0..2 {
        assert_eq!(news.expect_dead_link(), 0);
    }
    host.revive();
    if guest.driver == Driver::Nbd {
        let said = ok(&format!("reconnect nbd0 {BLUE} --connections 2"));
        assert_eq!(said, "/dev/nbd0: 2 connections offered\n");
    } else {
        expect_alive(0);
        let said = ok(&format!("reconnect nbd0 {BLUE}"));
        assert_eq!(said, "/dev/nbd0: 2 connections replaced\n");
        let said = ok(&format!("reconnect nbd0 {BLUE}"));
        assert_eq!(said, "/dev/nbd0: no connection is dead\n");
    }
    expect_connections("blue", 2);
    read_direct().expect("to read");
}

/// The command, once it hears.
fn listen(options: &str) -> Daemon {
    let daemon = Daemon::start(&format!("/rnbd/rnbdctl events {options}"));
    expect(&daemon, "listening");
    daemon
}

fn expect(events: &Daemon, words: &str) {
    let said = wait_until(SOON, || events.said().contains(words));
    assert!(said.is_ok(), "{words} was not said: {}", events.said());
}

/// Connects, loses a connection, gets another one, and disconnects.
fn live(guest: &Guest) {
    let _storage = Storage::new();
    let mut host = Host::local("blue");
    let options = "--backend image --connections 1 --dead-conn-timeout 60";
    let _connected = Connected::to(&format!("{options} {BLUE}"));
    host.kill();
    if guest.driver == Driver::Rnbd {
        expect_alive(0);
        host.revive();
        ok(&format!("reconnect nbd0 {BLUE}"));
    }
}

fn events_for_people(guest: &Guest) {
    let events = listen("");
    live(guest);
    let lines: &[&str] = match guest.driver {
        Driver::Nbd => &["nbd.ko tells only", " nbd0 connection-dead\n"],
        Driver::Rnbd => &[
            " nbd0 connected size=16777216 block-size=512 flags=",
            " nbd0 connection-dead connection=0 reason=",
            " nbd0 reconnected connection=0 reconnects=1 backend=\"image\"\n",
            " nbd0 disconnected backend=\"image\"\n",
        ],
    };
    for line in lines {
        expect(&events, line);
    }
    say(&events.said());
}

fn events_for_programs(guest: &Guest) {
    let events = listen("--json");
    live(guest);
    let lines: &[&str] = match guest.driver {
        Driver::Nbd => &["\"event\":\"connection-dead\",\"index\":0}\n"],
        Driver::Rnbd => &[
            "\"event\":\"connected\",\"index\":0,\"backend\":\"image\",\"size\":16777216,",
            "\"event\":\"connection-dead\",\"index\":0,\"connection\":0,\"reason\":\"",
            "\"event\":\"reconnected\",\"index\":0,\"connection\":0,\"reconnects\":1,",
            "\"event\":\"disconnected\",\"index\":0,\"backend\":\"image\"}\n",
        ],
    };
    for line in lines {
        expect(&events, line);
    }
    for line in events
        .said()
        .lines()
        .filter(|line| !line.starts_with("rnbdctl: "))
    {
        assert!(
            line.starts_with("{\"time\":\"") && line.ends_with('}'),
            "{line}"
        );
    }
}

/// The listener is stopped meanwhile.
fn missed_events(guest: &Guest) {
    only_rnbd(guest);
    let _storage = Storage::new();
    let _host = Host::local("blue");
    let connected = Connected::to(&format!("--backend image {BLUE}"));
    let listeners = [listen(""), listen("--json")];
    for events in &listeners {
        events.signal(Signal::STOP);
    }
    for size in (SIZE - 1500 * 512..SIZE).step_by(512) {
        let change = Setup::change(0).backend("image").size(size);
        assert_eq!(connected.0.reconfigure(&change), Ok(()));
    }
    for events in &listeners {
        events.signal(Signal::CONT);
    }
    expect(
        &listeners[0],
        "events were missed; the devices are now:\nDEVICE",
    );
    expect(
        &listeners[1],
        "\"event\":\"missed\",\"devices\":[{\"index\":0,",
    );
}
