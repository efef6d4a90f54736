// SPDX-License-Identifier: GPL-2.0

//! Who reads the partition table of a device that was connected, and when.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::geometry::{make_partitions, partitioned_server};
use crate::device::{self, Plan, SOON, USUAL_FLAGS};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::sh;
use crate::proto::{BLKRRPART, CAN_MULTI_CONN, Command};
use crate::server::{Server, Transport};
use crate::sys::ioctl_number;
use crate::test;
use crate::uevents::Uevents;

pub fn tests() -> Vec<Test> {
    vec![
        test!(appear_without_an_open),
        test!(appear_once),
        test!(an_open_finds_them),
        test!(a_silent_server_holds_up_nobody).limit_seconds(180),
        test!(a_server_that_cannot_read_them),
        test!(after_a_reconnect),
        test!(are_not_looked_for).parameters("nbds_max=4 partition_scan=0"),
    ]
}

const SIZE: u64 = 8 << 20;

/// Connects nbd0 by netlink, and does not open it.
fn connect(server: Server) -> Link {
    let setup = Setup::new(SIZE).index(0).flags(USUAL_FLAGS);
    connect_with(setup, server)
}

fn connect_with(setup: Setup, server: Server) -> Link {
    let netlink = Netlink::open();
    let socket = server.connect(Transport::Unix);
    let index = netlink.connect(&setup.sockets([socket])).unwrap();
    Link {
        server,
        netlink,
        index,
    }
}

fn end(link: &Link) {
    link.disconnect().unwrap();
    link.wait_free();
}

fn are_there() -> bool {
    ["nbd0p1", "nbd0p2"].map(|name| Path::new("/sys/block/nbd0").join(name).exists()) == [true; 2]
}

fn appear() -> bool {
    wait_until(SOON, are_there).is_ok()
}

fn appear_without_an_open(guest: &Guest) {
    let link = connect(partitioned_server());
    match guest.expected("partitions-appear-by-themselves") {
        Driver::Nbd => {
            thread::sleep(Duration::from_secs(3));
            assert!(!are_there());
        }
        Driver::Rnbd => assert!(appear()),
    }
    end(&link);
}

/// They do not vanish and come back while programs open and close the device.
fn appear_once(guest: &Guest) {
    let image = partitioned_server().peek(0, SIZE as usize);
    let mut twice = 0;
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
        assert!(appear(), "round {round}");
        thread::sleep(Duration::from_millis(50));
        let events = uevents.rest();
        let of = |action: &str| {
            let is = |event: &&String| {
                let lines: Vec<&str> = event.lines().collect();
                lines.contains(&action) && lines.contains(&"DEVNAME=nbd0p1")
            };
            events.iter().filter(is).count()
        };
        twice += usize::from(of("ACTION=add") != 1 || of("ACTION=remove") != 0);
        end(&link);
    }
    // nbd.ko: now and then.
    if guest.expected("partitions-appear-by-themselves") == Driver::Rnbd {
        assert_eq!(twice, 0, "of 20 times");
    }
}

/// Whoever opens the device at once has them looked for, with either front end.
fn an_open_finds_them(_: &Guest) {
    for round in 0..10 {
        let link = connect(partitioned_server());
        drop(File::open("/dev/nbd0").expect("the device"));
        assert!(are_there(), "round {round}");
        end(&link);
        let mut rig = Plan::new(SIZE).attach_to(partitioned_server());
        assert!(are_there(), "round {round}");
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

/// How long `f` takes.
fn time(f: impl FnOnce()) -> Duration {
    let began = Instant::now();
    f();
    began.elapsed()
}

/// Nobody has to wait long: neither who connects, nor who opens or disconnects the device.
fn a_silent_server_holds_up_nobody(guest: &Guest) {
    // nbd.ko leaves that to who opens the device.
    let opens = guest.expected("partitions-appear-by-themselves") == Driver::Rnbd;
    for by_netlink in [true, false] {
        for open_first in [true, false] {
            let server = Server::new();
            server.script(|conn, _| conn.stall());
            let mut link = None;
            let connecting = time(|| link = Some(connect(server)));
            assert!(connecting < SOON / 2, "{connecting:?}");
            if opens && open_first {
                for _ in 0..2 {
                    let opening = time(|| drop(File::open("/dev/nbd0").expect("the device")));
                    assert!(opening < SOON / 2, "{opening:?}");
                }
            }
            let link = link.unwrap();
            let disconnecting = time(|| {
                if by_netlink || !opens {
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
    let opening = time(|| drop(File::open("/dev/nbd0").expect("the device")));
    assert!(opening < SOON / 2, "{opening:?}");
    link.server.wait_for_command(Command::Read);
    link.server.be_honest();
    assert!(!are_there());
    end(&link);
}

/// What could not be read over a connection that died is read over the next one.
fn after_a_reconnect(guest: &Guest) {
    if guest.expected("partitions-appear-by-themselves") == Driver::Nbd {
        return;
    }
    let image = partitioned_server().peek(0, SIZE as usize);
    let server = Server::new();
    server.script(|conn, _| conn.close());
    let setup = Setup::new(SIZE)
        .index(0)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .dead_timeout(1);
    let link = connect_with(setup, server);
    let line = "nbd0: no connection left, I/O fails";
    let given_up = wait_until(SOON, || guest.log().iter().any(|l| l.contains(line)));
    assert!(given_up.is_ok());
    assert!(!are_there());
    let server = Server::new();
    server.poke(0, &image);
    let again = Setup::change(0).sockets([server.connect(Transport::Unix)]);
    link.netlink.reconfigure(&again).unwrap();
    assert!(appear());
    end(&link);
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
        assert!(!are_there());
    }
    // But for whoever asks for it.
    let device = File::open("/dev/nbd0").expect("the device");
    assert_eq!(ioctl_number(&device, BLKRRPART, 0), Ok(0));
    assert!(are_there());
    drop(device);
    end(&link);

    let mut rig = Plan::new(SIZE).attach_to(partitioned_server());
    make_partitions();
    drop(rig.open_to_read());
    if guest.expected("partitions-appear-by-themselves") == Driver::Rnbd {
        assert!(!are_there());
    }
    assert_eq!(rig.disconnect(), Ok(0));
}
