// SPDX-License-Identifier: GPL-2.0
//! Partitions are removed only by a task that holds the lock against openers.

use crate::rnbd_dev::Device;

fn tear_down(device: &Device) {
    device.disk.drop_partitions(); //~ E0599
    //fix: device.disk.lock_open_mutex().drop_partitions();
}
