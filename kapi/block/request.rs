// SPDX-License-Identifier: GPL-2.0
//! Requests, from `queue_rq` to their end.
//!
//! # The two handles of a request
//!
//! A server may answer a write before it has read all of its data, and a reply may arrive while the
//! request's connection is being shut down. The block layer must not free the pages of a request
//! before both its transmission and its answer are settled. So [`NewRequest::start()`] splits a
//! request into two handles, which a counter in the request's private data counts:
//!
//! - [`Unsent`] belongs to the code that sends the request. It is held until the last byte was
//!   passed to the socket, or until the connection is dead and nothing more can be sent. Its holder
//!   drops it if everything was sent, and calls [`Unsent::overrule()`] if not.
//! - [`Unanswered`] belongs to the code that decides how the request ends: the receiver of the
//!   reply, or the code that gives the request up. Its holder calls [`Unanswered::finish()`]. If it
//!   is dropped instead, the request fails with `BLK_STS_IOERR`.
//!
//! When both handles are gone, the request ends: it is completed with a status, or requeued to be
//! dispatched again. The outcome is that of `overrule()` if it was called, otherwise that of
//! `finish()`, whichever call came first.
//!
//! A handle is consumed when its holder is done, so a request cannot be ended twice. It can be lost
//! only if a handle is leaked. Only `Unsent` gives access to the data of a write, to send it, and
//! only `Unanswered` to the memory of a read, to receive into it (see [`super::payload`]).
//!
//! Mirrors `kernel::block::mq::Request`, which (7.3) is reference-counted, ends only successfully,
//! cannot be requeued, and shows neither its operation nor its position, length and tag.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

pub(crate) use super::outcome::{
    Outcome,
    Status, //
};

use super::{
    outcome::{
        good_sectors,
        REQUEUE, //
    },
    pdu::{
        pdu,
        trace_refusal,
        Pdu, //
    },
    timeline::Timeline, //
};
use crate::kapi::{
    bindings,
    llist::Linked, //
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ptr::NonNull, //
};
use kernel::{
    cpu::CpuId,
    sync::atomic::{
        Atomic,
        Full,
        Relaxed,
        Release, //
    },
};

/// The operation of a request (`enum req_op`). Those that a disk without zones does not get are
/// `Other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    Other,
}

impl Op {
    /// Returns whether the operation changes the medium (`op_is_write()`). A flush does not.
    pub(crate) fn is_write(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }
}

/// A request that was passed to `queue_rq` and has not been started.
///
/// # Invariants
///
/// `rq` was passed to `queue_rq`, which has not returned yet. It has not been started.
pub(crate) struct NewRequest {
    pub(super) rq: NonNull<bindings::request>,
}

/// One of the two handles of a request in flight; see the module's documentation.
///
/// # Invariants
///
/// `rq` was started and has not ended. `Pdu::handles` includes this handle.
pub(super) struct Handle {
    pub(super) rq: NonNull<bindings::request>,
}

/// The transmit side's handle: while it exists, the request's data may be sent.
///
/// Dropping it means that everything was sent.
pub(crate) struct Unsent(Handle);

/// The handle of the code that decides how the request ends.
///
/// Dropping it without a decision fails the request.
pub(crate) struct Unanswered(pub(super) Handle);

/// What `queue_rq` returns to the block layer. Only a [`NewRequest`] creates it, by being started
/// or refused.
///
/// It is not `Send`, since `queue_rq` must not return the status of a request that another task was
/// given.
pub(crate) struct QueueStatus(pub(super) Status, PhantomData<*mut ()>);

impl QueueStatus {
    fn new(status: Status) -> Self {
        QueueStatus(status, PhantomData)
    }
}

/// The operation of a request, its position and length, and those of its flags that matter to the
/// driver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) op: Op,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u32,
    pub(crate) fua: bool,
    pub(crate) nounmap: bool,
}

/// Reads the extent of a request.
///
/// # Safety
///
/// `rq` must point to a request that is not freed, or given to another driver, during the call.
pub(super) unsafe fn extent(rq: NonNull<bindings::request>) -> Extent {
    // SAFETY: By this function's safety requirements, `rq` is valid. While the driver owns it,
    // these fields do not change. A request that timed out may end at the same time, which changes
    // them; what is read then is only logged.
    let (cmd_flags, sector, len_bytes) = unsafe {
        let rq = rq.as_ptr();
        (
            (&raw const (*rq).cmd_flags).read_volatile(),
            (&raw const (*rq).__sector).read_volatile(),
            (&raw const (*rq).__data_len).read_volatile(),
        )
    };
    let op = match cmd_flags & ((1 << bindings::REQ_OP_BITS) - 1) {
        bindings::req_op_REQ_OP_READ => Op::Read,
        bindings::req_op_REQ_OP_WRITE => Op::Write,
        bindings::req_op_REQ_OP_FLUSH => Op::Flush,
        bindings::req_op_REQ_OP_DISCARD => Op::Discard,
        bindings::req_op_REQ_OP_WRITE_ZEROES => Op::WriteZeroes,
        _ => Op::Other,
    };
    let has = |bit: u32| cmd_flags & (1 << bit) != 0;
    Extent {
        op,
        offset_bytes: sector << bindings::SECTOR_SHIFT,
        len_bytes,
        fua: has(bindings::req_flag_bits___REQ_FUA),
        nounmap: has(bindings::req_flag_bits___REQ_NOUNMAP),
    }
}

impl NewRequest {
    /// Returns the extent of the request.
    pub(crate) fn extent(&self) -> Extent {
        // SAFETY: By the type invariant, the driver owns the request.
        unsafe { extent(self.rq) }
    }

    /// Returns the tag, which is unique within the hardware queue.
    pub(crate) fn tag(&self) -> u32 {
        // SAFETY: By the type invariant, the driver owns the request, which has a driver tag.
        unsafe { (*self.rq.as_ptr()).tag as u32 }
    }

    /// Leaves the request to the block layer, which ends it with `status`, or keeps it if that is
    /// [`Status::DEV_RESOURCE`].
    pub(crate) fn refuse(self, status: Status) -> QueueStatus {
        if status != Status::DEV_RESOURCE {
            // SAFETY: By the type invariant, the driver owns the request. It ends when `queue_rq` has returned.
            unsafe { trace_refusal(self.rq, status.0) };
        }
        QueueStatus::new(status)
    }

    /// Gives the request back to the block layer, which dispatches it again after `delay_ms`, and others before
    /// that. In contrast, nothing is dispatched before a request that was [refused](Self::refuse) with
    /// [`Status::DEV_RESOURCE`].
    ///
    /// The request keeps its tag. If others are given back meanwhile, the delay begins again.
    pub(crate) fn requeue_later(self, delay_ms: u32) -> QueueStatus {
        let rq = self.rq.as_ptr();
        // SAFETY: By the type invariant, the driver owns the request, which belongs to a queue and was not
        // started.
        let queue = unsafe {
            bindings::blk_mq_start_request(rq);
            // Keeps others from being merged with it when it is inserted again.
            (*rq).rq_flags |= bindings::RQF_DONTPREP;
            (*rq).q
        };
        // SAFETY: The request was started above and has no handles, so nothing else ends it.
        unsafe { bindings::blk_mq_requeue_request(rq, false) };
        // SAFETY: The queue exists as long as `queue_rq` runs, which by the type invariant has not returned.
        unsafe { bindings::blk_mq_delay_kick_requeue_list(queue, delay_ms as usize) };
        QueueStatus::new(Status::OK)
    }

    /// Starts the request and its timer (`blk_mq_start_request()`), and returns its two handles.
    pub(crate) fn start(self) -> (Unsent, Unanswered, QueueStatus) {
        // SAFETY: By the type invariant, the driver owns the request. It belongs to a `TagSet`.
        let pdu = unsafe { pdu(self.rq) };
        pdu.outcome.store(u32::from(Status::IOERR.0), Relaxed);
        pdu.start_undecided();
        pdu.handles.store(2, Release);
        // SAFETY: By the type invariant, the driver owns the request, which has not been started.
        unsafe { bindings::blk_mq_start_request(self.rq.as_ptr()) };
        // INVARIANT: The request was started above, and its count of handles set to two.
        (
            Unsent(Handle { rq: self.rq }),
            Unanswered(Handle { rq: self.rq }),
            QueueStatus::new(Status::OK),
        )
    }
}

// SAFETY: Any task may work on a request in flight, and end it.
unsafe impl Send for Handle {}
// SAFETY: `&Handle` only allows reading fields that do not change while the request is in flight.
unsafe impl Sync for Handle {}

/// Keeps code outside of this file from implementing [`Side`].
mod sealed {
    use super::{bindings, NonNull};

    /// A type that contains a handle.
    pub(crate) trait HasHandle {
        /// Returns the handle's request, which is in flight as long as `self` exists.
        fn rq(&self) -> NonNull<bindings::request>;
    }
}
pub(in crate::kapi) use sealed::HasHandle;

/// One of the two handles, [`Unsent`] or [`Unanswered`].
pub(crate) trait Side: HasHandle {
    /// The operation to whose data this handle gives access.
    const MOVES: Op;

    /// Returns the extent of the request.
    fn extent(&self) -> Extent {
        // SAFETY: By the invariant of `Handle`, the request is in flight as long as `self` exists.
        unsafe { extent(self.rq()) }
    }

    /// Returns the number of the request's hardware queue, and its tag.
    fn tag(&self) -> (u32, u32) {
        // SAFETY: By the invariant of `Handle`, the request is in flight as long as `self` exists.
        // The hardware context lives as long as the queue has requests.
        unsafe {
            let rq = self.rq().as_ptr();
            ((*(*rq).mq_hctx).queue_num, (*rq).tag as u32)
        }
    }
}

impl Side for Unsent {
    const MOVES: Op = Op::Write;
}

impl HasHandle for Unsent {
    fn rq(&self) -> NonNull<bindings::request> {
        self.0.rq
    }
}

impl Side for Unanswered {
    const MOVES: Op = Op::Read;
}

impl HasHandle for Unanswered {
    fn rq(&self) -> NonNull<bindings::request> {
        self.0.rq
    }
}

/// Returns where to note what happens to the request of a handle, if that is traced.
pub(in crate::kapi) fn timeline(side: &impl Side) -> Option<&Timeline> {
    // SAFETY: By the invariant of `Handle`, the request is in flight as long as `side` exists. It belongs to a
    // `TagSet`, as each request that was started does.
    unsafe { pdu(side.rq()) }.timeline()
}

impl Unsent {
    /// Sets the outcome of a request that was not completely sent. It takes precedence over that of
    /// the other handle, whichever is set first.
    pub(crate) fn overrule(self, outcome: Outcome) {
        self.0.pdu().overrule(outcome.pack());
    }
}

impl Unanswered {
    /// Sets the outcome of the request, and drops the handle.
    pub(crate) fn finish(self, outcome: Outcome) {
        self.0.pdu().outcome.store(outcome.pack(), Relaxed);
    }

    /// Returns whether to ignore the reply to this request, because fault injection simulates a
    /// timeout (`blk_should_fake_timeout()`).
    #[cfg(CONFIG_FAIL_IO_TIMEOUT)]
    pub(crate) fn should_fake_timeout(&self) -> bool {
        // SAFETY: By the invariant of `Handle`, the request is in flight, so its queue is valid.
        // The C code reads the flags without a lock, too.
        unsafe {
            let queue = (*self.rq().as_ptr()).q;
            let flags = (&raw const (*queue).queue_flags).read_volatile();
            flags & (1 << bindings::QUEUE_FLAG_FAIL_IO) != 0
                && bindings::__blk_should_fake_timeout(queue)
        }
    }

    /// Returns false: the kernel was built without this fault injection.
    #[cfg(not(CONFIG_FAIL_IO_TIMEOUT))]
    pub(crate) fn should_fake_timeout(&self) -> bool {
        false
    }
}

impl Handle {
    fn pdu(&self) -> &Pdu {
        // SAFETY: By the type invariant, the request is in flight. It belongs to a `TagSet`, as
        // each request that was started does.
        unsafe { pdu(self.rq) }
    }

    /// Ends the request as its handles decided: requeues it, or completes it on this CPU or on the
    /// one that submitted it.
    ///
    /// # Safety
    ///
    /// The request must have been started and not ended, and it must have no handles left. The
    /// caller must not use it afterwards.
    unsafe fn end(rq: NonNull<bindings::request>) {
        // SAFETY: By this function's safety requirements, the request is valid.
        let pdu = unsafe { pdu(rq) };
        // SAFETY: By this function's safety requirements, the request was not ended.
        unsafe { pdu.trace_end(rq) };
        let outcome = pdu.final_outcome();
        if outcome >= REQUEUE {
            if outcome == REQUEUE {
                // SAFETY: By this function's safety requirements, the request was started and not
                // ended.
                unsafe { bindings::blk_mq_requeue_request(rq.as_ptr(), true) };
                return;
            }
            // SAFETY: By this function's safety requirements. The outcome has a number of good sectors.
            unsafe { Self::complete_good_sectors(rq, good_sectors(outcome)) };
        }
        // SAFETY: By this function's safety requirements.
        let completes_remotely = unsafe { Self::complete_remotely(rq) };
        if !completes_remotely {
            // SAFETY: By this function's safety requirements. The request was not left to the block
            // layer, and its outcome is not a requeue.
            unsafe { Self::end_locally(rq) };
        }
    }

    /// Completes the first sectors of a request that has failed behind them.
    ///
    /// # Safety
    ///
    /// As for [`Self::end()`], but the caller still owns the request.
    #[cold]
    unsafe fn complete_good_sectors(rq: NonNull<bindings::request>, sectors: u32) {
        // SAFETY: By this function's safety requirements, the request is valid, and nothing else uses it.
        let len_bytes = unsafe { extent(rq) }.len_bytes;
        // Something must be left, which ends with the status.
        let last_bytes = len_bytes.saturating_sub(1 << bindings::SECTOR_SHIFT);
        let good_bytes = last_bytes.min(sectors.saturating_mul(1 << bindings::SECTOR_SHIFT));
        // SAFETY: By this function's safety requirements, the request was started and not ended. It has more
        // bytes than these.
        unsafe {
            bindings::blk_update_request(rq.as_ptr(), bindings::BLK_STS_OK as u8, good_bytes)
        };
    }

    /// Leaves the request to the block layer to be completed on the CPU that submitted it
    /// (`blk_mq_ops.complete`), if `rq_affinity` is 2 and this is another CPU.
    ///
    /// Returns whether it did.
    ///
    /// # Safety
    ///
    /// As for [`Self::end()`], but the caller still owns the request if this returns false.
    unsafe fn complete_remotely(rq: NonNull<bindings::request>) -> bool {
        // SAFETY: By this function's safety requirements, the request is in flight, so its queue is
        // valid. The C code reads the flags without a lock, too.
        let flags = unsafe { (&raw const (*(*rq.as_ptr()).q).queue_flags).read_volatile() };
        if flags & (1 << bindings::QUEUE_FLAG_SAME_FORCE) == 0 {
            return false;
        }
        // SAFETY: By this function's safety requirements, the request is valid.
        unsafe {
            bindings::blk_mq_rq_cpu(rq.as_ptr()) != CpuId::current().as_u32()
                && bindings::blk_mq_complete_request_remote(rq.as_ptr())
        }
    }

    /// Completes the request on this CPU. Its outcome must not be a requeue.
    ///
    /// # Safety
    ///
    /// As for [`Self::end()`].
    pub(super) unsafe fn end_locally(rq: NonNull<bindings::request>) {
        // SAFETY: By this function's safety requirements, the request is valid, and nothing else
        // uses it.
        let status = unsafe { pdu(rq) }.final_outcome();
        // SAFETY: By this function's safety requirements, the request was started and not ended.
        // Its outcome is not a requeue, so its lowest byte is a status.
        unsafe { bindings::blk_mq_end_request(rq.as_ptr(), status as u8) };
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // By the type invariant, this handle is counted. The decrement is fully ordered, so the
        // task that ends the request observes the outcome that each handle set.
        if self.pdu().handles.fetch_sub(1, Full) == 1 {
            // SAFETY: This was the last handle of a request in flight.
            unsafe { Self::end(self.rq) };
        }
    }
}

// SAFETY: The pointer is returned unchanged. A request has only one `Unsent`, so whoever holds that
// is the only user of the place for the next pointer. A request is aligned to more than one byte,
// so its address is even.
unsafe impl Linked for Unsent {
    type Raw = bindings::request;

    fn into_raw(self) -> *mut bindings::request {
        ManuallyDrop::new(self).0.rq.as_ptr()
    }

    unsafe fn from_raw(raw: *mut bindings::request) -> Self {
        // SAFETY: By this function's safety requirements, `raw` was returned by `into_raw()`, and
        // so is not null.
        let rq = unsafe { NonNull::new_unchecked(raw) };
        // INVARIANT: The handle that `into_raw()` gave up is still counted.
        Unsent(Handle { rq })
    }

    unsafe fn next<'a>(raw: *mut bindings::request) -> &'a Atomic<*mut bindings::request> {
        // SAFETY: By this function's safety requirements, `raw` was returned by `into_raw()`. The
        // handle that this gave up keeps the request in flight.
        unsafe { &pdu(NonNull::new_unchecked(raw)).next }
    }
}
