// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail. A sweep has each one of a call fail in turn; whatever the call answers,
//! the next one without a fault succeeds, and its data is right. Each is swept until a call meets no
//! failing allocation any more.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::{Pid, gettid};

use super::{Load, MIB, move_data, try_move_data};
use crate::device::{self, Plan, SOON, USUAL_FLAGS, assert_pattern, assert_usable, errno, pattern};
use crate::driver::{Driver, devices};
use crate::harness::{Guest, Test, say, seed, wait_until};
use crate::injection::{self, Allocations, Knobs, Nth, sample, sweep};
use crate::netlink::{self, DESTROY_ON_DISCONNECT, Link, Netlink, Setup};
use crate::proto::{self, CAN_MULTI_CONN};
use crate::server::{Server, Transport};
use crate::stacks;
use crate::sys::{Buffer, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(of_loading).unloaded().limit_seconds(300),
        test!(of_unloading).unloaded().limit_seconds(200),
        test!(of_open_and_the_first_ioctls),
        test!(of_do_it),
        test!(of_ioctls_while_it_runs),
        test!(of_connect),
        test!(of_connect_with_several_sockets),
        test!(of_connect_of_a_new_device).limit_seconds(300),
        test!(of_reconfigure),
        test!(of_replacing_a_stuck_connection)
            .parameters("nbds_max=1 replace_stuck=1")
            .limit_seconds(200),
        test!(of_status_and_disconnect),
        test!(of_reads_and_writes),
        test!(of_reading_debugfs),
        test!(of_workers_over_tcp),
        test!(of_workers_over_unix_sockets),
    ]
}

/// The driver's own allocations, and those of what it calls.
fn of_driver(guest: &Guest) -> Allocations {
    Allocations::of(&injection::code_of_module(guest.driver))
}

fn of_loading(guest: &Guest) {
    let _allocations = Allocations::of(&injection::code_of_initialisation());
    let unload = || {
        guest.driver.unload().expect("to unload");
    };
    let whole = sweep("loading", |nth| {
        if nth.fail(|| guest.driver.load("nbds_max=0")).is_ok() {
            unload();
        }
        assert!(!guest.driver.loaded());
    });
    assert!(whole.failed > 10);
    // Devices are made as `of_connect_of_a_new_device` has each step of it fail.
    let mut missing = 0;
    let some = sample("loading, with a device", 8, |nth| {
        if nth.fail(|| guest.driver.load("nbds_max=1")).is_ok() {
            // As nbd.ko does it: the module is there with what devices could be made.
            missing += u32::from(devices().is_empty());
            unload();
        }
        assert!(!guest.driver.loaded() && devices().is_empty());
    });
    say(&format!("{missing} times it was loaded without the device"));
    assert!(missing > 0);
    if guest.expected("loading-returns-enomem") == Driver::Rnbd {
        whole.assert_only_enomem();
        some.assert_only_enomem();
    }
    guest.driver.load("nbds_max=1").expect("to load");
    assert_usable(0);
}

fn of_unloading(guest: &Guest) {
    // The driver's place is not known before it is loaded; whether the kernel can do this is.
    drop(Knobs::of("failslab"));
    let swept = sweep("unloading", |nth| {
        guest.driver.load("nbds_max=1").expect("to load");
        let _allocations = of_driver(guest);
        // Who closed the device may not be gone yet.
        let free = wait_until(SOON, || guest.driver.references() == 0);
        assert!(free.is_ok());
        let unloaded = nth.fail(|| guest.driver.try_unload());
        assert_eq!(unloaded, Ok(()));
    });
    assert!(swept.failed > 0);
}

/// The ioctls before NBD_DO_IT, and their arguments; the last one is the socket's number.
const FIRST_IOCTLS: [(u32, u64); 6] = [
    (proto::SET_BLKSIZE, 512),
    (proto::SET_SIZE_BLOCKS, MIB / 512),
    (proto::CLEAR_SOCK, 0),
    (proto::SET_FLAGS, USUAL_FLAGS),
    (proto::SET_TIMEOUT, 5),
    (proto::SET_SOCK, 0),
];

fn of_open_and_the_first_ioctls(guest: &Guest) {
    let _allocations = of_driver(guest);
    let swept = sweep("open", |nth| {
        let opened = nth.fail(|| errno(device::open(0, 0)));
        drop(opened);
        drop(device::open(0, 0).expect("to open"));
    });
    assert!(swept.failed > 0);
    swept.assert_only_enomem();
    let mut failed = 0;
    for (index, (number, _)) in FIRST_IOCTLS.iter().enumerate() {
        let swept = sweep(&format!("ioctl {number:#x}"), |nth| {
            let server = Server::new();
            let socket = server.connect(Transport::Tcp4);
            let device = device::open(0, 0).expect("to open");
            for (at, (number, argument)) in FIRST_IOCTLS.into_iter().enumerate() {
                let argument = match number {
                    proto::SET_SOCK => socket.as_fd().as_raw_fd() as u64,
                    _ => argument,
                };
                let call = || ioctl_number(&device, number, argument);
                if at == index && nth.fail(call).is_ok() {
                    continue;
                }
                assert_eq!(call(), Ok(0), "ioctl {number:#x}");
            }
        });
        swept.assert_only_enomem();
        failed += swept.failed;
    }
    assert!(failed > 0);
    assert_usable(0);
}

/// Waits until the task is in NBD_DO_IT, moves data, and disconnects; or until `over`. Returns whether
/// data was moved.
fn use_and_disconnect(task: Pid, over: &AtomicBool) -> bool {
    let over = || over.load(Ordering::Relaxed);
    let connected = wait_until(SOON, || {
        let started = device::pid(0) == Some(task.as_raw_nonzero().get())
            && device::sysfs(0, "size") != "0"
            && stacks::sleeps(task);
        over() || started
    });
    if connected.is_err() || over() {
        return false;
    }
    // It may have been about to fail.
    let moved = try_move_data(0, 3).is_ok();
    let disconnect = |device| ioctl_number(device, proto::DISCONNECT, 0);
    let _ = File::open("/dev/nbd0").map(disconnect);
    moved
}

fn of_do_it(guest: &Guest) {
    let _allocations = of_driver(guest);
    let swept = sweep("NBD_DO_IT", |nth| {
        let server = Server::new();
        let device = device::open(0, 0).expect("to open");
        let socket = server.connect(Transport::Unix);
        for (number, argument) in FIRST_IOCTLS {
            let argument = match number {
                proto::SET_SOCK => socket.as_fd().as_raw_fd() as u64,
                _ => argument,
            };
            assert_eq!(ioctl_number(&device, number, argument), Ok(0));
        }
        drop(socket);
        let (task, over) = (gettid(), AtomicBool::new(false));
        thread::scope(|scope| {
            let user = scope.spawn(|| use_and_disconnect(task, &over));
            let answer = nth.fail(|| ioctl_number(&device, proto::DO_IT, 0));
            over.store(true, Ordering::Relaxed);
            let moved = user.join().expect("the user");
            assert!(moved || answer.is_err(), "no data was moved");
        });
        ioctl_number(&device, proto::CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
        drop(device);
        let ended = wait_until(SOON, || server.living() == 0);
        assert!(ended.is_ok(), "the driver keeps its socket");
        assert_usable(0);
    });
    assert!(swept.failed > 10);
    swept.assert_only_enomem();
}

fn of_ioctls_while_it_runs(guest: &Guest) {
    let allocations = of_driver(guest);
    let mut failed = 0;
    for (number, argument) in [
        (proto::SET_SIZE, 2 * MIB),
        (proto::SET_BLKSIZE, 4096),
        (proto::SET_TIMEOUT, 7),
        (proto::DISCONNECT, 0),
        (proto::CLEAR_SOCK, 0),
    ] {
        let swept = sweep(&format!("ioctl {number:#x} of a running device"), |nth| {
            let mut rig = Plan::new(MIB).attach();
            move_data(0, 5);
            let device = rig.open_to_read();
            let answer = nth.fail(|| ioctl_number(&device, number, argument));
            match number {
                // Nobody is kept waiting for want of memory.
                proto::DISCONNECT | proto::CLEAR_SOCK => {
                    assert_eq!(answer, Ok(0));
                    assert_eq!(rig.client.wait(), Ok(0));
                }
                _ => {
                    assert_eq!(ioctl_number(&device, number, argument), Ok(0));
                    move_data(0, 6);
                    assert_eq!(rig.disconnect(), Ok(0));
                }
            }
        });
        swept.assert_only_enomem();
        failed += swept.failed;
    }
    drop(allocations);
    assert!(failed > 0);
    assert_usable(0);
}

/// Connects device `index` with a fault. Where that is refused nothing is left of it; then connects
/// without.
fn connect(nth: &mut Nth, index: u32, setup: &Setup, transports: &[Transport]) {
    let netlink = Netlink::open();
    let server = Server::new();
    let sockets = transports.iter().map(|one| server.connect(*one));
    let setup = setup.clone().index(index);
    let asked = setup.clone().sockets(sockets);
    // It is connected even where the reply is lost.
    let answer = nth.fail(|| netlink.ask(netlink::CONNECT, asked.attrs()).map(drop));
    drop(asked);
    let link = match answer {
        Ok(()) => Link {
            server,
            netlink,
            index,
        },
        Err(_) => {
            let ended = wait_until(SOON, || server.living() == 0);
            assert!(ended.is_ok(), "the driver keeps a socket");
            let mut again = setup.try_attach_over(transports);
            // A device that is removed when it is disconnected is, and takes its time.
            let _ = wait_until(SOON, || {
                if again.is_err() {
                    again = setup.try_attach_over(transports);
                }
                again.is_ok()
            });
            again.expect("to connect")
        }
    };
    move_data(index, 11);
    link.disconnect().expect("to disconnect");
    let gone = wait_until(SOON, || device::pid(index).is_none());
    assert!(gone.is_ok());
}

/// A device whose size and sysfs files tell more.
fn setup() -> Setup {
    Setup::new(MIB).timeout(20).backend("image")
}

fn of_connect(guest: &Guest) {
    let _allocations = of_driver(guest);
    let swept = sweep("connect", |nth| {
        connect(nth, 0, &setup(), &[Transport::Unix]);
    });
    assert!(swept.failed > 20 && swept.ended_with(Errno::NOMEM) > 10);
    swept.assert_only_enomem();
}

fn of_connect_with_several_sockets(guest: &Guest) {
    let _allocations = of_driver(guest);
    let setup = setup().flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let transports = [Transport::Tcp4, Transport::Unix, Transport::Tcp6];
    let swept = sweep("connect with 3 sockets", |nth| {
        connect(nth, 1, &setup, &transports);
    });
    assert!(swept.failed > 30 && swept.ended_with(Errno::NOMEM) > 10);
    swept.assert_only_enomem();
}

fn of_connect_of_a_new_device(guest: &Guest) {
    let _allocations = of_driver(guest);
    let setup = setup().client_flags(DESTROY_ON_DISCONNECT);
    let swept = sweep("connect of a new device", |nth| {
        connect(nth, 7, &setup, &[Transport::Unix]);
        // Its number is free a moment after its disk is gone.
        let netlink = Netlink::open();
        let listed = || netlink.status(None).iter().any(|(index, _)| *index == 7);
        let gone = wait_until(SOON, || !devices().contains(&7) && !listed());
        assert!(gone.is_ok(), "the device stays");
    });
    assert!(swept.failed > 50 && swept.ended_with(Errno::NOMEM) > 20);
    // Where there was no memory for the name of the disk's device, `device_add()` says so: `__add_disk()`
    // does not look. That is one allocation, which may be met more than once, since what is allocated
    // before it differs between calls (a slab may want a page).
    swept.assert_only(&[Errno::NOMEM, Errno::INVAL]);
    assert!(swept.ended_with(Errno::INVAL) < 5);
}

fn of_reconfigure(guest: &Guest) {
    let _allocations = of_driver(guest);
    let link = setup().index(0).dead_timeout(30).attach().settle();
    let new_socket = || {
        let socket = link.server.connect(Transport::Unix);
        Setup::change(0).backend("image").sockets([socket])
    };
    let swept = sweep("reconfigure with a new socket", |nth| {
        link.kill_server();
        let change = new_socket();
        let answer = nth.fail(|| link.netlink.reconfigure(&change));
        drop(change);
        if answer.is_err() {
            let ended = wait_until(SOON, || link.server.living() == 0);
            assert!(ended.is_ok(), "the driver keeps a socket");
            assert_eq!(link.netlink.reconfigure(&new_socket()), Ok(()));
        }
        move_data(0, 13);
    });
    assert!(swept.failed > 5);
    swept.assert_only_enomem();
    let swept = sweep("reconfigure of sizes", |nth| {
        let size = if device::sysfs(0, "size") == "2048" {
            2
        } else {
            1
        };
        let change = Setup::change(0).backend("image").size(size * MIB);
        let answer = nth.fail(|| link.netlink.reconfigure(&change));
        if answer.is_err() {
            assert_eq!(link.netlink.reconfigure(&change), Ok(()));
        }
        move_data(0, 14);
    });
    swept.assert_only_enomem();
}

/// While there is no memory for the new connection the old one stays, although it is stuck.
fn of_replacing_a_stuck_connection(guest: &Guest) {
    let _allocations = of_driver(guest);
    let link = setup().index(0).attach().settle();
    let direct = link.direct();
    let swept = sweep("replacing a stuck connection", |nth| {
        link.server.script(|conn, _| conn.stall());
        thread::scope(|scope| {
            let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
            thread::sleep(Duration::from_millis(1200));
            link.server.be_honest();
            let change = || {
                let socket = link.server.connect(Transport::Unix);
                Setup::change(0).backend("image").sockets([socket])
            };
            let with_fault = change();
            if nth.fail(|| link.netlink.reconfigure(&with_fault)).is_err() {
                drop(with_fault);
                let alone = wait_until(SOON, || link.server.living() == 1);
                assert!(
                    alone.is_ok(),
                    "the driver keeps the new socket, or ended the old one"
                );
                assert!(!reader.is_finished(), "the old connection was ended");
                assert_eq!(link.netlink.reconfigure(&change()), Ok(()));
            }
            assert_eq!(errno(reader.join().unwrap()), Ok(()));
        });
    });
    assert!(swept.failed > 5);
    swept.assert_only_enomem();
}

fn of_status_and_disconnect(guest: &Guest) {
    let _allocations = of_driver(guest);
    let netlink = Netlink::open();
    let swept = sweep("status", |nth| {
        let answer = nth.fail(|| netlink.try_status(None));
        assert!(answer.is_err() || answer == Ok(vec![(0, false), (1, false)]));
    });
    assert!(swept.failed > 0);
    swept.assert_only_enomem();
    let swept = sweep("disconnect", |nth| {
        let link = setup().index(0).attach().settle();
        move_data(0, 17);
        assert_eq!(nth.fail(|| link.disconnect()), Ok(()));
        link.wait_free();
        let ended = wait_until(SOON, || link.server.living() == 0);
        assert!(ended.is_ok(), "the server is not told");
    });
    say(&format!("{} of a disconnect", swept.failed));
}

fn of_reads_and_writes(guest: &Guest) {
    let _allocations = of_driver(guest);
    let transports = match guest.expected("short-of-memory-is-not-broken") {
        Driver::Nbd => [Transport::Tcp4, Transport::Tcp6],
        Driver::Rnbd => [Transport::Tcp4, Transport::Unix],
    };
    for transport in transports {
        let mut rig = Plan::new(MIB).transport(transport).attach();
        // Then it is the task that makes a request that sends it.
        fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
        let direct = rig.direct();
        let written = Buffer::filled(64 << 10, |data| pattern(19, 4096, data));
        let swept = sweep(&format!("a write over {transport:?}"), |nth| {
            assert_eq!(
                nth.fail(|| errno(direct.write_all_at(&written, 4096))),
                Ok(())
            );
            assert_pattern(19, 4096, &rig.server.peek(4096, written.len()));
        });
        assert!(swept.failed > 0, "it was not the task that sent");
        let mut read = Buffer::new(written.len());
        // To ask for data may take no allocation.
        sweep(&format!("a read over {transport:?}"), |nth| {
            assert_eq!(
                nth.fail(|| errno(direct.read_exact_at(&mut read, 4096))),
                Ok(())
            );
            assert_pattern(19, 4096, &read);
        });
        drop(direct);
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

fn of_reading_debugfs(guest: &Guest) {
    let _allocations = of_driver(guest);
    let link = setup().index(0).attach().settle();
    let directory = "/sys/kernel/debug/nbd/nbd0";
    for entry in fs::read_dir(directory).expect(directory) {
        let path = entry.expect("an entry").path();
        let swept = sweep(&path.display().to_string(), |nth| {
            let answer = nth.fail(|| errno(fs::read_to_string(&path)));
            assert!(
                answer.is_err() || answer == errno(fs::read_to_string(&path)) || changes(&path)
            );
        });
        swept.assert_only_enomem();
    }
    drop(link);
}

/// Whether what the file says differs from one moment to the next.
fn changes(path: &Path) -> bool {
    path.ends_with("connections")
}

/// One in twenty of all allocations under the driver fail, whoever it works for, while data moves.
fn of_workers(guest: &Guest, transport: Transport) {
    let allocations = of_driver(guest);
    let setup = Setup::new(Load::BYTES).index(0).timeout(20);
    let link = setup
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .attach_over(&[transport; 2])
        .settle();
    let news = Netlink::listen();
    let mut load = Load::new(0, seed());
    let (failed, tally) = load.run(false, |tally| {
        thread::sleep(Duration::from_millis(300));
        allocations.fail(5);
        let enough = wait_until(3 * SOON, || tally.done() + tally.failed() > 500);
        let failed = allocations.stop();
        assert!(enough.is_ok(), "it has come to a halt: {tally:?}");
        failed
    });
    let lost = std::iter::from_fn(|| news.dead_link()).count();
    say(&format!(
        "{failed} allocations failed, {lost} connections were lost; {tally:?}"
    ));
    assert!(failed > 20);
    match guest.expected("short-of-memory-is-not-broken") {
        Driver::Nbd => {}
        Driver::Rnbd => {
            assert_eq!((lost, tally.failed()), (0, 0));
            load.verify();
        }
    }
    let stored = link.server.peek(0, Load::BYTES as usize);
    let copy = fs::File::from(memory(&stored));
    load.verify_in(&copy);
}

/// A file that only this process has.
fn memory(contents: &[u8]) -> std::os::fd::OwnedFd {
    use rustix::fs::{MemfdFlags, memfd_create};
    let file = memfd_create("stored", MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(file);
    file.write_all_at(contents, 0).expect("to write");
    file.into()
}

fn of_workers_over_tcp(guest: &Guest) {
    of_workers(guest, Transport::Tcp4);
}

fn of_workers_over_unix_sockets(guest: &Guest) {
    of_workers(guest, Transport::Unix);
}
