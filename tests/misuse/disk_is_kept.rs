// SPDX-License-Identifier: GPL-2.0
//! A disk that a callback has lent cannot be stored.

use crate::{kapi::block::disk::DiskRef, rnbd_dev::Device};

struct Kept(Option<&'static DiskRef>);

fn open(device: &Device, kept: &mut Kept) {
    kept.0 = Some(&device.disk); //~ lifetime may not live long enough
    //fix: device.disk.run_queues();
}
