// SPDX-License-Identifier: GPL-2.0
//! A limit for messages, so that a bad server cannot fill the log.

#![forbid(unsafe_code)]

use crate::kapi::task;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// Lets a burst of messages through, then only some: as the kernel's default rate limit, ten in five
/// seconds. Exact only where one task asks.
pub(crate) struct Ratelimit {
    begin: Atomic<usize>,
    printed: Atomic<u32>,
}

impl Ratelimit {
    const BURST: u32 = 10;
    const INTERVAL_SECONDS: usize = 5;

    /// Nothing was printed yet.
    pub(crate) fn new() -> Self {
        Ratelimit {
            begin: Atomic::new(0),
            printed: Atomic::new(0),
        }
    }

    /// Whether the next message may be printed.
    pub(crate) fn allow(&self) -> bool {
        let now = task::jiffies();
        let interval = Self::INTERVAL_SECONDS * task::HZ as usize;
        if now.wrapping_sub(self.begin.load(Relaxed)) > interval {
            self.begin.store(now, Relaxed);
            self.printed.store(0, Relaxed);
        }
        let printed = self.printed.load(Relaxed);
        self.printed.store(printed.saturating_add(1), Relaxed);
        printed < Self::BURST
    }
}
