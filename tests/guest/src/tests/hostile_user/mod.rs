// SPDX-License-Identifier: GPL-2.0

//! Programs that ask for anything, that hand over descriptors of anything, and that meddle with the
//! socket that a device uses. What they ask for wrongly is refused; a device that others use, and
//! whatever comes afterwards, is not harmed.
//!
//! - `nonsense` makes up what is asked for
//! - `asking` asks
//! - `sockets` gives the driver sockets that listen, or that somebody else goes on using

mod asking;
mod nonsense;
mod sockets;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::Test;

const MIB: u64 = 1 << 20;

/// Where the descriptors of servers begin, which are not what is asked with: no bit that falls over
/// makes one of them of another that this program has.
const OUT_OF_REACH: i32 = 900;

pub fn tests() -> Vec<Test> {
    [asking::tests(), sockets::tests()]
        .into_iter()
        .flatten()
        .collect()
}

/// Says so when it goes, also after a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
