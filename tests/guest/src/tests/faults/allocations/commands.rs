// SPDX-License-Identifier: GPL-2.0

//! Netlink commands, and the debugfs files of a connected device.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::of_driver;
use crate::device::{self, SOON, USUAL_FLAGS, errno};
use crate::driver::devices;
use crate::harness::{Guest, Test, say, wait_until};
use crate::injection::{Nth, sweep};
use crate::netlink::{self, DESTROY_ON_DISCONNECT, Link, Netlink, Setup};
use crate::proto::CAN_MULTI_CONN;
use crate::server::{Server, Transport};
use crate::sys::Buffer;
use crate::test;
use crate::tests::faults::{MIB, move_data};

pub fn tests() -> Vec<Test> {
    vec![
        test!(of_connect),
        test!(of_connect_with_several_sockets),
        test!(of_connect_of_a_new_device).limit_seconds(300),
        test!(of_reconfigure),
        test!(of_replacing_a_stuck_connection)
            .parameters("nbds_max=1 replace_stuck=1")
            .limit_seconds(200),
        test!(of_status_and_disconnect),
        test!(of_reading_debugfs),
    ]
}

/// With a backend, whose name and sysfs file need memory, too.
fn setup() -> Setup {
    Setup::new(MIB).timeout(20).backend("image")
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

fn of_reading_debugfs(guest: &Guest) {
    let _allocations = of_driver(guest);
    let link = setup().index(0).attach().settle();
    for entry in fs::read_dir(device::debugfs(0)).expect("files") {
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
