// SPDX-License-Identifier: GPL-2.0

//! When the partition table of a newly connected device is read, and by which task.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::geometry::{make_partitions, partitioned_server, partitioned_server_of_few};
use crate::device::{self, Plan, SOON, USUAL_FLAGS};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::sh;
use crate::proto::{BLKRRPART, CAN_MULTI_CONN, Command, SET_SIZE};
use crate::server::{Server, Transport};
use crate::sys::{self, ioctl_number};
use crate::test;
use crate::uevents::{Uevents, added_once};

pub fn tests() -> Vec<Test> {
    vec![
        test!(appear_without_an_open),
        test!(appear_once),
        test!(an_open_finds_them),
        test!(a_silent_server_holds_up_nobody).limit_seconds(180),
        test!(a_server_that_cannot_read_them),
        test!(after_a_reconnect),
        test!(of_a_size_that_comes_later),
        test!(a_server_that_dies_of_them),
        test!(one_task_waits_for_them),
        test!(other_reads_wait_for_a_connection),
        test!(are_not_looked_for).parameters("nbds_max=4 partition_scan=0"),
    ]
}

const SIZE: u64 = 8 << 20;

fn setup() -> Setup {
    Setup::new(SIZE).index(0)
}

/// Connects nbd0 by netlink, and does not open it.
fn connect(server: Server) -> Link {
    let link = setup().try_attach_to(server, &[Transport::Unix]);
    link.expect("to connect")
}

/// Whether nbd0 has its two partitions.
fn partitions_exist() -> bool {
    ["nbd0p1", "nbd0p2"].map(|name| Path::new("/sys/block/nbd0").join(name).exists()) == [true; 2]
}

fn partitions_appear() -> bool {
    wait_until(SOON, partitions_exist).is_ok()
}

fn appear_without_an_open(guest: &Guest) {
    let link = connect(partitioned_server());
    match guest.expected("partitions-appear-by-themselves") {
        Driver::Nbd => {
            thread::sleep(Duration::from_secs(3));
            assert!(!partitions_exist());
        }
        Driver::Rnbd => assert!(partitions_appear()),
    }
    link.disconnect_and_wait();
}

/// The partitions are not removed and added again while programs open and close the device.
fn appear_once(guest: &Guest) {
    let image = partitioned_server().peek(0, SIZE as usize);
    let mut wrong = 0;
    for round in 0..20 {
        let server = Server::new();
        server.poke(0, &image);
        let mut uevents = Uevents::listen();
        let link = connect(server);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        drop(File::open("/dev/nbd0").expect("the device"));
                        thread::yield_now();
                    }
                });
            }
        });
        assert!(partitions_appear(), "round {round}");
        thread::sleep(Duration::from_millis(50));
        wrong += u32::from(!added_once(&uevents.rest(), "nbd0p1"));
        link.disconnect_and_wait();
    }
    // With nbd.ko this fails in some rounds only.
    if guest.expected("partitions-appear-by-themselves") == Driver::Rnbd {
        assert_eq!(wrong, 0, "of 20 rounds");
    }
}

/// Opening the device at once reads the partition table, with both front ends.
fn an_open_finds_them(_: &Guest) {
    for round in 0..10 {
        let link = connect(partitioned_server());
        drop(File::open("/dev/nbd0").expect("the device"));
        assert!(partitions_exist(), "round {round}");
        link.disconnect_and_wait();
        let mut rig = Plan::new(SIZE).attach_to(partitioned_server());
        assert!(partitions_exist(), "round {round}");
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

/// How long `f` takes.
fn duration_of(f: impl FnOnce()) -> Duration {
    let began = Instant::now();
    f();
    began.elapsed()
}

/// Programs that connect, open and disconnect the device do not wait for the server.
fn a_silent_server_holds_up_nobody(guest: &Guest) {
    // With nbd.ko the open itself reads the partition table, and would wait.
    let open_returns = guest.expected("partitions-appear-by-themselves") == Driver::Rnbd;
    for disconnect_by_netlink in [true, false] {
        for open_first in [true, false] {
            let server = Server::new();
            server.script(|conn, _| conn.stall());
            let mut link = None;
            let connecting = duration_of(|| link = Some(connect(server)));
            assert!(connecting < SOON / 2, "{connecting:?}");
            if open_returns && open_first {
                for _ in 0..2 {
                    let opening =
                        duration_of(|| drop(File::open("/dev/nbd0").expect("the device")));
                    assert!(opening < SOON / 2, "{opening:?}");
                }
            }
            let link = link.unwrap();
            let disconnecting = duration_of(|| {
                if disconnect_by_netlink || !open_returns {
                    link.disconnect().unwrap();
                } else {
                    sh("nbd-client -L -d /dev/nbd0");
                }
            });
            assert!(disconnecting < SOON / 2, "{disconnecting:?}");
            link.wait_free();
        }
    }
    device::assert_usable(0);
}

fn a_server_that_cannot_read_them(_: &Guest) {
    let server = Server::new();
    server.script(|conn, request| match request.command {
        Command::Read => conn.refuse(request, 5),
        _ => conn.serve(request),
    });
    let link = connect(server);
    let opening = duration_of(|| drop(File::open("/dev/nbd0").expect("the device")));
    assert!(opening < SOON / 2, "{opening:?}");
    link.server.wait_for_command(Command::Read);
    link.server.be_honest();
    assert!(!partitions_exist());
    link.disconnect_and_wait();
}

/// If the connection dies before the whole partition table was read, it is read over the next connection.
fn after_a_reconnect(guest: &Guest) {
    if guest.expected("partitions-appear-by-themselves") == Driver::Nbd {
        return;
    }
    // The block layer reads the table with several requests.
    for count in 0..3 {
        let server = partitioned_server_of_few(count);
        let image = server.peek(0, SIZE as usize);
        let news = Netlink::listen();
        let setup = setup().flags(USUAL_FLAGS | CAN_MULTI_CONN).dead_timeout(1);
        let link = setup.try_attach_to(server, &[Transport::Unix]);
        let link = link.expect("to connect");
        assert_eq!(news.expect_dead_link(), 0);
        // With or without the end of the wait.
        thread::sleep(Duration::from_millis(if count == 0 { 1200 } else { 100 }));
        assert!(!partitions_exist());
        let server = Server::new();
        server.poke(0, &image);
        let again = Setup::change(0).sockets([server.connect(Transport::Unix)]);
        link.netlink.reconfigure(&again).unwrap();
        assert!(partitions_appear(), "{count} requests were served");
        link.disconnect_and_wait();
    }
}

/// It is connected again and again, and the device stays in use without partitions.
fn a_server_that_dies_of_them(guest: &Guest) {
    if guest.expected("partitions-appear-by-themselves") == Driver::Nbd {
        return;
    }
    // The table is read through the page cache, unlike the first block.
    let deadly = || {
        let server = Server::new();
        server.script(|conn, request| match request.len < 4096 {
            true => conn.serve(request),
            false => conn.close(),
        });
        server
    };
    let news = Netlink::listen();
    let setup = setup().flags(USUAL_FLAGS | CAN_MULTI_CONN).dead_timeout(5);
    let link = setup.try_attach_to(deadly(), &[Transport::Unix]);
    let link = link.expect("to connect");
    let given_up = || guest.has_logged("giving that up");
    // A server that is dropped closes its connections.
    let mut servers = Vec::new();
    loop {
        assert!(servers.len() < 10, "the table is read for ever");
        assert_eq!(news.expect_dead_link(), 0);
        let over = wait_until(Duration::from_secs(1), given_up).is_ok();
        let server = deadly();
        let again = Setup::change(0).sockets([server.connect(Transport::Unix)]);
        link.netlink.reconfigure(&again).unwrap();
        servers.push(server);
        if over {
            break;
        }
    }
    thread::sleep(Duration::from_millis(500));
    let last = servers.last().expect("one that was not lost");
    assert_eq!(last.requests(), []);
    assert_eq!(news.dead_link(), None);
    link.disconnect_and_wait();
}

/// A device without a size has no partition table. When it gets one, and the server is silent, an open does
/// not wait for that.
fn of_a_size_that_comes_later(guest: &Guest) {
    if guest.expected("partitions-appear-by-themselves") == Driver::Nbd {
        return;
    }
    let server = Server::new();
    server.script(|_, _| Ok(()));
    let link = Setup::new(0).index(0);
    let link = link.try_attach_to(server, &[Transport::Unix]);
    let link = link.expect("to connect");
    // The work item finds that there is no size.
    thread::sleep(Duration::from_millis(300));
    link.netlink
        .reconfigure(&Setup::change(0).size(SIZE))
        .expect("to set the size");
    link.server.wait_for_command(Command::Read);
    thread::scope(|scope| {
        let opening = scope.spawn(|| drop(File::open("/dev/nbd0").expect("the device")));
        let opened = wait_until(SOON / 2, || opening.is_finished());
        link.disconnect().expect("to disconnect");
        assert!(opened.is_ok(), "the open waits for the server");
    });
    link.wait_free();
}

/// However often the size is set, only one task waits for a server that does not answer.
fn one_task_waits_for_them(guest: &Guest) {
    if guest.expected("partitions-appear-by-themselves") == Driver::Nbd {
        return;
    }
    let server = Server::new();
    server.script(|_, _| Ok(()));
    let mut client = Plan::new(SIZE).start(&server);
    client.wait_ready(SIZE);
    let device = File::open("/dev/nbd0").expect("the device");
    server.wait_for_command(Command::Read);
    for _ in 0..20 {
        assert_eq!(ioctl_number(&device, SET_SIZE, SIZE), Ok(0));
    }
    thread::sleep(Duration::from_millis(300));
    assert_eq!(server.requests().len(), 1);
    server.kill();
    client.wait_lost();
    drop(device);
    device::assert_usable(0);
}

/// If the server is lost while the table is read, only that read fails.
fn other_reads_wait_for_a_connection(guest: &Guest) {
    if guest.expected("partitions-appear-by-themselves") == Driver::Nbd {
        return;
    }
    let server = partitioned_server();
    let image = server.peek(0, SIZE as usize);
    // The first block is read, and then the first page.
    let may_answer = Arc::new(AtomicBool::new(false));
    let answers = may_answer.clone();
    server.script(move |conn, request| match request.len {
        512 => {
            let _ = wait_until(SOON, || answers.load(Relaxed));
            conn.serve(request)
        }
        _ => Ok(()),
    });
    let setup = setup().flags(USUAL_FLAGS | CAN_MULTI_CONN).dead_timeout(30);
    let link = setup.try_attach_to(server, &[Transport::Unix]);
    let link = link.expect("to connect");
    let device = link.direct();
    link.server.forget_requests();
    may_answer.store(true, Relaxed);
    link.server
        .wait_for("a read of the table", |r| r.iter().any(|r| r.len == 4096));
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut data = sys::Buffer::new(8192);
            device.read_exact_at(&mut data, 1 << 20).map(|()| data)
        });
        link.server
            .wait_for("the direct read", |r| r.iter().any(|r| r.len == 8192));
        link.kill_server();
        let failed = || guest.has_logged("unable to read partition table");
        wait_until(SOON, failed).expect("the reading of the table to fail");
        thread::sleep(Duration::from_millis(300));
        assert!(!reading.is_finished());
        let server = Server::new();
        server.poke(0, &image);
        let again = Setup::change(0).sockets([server.connect(Transport::Unix)]);
        link.netlink.reconfigure(&again).unwrap();
        let read = reading.join().unwrap().expect("the direct read");
        assert!(*read == image[1 << 20..][..8192]);
        assert!(partitions_appear());
    });
    drop(device);
    link.disconnect_and_wait();
}

fn are_not_looked_for(guest: &Guest) {
    let server = partitioned_server();
    server.forget_requests();
    let link = connect(server);
    for _ in 0..3 {
        drop(File::open("/dev/nbd0").expect("the device"));
    }
    if guest.expected("partitions-appear-by-themselves") == Driver::Rnbd {
        thread::sleep(Duration::from_millis(200));
        assert_eq!(link.server.requests(), []);
        assert!(!partitions_exist());
    }
    // BLKRRPART does read the partition table.
    let device = File::open("/dev/nbd0").expect("the device");
    assert_eq!(ioctl_number(&device, BLKRRPART, 0), Ok(0));
    assert!(partitions_exist());
    drop(device);
    link.disconnect_and_wait();

    let mut rig = Plan::new(SIZE).attach_to(partitioned_server());
    make_partitions();
    drop(rig.open_to_read());
    if guest.expected("partitions-appear-by-themselves") == Driver::Rnbd {
        assert!(!partitions_exist());
    }
    assert_eq!(rig.disconnect(), Ok(0));
}
