// SPDX-License-Identifier: GPL-2.0
//! A queue is frozen no longer than the disk is borrowed.

use crate::{kapi::block::gendisk::Disk, rnbd_dev::Nbd};

fn freeze(disk: Disk<Nbd>) {
    let frozen = disk.disk.freeze();
    drop(disk); //~ E0505
    //fix:
    drop(frozen);
}
