// SPDX-License-Identifier: GPL-2.0
//! A lock that nobody waits for, so that it may be taken in any context.
//!
//! The `kernel` crate's (7.3) spin lock must not be held by a task that sleeps, nor be taken in softirq
//! and outside, and its mutex must not be taken in softirq.

use core::cell::UnsafeCell;
use kernel::sync::atomic::{
    Acquire,
    Atomic,
    Full, //
};

/// Nobody has it.
const FREE: i32 = 0;
/// Somebody has it.
const TAKEN: i32 = 1;
/// Somebody has it, and somebody else was turned away meanwhile.
const WANTED: i32 = 2;

/// See the module's documentation. Who does not get it does not come again: who has it learns that
/// somebody was turned away, and sees to it that what that one wanted is done.
///
/// # Invariants
///
/// `state` is other than [`FREE`] exactly while [`Self::try_with()`] lends the value to somebody.
pub(crate) struct TryLock<T> {
    state: Atomic<i32>,
    value: UnsafeCell<T>,
}

// SAFETY: The lock hands `T` from one task to the next.
unsafe impl<T: Send> Send for TryLock<T> {}
// SAFETY: At most one task has the `T` at any time.
unsafe impl<T: Send> Sync for TryLock<T> {}

impl<T> TryLock<T> {
    /// Not taken.
    pub(crate) fn new(value: T) -> Self {
        TryLock {
            state: Atomic::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// Runs `f` with the value. Returns what `f` does, and whether somebody was turned away meanwhile;
    /// nothing where somebody else has the value, who learns of it then.
    pub(crate) fn try_with<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<(R, bool)> {
        // INVARIANT: Only one caller changes it from `FREE` before it is that again.
        while self.state.cmpxchg(FREE, TAKEN, Acquire).is_err() {
            if self.mark_wanted() {
                return None;
            }
        }
        // SAFETY: By the type invariant nobody else has the value.
        let result = f(unsafe { &mut *self.value.get() });
        // INVARIANT: `f` and its borrow are over. What was done before somebody was turned away is seen
        // by whoever looks after this.
        let was_wanted = self.state.xchg(FREE, Full) == WANTED;
        Some((result, was_wanted))
    }

    /// Has who has the value learn that somebody wanted it. Returns whether anybody has it.
    pub(crate) fn mark_wanted(&self) -> bool {
        // An exchange also where it is marked already: it orders what the caller has done before.
        let mut seen = TAKEN;
        loop {
            match self.state.cmpxchg(seen, WANTED, Full) {
                Ok(_) => return true,
                Err(FREE) => return false,
                Err(now) => seen = now,
            }
        }
    }
}
