// SPDX-License-Identifier: GPL-2.0
//! What a queue's operations read without a lock or a count, because the block layer can wait for
//! them.

use super::{
    disk::{
        DiskRef,
        QueueId, //
    },
    frozen::Frozen,
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

/// An `Arc` that the operations of one queue read without a lock or a count: it is taken away only
/// while the queue is frozen and quiesced. (Frozen alone does not do: `queue_rq` may still run when its
/// request has already ended. Quiesced alone does not either: it does not stop `timeout`.)
///
/// # Invariants
///
/// `ptr` is null or came from `Arc::into_raw()`.
pub(crate) struct Published<T> {
    queue: QueueId,
    ptr: Atomic<*const T>,
    _owns: PhantomData<Arc<T>>,
}

// SAFETY: It owns an `Arc`, which every task may let go of; `queue` is only compared.
unsafe impl<T: Send + Sync> Send for Published<T> {}
// SAFETY: Through `&Published` several tasks may have a `&T`, and get and give `Arc`s of it.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// Nothing is published. For the operations of `queue`.
    pub(super) fn new(queue: QueueId) -> Self {
        Published {
            queue,
            ptr: Atomic::new(core::ptr::null()),
            _owns: PhantomData,
        }
    }

    /// What is published, for as long as the operation runs; nothing for the operations of another queue.
    pub(crate) fn get<'a>(&'a self, cx: &'a impl InQueue) -> Option<&'a T> {
        if QueueId::new(cx.queue()) != self.queue {
            return None;
        }
        let ptr = self.ptr.load(Acquire);
        // SAFETY: By the type invariant it is null or a live `Arc`'s. `self` is borrowed for `'a`, so it is
        // not dropped with the `Arc`; and `retract()` takes that away only while the queue is frozen and
        // quiesced, which it is not during `'a`, while an operation of it runs.
        unsafe { ptr.as_ref() }
    }

    /// Publishes `value` where nothing is published; gives it back where something is.
    pub(crate) fn publish(&self, value: Arc<T>) -> core::result::Result<(), Arc<T>> {
        let new = Arc::into_raw(value);
        match self.ptr.cmpxchg(core::ptr::null(), new, Full) {
            Ok(_) => Ok(()),
            // SAFETY: `new` came from `Arc::into_raw()`, and was given to nobody.
            Err(_) => Err(unsafe { Arc::from_raw(new) }),
        }
    }

    /// Takes away what is published; nothing where another queue is frozen.
    pub(crate) fn retract(&self, frozen: &Frozen<'_>) -> Option<Arc<T>> {
        if QueueId::new(frozen.queue()) != self.queue {
            return None;
        }
        let old = self.ptr.xchg(core::ptr::null(), Full);
        if old.is_null() {
            return None;
        }
        // SAFETY: By the type invariant it came from `Arc::into_raw()`, and with its queue frozen and
        // quiesced no operation looks at it.
        Some(unsafe { Arc::from_raw(old) })
    }
}

impl<T> Drop for Published<T> {
    fn drop(&mut self) {
        let old = self.ptr.load(Relaxed);
        if !old.is_null() {
            // SAFETY: By the type invariant it came from `Arc::into_raw()`, and with exclusive access
            // nobody looks at it.
            drop(unsafe { Arc::from_raw(old) });
        }
    }
}

impl QueueId {
    /// Something that this queue's operations can read.
    pub(crate) fn published<T>(self) -> Published<T> {
        Published::new(self)
    }
}

/// An `Arc` that `queue_rq` and `commit_rqs` of one queue read without a lock or a count. Unlike
/// [`Published`] it can be replaced while requests are in flight.
///
/// # Invariants
///
/// `ptr` came from `Arc::into_raw()`.
pub(crate) struct Dispatched<T> {
    queue: QueueId,
    ptr: Atomic<*const T>,
    _owns: PhantomData<Arc<T>>,
}

// SAFETY: It owns an `Arc`, which every task may let go of; `queue` is only compared.
unsafe impl<T: Send + Sync> Send for Dispatched<T> {}
// SAFETY: Through `&Dispatched` several tasks may have a borrowed `Arc`, and replace it.
unsafe impl<T: Send + Sync> Sync for Dispatched<T> {}

impl<T> Dispatched<T> {
    /// For `queue_rq` and `commit_rqs` of `queue`.
    pub(super) fn new(queue: QueueId, value: Arc<T>) -> Self {
        Dispatched {
            queue,
            ptr: Atomic::new(Arc::into_raw(value)),
            _owns: PhantomData,
        }
    }

    /// What it is, for as long as the operation runs; nothing for the operations of another queue.
    pub(crate) fn get<'a>(&'a self, cx: &'a Dispatch<'_>) -> Option<ArcBorrow<'a, T>> {
        if QueueId::new(cx.queue()) != self.queue {
            return None;
        }
        let ptr = self.ptr.load(Acquire);
        // SAFETY: By the type invariant it is a live `Arc`'s. `self` is borrowed for `'a`, so it is not
        // dropped with the `Arc`; and `replace()` lets go of that only after the queue was quiesced, which
        // it is not during `'a`, while a dispatch runs that saw it.
        Some(unsafe { ArcBorrow::from_raw(ptr) })
    }

    /// Replaces it. `disk` is the one whose dispatches read it. Waits until none of them looks at what it
    /// was. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` where it is another disk; then nothing was replaced.
    pub(crate) fn replace(&self, disk: &DiskRef, value: Arc<T>) -> Result {
        let queue = disk.queue();
        if QueueId::new(queue) != self.queue {
            return Err(EINVAL);
        }
        let old = self.ptr.xchg(Arc::into_raw(value), Full);
        // SAFETY: The disk's queue is valid. When this returns, no dispatch runs that began before.
        unsafe { bindings::blk_mq_quiesce_queue(queue) };
        // SAFETY: It was quiesced just now.
        unsafe { bindings::blk_mq_unquiesce_queue(queue) };
        // SAFETY: By the type invariant it came from `Arc::into_raw()`, and no dispatch runs any more that
        // saw it.
        drop(unsafe { Arc::from_raw(old) });
        Ok(())
    }
}

impl<T> Drop for Dispatched<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it came from `Arc::into_raw()`, and with exclusive access
        // nobody looks at it.
        drop(unsafe { Arc::from_raw(self.ptr.load(Relaxed)) });
    }
}

impl DiskRef {
    /// Something that this disk's dispatches can read.
    pub(crate) fn dispatched<T>(&self, value: Arc<T>) -> Dispatched<T> {
        Dispatched::new(QueueId::new(self.queue()), value)
    }
}
