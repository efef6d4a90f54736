// SPDX-License-Identifier: GPL-2.0

//! A device that lives as long as the netlink socket that has connected it, if that is asked for.

use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use crate::device::{self, SOON, assert_usable};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{DISCONNECT_ON_RELEASE, Netlink, Setup};
use crate::proto;
use crate::server::{Server, Transport};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(a_device_ends_with_its_owner),
        test!(a_device_ends_with_the_process),
        test!(a_device_in_use_ends_with_its_owner),
        test!(only_where_it_is_asked_for),
        test!(another_socket_can_become_the_owner),
        test!(the_next_user_of_the_index_is_left_alone),
        test!(many_at_the_same_time).parameters("nbds_max=4"),
    ]
}

const SIZE: u64 = 1 << 20;

fn setup(index: u32) -> Setup {
    Setup::new(SIZE).index(index)
}

fn connect_with(netlink: &Netlink, setup: Setup, server: &Server) {
    let socket = server.connect(Transport::Unix);
    netlink.connect(&setup.sockets([socket])).unwrap();
}

fn owned(index: u32) -> Setup {
    setup(index).client_flags(DISCONNECT_ON_RELEASE)
}

/// Whether device `index` is disconnected soon, or if not, stays as it is for a while.
fn ends(index: u32) -> bool {
    wait_until(Duration::from_secs(2), || device::pid(index).is_none()).is_ok()
}

fn assert_ends(guest: &Guest, index: u32) {
    let ends = ends(index);
    match guest.expected("a-device-can-have-an-owner") {
        Driver::Nbd => {
            assert!(!ends);
            Netlink::open().disconnect(index).unwrap();
        }
        Driver::Rnbd => assert!(ends),
    }
}

fn a_device_ends_with_its_owner(guest: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    connect_with(&owner, owned(0), &server);
    assert!(device::pid(0).is_some());
    drop(owner);
    assert_ends(guest, 0);
    let line = "nbd0: its netlink socket was closed, disconnecting";
    let logged = guest.log().iter().any(|l| l.contains(line));
    assert_eq!(
        logged,
        guest.expected("a-device-can-have-an-owner") == Driver::Rnbd
    );
    assert_usable(0);
}

fn a_device_ends_with_the_process(guest: &Guest) {
    let server = Server::new();
    let mut process = Command::new("/proc/self/exe")
        .args(["helper", "own", "0", &SIZE.to_string()])
        .stdin(server.connect(Transport::Unix))
        .stdout(Stdio::null())
        .spawn()
        .expect("a process");
    let connected = wait_until(SOON, || device::pid(0).is_some());
    assert!(connected.is_ok());
    process.kill().expect("to kill it");
    process.wait().expect("it to end");
    assert_ends(guest, 0);
    assert_usable(0);
}

/// Whoever has it open meets errors, as after any disconnect.
fn a_device_in_use_ends_with_its_owner(guest: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    connect_with(&owner, owned(0), &server);
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    // A request that is not answered does not hold it up.
    server.script(|conn, _| conn.stall());
    thread::scope(|scope| {
        let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
        server.wait_for_command(proto::Command::Read);
        drop(owner);
        if guest.expected("a-device-can-have-an-owner") == Driver::Nbd {
            assert!(!ends(0));
            Netlink::open().disconnect(0).unwrap();
        }
        assert!(reader.join().unwrap().is_err());
    });
    drop(direct);
    assert!(ends(0));
    assert_usable(0);
}

fn only_where_it_is_asked_for(_: &Guest) {
    let server = Server::new();
    let connector = Netlink::open();
    connect_with(&connector, setup(0), &server);
    drop(connector);
    assert!(!ends(0));
    // Nor with a socket that has nothing to do with it.
    let owner = Netlink::open();
    let again = Setup::change(0).client_flags(DISCONNECT_ON_RELEASE);
    owner.reconfigure(&again).unwrap();
    drop(Netlink::open());
    assert!(!ends(0));
    // Nor after the flag was taken back.
    owner
        .reconfigure(&Setup::change(0).client_flags(0))
        .unwrap();
    drop(owner);
    assert!(!ends(0));
    Netlink::open().disconnect(0).unwrap();
    assert!(ends(0));
    assert_usable(0);
}

fn another_socket_can_become_the_owner(guest: &Guest) {
    let server = Server::new();
    let first = Netlink::open();
    connect_with(&first, owned(0), &server);
    let second = Netlink::open();
    // This changes nothing that it does not name.
    second.reconfigure(&Setup::change(0).timeout(10)).unwrap();
    let taken_over = Setup::change(0).client_flags(DISCONNECT_ON_RELEASE);
    second.reconfigure(&taken_over).unwrap();
    drop(first);
    assert!(!ends(0));
    drop(second);
    assert_ends(guest, 0);
    assert_usable(0);
}

fn the_next_user_of_the_index_is_left_alone(_: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    connect_with(&owner, owned(0), &server);
    owner.disconnect(0).unwrap();
    assert!(ends(0));
    let other = Netlink::open();
    connect_with(&other, setup(0), &server);
    // Its own attempt fails, and does not make it the owner of anything.
    let socket = server.connect(Transport::Unix);
    let connected = owner.connect(&owned(0).sockets([socket]));
    assert_eq!(connected, Err(Errno::BUSY));
    drop(owner);
    assert!(!ends(0));
    other.disconnect(0).unwrap();
    assert!(ends(0));
    assert_usable(0);
}

fn many_at_the_same_time(guest: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    for index in 0..4 {
        connect_with(&owner, owned(index), &server);
    }
    drop(owner);
    for index in 0..4 {
        assert_ends(guest, index);
    }
}
