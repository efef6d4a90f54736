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

use crate::device::{SOON, assert_pattern, errno, pattern};
use crate::harness::{Test, wait_until};
use crate::netlink::Setup;
use crate::sys::{Buffer, SysResult};

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

pub(super) fn read_one(device: &File, offset: u64) -> SysResult<()> {
    errno(device.read_exact_at(&mut Buffer::new(4096), offset))
}

/// Writes and reads a little, at `offset`.
pub(super) fn move_data(direct: &File, offset: u64, seed: u64) {
    let data = Buffer::filled(64 << 10, |data| pattern(seed, offset, data));
    direct.write_all_at(&data, offset).unwrap();
    let mut back = Buffer::new(data.len());
    direct.read_exact_at(&mut back, offset).unwrap();
    assert_pattern(seed, offset, &back);
}
