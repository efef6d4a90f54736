// SPDX-License-Identifier: GPL-2.0
//! A file shows the driver part of the disk that it is of.

use crate::{
    kapi::block::gendisk::{BlockDevice, File, GenDisk},
    rnbd_dev::Nbd,
};

fn show<U: BlockDevice>(disk: &GenDisk<Nbd>) -> kernel::error::Result {
    GenDisk::<U>::add_file(disk, File::Pid) //~ E0308
    //fix: GenDisk::<Nbd>::add_file(disk, File::Pid)
}
