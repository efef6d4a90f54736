// SPDX-License-Identifier: GPL-2.0

//! Who hears of a device: those in the network namespace of whoever has connected it, with or without privilege.

use std::path::Path;
use std::sync::mpsc;
use std::thread;

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::super::outages::Namespace;
use super::listener::{CLOSED, Heard, Listener};
use crate::device::{Plan, SOON, USUAL_FLAGS};
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::proto::CAN_MULTI_CONN;
use crate::server::Transport;
use crate::sys;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(in_the_namespace_of_who_connected),
        test!(a_namespace_is_given_back),
        test!(by_a_socket_of_another_namespace),
        test!(by_ioctl_in_another_namespace),
        test!(without_privilege),
    ]
}

const MIB: u64 = 1 << 20;

/// Who connects there, and whoever acts on the device afterwards, is somewhere else.
fn in_the_namespace_of_who_connected(guest: &Guest) {
    let here = Listener::new(guest, 0);
    let (say, hear) = mpsc::channel();
    thread::scope(|scope| {
        let there = scope.spawn(move || {
            sys::enter_new_network();
            let listener = Listener::here(0);
            let setup = Setup::new(MIB).index(0).dead_timeout(20);
            let link = setup.attach().settle();
            assert_eq!(listener.next(), Heard::Connected);
            say.send(()).unwrap();
            assert_eq!(listener.next(), Heard::Resized(2 * MIB));
            link.server.kill();
            assert_eq!(listener.next(), Heard::Dead(0, 0, CLOSED));
            say.send(()).unwrap();
            assert_eq!(listener.next(), Heard::Reconnected(0, 1));
            say.send(()).unwrap();
            assert_eq!(listener.next(), Heard::Disconnected);
            listener.expect_silence();
        });
        let act = |hear: &mpsc::Receiver<()>, act: &dyn Fn(&Netlink)| {
            if hear.recv().is_ok() {
                act(&Netlink::open());
            }
        };
        let server = crate::server::Server::new();
        act(&hear, &|netlink| {
            let change = Setup::change(0).size(2 * MIB);
            assert_eq!(netlink.reconfigure(&change), Ok(()));
        });
        act(&hear, &|netlink| {
            let socket = server.connect(Transport::Unix);
            let change = Setup::change(0).sockets([socket]);
            assert_eq!(netlink.reconfigure(&change), Ok(()));
        });
        act(&hear, &|netlink| {
            assert_eq!(netlink.disconnect(0), Ok(()));
        });
        there.join().unwrap();
    });
    here.expect_silence();

    // Nobody is left there, and the next device is of this namespace.
    let link = Setup::new(MIB).index(0).attach();
    assert_eq!(here.next(), Heard::Connected);
    link.disconnect_and_wait();
    assert_eq!(here.next(), Heard::Disconnected);
}

/// Devices that were connected in a namespace do not keep it, and neither does a connect that has failed.
fn a_namespace_is_given_back(guest: &Guest) {
    drop(Listener::new(guest, 0));
    let namespace = Namespace::new("events", 7);
    namespace.inside(|| {
        let link = Setup::new(MIB).index(0).attach();
        link.disconnect_and_wait();
        let socket = link.server.connect(Transport::Unix);
        let twice = [socket.try_clone().unwrap(), socket];
        let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let refused = link.netlink.connect(&setup.sockets(twice));
        assert_eq!(refused, Err(Errno::BUSY));
        let mut rig = Plan::new(MIB).attach();
        assert_eq!(rig.disconnect(), Ok(0));
    });
    drop(namespace);
    // The one end of a pair goes with the namespace of the other.
    let gone = || !Path::new("/sys/class/net/veth7").exists();
    assert!(
        wait_until(SOON, gone).is_ok(),
        "something keeps the namespace"
    );
}

/// The namespace is that of the socket, wherever the task is.
fn by_a_socket_of_another_namespace(guest: &Guest) {
    let here = Listener::new(guest, 0);
    let netlink = Netlink::open();
    let server = crate::server::Server::new();
    let sockets = [server.connect(Transport::Unix)];
    let there = thread::spawn(move || {
        sys::enter_new_network();
        let connected = netlink.connect(&Setup::new(MIB).index(0).sockets(sockets));
        assert_eq!(connected, Ok(0));
    });
    there.join().unwrap();
    assert_eq!(here.next(), Heard::Connected);
    let netlink = Netlink::open();
    assert_eq!(netlink.disconnect(0), Ok(()));
    assert_eq!(here.next(), Heard::Disconnected);
    netlink.wait_free(0);
}

fn by_ioctl_in_another_namespace(guest: &Guest) {
    let here = Listener::new(guest, 0);
    let there = thread::spawn(|| {
        sys::enter_new_network();
        let listener = Listener::here(0);
        // The thread that plays the client inherits the namespace.
        let mut rig = Plan::new(MIB).attach();
        assert_eq!(listener.next(), Heard::Connected);
        assert_eq!(rig.disconnect(), Ok(0));
        assert_eq!(listener.next(), Heard::Disconnected);
    });
    there.join().unwrap();
    here.expect_silence();
}

fn without_privilege(guest: &Guest) {
    drop(Listener::new(guest, 0));
    let (say, hear) = mpsc::channel();
    // Capabilities belong to a thread.
    let thread = thread::spawn(move || {
        let mut sets = capabilities(None).unwrap();
        sets.effective = CapabilitySet::empty();
        set_capabilities(None, sets).unwrap();
        let listener = Listener::here(0);
        say.send(()).unwrap();
        assert_eq!(listener.next(), Heard::Connected);
    });
    hear.recv().expect("a listener");
    let link = Setup::new(MIB).index(0).attach();
    thread.join().unwrap();
    drop(link);
}
