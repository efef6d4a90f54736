// SPDX-License-Identifier: GPL-2.0
//! The lock against openers is held no longer than the disk is borrowed.

use crate::{kapi::block::gendisk::Disk, rnbd_dev::Nbd};

fn lock(disk: Disk<Nbd>) {
    let held = disk.disk.lock_open_mutex();
    drop(disk); //~ E0505
    //fix:
    drop(held);
}
