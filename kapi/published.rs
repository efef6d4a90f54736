// SPDX-License-Identifier: GPL-2.0
//! What a queue's operations read without a lock or a count, because the block layer can wait for
//! them.

use super::{
    bindings,
    frozen::Frozen,
    mq::{Dispatch, InQueue},
};
use core::marker::PhantomData;
use kernel::sync::{
    atomic::{Acquire, Atomic, Full, Relaxed},
    Arc, ArcBorrow,
};

/// An `Arc` that the operations of one queue read without a lock or a count: it is taken away only
/// while the queue is frozen and quiesced. (Frozen alone does not do: `queue_rq` may still run when its
/// request has already ended. Quiesced alone does not either: it does not stop `timeout`.)
///
/// # Invariants
///
/// `ptr` is null or came from `Arc::into_raw()`.
pub(crate) struct Published<T> {
    queue: *mut bindings::request_queue,
    ptr: Atomic<*const T>,
    _owns: PhantomData<Arc<T>>,
}

// SAFETY: It is an `Arc` that can be replaced; `queue` is only compared.
unsafe impl<T: Send + Sync> Send for Published<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// Nothing is published. For the operations of `queue`.
    pub(super) fn new(queue: *mut bindings::request_queue) -> Self {
        Published {
            queue,
            ptr: Atomic::new(core::ptr::null()),
            _owns: PhantomData,
        }
    }

    /// What is published, for as long as the operation runs.
    pub(crate) fn get<'a>(&self, cx: &'a impl InQueue) -> Option<&'a T> {
        if cx.queue() != self.queue {
            return None;
        }
        let ptr = self.ptr.load(Acquire);
        // SAFETY: By the type invariant it is null or a live `Arc`'s. It is taken away only while this
        // queue is frozen and quiesced, which cannot be while an operation of it runs, and `'a` ends
        // with the operation.
        unsafe { ptr.as_ref() }
    }

    /// Publishes `value` where nothing is published; gives it back where something is.
    pub(crate) fn publish(&self, value: Arc<T>) -> core::result::Result<(), Arc<T>> {
        let new = Arc::into_raw(value);
        match self.ptr.cmpxchg(core::ptr::null(), new, Full) {
            Ok(_) => Ok(()),
            // SAFETY: `new` came from `Arc::into_raw()` above.
            Err(_) => Err(unsafe { Arc::from_raw(new) }),
        }
    }

    /// Takes away what is published.
    pub(crate) fn retract(&self, frozen: &Frozen<'_>) -> Option<Arc<T>> {
        if frozen.queue() != self.queue {
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

/// An `Arc` that `queue_rq` and `commit_rqs` of one queue read without a lock or a count. Unlike
/// [`Published`] it can be replaced while requests are in flight.
///
/// # Invariants
///
/// `ptr` came from `Arc::into_raw()`.
pub(crate) struct Dispatched<T> {
    queue: *mut bindings::request_queue,
    ptr: Atomic<*const T>,
    _owns: PhantomData<Arc<T>>,
}

// SAFETY: It is an `Arc` that can be replaced; `queue` is only compared.
unsafe impl<T: Send + Sync> Send for Dispatched<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Dispatched<T> {}

impl<T> Dispatched<T> {
    /// For `queue_rq` and `commit_rqs` of `queue`.
    pub(super) fn new(queue: *mut bindings::request_queue, value: Arc<T>) -> Self {
        Dispatched {
            queue,
            ptr: Atomic::new(Arc::into_raw(value)),
            _owns: PhantomData,
        }
    }

    /// What it is, for as long as the operation runs.
    pub(crate) fn get<'a>(&self, cx: &'a Dispatch<'_>) -> Option<ArcBorrow<'a, T>> {
        if cx.queue() != self.queue {
            return None;
        }
        // SAFETY: By the type invariant it is a live `Arc`'s. It is let go of only after this queue
        // was quiesced since it was replaced, which cannot be while a dispatch runs that saw it.
        Some(unsafe { ArcBorrow::from_raw(self.ptr.load(Acquire)) })
    }

    /// Replaces it. Waits until no dispatch looks at what it was. May sleep.
    pub(crate) fn replace(&self, value: Arc<T>) {
        let old = self.ptr.xchg(Arc::into_raw(value), Full);
        // SAFETY: This lives in what the disk's queue refers to, so the queue is valid. Afterwards no
        // dispatch runs that began before the exchange, so `old`, which came from `Arc::into_raw()`,
        // is ours alone.
        drop(unsafe {
            bindings::blk_mq_quiesce_queue(self.queue);
            bindings::blk_mq_unquiesce_queue(self.queue);
            Arc::from_raw(old)
        });
    }
}

impl<T> Drop for Dispatched<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it came from `Arc::into_raw()`, and with exclusive access
        // nobody looks at it.
        drop(unsafe { Arc::from_raw(self.ptr.load(Relaxed)) });
    }
}
