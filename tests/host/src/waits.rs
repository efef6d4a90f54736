// SPDX-License-Identifier: GPL-2.0
//! What tasks wait for, as far as loom does not have it. For the model of a connection.

use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicUsize, Ordering},
};
use std::ops::{Deref, DerefMut};

/// A work item: to queue it while it is queued does nothing, and while it runs has it run once more.
#[derive(Default)]
pub(crate) struct Work {
    queued: Mutex<(bool, bool)>,
    wake: Condvar,
}

impl Work {
    pub(crate) fn queue(&self) {
        self.queued.lock().unwrap().0 = true;
        self.wake.notify_one();
    }

    /// It is never queued again.
    pub(crate) fn stop(&self) {
        self.queued.lock().unwrap().1 = true;
        self.wake.notify_one();
    }

    /// Waits until it is queued. Returns whether that can be.
    pub(crate) fn wait_queued(&self) -> bool {
        let mut queued = self.queued.lock().unwrap();
        loop {
            if std::mem::take(&mut queued.0) {
                return true;
            }
            if queued.1 {
                return false;
            }
            queued = self.wake.wait(queued).unwrap();
        }
    }
}

/// `struct completion`.
#[derive(Default)]
pub(crate) struct Completion {
    done: Mutex<bool>,
    wake: Condvar,
}

impl Completion {
    pub(crate) fn complete_all(&self) {
        *self.done.lock().unwrap() = true;
        self.wake.notify_all();
    }

    pub(crate) fn wait(&self) {
        let mut done = self.done.lock().unwrap();
        while !*done {
            done = self.wake.wait(done).unwrap();
        }
    }
}

/// A lock that is mostly tried. Loom lets others run before an attempt at a lock, but not before the unlocking.
/// Each attempt reads `unlocks` and the unlocking writes it, so it does.
pub(crate) struct TryMutex<T> {
    mutex: Mutex<T>,
    unlocks: AtomicUsize,
}

pub(crate) struct TryGuard<'a, T> {
    content: MutexGuard<'a, T>,
    unlocks: &'a AtomicUsize,
}

impl<T> TryMutex<T> {
    pub(crate) fn new(content: T) -> Self {
        TryMutex {
            mutex: Mutex::new(content),
            unlocks: AtomicUsize::new(0),
        }
    }

    pub(crate) fn try_lock(&self) -> Option<TryGuard<'_, T>> {
        self.unlocks.load(Ordering::Relaxed);
        self.mutex
            .try_lock()
            .ok()
            .map(|content| self.guard(content))
    }

    pub(crate) fn lock(&self) -> TryGuard<'_, T> {
        self.guard(self.mutex.lock().unwrap())
    }

    fn guard<'a>(&'a self, content: MutexGuard<'a, T>) -> TryGuard<'a, T> {
        TryGuard {
            content,
            unlocks: &self.unlocks,
        }
    }
}

impl<T> Drop for TryGuard<'_, T> {
    fn drop(&mut self) {
        self.unlocks.fetch_add(1, Ordering::Relaxed);
    }
}

impl<T> Deref for TryGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.content
    }
}

impl<T> DerefMut for TryGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.content
    }
}
