// SPDX-License-Identifier: GPL-2.0

//! The end of a connection, and of a device.

use std::collections::HashSet;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::io::Errno;

use super::{MIB, move_data, sysfs_exists, try_connect, wait_destroyed};
use crate::debug_kernel::enough;
use crate::device::{self, SOON, USUAL_FLAGS, assert_usable, read_page};
use crate::harness::{Guest, Test, say, seed, wait_until};
use crate::netlink::{DESTROY_ON_DISCONNECT, DISCONNECT_ON_CLOSE, Link, Netlink, Setup};
use crate::proto::{self, CAN_MULTI_CONN, Command};
use crate::server::{Server, Transport, tcp_pair};
use crate::sys::{Buffer, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(disconnect),
        // Otherwise a read of the first block may be owed.
        test!(nothing_owed_is_ended_politely).parameters("nbds_max=2 partition_scan=0"),
        test!(disconnect_an_open_device),
        test!(disconnect_with_requests_in_flight),
        test!(connected_devices_hold_the_module),
        test!(clear_sock_frees_a_connected_device),
        test!(devices_are_made_and_destroyed),
        test!(a_device_that_is_open_is_destroyed_later),
        test!(disconnect_on_close),
        test!(connect_against_the_last_close),
        test!(disconnect_while_it_is_being_connected),
        test!(close_while_it_is_being_connected),
        test!(commands_at_the_same_time),
    ]
}

fn disconnect(_: &Guest) {
    let netlink = Netlink::open();
    assert_eq!(netlink.disconnect(0), Ok(()), "not connected");
    assert_eq!(netlink.disconnect(17), Err(Errno::INVAL), "no such device");
    let setup = Setup::new(MIB).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    assert_eq!(link.disconnect(), Ok(()));
    let said_goodbye = |requests: &[proto::Request]| {
        let goodbyes = requests
            .iter()
            .filter(|request| request.command == Command::Disconnect);
        let connections: HashSet<usize> = goodbyes.map(|request| request.connection).collect();
        connections.len() == 2
    };
    link.server.wait_for("two goodbyes", said_goodbye);
    let ended = wait_until(SOON, || link.server.living() == 0);
    assert!(ended.is_ok());
    assert_eq!(link.disconnect(), Ok(()), "not connected any more");
    assert_usable(link.index);
}

/// The server of a connection that owes nothing finds a disconnect and the end of the stream, not a reset.
fn nothing_owed_is_ended_politely(_: &Guest) {
    let (ours, mut theirs) = tcp_pair((Ipv4Addr::LOCALHOST, 0).into());
    let netlink = Netlink::open();
    let index = netlink.connect(&Setup::new(MIB).sockets([ours])).unwrap();
    assert_eq!(netlink.disconnect(index), Ok(()));
    let mut received = Vec::new();
    theirs.read_to_end(&mut received).expect("no reset");
    assert_eq!(received.len(), 28, "a request");
    assert_eq!(received[6..8], [0, 2], "a disconnect");
}

fn disconnect_an_open_device(_: &Guest) {
    let link = Setup::new(MIB).attach();
    let direct = link.direct();
    assert_eq!(read_page(&direct, 0), Ok(()));
    assert_eq!(link.disconnect(), Ok(()));
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    assert_eq!(link.netlink.status(Some(0)), [(0, true)]);
    assert_eq!(link.revive(), Err(Errno::INVAL));
    assert_eq!(
        try_connect(&Setup::new(MIB).index(0)),
        Err(Errno::BUSY),
        "still open"
    );
    assert_eq!(link.disconnect(), Ok(()));
    drop(direct);
    link.wait_free();
    assert_eq!(try_connect(&Setup::new(MIB).index(0)), Ok(()));
}

fn disconnect_with_requests_in_flight(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    link.server.script(|conn, _| conn.stall());
    let direct = link.direct();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        link.server.wait_for_command(Command::Read);
        assert_eq!(link.disconnect(), Ok(()));
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    drop(direct);
    link.wait_free();
}

fn connected_devices_hold_the_module(guest: &Guest) {
    let link = Setup::new(MIB).attach();
    assert_eq!(guest.driver.try_unload(), Err(Errno::WOULDBLOCK));
    link.disconnect().unwrap();
}

fn clear_sock_frees_a_connected_device(_: &Guest) {
    let link = Setup::new(MIB).attach();
    let open = device::open(link.index, 0).unwrap();
    assert_eq!(ioctl_number(&open, proto::CLEAR_SOCK, 0), Ok(0));
    assert_eq!(device::sysfs(link.index, "size"), "0");
    drop(open);
    link.wait_free();
    assert_usable(link.index);
}

/// The index is in use for a moment after the disk has gone.
fn attach_again(setup: &Setup) -> Link {
    let mut link = None;
    let attached = wait_until(SOON, || match setup.try_attach() {
        Ok(attached) => {
            link = Some(attached);
            true
        }
        Err(Errno::INVAL | Errno::EXIST) => false,
        Err(errno) => panic!("to connect again: {errno}"),
    });
    assert!(attached.is_ok(), "the index cannot be used again");
    link.unwrap()
}

fn devices_are_made_and_destroyed(_: &Guest) {
    // The last is one of those that the module made.
    for index in [7, 20_000, 1] {
        let keep = Setup::new(MIB).index(index);
        let setup = keep.clone().client_flags(DESTROY_ON_DISCONNECT);
        for _ in 0..3 {
            let link = setup.attach();
            assert!(sysfs_exists(index));
            move_data(&link.direct(), 0, 4);
            assert_eq!(link.disconnect(), Ok(()));
            wait_destroyed(index);
            let dev = format!("/dev/nbd{index}");
            assert!(wait_until(SOON, || !Path::new(&dev).exists()).is_ok());
            let forgotten = wait_until(SOON, || link.netlink.status(Some(index)).is_empty());
            assert!(forgotten.is_ok());
        }
        let link = attach_again(&keep);
        move_data(&link.direct(), 0, 5);
        link.disconnect_and_wait();
        assert!(sysfs_exists(index), "it was not to be destroyed");
    }
}

fn a_device_that_is_open_is_destroyed_later(_: &Guest) {
    let setup = Setup::new(MIB).index(7).client_flags(DESTROY_ON_DISCONNECT);
    let link = setup.attach();
    let direct = link.direct();
    assert_eq!(link.disconnect(), Ok(()));
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    assert!(sysfs_exists(7));
    assert_eq!(try_connect(&setup), Err(Errno::INVAL), "it is going");
    drop(direct);
    wait_destroyed(7);
    drop(attach_again(&setup));
    wait_destroyed(7);
}

fn disconnect_on_close(_: &Guest) {
    let link = Setup::new(MIB).client_flags(DISCONNECT_ON_CLOSE).attach();
    let direct = link.direct();
    let second = link.direct();
    drop(second);
    assert_eq!(read_page(&direct, 0), Ok(()), "one is left");
    drop(direct);
    link.wait_free();
    let ended = wait_until(SOON, || link.server.living() == 0);
    assert!(ended.is_ok());
    // And both flags together; the second close is the last.
    let flags = DISCONNECT_ON_CLOSE | DESTROY_ON_DISCONNECT;
    let link = Setup::new(MIB).index(7).client_flags(flags).attach();
    drop(link.direct());
    wait_destroyed(7);
    // It can be taken back.
    let link = Setup::new(MIB).client_flags(DISCONNECT_ON_CLOSE).attach();
    let stay = Setup::change(link.index).client_flags(0);
    assert_eq!(link.netlink.reconfigure(&stay), Ok(()));
    drop(link.direct());
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
}

/// A device goes with its last close, but not where it has been connected anew by then.
fn connect_against_the_last_close(_: &Guest) {
    let setup = Setup::new(MIB).index(7).client_flags(DESTROY_ON_DISCONNECT);
    let server = Server::new();
    let mut caught = 0;
    for _ in 0..enough(400, 60) {
        let link = attach_again(&setup);
        let open = device::open(7, 0).unwrap();
        assert_eq!(ioctl_number(&open, proto::CLEAR_SOCK, 0), Ok(0));
        let setup = setup.clone().sockets([server.connect(Transport::Unix)]);
        let connected = thread::scope(|scope| {
            let connector = scope.spawn(|| {
                let netlink = Netlink::open();
                let mut answer = Err(Errno::BUSY);
                while answer == Err(Errno::BUSY) {
                    answer = netlink.connect(&setup);
                }
                answer
            });
            thread::sleep(Duration::from_millis(2));
            drop(open);
            connector.join().unwrap()
        });
        if connected.is_ok() {
            caught += 1;
            thread::sleep(Duration::from_millis(20));
            assert_eq!(
                link.netlink.status(Some(7)),
                [(7, true)],
                "connected, and unknown"
            );
        }
        let _ = link.disconnect();
    }
    say(&format!("{caught} connected in time"));
    wait_destroyed(7);
}

/// Does `act` at some moment while device 0 is being connected, again and again. What is still
/// connected then works.
fn meddle_with_connecting(client_flags: u64, act: impl Fn(&Netlink) + Sync) {
    let mut random = Rng::with_seed(seed());
    let server = Server::new();
    let netlink = Netlink::open();
    let mut survived = 0;
    for round in 0..enough(300, 60) {
        // The number of hardware queues changes each time, which takes a while.
        let sockets = [Transport::Unix; 2].into_iter().take(1 + round % 2);
        let setup = Setup::new(MIB)
            .index(0)
            .flags(USUAL_FLAGS | CAN_MULTI_CONN)
            .client_flags(client_flags)
            .sockets(sockets.map(|transport| server.connect(transport)));
        let connected = thread::scope(|scope| {
            let connector = scope.spawn(|| Netlink::open().connect(&setup));
            thread::sleep(Duration::from_micros(random.u64(..12_000)));
            act(&netlink);
            connector.join().unwrap()
        });
        drop(setup);
        if connected.is_ok() && netlink.status(Some(0)) == [(0, true)] {
            let open = device::open(0, libc::O_DIRECT).unwrap();
            // The last close may have been that of the scan for partitions, after the status was read.
            let ended = client_flags == DISCONNECT_ON_CLOSE && device::sysfs(0, "size") == "0";
            if !ended {
                survived += 1;
                assert_eq!(read_page(&open, 0), Ok(()), "connected, and dead");
            }
        }
        let _ = netlink.disconnect(0);
        let free = wait_until(SOON, || netlink.status(Some(0)) == [(0, false)]);
        assert!(free.is_ok());
    }
    say(&format!("{survived} survived"));
}

fn disconnect_while_it_is_being_connected(_: &Guest) {
    meddle_with_connecting(0, |netlink| assert_eq!(netlink.disconnect(0), Ok(())));
}

fn close_while_it_is_being_connected(_: &Guest) {
    meddle_with_connecting(DISCONNECT_ON_CLOSE, |_| drop(device::open(0, 0).unwrap()));
}

fn commands_at_the_same_time(_: &Guest) {
    let until = Instant::now() + Duration::from_secs(2);
    thread::scope(|scope| {
        for worker in 0..4_u32 {
            scope.spawn(move || {
                let server = Server::new();
                let netlink = Netlink::open();
                let mut connected = 0;
                let mut round = worker;
                while Instant::now() < until || connected == 0 {
                    round += 1;
                    let socket = server.connect(Transport::Unix);
                    let mut setup = Setup::new(MIB).sockets([socket]);
                    if round % 2 == 0 {
                        setup = setup.index(round % 5);
                    }
                    let destroy = u64::from(round % 3 == 0);
                    setup = setup.client_flags(destroy * DESTROY_ON_DISCONNECT);
                    match netlink.connect(&setup) {
                        Ok(index) => {
                            connected += 1;
                            // Somebody else may have disconnected it already.
                            if let Ok(direct) = device::open(index, libc::O_DIRECT) {
                                let _ = direct.read_at(&mut Buffer::new(4096), 0);
                            }
                            let change = Setup::change(index).size(2 * MIB);
                            let _ = netlink.reconfigure(&change);
                            let _ = netlink.disconnect(index);
                        }
                        // In use, going, or not quite gone.
                        Err(Errno::BUSY | Errno::INVAL | Errno::EXIST) => {}
                        Err(errno) => panic!("CONNECT: {errno}"),
                    }
                    netlink.status(None);
                    let _ = netlink.disconnect(round % 5);
                }
            });
        }
    });
    let netlink = Netlink::open();
    for (index, _) in netlink.status(None) {
        let _ = netlink.disconnect(index);
    }
}
