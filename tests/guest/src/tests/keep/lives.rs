// SPDX-License-Identifier: GPL-2.0

//! From the start of `rnbdctl keep` to its end, and what it refuses.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::Signal;

use super::super::outages::{Host, SIZE, STORAGE, Storage, under_fio};
use super::super::rnbdctl::tool::{fails, ok};
use super::{CONFIG, Kept, config, expect_alive, expect_connections, only_rnbd, read_direct};
use crate::device::{self, SOON, errno};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::programs::sh;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(another_export_is_refused),
        test!(killed_and_started_again),
        test!(a_connection_of_several_dies),
        test!(before_the_server_is_there),
        test!(the_next_server),
        test!(hands_over_at_sighup),
        test!(somebody_else_disconnects),
        test!(what_is_left_at_the_end),
        test!(two_for_one_device),
        test!(somebody_elses_device),
        test!(a_device_of_another_server),
        test!(configurations_that_make_no_sense),
    ]
}

/// Its size has changed. Requests fail when their time is over, and go on when the right one is back.
fn another_export_is_refused(guest: &Guest) {
    let _storage = Storage::new();
    let mut host = Host::local("kept");
    let timeout = match guest.driver {
        Driver::Nbd => "timeout = 1",
        Driver::Rnbd => "",
    };
    let config =
        config(&["kept"], timeout).replace("dead-conn-timeout = 60", "dead-conn-timeout = 2");
    let kept = Kept::start(&config, "");
    host.kill();
    File::options()
        .write(true)
        .open(STORAGE)
        .unwrap()
        .set_len(SIZE / 2)
        .unwrap();
    host.revive();
    kept.expect_said(
        &format!("it has {} bytes, and the device {SIZE}", SIZE / 2),
        1,
    );
    assert_eq!(errno(read_direct()), Err(Errno::IO));
    expect_connections("kept", 0);
    // It is said once, and not for each attempt.
    assert_eq!(
        kept.daemon.said().matches("comparing the export").count(),
        1
    );
    host.kill();
    File::options()
        .write(true)
        .open(STORAGE)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    host.revive();
    kept.expect_replaced(1);
    let works = wait_until(SOON, || read_direct().is_ok());
    assert!(works.is_ok(), "{}", kept.daemon.said());
}

/// A read waits meanwhile.
fn killed_and_started_again(guest: &Guest) {
    let _storage = Storage::new();
    let mut host = Host::local("kept");
    let timeout = match guest.driver {
        Driver::Nbd => "timeout = 2",
        Driver::Rnbd => "",
    };
    let config = config(&["kept"], &format!("connections = 1\n{timeout}"));
    let mut kept = Kept::start(&config, "");
    assert_eq!(device::sysfs(0, "backend"), "kept");
    // It finds the device that it has connected.
    kept.daemon.kill();
    let mut again = Kept::start(&config, "");
    again.expect_said("/dev/nbd0 is connected already", 1);
    again.daemon.kill();
    host.kill();
    thread::scope(|scope| {
        let reader = scope.spawn(read_direct);
        host.revive();
        let third = Kept::start(&config, "");
        reader.join().unwrap().expect("to read");
        drop(third);
    });
}

/// The others go on meanwhile. The new one leads to their server, and not to another one, which could be another
/// store.
fn a_connection_of_several_dies(guest: &Guest) {
    only_rnbd(guest);
    let _storage = Storage::new();
    let _host = Host::local("kept");
    let config = config(&["other", "kept"], "connections = 2");
    let mut kept = Kept::start(&config, "");
    let mut other = Host::local("other");
    ok("handover nbd0 --connection 1 nbd+unix:///?socket=/tmp/other.sock");
    expect_connections("other", 1);
    // It does not know which server it has dialled.
    kept.daemon.kill();
    let again = Kept::start(&config, "");
    other.kill();
    other.revive();
    again.expect_replaced(1);
    expect_connections("kept", 2);
    expect_connections("other", 0);
    expect_alive(2);
}

/// It is dialled more and more rarely, and found when it is there.
fn before_the_server_is_there(_: &Guest) {
    let _ = fs::remove_file("/tmp/kept.sock");
    let listener = UnixListener::bind("/tmp/kept.sock").unwrap();
    let config = config(&["kept"], "").replace("delay = 0.5", "delay = 10");
    let mut kept = Kept::begin(&config, "");
    let dialled = thread::spawn(move || {
        listener.set_nonblocking(true).unwrap();
        let (began, mut dialled) = (Instant::now(), 0);
        while began.elapsed() < Duration::from_secs(3) {
            match listener.accept() {
                Ok(_) => dialled += 1,
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
        dialled
    });
    kept.expect_note("STATUS=kept: trying again: greeting of /tmp/kept.sock");
    // At 0, 0.1, 0.3, 0.7 and 1.5 seconds at the earliest if no delay was below its half, which is 0.05 s first.
    let dialled = dialled.join().unwrap();
    assert!((2..=7).contains(&dialled), "{dialled} times");
    let _storage = Storage::new();
    let _host = Host::local("kept");
    kept.expect_note("READY=1");
    drop(kept);
}

fn the_next_server(guest: &Guest) {
    let _storage = Storage::new();
    let _ = fs::remove_file("/tmp/kept.sock");
    let mut other = Host::local("other");
    let timeout = match guest.driver {
        Driver::Nbd => "timeout = 2",
        Driver::Rnbd => "",
    };
    let config = config(&["kept", "other"], &format!("connections = 1\n{timeout}"));
    let kept = Kept::start(&config, "");
    expect_connections("other", 1);
    if guest.driver == Driver::Nbd {
        // It cannot know whether another connection is alive, and so dials the same server.
        return;
    }
    let _host = Host::local("kept");
    other.kill();
    kept.expect_replaced(1);
    expect_connections("kept", 1);
    read_direct().expect("to read");
}

fn hands_over_at_sighup(guest: &Guest) {
    let _storage = Storage::new();
    let mut hosts = ["blue", "green"].map(Host::local);
    let mut kept = Kept::start(&config(&["blue"], "connections = 2"), "");
    expect_connections("blue", 2);
    let hang_up = |kept: &mut Kept, name: &str| {
        fs::write(CONFIG, config(&[name], "connections = 2")).unwrap();
        kept.daemon.signal(Signal::HUP);
        kept.expect_note("RELOADING=1");
    };
    if guest.driver == Driver::Nbd {
        hang_up(&mut kept, "green");
        kept.expect_said("nbd.ko replaces no connections that are alive", 1);
        expect_connections("blue", 2);
        return;
    }
    under_fio(|| {
        for (round, name) in (1..).zip(["green", "blue", "green", "blue"]) {
            hang_up(&mut kept, name);
            kept.expect_said("handed 2 connections over", round);
            let old = usize::from(name == "blue");
            expect_connections(["blue", "green"][old], 0);
            hosts[old].shut_down();
            hosts[old].revive();
        }
    });
    expect_alive(2);
    // What makes no sense changes nothing.
    fs::write(CONFIG, "uris = []\n").unwrap();
    kept.daemon.signal(Signal::HUP);
    kept.expect_said("the old configuration stays", 1);
    expect_connections("blue", 2);
}

fn somebody_else_disconnects(guest: &Guest) {
    only_rnbd(guest);
    let _storage = Storage::new();
    let _host = Host::local("kept");
    let mut kept = Kept::start(&config(&["kept"], ""), "");
    ok("disconnect nbd0 --backend kept");
    assert!(kept.daemon.wait(SOON), "{}", kept.daemon.said());
    kept.expect_said("somebody else has disconnected it", 1);
    assert_eq!(device::pid(0), None);
}

fn what_is_left_at_the_end(_: &Guest) {
    let _storage = Storage::new();
    sh(&format!("mkfs.ext4 -q {STORAGE}"));
    let _host = Host::local("kept");
    let config = config(&["kept"], "");
    let end = |options: &str| {
        let mut kept = Kept::start(&config, options);
        kept.daemon.terminate();
        assert!(kept.daemon.wait(SOON), "{}", kept.daemon.said());
        kept.expect_note("STOPPING=1");
        kept
    };
    let first = end("");
    assert!(device::pid(0).is_some(), "{}", first.daemon.said());
    sh("mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt");
    let mounted = end("--disconnect");
    mounted.expect_said("/dev/nbd0 is mounted or claimed, and stays connected", 1);
    sh("touch /tmp/mnt/x && umount /tmp/mnt");
    let last = end("--disconnect");
    let gone = wait_until(SOON, || device::pid(0).is_none());
    assert!(gone.is_ok(), "{}", last.daemon.said());
}

/// Both would connect a device of their own, where the configuration names none.
fn two_for_one_device(_: &Guest) {
    let _storage = Storage::new();
    let _host = Host::local("kept");
    let config = config(&["kept"], "").replace("device = \"/dev/nbd0\"\n", "");
    let mut kept = Kept::start(&config, "");
    let words = "another \"rnbdctl keep\" keeps the device with the identifier \"kept\"";
    fails(
        &format!("keep {CONFIG}"),
        3,
        &[words, "/run/rnbd/kept.backend"],
    );
    assert_eq!(device::pid(1), None);
    kept.daemon.kill();
    let again = Kept::start(&config, "");
    again.expect_said("/dev/nbd0 is connected already", 1);
}

fn somebody_elses_device(_: &Guest) {
    let _storage = Storage::new();
    let _host = Host::local("kept");
    ok("connect --backend theirs nbd+unix:///?socket=/tmp/kept.sock nbd0");
    let mut kept = Kept::begin(&config(&["kept"], ""), "");
    kept.expect_said("it is connected with the identifier \"theirs\"", 1);
    kept.expect_failure();
    fails(
        &format!("keep {CONFIG}"),
        3,
        &["there is no device left to keep"],
    );
    assert!(device::pid(0).is_some());
}

/// Two configurations in different directories may have one name.
fn a_device_of_another_server(guest: &Guest) {
    only_rnbd(guest);
    let _storage = Storage::new();
    let _hosts = ["kept", "other"].map(Host::local);
    ok("connect --backend kept nbd+unix:///?socket=/tmp/other.sock nbd0");
    let mut kept = Kept::begin(&config(&["kept"], ""), "");
    kept.expect_said("connected to /tmp/other.sock, and none of the URIs", 1);
    kept.expect_failure();
    expect_connections("kept", 0);
    read_direct().expect("to read");
}

fn configurations_that_make_no_sense(_: &Guest) {
    fails(
        "keep /tmp/nothing.toml",
        2,
        &["/tmp/nothing.toml: No such file"],
    );
    fails("keep", 2, &["/etc/rnbd"]);
    fs::write(CONFIG, config(&["kept"], "conections = 2")).unwrap();
    fails(
        &format!("keep {CONFIG}"),
        2,
        &["line 5", "conections", "rnbd.toml(5)"],
    );
    fs::write(CONFIG, "uris = [\"nbds+unix:///?socket=/tmp/kept.sock\"]\n").unwrap();
    fails(&format!("keep {CONFIG}"), 2, &["TLS for TCP only"]);
    fs::write(CONFIG, config(&["kept"], "")).unwrap();
    fails(
        &format!("keep {CONFIG} {CONFIG}"),
        2,
        &["several have the identifier \"kept\""],
    );
}
