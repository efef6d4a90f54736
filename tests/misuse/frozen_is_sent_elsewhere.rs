// SPDX-License-Identifier: GPL-2.0
//! Who froze a queue, and must not wait for it, lets it go.

use crate::rnbd_dev::Device;

fn elsewhere(_what: impl Send) {}

fn send(device: &Device) {
    elsewhere(device.disk.freeze()); //~ E0277
    //fix: drop(device.disk.freeze());
}
