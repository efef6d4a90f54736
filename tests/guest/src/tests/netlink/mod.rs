// SPDX-License-Identifier: GPL-2.0

//! The netlink front end.

mod connect;
mod failover;
mod identity;
mod lifetimes;
mod owners;
mod reconfigure;
mod sharing;
mod thousands;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::Errno;

use crate::device::{SOON, assert_pattern, pattern};
use crate::harness::{Test, Until, wait_until};
use crate::netlink::{Link, Setup};
use crate::proto;
use crate::sys::{Buffer, SysResult, ioctl_number};

const MIB: u64 = 1 << 20;

pub fn tests() -> Vec<Test> {
    [
        connect::tests(),
        identity::tests(),
        lifetimes::tests(),
        owners::tests(),
        reconfigure::tests(),
        failover::tests(),
        sharing::tests(),
        thousands::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn sysfs_exists(index: u32) -> bool {
    Path::new(&format!("/sys/block/nbd{index}")).exists()
}

fn wait_destroyed(index: u32) {
    let gone = wait_until(SOON, || !sysfs_exists(index));
    assert!(gone.is_ok(), "nbd{index} is still there");
}

/// Connects with one socket, and undoes it at once if that works.
fn try_connect(setup: &Setup) -> SysResult<()> {
    setup.try_attach()?.disconnect()
}

/// Writes and reads a little, at `offset`.
pub fn move_data(direct: &File, offset: u64, seed: u64) {
    let data = Buffer::filled(64 << 10, |data| pattern(seed, offset, data));
    direct.write_all_at(&data, offset).unwrap();
    let mut back = Buffer::new(data.len());
    direct.read_exact_at(&mut back, offset).unwrap();
    assert_pattern(seed, offset, &back);
}

/// Writes and reads all quarters of a device of 16 MiB at the same time, until `f` returns.
pub fn under_load(link: &Link, f: impl FnOnce()) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for worker in 0..4 {
            let (direct, done) = (link.direct(), &done);
            scope.spawn(move || {
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    move_data(&direct, worker * 4 * MIB + ((round % 32) << 16), round);
                    round += 1;
                }
            });
        }
        let _until_done = Until(&done);
        f();
    });
}

/// Asserts that no ioctl changes a device that netlink has connected, or its connection.
fn assert_ioctls_are_refused(device: &File) {
    for request in [
        proto::SET_SOCK,
        proto::SET_BLKSIZE,
        proto::SET_SIZE,
        proto::SET_SIZE_BLOCKS,
        proto::SET_TIMEOUT,
        proto::SET_FLAGS,
        proto::DO_IT,
        proto::CLEAR_QUE,
        proto::PRINT_DEBUG,
        // The number after the last one of linux/nbd.h.
        0xab0b,
    ] {
        let answer = ioctl_number(device, request, 0);
        assert_eq!(answer, Err(Errno::INVAL), "{request:#x}");
    }
}
