// SPDX-License-Identifier: GPL-2.0
//! The atomic word that `cmd.rs` and `fate.rs` are written against, in the kernel's memory model. The tests put
//! another one in its place, to compile the same file on the host.

#![forbid(unsafe_code)]

use kernel::sync::atomic::{
    Acquire,
    Atomic,
    Full,
    Release, //
};

/// A word that several CPUs read and write.
pub(crate) struct AtomicWord(Atomic<u64>);

impl AtomicWord {
    pub(crate) fn new(value: u64) -> Self {
        AtomicWord(Atomic::new(value))
    }

    /// Sees what was written before the store that it sees.
    pub(crate) fn load(&self) -> u64 {
        self.0.load(Acquire)
    }

    /// What was written before is seen by whoever sees this.
    pub(crate) fn store(&self, value: u64) {
        self.0.store(value, Release);
    }

    /// Replaces `old` by `new`; the error is what was there instead. Fully ordered.
    pub(crate) fn compare_exchange(&self, old: u64, new: u64) -> Result<u64, u64> {
        self.0.cmpxchg(old, new, Full)
    }
}
