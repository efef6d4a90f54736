// SPDX-License-Identifier: GPL-2.0
//! blk-mq: tag sets and the operations of a driver.
//!
//! Mirrors `kernel::block::mq`, which (7.3) has no timeout operation, no hardware contexts, and no
//! `queue_rq` that may sleep (`BLK_MQ_F_BLOCKING`). For its requests see [`super::request`].
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)
//!
//! See also `Documentation/block/blk-mq.rst`.

use super::{
    pdu::Pdu,
    request::{
        Handle,
        NewRequest,
        QueueStatus, //
    },
    timed_out::TimedOutRequest, //
};
use crate::kapi::bindings;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    ffi,
    prelude::*,
    types::Opaque, //
};

/// Proof that an operation of a queue is running. Until it returns, either `blk_mq_wait_quiesce_done()` or
/// `flush_work()` of the queue's timeout work does not return.
///
/// # Safety
///
/// A value of this type, or a reference to one, must exist only while an operation of that queue
/// runs.
pub(crate) unsafe trait InQueue {
    /// Returns the queue.
    #[doc(hidden)]
    fn queue(&self) -> *mut bindings::request_queue;
}

/// Proof that `queue_rq` or `commit_rqs` is running. Until it returns, `blk_mq_wait_quiesce_done()` does not
/// return.
pub(crate) struct Dispatch<'a> {
    hctx: *mut bindings::blk_mq_hw_ctx,
    _call: PhantomData<&'a ()>,
}

// SAFETY: Only `VTable` creates a `Dispatch`, and lends it to the operation.
unsafe impl InQueue for Dispatch<'_> {
    fn queue(&self) -> *mut bindings::request_queue {
        // SAFETY: The hardware context is valid during the call.
        unsafe { (*self.hctx).queue }
    }
}

impl Dispatch<'_> {
    /// Returns the number of the hardware queue.
    pub(crate) fn hw_queue(&self) -> u32 {
        // SAFETY: The hardware context is valid during the call.
        unsafe { (*self.hctx).queue_num }
    }

    /// Runs the hardware queue again after `delay_ms` milliseconds.
    pub(crate) fn run_again(&self, delay_ms: u32) {
        // SAFETY: The hardware context is valid during the call.
        unsafe { bindings::blk_mq_delay_run_hw_queue(self.hctx, delay_ms as usize) };
    }
}

/// Proof that `timeout` is running, which it does only in the queue's work item for timeouts. Until it
/// returns, `flush_work()` of that work item does not.
pub(crate) struct Expiry<'a> {
    queue: *mut bindings::request_queue,
    _call: PhantomData<&'a ()>,
}

// SAFETY: Only `VTable` creates an `Expiry`, and lends it to the operation.
unsafe impl InQueue for Expiry<'_> {
    fn queue(&self) -> *mut bindings::request_queue {
        self.queue
    }
}

/// What the block layer is to do with a request that timed out (`enum blk_eh_timer_return`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimeoutStatus {
    /// Restart the timer of the request, which stays in flight (`BLK_EH_RESET_TIMER`).
    ResetTimer,
    /// Leave the request alone until it is started again (`BLK_EH_DONE`): it has ended or been
    /// requeued, or soon will be.
    ///
    /// To restart the timer of such a request would be a data race: the block layer and the driver
    /// would both change its flags, which are not atomic.
    Done,
}

/// The blk-mq operations of a driver.
///
/// # Context
///
/// All operations may sleep: the tag set has `BLK_MQ_F_BLOCKING`.
pub(crate) trait Operations: Sized + Send + Sync + 'static {
    /// Starts or refuses a request. If `last` is false, another request follows at once, or
    /// `commit_rqs` is called.
    fn queue_rq(&self, cx: &Dispatch<'_>, rq: NewRequest, last: bool) -> QueueStatus;

    /// Called when no other request follows, although the previous one was not marked `last`.
    fn commit_rqs(&self, cx: &Dispatch<'_>);

    /// Called when a request has timed out. It may end at the same time.
    fn timeout(&self, cx: &Expiry<'_>, rq: TimedOutRequest<'_>) -> TimeoutStatus;
}

/// The C side of [`Operations`].
///
/// The `queuedata` of each queue that uses it is a `*const T`, which is valid as long as the queue.
/// [`super::gendisk::Disk`] ensures that.
struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    /// Returns the driver's data, and the proof that one of its operations runs.
    ///
    /// # Safety
    ///
    /// `hctx` must be a hardware context of a queue of [`super::gendisk::Disk<T>`], passed to
    /// `queue_rq` or `commit_rqs`. The returned values must not outlive that call.
    unsafe fn driver<'a>(hctx: *mut bindings::blk_mq_hw_ctx) -> (&'a T, Dispatch<'a>) {
        let cx = Dispatch {
            hctx,
            _call: PhantomData,
        };
        // SAFETY: By this function's safety requirements and the type's documentation, `queuedata`
        // is a valid `*const T`.
        (unsafe { &*(*cx.queue()).queuedata.cast::<T>() }, cx)
    }

    /// Implements `blk_mq_ops.queue_rq`.
    ///
    /// # Safety
    ///
    /// `hctx` as for [`Self::driver()`]. `bd` must be valid, and hold a request of the same queue
    /// that was not started.
    unsafe extern "C" fn queue_rq(
        hctx: *mut bindings::blk_mq_hw_ctx,
        bd: *const bindings::blk_mq_queue_data,
    ) -> bindings::blk_status_t {
        // SAFETY: By this function's safety requirements. blk-mq passes a hardware context of this
        // queue.
        let (driver, cx) = unsafe { Self::driver(hctx) };
        // SAFETY: By this function's safety requirements, `bd` is valid during the call, and its
        // request is not null.
        let (rq, last) = unsafe { (NonNull::new_unchecked((*bd).rq), (*bd).last) };
        // INVARIANT: blk-mq passed this request, which was not started.
        driver.queue_rq(&cx, NewRequest { rq }, last).0 .0
    }

    /// Implements `blk_mq_ops.commit_rqs`.
    ///
    /// # Safety
    ///
    /// `hctx` as for [`Self::driver()`].
    unsafe extern "C" fn commit_rqs(hctx: *mut bindings::blk_mq_hw_ctx) {
        // SAFETY: By this function's safety requirements. blk-mq passes a hardware context of this
        // queue.
        let (driver, cx) = unsafe { Self::driver(hctx) };
        driver.commit_rqs(&cx);
    }

    /// Implements `blk_mq_ops.timeout`.
    ///
    /// # Safety
    ///
    /// `rq` must be a request of a queue of [`super::gendisk::Disk<T>`]. The caller must hold a
    /// reference to both during the call.
    unsafe extern "C" fn timeout(rq: *mut bindings::request) -> bindings::blk_eh_timer_return {
        // SAFETY: By this function's safety requirements, the request and its queue are valid.
        let queue = unsafe { (*rq).q };
        // SAFETY: By the type's documentation, `queuedata` is a `*const T` that is valid as long as
        // the queue.
        let driver = unsafe { &*(*queue).queuedata.cast::<T>() };
        // SAFETY: By this function's safety requirements, the request is valid, so it is not null.
        let rq = unsafe { NonNull::new_unchecked(rq) };
        let cx = Expiry {
            queue,
            _call: PhantomData,
        };
        // INVARIANT: blk-mq passed this request to `timeout`.
        let overdue = TimedOutRequest {
            rq,
            _call: PhantomData,
        };
        match driver.timeout(&cx, overdue) {
            TimeoutStatus::ResetTimer => bindings::blk_eh_timer_return_BLK_EH_RESET_TIMER,
            TimeoutStatus::Done => bindings::blk_eh_timer_return_BLK_EH_DONE,
        }
    }

    /// Implements `blk_mq_ops.complete`.
    ///
    /// # Safety
    ///
    /// `rq` must be a request that [`Handle::complete_remotely()`] passed to the block layer.
    unsafe extern "C" fn complete(rq: *mut bindings::request) {
        // SAFETY: `complete_remotely()` passes only requests without handles to the block layer,
        // which calls this function once for each.
        unsafe { Handle::end_locally(NonNull::new_unchecked(rq)) };
    }

    /// Implements `blk_mq_ops.init_request`.
    ///
    /// # Safety
    ///
    /// `rq` must be a newly allocated request of a [`TagSet`].
    unsafe extern "C" fn init_request(
        _set: *mut bindings::blk_mq_tag_set,
        rq: *mut bindings::request,
        _hctx: ffi::c_uint,
        _node: ffi::c_int,
    ) -> ffi::c_int {
        // SAFETY: The request is followed by `cmd_size` bytes, which suffice for a `Pdu`. They are
        // aligned for it: the size of a request is a multiple of its alignment, which is that of a
        // pointer.
        unsafe { rq.add(1).cast::<Pdu>().write(Pdu::new()) };
        0
    }

    const OPS: bindings::blk_mq_ops = bindings::blk_mq_ops {
        queue_rq: Some(Self::queue_rq),
        commit_rqs: Some(Self::commit_rqs),
        timeout: Some(Self::timeout),
        complete: Some(Self::complete),
        init_request: Some(Self::init_request),
        ..pin_init::zeroed()
    };
}

/// A set of tags and their requests.
///
/// # Invariants
///
/// `inner` was initialised by `blk_mq_alloc_tag_set()`.
#[pin_data(PinnedDrop)]
pub(crate) struct TagSet<T: Operations> {
    #[pin]
    inner: Opaque<bindings::blk_mq_tag_set>,
    _driver: PhantomData<T>,
}

// SAFETY: The tag set's own locks protect it, and it contains no `T`.
unsafe impl<T: Operations> Send for TagSet<T> {}
// SAFETY: `&TagSet` only offers the address of the set, which its own locks protect.
unsafe impl<T: Operations> Sync for TagSet<T> {}

impl<T: Operations> TagSet<T> {
    /// Creates a set for `hw_queues` hardware queues with `depth` tags each.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(hw_queues: u32, depth: u32) -> impl PinInit<Self, Error> {
        let set = bindings::blk_mq_tag_set {
            ops: &VTable::<T>::OPS,
            nr_hw_queues: hw_queues,
            queue_depth: depth,
            numa_node: bindings::NUMA_NO_NODE,
            cmd_size: size_of::<Pdu>() as u32,
            flags: bindings::BLK_MQ_F_BLOCKING | bindings::BLK_MQ_F_NO_SCHED_BY_DEFAULT,
            ..pin_init::zeroed()
        };
        try_pin_init!(Self {
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::blk_mq_tag_set| {
                // SAFETY: `slot` is valid for writes.
                unsafe { slot.write(set) };
                // SAFETY: The set has all values that it needs, and does not move from here on.
                to_result(unsafe { bindings::blk_mq_alloc_tag_set(slot) })
            }),
            _driver: PhantomData,
        })
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::blk_mq_tag_set {
        self.inner.get()
    }
}

#[pinned_drop]
impl<T: Operations> PinnedDrop for TagSet<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant, the set was allocated. A disk drops its reference to the
        // set when it is freed itself, and no longer uses the set then.
        unsafe { bindings::blk_mq_free_tag_set(self.inner.get()) };
    }
}
