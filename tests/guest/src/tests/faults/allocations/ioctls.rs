// SPDX-License-Identifier: GPL-2.0

//! Devices that ioctls configure.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::thread::{Pid, gettid};

use super::of_driver;
use crate::device::{self, Plan, SOON, USUAL_FLAGS, assert_usable, errno};
use crate::harness::{Guest, Test, wait_until};
use crate::injection::sweep;
use crate::proto;
use crate::server::{Server, Transport};
use crate::stacks;
use crate::sys::ioctl_number;
use crate::test;
use crate::tests::faults::{MIB, move_data, try_move_data};

pub fn tests() -> Vec<Test> {
    vec![
        test!(of_open_and_the_first_ioctls),
        test!(of_do_it),
        test!(of_ioctls_while_it_runs),
    ]
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
