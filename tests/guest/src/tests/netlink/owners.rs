// SPDX-License-Identifier: GPL-2.0

//! Devices that are disconnected when the netlink socket that connected them is closed: their owner.

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

/// What connects device `index` to `server`.
fn setup(index: u32, server: &Server) -> Setup {
    let socket = server.connect(Transport::Unix);
    Setup::new(SIZE).index(index).sockets([socket])
}

/// The same, and the socket that sends it becomes the owner.
fn owned(index: u32, server: &Server) -> Setup {
    setup(index, server).client_flags(DISCONNECT_ON_RELEASE)
}

/// Whether device `index` is disconnected within two seconds.
fn is_disconnected_soon(index: u32) -> bool {
    wait_until(Duration::from_secs(2), || device::pid(index).is_none()).is_ok()
}

/// Asserts that device `index`, whose owner is gone, is disconnected. nbd.ko does not do that; then this
/// disconnects it.
fn assert_disconnected(guest: &Guest, index: u32) {
    let disconnected = is_disconnected_soon(index);
    match guest.expected("a-device-can-have-an-owner") {
        Driver::Nbd => {
            assert!(!disconnected);
            Netlink::open().disconnect(index).unwrap();
        }
        Driver::Rnbd => assert!(disconnected),
    }
}

fn a_device_ends_with_its_owner(guest: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    owner.connect(&owned(0, &server)).unwrap();
    assert!(device::pid(0).is_some());
    drop(owner);
    assert_disconnected(guest, 0);
    let line = "nbd0: its netlink socket was closed, disconnecting";
    assert_eq!(
        guest.has_logged(line),
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
    assert_disconnected(guest, 0);
    assert_usable(0);
}

/// Requests fail, as after any other disconnect.
fn a_device_in_use_ends_with_its_owner(guest: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    owner.connect(&owned(0, &server)).unwrap();
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    // A request that the server does not answer does not delay the disconnect.
    server.script(|conn, _| conn.stall());
    thread::scope(|scope| {
        let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
        server.wait_for_command(proto::Command::Read);
        drop(owner);
        if guest.expected("a-device-can-have-an-owner") == Driver::Nbd {
            assert!(!is_disconnected_soon(0));
            Netlink::open().disconnect(0).unwrap();
        }
        assert!(reader.join().unwrap().is_err());
    });
    drop(direct);
    assert!(is_disconnected_soon(0));
    assert_usable(0);
}

fn only_where_it_is_asked_for(_: &Guest) {
    let server = Server::new();
    let connector = Netlink::open();
    connector.connect(&setup(0, &server)).unwrap();
    drop(connector);
    assert!(!is_disconnected_soon(0));
    // Another netlink socket than the owner's is closed.
    let owner = Netlink::open();
    let again = Setup::change(0).client_flags(DISCONNECT_ON_RELEASE);
    owner.reconfigure(&again).unwrap();
    drop(Netlink::open());
    assert!(!is_disconnected_soon(0));
    // The flag is cleared before the owner is closed.
    owner
        .reconfigure(&Setup::change(0).client_flags(0))
        .unwrap();
    drop(owner);
    assert!(!is_disconnected_soon(0));
    Netlink::open().disconnect(0).unwrap();
    assert!(is_disconnected_soon(0));
    assert_usable(0);
}

fn another_socket_can_become_the_owner(guest: &Guest) {
    let server = Server::new();
    let first = Netlink::open();
    first.connect(&owned(0, &server)).unwrap();
    let second = Netlink::open();
    // A RECONFIGURE without the flags leaves the owner as it is.
    second.reconfigure(&Setup::change(0).timeout(10)).unwrap();
    let taken_over = Setup::change(0).client_flags(DISCONNECT_ON_RELEASE);
    second.reconfigure(&taken_over).unwrap();
    drop(first);
    assert!(!is_disconnected_soon(0));
    drop(second);
    assert_disconnected(guest, 0);
    assert_usable(0);
}

fn the_next_user_of_the_index_is_left_alone(_: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    owner.connect(&owned(0, &server)).unwrap();
    owner.disconnect(0).unwrap();
    assert!(is_disconnected_soon(0));
    let other = Netlink::open();
    other.connect(&setup(0, &server)).unwrap();
    // A CONNECT that fails does not make the socket the owner.
    let connected = owner.connect(&owned(0, &server));
    assert_eq!(connected, Err(Errno::BUSY));
    drop(owner);
    assert!(!is_disconnected_soon(0));
    other.disconnect(0).unwrap();
    assert!(is_disconnected_soon(0));
    assert_usable(0);
}

fn many_at_the_same_time(guest: &Guest) {
    let server = Server::new();
    let owner = Netlink::open();
    for index in 0..4 {
        owner.connect(&owned(index, &server)).unwrap();
    }
    drop(owner);
    for index in 0..4 {
        assert_disconnected(guest, index);
    }
}
