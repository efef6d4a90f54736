// SPDX-License-Identifier: GPL-2.0

//! The driver is loaded anew while `rnbdctl keep` waits for a server, or its device is connected anew.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::process::Signal;

use super::super::outages::{Host, Storage};
use super::super::rnbdctl::tool::ok;
use super::{Kept, config, read_direct};
use crate::device::{self, SOON};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::programs::Daemon;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![test!(the_driver), test!(the_device)]
}

/// Nothing that it hears of the old one is heard of the new one. With nbd.ko it cannot look either.
fn the_driver(guest: &Guest) {
    let _storage = Storage::new();
    let _ = fs::remove_file("/tmp/kept.sock");
    let timeout = match guest.driver {
        Driver::Nbd => "timeout = 2",
        Driver::Rnbd => "",
    };
    let mut kept = Kept::begin(&config(&["kept"], timeout), "");
    kept.expect_said("connecting to /tmp/kept.sock", 1);
    let events = Daemon::start("/rnbd/rnbdctl events");
    let listens = |times| {
        let said = wait_until(SOON, || events.said().matches("listening").count() >= times);
        assert!(said.is_ok(), "{}", events.said());
    };
    listens(1);
    guest.driver.unload().expect("to unload it");
    kept.expect_said("the driver has changed", 1);
    guest.driver.load("nbds_max=2").expect("to load it");
    kept.expect_said("the driver has changed", 2);
    listens(2);
    let mut host = Host::local("kept");
    kept.expect_note("READY=1");
    host.kill();
    host.revive();
    // Otherwise it looks after a minute, with rnbd.
    kept.expect_said("is dead", 1);
    kept.expect_replaced(1);
    read_direct().expect("to read");
    let told = wait_until(SOON, || events.said().contains(" connection-dead"));
    assert!(told.is_ok(), "{}", events.said());
}

/// With the same index and identifier, to another server, while it does not look.
fn the_device(guest: &Guest) {
    let _storage = Storage::new();
    let _hosts = ["kept", "other"].map(Host::local);
    let mut kept = Kept::start(&config(&["kept"], ""), "");
    let file = || fs::metadata("/sys/block/nbd0/pid").map(|found| found.ino());
    let first = file().unwrap();
    kept.daemon.signal(Signal::STOP);
    ok("disconnect nbd0 --backend kept");
    let free = wait_until(SOON, || device::pid(0).is_none());
    assert!(free.is_ok());
    ok("connect --backend kept nbd+unix:///?socket=/tmp/other.sock nbd0");
    // One process may have connected both, and has one number.
    assert_ne!(file().unwrap(), first);
    kept.daemon.signal(Signal::CONT);
    // nbd.ko tells nothing.
    kept.daemon.signal(Signal::HUP);
    kept.expect_said("somebody else has connected /dev/nbd0 anew", 1);
    match guest.driver {
        Driver::Rnbd => {
            kept.expect_said("connected to /tmp/other.sock, and none of the URIs", 1);
            kept.expect_failure();
        }
        Driver::Nbd => kept.expect_said("/dev/nbd0 is connected already", 1),
    }
}
