// SPDX-License-Identifier: GPL-2.0
//! There is no value of a disk, only references.

use crate::rnbd_dev::Device;

fn take(device: &Device) -> u32 {
    let disk = device.disk; //~ E0507
    //fix: let disk = &device.disk;
    disk.openers()
}
