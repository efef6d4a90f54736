// SPDX-License-Identifier: GPL-2.0
//! Pointers that blk-mq operations read without locks or reference counts.
//!
//! The block layer can wait for running operations: `blk_mq_wait_quiesce_done()` waits for `queue_rq`
//! and `commit_rqs`, and `flush_work()` for the work item in which `timeout` runs. So a pointer is
//! replaced first, and the object released only after such a wait, much as with RCU. The `kernel`
//! crate (7.3) has nothing similar.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use super::{
    disk::{
        DiskRef,
        QueueId, //
    },
    mq::{
        Dispatch,
        InQueue, //
    },
};
use crate::kapi::bindings;
use core::marker::PhantomData;
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed, //
        },
        Arc,
        ArcBorrow, //
    },
};

/// An `Arc` that all operations of one queue can read without a lock or a reference count.
///
/// Releasing it waits for the operations that may have read it. A freeze would wait for requests
/// instead, which is not enough: `queue_rq` may still be running although its request has already
/// ended.
///
/// # Invariants
///
/// `ptr` and `retracted` are null or were returned by `Arc::into_raw()`, whose reference this object
/// owns. Operations read `ptr` only, so those that use `retracted` have begun before it was stored.
pub(crate) struct Published<T> {
    queue: QueueId,
    ptr: Atomic<*const T>,
    retracted: Atomic<*const T>,
    _owns: PhantomData<Arc<T>>,
}

// SAFETY: The object owns an `Arc<T>`, which is `Send`; `queue` is only compared.
unsafe impl<T: Send + Sync> Send for Published<T> {}
// SAFETY: `&Published` gives several tasks access to `&T`, and lets them exchange `Arc<T>`s. Both
// are allowed, as `T` is `Send` and `Sync`.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// Creates an empty object for the operations of `queue`.
    pub(super) fn new(queue: QueueId) -> Self {
        Published {
            queue,
            ptr: Atomic::new(core::ptr::null()),
            retracted: Atomic::new(core::ptr::null()),
            _owns: PhantomData,
        }
    }

    /// Returns what is published, for as long as the operation runs; `None` also for an operation
    /// of another queue.
    pub(crate) fn get<'a>(&'a self, cx: &'a impl InQueue) -> Option<&'a T> {
        if QueueId::new(cx.queue()) != self.queue {
            return None;
        }
        let ptr = self.ptr.load(Acquire);
        // SAFETY: By the type invariant, `ptr` is null or belongs to an `Arc`. This object and its
        // `Arc` are not dropped during `'a`, as `self` is borrowed. `release()` does not return the
        // `Arc` during `'a` either: it first waits until the operation that has read `ptr` has returned.
        unsafe { ptr.as_ref() }
    }

    /// Publishes `value` if nothing is published; otherwise returns it.
    pub(crate) fn publish(&self, value: Arc<T>) -> core::result::Result<(), Arc<T>> {
        let new = Arc::into_raw(value);
        match self.ptr.cmpxchg(core::ptr::null(), new, Full) {
            Ok(_) => Ok(()),
            // SAFETY: `new` was returned by `Arc::into_raw()` above, and was not published.
            Err(_) => Err(unsafe { Arc::from_raw(new) }),
        }
    }

    /// Takes back what is published: operations that begin now find nothing. Those that have begun may
    /// still use it, so it is kept until [`Self::release()`] is called. `disk` must be the disk whose
    /// operations read it; otherwise, or if nothing is published, this does nothing.
    ///
    /// # Context
    ///
    /// May sleep, if what was retracted before has not been released. The caller must hold no lock that
    /// an operation takes.
    pub(crate) fn retract(&self, disk: &DiskRef) {
        if QueueId::new(disk.queue()) != self.queue {
            return;
        }
        drop(self.release(disk));
        let old = self.ptr.xchg(core::ptr::null(), Full);
        // INVARIANT: `old` was owned by `ptr`, and is stored after `ptr` was cleared.
        let older = self.retracted.xchg(old, Full);
        // Another task has retracted meanwhile.
        drop(self.end_of_operations(disk, older));
    }

    /// Waits until no operation uses what was retracted, and returns it. Returns `None` if nothing was,
    /// or if `disk` is another disk.
    ///
    /// # Context
    ///
    /// May sleep. The caller must hold no lock that an operation takes.
    pub(crate) fn release(&self, disk: &DiskRef) -> Option<Arc<T>> {
        if QueueId::new(disk.queue()) != self.queue {
            return None;
        }
        let old = self.retracted.xchg(core::ptr::null(), Full);
        self.end_of_operations(disk, old)
    }

    /// Waits until no operation uses `old`, which the caller has taken out of `retracted`, and returns
    /// its `Arc`; `None` if it is null. The caller has checked `disk`.
    fn end_of_operations(&self, disk: &DiskRef, old: *const T) -> Option<Arc<T>> {
        if old.is_null() {
            return None;
        }
        wait_for_dispatches(disk);
        // `blk_sync_queue()` would also stop the timer, which requests of the next session need.
        // SAFETY: The queue of a `DiskRef` is valid. This waits for the work item in which `timeout` runs.
        unsafe { bindings::flush_work(&raw mut (*disk.queue()).timeout_work) };
        // SAFETY: By the type invariant, `old` was returned by `Arc::into_raw()`, and the operations that
        // use it had begun before it was stored in `retracted`. They have returned.
        Some(unsafe { Arc::from_raw(old) })
    }
}

/// Waits until every dispatch that has begun before has returned. Others may begin meanwhile: unlike a quiesce,
/// this keeps no request waiting.
///
/// # Context
///
/// May sleep. The caller must hold no lock that a dispatch takes.
pub(super) fn wait_for_dispatches(disk: &DiskRef) {
    // SAFETY: The queue of a `DiskRef` is valid, and has the tag set of its disk for its whole life. The
    // function does no more than wait for the read side of the set's (S)RCU, in which each dispatch runs.
    unsafe { bindings::blk_mq_wait_quiesce_done((*disk.queue()).tag_set) };
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        for old in [self.ptr.load(Relaxed), self.retracted.load(Relaxed)] {
            if !old.is_null() {
                // SAFETY: By the type invariant, `old` was returned by `Arc::into_raw()`. `&mut self`
                // excludes other users: this object is part of the disk's data, which is freed after
                // `Disk::remove()` has waited for the operations.
                drop(unsafe { Arc::from_raw(old) });
            }
        }
    }
}

impl QueueId {
    /// Creates an empty [`Published`] for the operations of this queue.
    pub(crate) fn published<T>(self) -> Published<T> {
        Published::new(self)
    }
}

/// An `Arc` that `queue_rq` and `commit_rqs` of one queue can read without a lock or a reference
/// count.
///
/// Unlike [`Published`], it can be replaced while requests are in flight, but `timeout` cannot read
/// it.
///
/// # Invariants
///
/// `ptr` was returned by `Arc::into_raw()`, whose reference this object owns.
pub(crate) struct Dispatched<T> {
    queue: QueueId,
    ptr: Atomic<*const T>,
    _owns: PhantomData<Arc<T>>,
}

// SAFETY: The object owns an `Arc<T>`, which is `Send`; `queue` is only compared.
unsafe impl<T: Send + Sync> Send for Dispatched<T> {}
// SAFETY: `&Dispatched` lends the `Arc<T>` to several tasks, and lets them replace it. Both are
// allowed, as `T` is `Send` and `Sync`.
unsafe impl<T: Send + Sync> Sync for Dispatched<T> {}

impl<T> Dispatched<T> {
    /// Creates an object for `queue_rq` and `commit_rqs` of `queue`.
    pub(super) fn new(queue: QueueId, value: Arc<T>) -> Self {
        Dispatched {
            queue,
            ptr: Atomic::new(Arc::into_raw(value)),
            _owns: PhantomData,
        }
    }

    /// Returns the current value, for as long as the operation runs; `None` for an operation of
    /// another queue.
    pub(crate) fn get<'a>(&'a self, cx: &'a Dispatch<'_>) -> Option<ArcBorrow<'a, T>> {
        if QueueId::new(cx.queue()) != self.queue {
            return None;
        }
        let ptr = self.ptr.load(Acquire);
        // SAFETY: By the type invariant, `ptr` belongs to an `Arc`. This object and its `Arc` are
        // not dropped during `'a`, as `self` is borrowed. `replace()` does not drop the `Arc` during
        // `'a` either: it first waits until the dispatch that has read `ptr` has returned.
        Some(unsafe { ArcBorrow::from_raw(ptr) })
    }

    /// Replaces the value, and waits until no operation uses the old one. `disk` must be the disk
    /// whose operations read it.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is another disk; nothing was replaced then.
    ///
    /// # Context
    ///
    /// May sleep. The caller must hold no lock that a dispatch takes.
    pub(crate) fn replace(&self, disk: &DiskRef, value: Arc<T>) -> Result {
        let queue = disk.queue();
        if QueueId::new(queue) != self.queue {
            return Err(EINVAL);
        }
        let old = self.ptr.xchg(Arc::into_raw(value), Full);
        wait_for_dispatches(disk);
        // SAFETY: By the type invariant, `old` was returned by `Arc::into_raw()`. No dispatch that
        // has read it is still running.
        drop(unsafe { Arc::from_raw(old) });
        Ok(())
    }
}

impl<T> Drop for Dispatched<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the pointer was returned by `Arc::into_raw()`. `&mut self`
        // excludes other users.
        drop(unsafe { Arc::from_raw(self.ptr.load(Relaxed)) });
    }
}

impl DiskRef {
    /// Creates a [`Dispatched`] for this disk's `queue_rq` and `commit_rqs`.
    pub(crate) fn dispatched<T>(&self, value: Arc<T>) -> Dispatched<T> {
        Dispatched::new(QueueId::new(self.queue()), value)
    }
}
