// SPDX-License-Identifier: GPL-2.0
//! A lock-free list with many producers and one consumer, linked through the items themselves.
//!
//! Any context can append an item without taking a lock; the consumer takes out all items at once,
//! in the order in which they were appended. The list can be closed, after which it accepts no more
//! items. A caller that fails to append keeps its item.
//!
//! The `kernel` crate (7.3) has no wrapper for `llist`, and the C list cannot be closed.
//!
//! The host tests compile this file as it is and check it with loom, a model checker.
//!
//! C header: [`include/linux/llist.h`](srctree/include/linux/llist.h)

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

/// A type that a [`List`] can link.
///
/// # Safety
///
/// `from_raw(into_raw(x))` must return `x`. From `into_raw()` to `from_raw()`, `next()` must return
/// a reference to the same valid place, which nothing but the list uses.
pub(crate) unsafe trait Linked: Sized {
    /// The type that a raw pointer to an item points to.
    type Raw;

    /// Gives the item up to a list.
    ///
    /// The pointer is never null, and its address is even.
    fn into_raw(self) -> *mut Self::Raw;

    /// Takes the item back from a list.
    ///
    /// # Safety
    ///
    /// `raw` must have been returned by [`Self::into_raw()`]. This function must be called only
    /// once for each such call.
    unsafe fn from_raw(raw: *mut Self::Raw) -> Self;

    /// Returns the place where the list stores the pointer to the next item.
    ///
    /// # Safety
    ///
    /// `raw` must have been returned by [`Self::into_raw()`], and the item must not be taken back
    /// during `'a`.
    unsafe fn next<'a>(raw: *mut Self::Raw) -> &'a Atomic<*mut Self::Raw>;
}

/// A lock-free list; see the module's documentation.
///
/// # Invariants
///
/// `newest` is null, [`Self::CLOSED`], or the pointer that `into_raw()` returned for the item
/// appended last. From that item, `next()` leads to all the others, from newer to older, and
/// finally to null. The list owns these items.
pub(crate) struct List<T: Linked> {
    newest: Atomic<*mut T::Raw>,
    _owns: PhantomData<T>,
}

// SAFETY: Sending the list sends its items, which are `Send`; the rest is an atomic.
unsafe impl<T: Linked + Send> Send for List<T> {}
// SAFETY: A shared reference allows appending and taking items, which are `Send`. It never yields a
// reference to an item in the list.
unsafe impl<T: Linked + Send> Sync for List<T> {}

impl<T: Linked> List<T> {
    /// The value of `newest` in a closed list. It is odd, so it is not the address of an item.
    const CLOSED: *mut T::Raw = ptr::without_provenance_mut(1);

    /// Creates an empty list.
    pub(crate) fn new() -> Self {
        List {
            newest: Atomic::new(ptr::null_mut()),
            _owns: PhantomData,
        }
    }

    /// Appends `item`, or returns it if the list is closed.
    ///
    /// The append is fully ordered: a CPU that observes what the caller does afterwards also
    /// observes the item.
    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let raw = item.into_raw();
        let mut newest = self.newest.load(Relaxed);
        loop {
            if newest == Self::CLOSED {
                // SAFETY: `raw` was returned by `into_raw()` above, and the list did not take it.
                return Err(unsafe { T::from_raw(raw) });
            }
            // SAFETY: `raw` was returned by `into_raw()` above, and has not been published yet.
            unsafe { T::next(raw) }.store(newest, Relaxed);
            // INVARIANT: The previous newest item follows this one. The exchange publishes `next`,
            // and pairs with the one in `replace()`.
            match self.newest.cmpxchg(newest, raw, Full) {
                Ok(_) => return Ok(()),
                Err(now) => newest = now,
            }
        }
    }

    /// Takes all items out.
    pub(crate) fn take(&self) -> Batch<T> {
        self.replace(ptr::null_mut())
    }

    /// Takes all items out, and closes the list.
    pub(crate) fn close(&self) -> Batch<T> {
        self.replace(Self::CLOSED)
    }

    /// Returns whether the list contains no item.
    pub(crate) fn is_empty(&self) -> bool {
        let newest = self.newest.load(Acquire);
        newest.is_null() || newest == Self::CLOSED
    }

    fn replace(&self, new: *mut T::Raw) -> Batch<T> {
        let mut newest = self.newest.load(Relaxed);
        loop {
            // A closed list stays closed, and an empty one has nothing to take.
            if newest == Self::CLOSED || newest == new {
                return Batch::of_newest(ptr::null_mut());
            }
            // INVARIANT: From here on the batch owns the items.
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

/// The items taken out of a list, oldest first.
///
/// # Invariants
///
/// `oldest` is null or the pointer that `into_raw()` returned for an item. From that item, `next()`
/// leads to all the others, and finally to null. The batch owns these items.
pub(crate) struct Batch<T: Linked> {
    oldest: *mut T::Raw,
    _owns: PhantomData<T>,
}

// SAFETY: The batch owns its items, which are `Send`.
unsafe impl<T: Linked + Send> Send for Batch<T> {}

impl<T: Linked> Batch<T> {
    /// Creates an empty batch.
    pub(crate) fn empty() -> Self {
        // INVARIANT: A null `oldest` is allowed.
        Batch {
            oldest: ptr::null_mut(),
            _owns: PhantomData,
        }
    }

    /// Creates a batch from a chain taken out of a list, by reversing the chain.
    fn of_newest(mut newest: *mut T::Raw) -> Self {
        let mut oldest = ptr::null_mut();
        while !newest.is_null() {
            // SAFETY: By the invariant of `List`, `newest` was returned by `into_raw()`. The item
            // was taken out of the list, so nothing else uses it.
            let next = unsafe { T::next(newest) };
            let older = next.load(Relaxed);
            next.store(oldest, Relaxed);
            oldest = newest;
            newest = older;
        }
        // INVARIANT: Each item now leads to the one that was appended after it.
        Batch {
            oldest,
            _owns: PhantomData,
        }
    }

    /// Returns whether the batch is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.oldest.is_null()
    }

    /// Takes the oldest item.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let raw = self.oldest;
        if raw.is_null() {
            return None;
        }
        // SAFETY: By the type invariant, `raw` was returned by `into_raw()` and was not taken back.
        self.oldest = unsafe { T::next(raw) }.load(Relaxed);
        // SAFETY: By the type invariant, `raw` was returned by `into_raw()`. The batch no longer refers to
        // the item, so it is taken back once.
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
