// SPDX-License-Identifier: GPL-2.0
//! A place where a request waits for whoever ends it.

use super::request::{
    Handle,
    Unanswered, //
};
use crate::kapi::bindings;
use core::{
    mem::ManuallyDrop,
    ptr::NonNull, //
};
use kernel::sync::atomic::{
    Atomic,
    Full, //
};

/// A place for one [`Unanswered`], where it waits for whoever will decide.
///
/// # Invariants
///
/// `ptr` is null, or a request of which this object owns the `Unanswered` handle.
pub(crate) struct Parked {
    ptr: Atomic<*mut bindings::request>,
}

impl Parked {
    /// Creates an empty place.
    pub(crate) fn empty() -> Self {
        Parked {
            ptr: Atomic::new(core::ptr::null_mut()),
        }
    }

    fn exchange(&self, new: *mut bindings::request) -> Option<Unanswered> {
        // INVARIANT: The ownership of the handle in `ptr` moves to the returned value.
        NonNull::new(self.ptr.xchg(new, Full)).map(|rq| Unanswered(Handle { rq }))
    }

    /// Puts a handle in, and returns the one that was there before.
    pub(crate) fn put(&self, request: Unanswered) -> Option<Unanswered> {
        self.exchange(ManuallyDrop::new(request).0.rq.as_ptr())
    }

    /// Takes the handle out.
    pub(crate) fn take(&self) -> Option<Unanswered> {
        self.exchange(core::ptr::null_mut())
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        drop(self.take());
    }
}
