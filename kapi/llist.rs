// SPDX-License-Identifier: GPL-2.0
//! A list to whose end anybody appends without a lock, and from which one consumer takes all. It links
//! what is in it through the items' own memory, and can be closed, after which nothing gets in.
//!
//! C header: [`include/linux/llist.h`](srctree/include/linux/llist.h), which has no way to close a list.
//! The tests compile this very file on the host and check it with a model checker.

use core::{
    marker::PhantomData,
    ptr, //
};
use kernel::sync::atomic::{
    Acquire,
    Atomic,
    Full,
    Relaxed, //
};

/// What a list can link.
///
/// # Safety
///
/// `from_raw(into_raw(x))` must be `x`, and `next()` of what `into_raw()` returned must be valid, nobody
/// else's and the same place until `from_raw()`.
pub(crate) unsafe trait Linked: Sized {
    /// What it points to.
    type Raw;

    /// Gives it up to a list. Never null, and its address is not odd.
    fn into_raw(self) -> *mut Self::Raw;

    /// Takes it back from a list.
    ///
    /// # Safety
    ///
    /// `raw` must have come from [`Self::into_raw()`], once for each call of this.
    unsafe fn from_raw(raw: *mut Self::Raw) -> Self;

    /// Where the next item of the list is kept.
    ///
    /// # Safety
    ///
    /// `raw` must have come from [`Self::into_raw()`] and not have been taken back in `'a`.
    unsafe fn next<'a>(raw: *mut Self::Raw) -> &'a Atomic<*mut Self::Raw>;
}

/// See the module's documentation.
///
/// # Invariants
///
/// `newest` is null, [`Self::CLOSED`], or what `into_raw()` of the item that was appended last returned;
/// from there `next()` leads to all others, the newer before the older, and at last to null. The list
/// owns them.
pub(crate) struct List<T: Linked> {
    newest: Atomic<*mut T::Raw>,
    _owns: PhantomData<T>,
}

// SAFETY: The items are handed from one task to another, and nothing is shared but atomics.
unsafe impl<T: Linked + Send> Send for List<T> {}
// SAFETY: Appending and taking hand items over; nobody gets a reference to one in the list.
unsafe impl<T: Linked + Send> Sync for List<T> {}

impl<T: Linked> List<T> {
    /// Odd, so that it is no item's address.
    const CLOSED: *mut T::Raw = ptr::without_provenance_mut(1);

    /// Nothing is in it.
    pub(crate) fn new() -> Self {
        List {
            newest: Atomic::new(ptr::null_mut()),
            _owns: PhantomData,
        }
    }

    /// Appends `item`; gives it back where the list is closed. Fully ordered: what the caller does
    /// afterwards is seen after the item.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let raw = item.into_raw();
        let mut newest = self.newest.load(Relaxed);
        loop {
            if newest == Self::CLOSED {
                // SAFETY: It was given up above, and the list did not get it.
                return Err(unsafe { T::from_raw(raw) });
            }
            // SAFETY: It was given up above, and nobody else knows it yet.
            unsafe { T::next(raw) }.store(newest, Relaxed);
            // INVARIANT: What was the newest comes after this one. The exchange publishes `next`; it
            // pairs with those of `replace()`.
            match self.newest.cmpxchg(newest, raw, Full) {
                Ok(_) => return Ok(()),
                Err(now) => newest = now,
            }
        }
    }

    /// Takes everything out.
    pub(crate) fn take(&self) -> Batch<T> {
        self.replace(ptr::null_mut())
    }

    /// Takes everything out, and lets nothing in any more.
    pub(crate) fn close(&self) -> Batch<T> {
        self.replace(Self::CLOSED)
    }

    /// Whether nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        let newest = self.newest.load(Acquire);
        newest.is_null() || newest == Self::CLOSED
    }

    fn replace(&self, new: *mut T::Raw) -> Batch<T> {
        let mut newest = self.newest.load(Relaxed);
        loop {
            // A list that is closed stays so, and from an empty one there is nothing to take.
            if newest == Self::CLOSED || newest == new {
                return Batch::of_newest(ptr::null_mut());
            }
            // INVARIANT: The items belong to the batch from here on.
            match self.newest.cmpxchg(newest, new, Full) {
                Ok(_) => return Batch::of_newest(newest),
                Err(now) => newest = now,
            }
        }
    }
}

impl<T: Linked> Drop for List<T> {
    fn drop(&mut self) {
        drop(self.close());
    }
}

/// What was in a list, the oldest first.
///
/// # Invariants
///
/// `oldest` is null or what `into_raw()` of an item returned; from there `next()` leads to all others, and
/// at last to null. The batch owns them.
pub(crate) struct Batch<T: Linked> {
    oldest: *mut T::Raw,
    _owns: PhantomData<T>,
}

// SAFETY: It owns its items, which may be sent.
unsafe impl<T: Linked + Send> Send for Batch<T> {}

impl<T: Linked> Batch<T> {
    /// Nothing.
    pub(crate) fn empty() -> Self {
        // INVARIANT: Null is allowed.
        Batch {
            oldest: ptr::null_mut(),
            _owns: PhantomData,
        }
    }

    /// Turns a chain around that was taken out of a list.
    fn of_newest(mut newest: *mut T::Raw) -> Self {
        let mut oldest = ptr::null_mut();
        while !newest.is_null() {
            // SAFETY: By the list's invariant it is an item's, which was taken out and is ours now.
            let next = unsafe { T::next(newest) };
            let older = next.load(Relaxed);
            next.store(oldest, Relaxed);
            oldest = newest;
            newest = older;
        }
        // INVARIANT: Each leads to the one that was appended after it.
        Batch {
            oldest,
            _owns: PhantomData,
        }
    }

    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.oldest.is_null()
    }

    /// Takes the oldest one.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let raw = self.oldest;
        if raw.is_null() {
            return None;
        }
        // SAFETY: By the type invariant it is an item's that was not taken back.
        self.oldest = unsafe { T::next(raw) }.load(Relaxed);
        // SAFETY: As it was, and the batch has let go of it just now.
        Some(unsafe { T::from_raw(raw) })
    }
}

impl<T: Linked> Drop for Batch<T> {
    fn drop(&mut self) {
        while let Some(item) = self.pop() {
            drop(item);
        }
    }
}
