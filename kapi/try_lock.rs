// SPDX-License-Identifier: GPL-2.0
//! A lock that nobody waits for, so that it may be taken in any context.
//!
//! The `kernel` crate's (7.3) spin lock must not be held by a task that sleeps, nor be taken in softirq
//! and outside, and its mutex must not be taken in softirq.

use core::{
    cell::UnsafeCell,
    ops::{Deref, DerefMut},
};
use kernel::sync::atomic::{Acquire, Atomic, Release};

/// See the module's documentation.
///
/// # Invariants
///
/// `taken` is 1 exactly while a [`Guard`] exists.
pub(crate) struct TryLock<T> {
    taken: Atomic<i32>,
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
            taken: Atomic::new(0),
            value: UnsafeCell::new(value),
        }
    }

    /// Takes the lock, unless it is taken.
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        // INVARIANT: Only one caller changes it from 0 to 1 before it is 0 again.
        self.taken.cmpxchg(0, 1, Acquire).ok()?;
        Some(Guard { lock: self })
    }
}

/// Has the lock until it goes.
pub(crate) struct Guard<'a, T> {
    lock: &'a TryLock<T>,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: By the lock's invariant this is the only guard.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: As above.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        // INVARIANT: This was the only guard.
        self.lock.taken.store(0, Release);
    }
}
