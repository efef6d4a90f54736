// SPDX-License-Identifier: GPL-2.0
//! blk-mq: tag sets, and the operations of a driver.
//!
//! Mirrors `kernel::block::mq`, which (7.3) has no timeout, no request direction, no access to a
//! request's data and no blocking `queue_rq`. Source: `include/linux/blk-mq.h`,
//! `Documentation/block/blk-mq.rst`.

use super::request::{
    Handle,
    NewRequest,
    Pdu,
    QueueStatus, //
    TimedOutRequest,
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

/// Proof of being inside an operation that the block layer called: its queue cannot be quiesced and
/// frozen before it is over.
///
/// # Safety
///
/// There must be no value of it, or reference to one, outside an operation of that queue.
pub(crate) unsafe trait InQueue {
    /// The queue.
    #[doc(hidden)]
    fn queue(&self) -> *mut bindings::request_queue;
}

/// Proof of being inside `queue_rq` or `commit_rqs`: the queue cannot be quiesced before it is over.
pub(crate) struct Dispatch<'a> {
    hctx: *mut bindings::blk_mq_hw_ctx,
    _call: PhantomData<&'a ()>,
}

// SAFETY: Only `VTable` makes one, and lends it to the operation.
unsafe impl InQueue for Dispatch<'_> {
    fn queue(&self) -> *mut bindings::request_queue {
        // SAFETY: The hardware context is valid during the call.
        unsafe { (*self.hctx).queue }
    }
}

impl Dispatch<'_> {
    /// Which hardware queue it is.
    pub(crate) fn hw_queue(&self) -> u32 {
        // SAFETY: The hardware context is valid during the call.
        unsafe { (*self.hctx).queue_num }
    }

    /// Has the hardware queue run again after `delay_ms`.
    pub(crate) fn run_again(&self, delay_ms: u32) {
        // SAFETY: The hardware context is valid during the call.
        unsafe { bindings::blk_mq_delay_run_hw_queue(self.hctx, delay_ms as usize) };
    }
}

/// Proof of being inside `timeout`: the queue cannot be frozen before it is over.
pub(crate) struct Expiry<'a> {
    queue: *mut bindings::request_queue,
    _call: PhantomData<&'a ()>,
}

// SAFETY: Only `VTable` makes one, and lends it to the operation.
unsafe impl InQueue for Expiry<'_> {
    fn queue(&self) -> *mut bindings::request_queue {
        self.queue
    }
}

/// What the driver does about a request whose time is up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimeoutStatus {
    /// It goes on waiting: its timer starts again.
    ResetTimer,
    /// It ends, or is requeued, soon or already: the block layer leaves it alone until it is started again
    /// (`BLK_EH_DONE`). Flags of the request that the two would change at the same time are not atomic.
    Done,
}

/// A driver's blk-mq operations. They may sleep (`BLK_MQ_F_BLOCKING`).
pub(crate) trait Operations: Sized + Send + Sync + 'static {
    /// A request to start. `last`: no other follows at once, or `commit_rqs` is called.
    fn queue_rq(&self, cx: &Dispatch<'_>, rq: NewRequest, last: bool) -> QueueStatus;

    /// No other request follows at once, although the one before was not marked `last`.
    fn commit_rqs(&self, cx: &Dispatch<'_>);

    /// A request's time is up. It may have ended meanwhile. Returns whether its timer is to start again.
    fn timeout(&self, cx: &Expiry<'_>, rq: TimedOutRequest<'_>) -> TimeoutStatus;
}

/// The C side of [`Operations`]. All queues that use it have a `*const T` as `queuedata` that is valid
/// for as long as the queue is ([`super::gendisk::Disk`] sees to it).
struct VTable<T: Operations>(PhantomData<T>);

impl<T: Operations> VTable<T> {
    /// # Safety
    ///
    /// `hctx` must be a hardware context of a queue of [`super::gendisk::Disk<T>`].
    unsafe fn driver<'a>(hctx: *mut bindings::blk_mq_hw_ctx) -> (&'a T, Dispatch<'a>) {
        let cx = Dispatch {
            hctx,
            _call: PhantomData,
        };
        // SAFETY: The caller promises that `queuedata` is a `*const T`.
        (unsafe { &*(*cx.queue()).queuedata.cast::<T>() }, cx)
    }

    /// `blk_mq_ops.queue_rq`
    ///
    /// # Safety
    ///
    /// `hctx` as for [`Self::driver()`]; `bd` must hold a request of it that was not started.
    unsafe extern "C" fn queue_rq(
        hctx: *mut bindings::blk_mq_hw_ctx,
        bd: *const bindings::blk_mq_queue_data,
    ) -> bindings::blk_status_t {
        // SAFETY: blk-mq passes a hardware context of our queue, and a request for it.
        let (driver, cx) = unsafe { Self::driver(hctx) };
        // SAFETY: blk-mq passes a `bd` that is valid during the call, with a request in it.
        let (rq, last) = unsafe { (NonNull::new_unchecked((*bd).rq), (*bd).last) };
        // INVARIANT: The request was passed to us and was not started.
        driver.queue_rq(&cx, NewRequest { rq }, last).0 .0
    }

    /// `blk_mq_ops.commit_rqs`
    ///
    /// # Safety
    ///
    /// `hctx` as for [`Self::driver()`].
    unsafe extern "C" fn commit_rqs(hctx: *mut bindings::blk_mq_hw_ctx) {
        // SAFETY: blk-mq passes a hardware context of our queue.
        let (driver, cx) = unsafe { Self::driver(hctx) };
        driver.commit_rqs(&cx);
    }

    /// `blk_mq_ops.timeout`
    ///
    /// # Safety
    ///
    /// `rq` must be a request of a queue of [`super::gendisk::Disk<T>`], referenced during the call.
    unsafe extern "C" fn timeout(rq: *mut bindings::request) -> bindings::blk_eh_timer_return {
        // SAFETY: blk-mq passes a request of our queue and holds a reference to it and to the queue.
        let (driver, queue, rq) = unsafe {
            let queue = (*rq).q;
            let driver = &*(*queue).queuedata.cast::<T>();
            (driver, queue, NonNull::new_unchecked(rq))
        };
        let cx = Expiry {
            queue,
            _call: PhantomData,
        };
        // INVARIANT: The request was passed to us.
        let overdue = TimedOutRequest {
            rq,
            _call: PhantomData,
        };
        match driver.timeout(&cx, overdue) {
            TimeoutStatus::ResetTimer => bindings::blk_eh_timer_return_BLK_EH_RESET_TIMER,
            TimeoutStatus::Done => bindings::blk_eh_timer_return_BLK_EH_DONE,
        }
    }

    /// `blk_mq_ops.complete`
    ///
    /// # Safety
    ///
    /// `rq` must be a request that [`Handle::complete_remotely()`] has left to the block layer.
    unsafe extern "C" fn complete(rq: *mut bindings::request) {
        // SAFETY: `complete_remotely()` leaves only a request without handles to the block layer, which calls
        // this once for it.
        unsafe { Handle::end_locally(NonNull::new_unchecked(rq)) };
    }

    /// `blk_mq_ops.init_request`
    ///
    /// # Safety
    ///
    /// `rq` must be a new request of a [`TagSet`].
    unsafe extern "C" fn init_request(
        _set: *mut bindings::blk_mq_tag_set,
        rq: *mut bindings::request,
        _hctx: ffi::c_uint,
        _node: ffi::c_int,
    ) -> ffi::c_int {
        // SAFETY: `cmd_size` bytes lie behind the request, enough for a `Pdu` and aligned for one: a
        // request's size is a multiple of its alignment, which is that of a pointer.
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

/// A set of tags, and the requests that go with them.
///
/// # Invariants
///
/// `inner` was set up by `blk_mq_alloc_tag_set()`.
#[pin_data(PinnedDrop)]
pub(crate) struct TagSet<T: Operations> {
    #[pin]
    inner: Opaque<bindings::blk_mq_tag_set>,
    _driver: PhantomData<T>,
}

// SAFETY: The tag set's own locks protect it; it holds no `T`.
unsafe impl<T: Operations> Send for TagSet<T> {}
// SAFETY: What `&TagSet` offers is the address of the set, whose own locks protect it.
unsafe impl<T: Operations> Sync for TagSet<T> {}

impl<T: Operations> TagSet<T> {
    /// Tags for `hw_queues` hardware queues, `depth` for each. May sleep.
    pub(crate) fn new(hw_queues: u32, depth: u32) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- Opaque::try_ffi_init(move |slot: *mut bindings::blk_mq_tag_set| {
                // SAFETY: `slot` is ours to initialise, and it is pinned.
                unsafe {
                    slot.write(pin_init::zeroed());
                    (*slot).ops = &VTable::<T>::OPS;
                    (*slot).nr_hw_queues = hw_queues;
                    (*slot).queue_depth = depth;
                    (*slot).numa_node = bindings::NUMA_NO_NODE;
                    (*slot).cmd_size = size_of::<Pdu>() as u32;
                    (*slot).flags =
                        bindings::BLK_MQ_F_BLOCKING | bindings::BLK_MQ_F_NO_SCHED_BY_DEFAULT;
                    to_result(bindings::blk_mq_alloc_tag_set(slot))
                }
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
        // SAFETY: By the type invariant it was allocated; a disk that uses it goes before it does.
        unsafe { bindings::blk_mq_free_tag_set(self.inner.get()) };
    }
}
