// SPDX-License-Identifier: GPL-2.0
//! A lock that can only be tried, never waited for, so that any context may use it.
//!
//! A context that fails to take the lock marks it as wanted and returns. The holder sees the mark
//! when it releases the lock, and must then do, or schedule, the work for which the other context
//! wanted the lock.
//!
//! The `kernel` crate (7.3) has `SpinLock::try_lock()` and `Mutex::try_lock()`. Neither fits: the
//! holder of this lock may sleep, which rules out a spin lock, and softirqs try to take it, which
//! rules out a mutex.
//!
//! The host tests compile this file as it is and check it with loom, a model checker.

use core::cell::UnsafeCell;
use kernel::sync::atomic::{
    Acquire,
    Atomic,
    Full, //
};

/// The lock is free.
const FREE: i32 = 0;
/// The lock is held.
const TAKEN: i32 = 1;
/// The lock is held, and another context failed to take it meanwhile.
const WANTED: i32 = 2;

/// A lock that is never waited for; see the module's documentation.
///
/// # Invariants
///
/// `state` differs from [`FREE`] exactly while [`Self::try_with()`] lends the value to its caller.
pub(crate) struct TryLock<T> {
    state: Atomic<i32>,
    value: UnsafeCell<T>,
}

// SAFETY: Sending the lock sends the `T`, which is `Send`.
unsafe impl<T: Send> Send for TryLock<T> {}
// SAFETY: The lock gives at most one task at a time access to the `T`, which is `Send`.
unsafe impl<T: Send> Sync for TryLock<T> {}

impl<T> TryLock<T> {
    /// Creates a lock that is free.
    pub(crate) fn new(value: T) -> Self {
        TryLock {
            state: Atomic::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// Runs `f` with the value if the lock is free.
    ///
    /// Returns the result of `f`, and whether another context marked the lock as wanted meanwhile.
    /// Returns `None` if the lock is held; in that case its holder will see that it is wanted.
    pub(crate) fn try_with<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<(R, bool)> {
        // INVARIANT: Nobody else changes `state` from `FREE` until it is `FREE` again.
        while self.state.cmpxchg(FREE, TAKEN, Acquire).is_err() {
            if self.mark_wanted() {
                return None;
            }
        }
        // SAFETY: By the type invariant, nobody else has access to the value.
        let result = f(unsafe { &mut *self.value.get() });
        // INVARIANT: The borrow of the value ended with `f`. The exchange is fully ordered, so the
        // caller observes what another context did before it marked the lock as wanted.
        let was_wanted = self.state.xchg(FREE, Full) == WANTED;
        Some((result, was_wanted))
    }

    /// Marks the lock as wanted if it is held. Returns whether it is held.
    pub(crate) fn mark_wanted(&self) -> bool {
        // The exchange is done even if the lock is already marked as wanted, since it also orders
        // what the caller did before.
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
