// SPDX-License-Identifier: GPL-2.0
//! What the owner of a disk lends goes with it.

use crate::{
    kapi::block::{disk::Sectors, gendisk::Disk},
    rnbd_dev::Nbd,
};

fn remove(disk: Disk<Nbd>) -> Sectors {
    let lent = &disk.disk;
    drop(disk); //~ E0505
    //fix:
    lent.capacity()
}
