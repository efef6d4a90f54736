// SPDX-License-Identifier: GPL-2.0
//! What operations read is taken away only while the queue is frozen.

use crate::{kapi::block::published::Published, rnbd_dev::Device};

fn retract(session: &Published<u32>, device: &Device) {
    drop(session.retract(&device.disk)); //~ E0308
    //fix: drop(session.retract(&device.disk.freeze()));
}
