// SPDX-License-Identifier: GPL-2.0

//! Data: the requests and replies that carry it, and that it comes back as it was written.

mod data;
mod pages;
mod receiving;
mod requests;
mod sending;

use crate::device::{Rig, pattern};
use crate::harness::Test;
use crate::proto::Command;
use crate::sys::Buffer;

pub fn tests() -> Vec<Test> {
    [
        requests::tests(),
        data::tests(),
        receiving::tests(),
        sending::tests(),
        pages::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

fn essences(rig: &Rig) -> Vec<(Command, u16, u64, u32)> {
    rig.server
        .requests()
        .iter()
        .map(|request| request.essence())
        .collect()
}

fn written(seed: u64, offset: u64, len: usize) -> Buffer {
    Buffer::filled(len, |data| pattern(seed, offset, data))
}
