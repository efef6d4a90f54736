// SPDX-License-Identifier: GPL-2.0
//! Requests, from `queue_rq` to their end.
//!
//! Source: `include/linux/blk-mq.h`.

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

/// A block layer status (`blk_status_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(pub(super) u8);

impl Status {
    pub(crate) const OK: Status = Status(bindings::BLK_STS_OK as u8);
    /// `EOPNOTSUPP`.
    pub(crate) const NOTSUPP: Status = Status(bindings::BLK_STS_NOTSUPP);
    /// `ENOSPC`.
    pub(crate) const NOSPC: Status = Status(bindings::BLK_STS_NOSPC);
    /// `EREMOTEIO`: the target refused.
    pub(crate) const TARGET: Status = Status(bindings::BLK_STS_TARGET);
    /// `EIO`.
    pub(crate) const IOERR: Status = Status(bindings::BLK_STS_IOERR);
    /// Not an end: the block layer keeps the request until the queue runs again, which the driver
    /// sees to ([`Dispatch::run_again()`](super::mq::Dispatch::run_again)).
    pub(crate) const DEV_RESOURCE: Status = Status(bindings::BLK_STS_DEV_RESOURCE);
}

/// What a request asks for (`enum req_op`, as far as a disk without zones gets it).
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
    /// Whether the operation changes the medium (`op_is_write()`, for which a flush does not).
    pub(crate) fn is_write(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is over, with this status.
    Complete(Status),
    /// The block layer shall dispatch it again.
    Requeue,
}

impl Outcome {
    /// As [`Pdu`] keeps it: a `blk_status_t`, or [`REQUEUE`].
    fn pack(self) -> u32 {
        match self {
            Outcome::Complete(status) => u32::from(status.0),
            Outcome::Requeue => REQUEUE,
        }
    }
}

/// The driver's private data in each request.
pub(super) struct Pdu {
    /// [`Handle`]s. The last one that goes ends the request.
    handles: Atomic<i32>,
    /// How it ends, as its [`Unanswered`] says: see [`Outcome::pack()`].
    outcome: Atomic<u32>,
    /// How it ends all the same, as its [`Unsent`] says, where that is not [`NOT_OVERRULED`].
    overruled: Atomic<u32>,
    /// The next one in a list of requests that wait to be sent.
    next: Atomic<*mut bindings::request>,
}

/// [`Outcome::Requeue`], beyond every `blk_status_t`.
const REQUEUE: u32 = 1 << 8;
/// `overruled` while [`Unsent`] has said nothing.
const NOT_OVERRULED: u32 = 1 << 9;

impl Pdu {
    pub(super) fn new() -> Self {
        Pdu {
            handles: Atomic::new(0),
            outcome: Atomic::new(0),
            overruled: Atomic::new(NOT_OVERRULED),
            next: Atomic::new(core::ptr::null_mut()),
        }
    }

    /// How the request ends. Both sides have said what they had to.
    fn final_outcome(&self) -> u32 {
        match self.overruled.load(Relaxed) {
            NOT_OVERRULED => self.outcome.load(Relaxed),
            overruled => overruled,
        }
    }
}

/// A request that `queue_rq` was given and that has not been started.
///
/// # Invariants
///
/// `rq` was passed to `queue_rq`, and neither has it been started nor has `queue_rq` returned.
pub(crate) struct NewRequest {
    pub(super) rq: NonNull<bindings::request>,
}

/// One of the two handles of a request in flight. When both are gone it ends.
///
/// # Invariants
///
/// `rq` was started and has not ended, and this handle is counted in its `Pdu::handles`.
pub(super) struct Handle {
    rq: NonNull<bindings::request>,
}

/// The transmit side's handle of a request: as long as it exists the request's data may be sent.
/// Dropping it says that everything was sent.
pub(crate) struct Unsent(Handle);

/// The other handle of a request, for whoever decides how it ends: who has the answer, or gives it up.
/// Dropping it without a decision fails the request.
pub(crate) struct Unanswered(Handle);

/// What became of a request in `queue_rq`: only the request itself makes one.
///
/// It stays in the task: it must not be what `queue_rq` says of another request.
pub(crate) struct QueueStatus(pub(super) Status, PhantomData<*mut ()>);

impl QueueStatus {
    fn new(status: Status) -> Self {
        QueueStatus(status, PhantomData)
    }
}

/// Where a request asks for what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) op: Op,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u32,
    pub(crate) fua: bool,
    pub(crate) nounmap: bool,
}

/// # Safety
///
/// `rq` must point to a request that cannot be freed or given to somebody else during the call.
unsafe fn extent(rq: NonNull<bindings::request>) -> Extent {
    // SAFETY: The caller promises that `rq` is valid. These fields do not change while the driver has it. One
    // that the timeout handler was given may end meanwhile, which changes them; what is read then is for the
    // log only.
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

/// # Safety
///
/// `rq` must point to a request of a tag set of [`TagSet`](super::mq::TagSet), for as long as `'a`.
unsafe fn pdu<'a>(rq: NonNull<bindings::request>) -> &'a Pdu {
    // SAFETY: blk-mq allocates `cmd_size` bytes behind each request (`blk_mq_rq_to_pdu()` is that
    // address), and `init_request` wrote a `Pdu` there. It consists of atomics, so sharing is fine.
    unsafe { &*rq.as_ptr().add(1).cast::<Pdu>() }
}

impl NewRequest {
    /// What it asks for.
    pub(crate) fn extent(&self) -> Extent {
        // SAFETY: By the type invariant the driver holds the request.
        unsafe { extent(self.rq) }
    }

    /// Its tag, unique within its hardware queue.
    pub(crate) fn tag(&self) -> u32 {
        // SAFETY: By the type invariant the driver holds the request, which has a driver tag.
        unsafe { (*self.rq.as_ptr()).tag as u32 }
    }

    /// Leaves it to the block layer, which ends it with `status`.
    pub(crate) fn refuse(self, status: Status) -> QueueStatus {
        QueueStatus::new(status)
    }

    /// Starts it, and with it its timer.
    pub(crate) fn start(self) -> (Unsent, Unanswered, QueueStatus) {
        // SAFETY: By the type invariant the driver holds the request, which is of a tag set of ours.
        let pdu = unsafe { pdu(self.rq) };
        pdu.outcome.store(u32::from(Status::IOERR.0), Relaxed);
        pdu.overruled.store(NOT_OVERRULED, Relaxed);
        pdu.handles.store(2, Release);
        // SAFETY: By the type invariant the driver holds the request and it was not started.
        unsafe { bindings::blk_mq_start_request(self.rq.as_ptr()) };
        // INVARIANT: It was started just now, and two handles are counted.
        (
            Unsent(Handle { rq: self.rq }),
            Unanswered(Handle { rq: self.rq }),
            QueueStatus::new(Status::OK),
        )
    }
}

// SAFETY: A request may be worked on from any task.
unsafe impl Send for Handle {}
// SAFETY: What `&Handle` offers reads fields that do not change while the request is in flight.
unsafe impl Sync for Handle {}

/// Keeps [`Side`] to the two types below.
mod sealed {
    use super::{bindings, NonNull};

    /// What has a handle.
    pub(crate) trait HasHandle {
        /// The request of the handle, which is in flight as long as `self` lives.
        fn rq(&self) -> NonNull<bindings::request>;
    }
}
use sealed::HasHandle;

/// One of the two sides of a request in flight.
pub(crate) trait Side: HasHandle {
    /// Of which operation it may touch the data: to send, or to receive.
    const MOVES: Op;

    /// What the request asks for.
    fn extent(&self) -> Extent {
        // SAFETY: By the invariant of `Handle` the request is in flight while `self` lives.
        unsafe { extent(self.rq()) }
    }

    /// The request's hardware queue and its tag.
    fn tag(&self) -> (u32, u32) {
        // SAFETY: By the invariant of `Handle` the request is in flight while `self` lives; the hardware
        // context lives as long as the queue has requests.
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

impl Unsent {
    /// The request was not wholly sent: it ends with `outcome`, whatever the other side has said or will
    /// say.
    pub(crate) fn overrule(self, outcome: Outcome) {
        self.0.pdu().overruled.store(outcome.pack(), Relaxed);
    }
}

impl Unanswered {
    /// Says how the request ends, and lets go of it.
    pub(crate) fn finish(self, outcome: Outcome) {
        self.0.pdu().outcome.store(outcome.pack(), Relaxed);
    }

    /// Whether its reply is to be forgotten, since somebody tests what happens then
    /// (`blk_should_fake_timeout()`).
    #[cfg(CONFIG_FAIL_IO_TIMEOUT)]
    pub(crate) fn should_fake_timeout(&self) -> bool {
        // SAFETY: By the invariant of `Handle` the request is in flight, so its queue is valid; its flags
        // are looked at without a lock in C too.
        unsafe {
            let queue = (*self.rq().as_ptr()).q;
            let flags = (&raw const (*queue).queue_flags).read_volatile();
            flags & (1 << bindings::QUEUE_FLAG_FAIL_IO) != 0
                && bindings::__blk_should_fake_timeout(queue)
        }
    }

    /// Never: the kernel was built without fault injection.
    #[cfg(not(CONFIG_FAIL_IO_TIMEOUT))]
    pub(crate) fn should_fake_timeout(&self) -> bool {
        false
    }
}

impl Handle {
    fn pdu(&self) -> &Pdu {
        // SAFETY: By the type invariant the request is in flight, and only requests of our tag sets are
        // started.
        unsafe { pdu(self.rq) }
    }

    /// Ends the request, or has the block layer end it on the CPU that it came from.
    ///
    /// # Safety
    ///
    /// No handle may be left.
    unsafe fn end(rq: NonNull<bindings::request>) {
        // SAFETY: The request is the driver's until the calls below, and there is no handle through
        // which anybody else could end it.
        unsafe {
            if pdu(rq).final_outcome() == REQUEUE {
                bindings::blk_mq_requeue_request(rq.as_ptr(), true);
            } else if !Self::complete_remotely(rq) {
                Self::end_locally(rq);
            }
        }
    }

    /// Where `rq_affinity` is 2 and this is not the CPU that the request came from, has the block layer
    /// end it there (`complete`). Returns whether it does.
    ///
    /// # Safety
    ///
    /// As for [`Self::end()`]. The request is the block layer's where this returns true.
    unsafe fn complete_remotely(rq: NonNull<bindings::request>) -> bool {
        // SAFETY: The request is the driver's, so its queue is valid; its flags are looked at without a
        // lock in C too.
        unsafe {
            let flags = (&raw const (*(*rq.as_ptr()).q).queue_flags).read_volatile();
            flags & (1 << bindings::QUEUE_FLAG_SAME_FORCE) != 0
                && bindings::blk_mq_rq_cpu(rq.as_ptr()) != CpuId::current().as_u32()
                && bindings::blk_mq_complete_request_remote(rq.as_ptr())
        }
    }

    /// Ends the request, which is not to be requeued.
    ///
    /// # Safety
    ///
    /// As for [`Self::end()`].
    pub(super) unsafe fn end_locally(rq: NonNull<bindings::request>) {
        // SAFETY: No handle is left, so the request is nobody else's.
        let status = unsafe { pdu(rq) }.final_outcome();
        // SAFETY: The request was started, nobody else can end it, and it is not to be requeued, so what
        // it ends with is a status.
        unsafe { bindings::blk_mq_end_request(rq.as_ptr(), status as u8) };
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // By the type invariant this handle is counted. Whoever ends the request sees what both sides
        // have said: this orders it.
        if self.pdu().handles.fetch_sub(1, Full) == 1 {
            // SAFETY: This was the last handle.
            unsafe { Self::end(self.rq) };
        }
    }
}

// SAFETY: The pointer comes back as it was, and the place for the next one belongs to whoever has the
// one `Unsent` that a request has. Requests are aligned to more than a byte.
unsafe impl Linked for Unsent {
    type Raw = bindings::request;

    fn into_raw(self) -> *mut bindings::request {
        ManuallyDrop::new(self).0.rq.as_ptr()
    }

    unsafe fn from_raw(raw: *mut bindings::request) -> Self {
        // SAFETY: The caller has it from `into_raw()`, where it was not null.
        let rq = unsafe { NonNull::new_unchecked(raw) };
        // INVARIANT: The handle that `into_raw()` has given up is still counted.
        Unsent(Handle { rq })
    }

    unsafe fn next<'a>(raw: *mut bindings::request) -> &'a Atomic<*mut bindings::request> {
        // SAFETY: The caller has it from `into_raw()`, and its handle keeps the request in flight.
        unsafe { &pdu(NonNull::new_unchecked(raw)).next }
    }
}

/// Room for one parked [`Unanswered`] handle.
///
/// # Invariants
///
/// `ptr` is null or owns one handle.
pub(crate) struct Parked {
    ptr: Atomic<*mut bindings::request>,
}

impl Parked {
    /// Nothing is parked.
    pub(crate) fn empty() -> Self {
        Parked {
            ptr: Atomic::new(core::ptr::null_mut()),
        }
    }

    fn exchange(&self, new: *mut bindings::request) -> Option<Unanswered> {
        // INVARIANT: Ownership of what was parked moves to the value returned here.
        NonNull::new(self.ptr.xchg(new, Full)).map(|rq| Unanswered(Handle { rq }))
    }

    /// Parks a handle; gives back what was there before.
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

/// A request whose time is up. The block layer holds a reference, so its tag is not given away, but
/// it may have ended meanwhile.
///
/// # Invariants
///
/// `rq` was passed to `timeout`, which has not returned.
pub(crate) struct TimedOutRequest<'a> {
    pub(super) rq: NonNull<bindings::request>,
    pub(super) _call: PhantomData<&'a ()>,
}

impl TimedOutRequest<'_> {
    /// What it asks for.
    pub(crate) fn extent(&self) -> Extent {
        // SAFETY: By the type invariant the block layer holds a reference.
        unsafe { extent(self.rq) }
    }

    /// Its hardware queue and its tag.
    pub(crate) fn tag(&self) -> (u32, u32) {
        // SAFETY: By the type invariant the block layer holds a reference, which keeps the tag; the hardware
        // context lives as long as the queue has requests.
        unsafe {
            let rq = self.rq.as_ptr();
            ((*(*rq).mq_hctx).queue_num, (*rq).tag as u32)
        }
    }

    /// How long it may take, in jiffies.
    pub(crate) fn timeout_jiffies(&self) -> u32 {
        // SAFETY: By the type invariant the block layer holds a reference.
        unsafe { (*self.rq.as_ptr()).timeout }
    }
}
