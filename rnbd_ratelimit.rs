// SPDX-License-Identifier: GPL-2.0
//! A rate limit for messages that a server can cause.

#![forbid(unsafe_code)]

use crate::{
    kapi::task,
    pure::time::elapsed, //
};
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// A rate limit with the kernel's defaults: ten messages in five seconds.
///
/// It is not exact when several tasks use it concurrently. C header:
/// [`include/linux/ratelimit.h`](srctree/include/linux/ratelimit.h)
pub(crate) struct Ratelimit {
    begin: Atomic<usize>,
    printed: Atomic<u32>,
}

impl Ratelimit {
    const BURST: u32 = 10;
    const INTERVAL_SECONDS: usize = 5;

    /// Returns a rate limit that has let no message through yet.
    pub(crate) fn new() -> Self {
        Ratelimit {
            begin: Atomic::new(0),
            printed: Atomic::new(0),
        }
    }

    /// Returns whether the next message may be printed (`__ratelimit()`).
    pub(crate) fn allow(&self) -> bool {
        let now = task::jiffies();
        let interval = Self::INTERVAL_SECONDS * task::HZ as usize;
        if elapsed(now, self.begin.load(Relaxed)) > interval {
            self.begin.store(now, Relaxed);
            self.printed.store(0, Relaxed);
        }
        let printed = self.printed.load(Relaxed);
        self.printed.store(printed.saturating_add(1), Relaxed);
        printed < Self::BURST
    }
}
