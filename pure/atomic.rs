// SPDX-License-Identifier: GPL-2.0
//! The atomic word that `cmd.rs` and `fate.rs` use, in the kernel's memory model.
//!
//! The host tests replace it by one that a model checker controls.

#![forbid(unsafe_code)]

use kernel::sync::atomic::{
    Acquire,
    Atomic,
    Full,
    Release, //
};

/// A 64-bit word that several CPUs read and write.
pub(crate) struct AtomicWord(Atomic<u64>);

impl AtomicWord {
    /// Returns a word with this value.
    pub(crate) fn new(value: u64) -> Self {
        AtomicWord(Atomic::new(value))
    }

    /// Loads the value, with acquire ordering.
    pub(crate) fn load(&self) -> u64 {
        self.0.load(Acquire)
    }

    /// Stores a value, with release ordering.
    pub(crate) fn store(&self, value: u64) {
        self.0.store(value, Release);
    }

    /// Replaces `old` by `new`, fully ordered.
    ///
    /// # Errors
    ///
    /// Returns the value that was found instead of `old`.
    pub(crate) fn compare_exchange(&self, old: u64, new: u64) -> Result<u64, u64> {
        self.0.cmpxchg(old, new, Full)
    }
}
