// SPDX-License-Identifier: GPL-2.0
//! Items of a list whose memory was allocated beforehand.
//!
//! A context that may not allocate memory, or must not wait for it, appends one to a
//! [`List`](super::llist::List).

use super::llist::Linked;
use core::ptr;
use kernel::{
    alloc::{
        flags::{
            GFP_NOWAIT,
            __GFP_NOWARN, //
        },
        Flags, //
    },
    prelude::*,
    sync::atomic::Atomic, //
};

/// A value that a list can link.
pub(crate) struct Item<T> {
    pub(crate) value: T,
    next: Atomic<*mut Item<T>>,
}

// SAFETY: Sending the item sends its value, which is `Send`. `next` is used by the list only, which owns the
// items that it points to, and is `Send` if they are.
unsafe impl<T: Send> Send for Item<T> {}

impl<T> Item<T> {
    /// Allocates an item.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn new(value: T) -> Result<KBox<Self>> {
        Self::with(value, GFP_KERNEL)
    }

    /// As [`Self::new()`], but does not wait for memory, and does not warn if there is none.
    ///
    /// # Context
    ///
    /// Any context.
    pub(crate) fn new_at_once(value: T) -> Result<KBox<Self>> {
        Self::with(value, GFP_NOWAIT | __GFP_NOWARN)
    }

    fn with(value: T, flags: Flags) -> Result<KBox<Self>> {
        let item = Item {
            value,
            next: Atomic::new(ptr::null_mut()),
        };
        Ok(KBox::new(item, flags)?)
    }
}

// SAFETY: `KBox::from_raw()` returns the box that `KBox::into_raw()` has taken apart. In between, nobody else has
// the item, and `next` is a field of it.
unsafe impl<T> Linked for KBox<Item<T>> {
    type Raw = Item<T>;

    fn into_raw(self) -> *mut Item<T> {
        // It is aligned for a pointer, so its address is even, and not null.
        KBox::into_raw(self)
    }

    unsafe fn from_raw(raw: *mut Item<T>) -> Self {
        // SAFETY: By this function's safety requirements, `raw` comes from `into_raw()`, and is taken back once.
        unsafe { KBox::from_raw(raw) }
    }

    unsafe fn next<'a>(raw: *mut Item<T>) -> &'a Atomic<*mut Item<T>> {
        // SAFETY: By this function's safety requirements, the item is not taken back during `'a`. Only the list
        // has it, and makes no other reference to it.
        unsafe { &(*raw).next }
    }
}
