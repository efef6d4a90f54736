// SPDX-License-Identifier: GPL-2.0
//! The driver's private data in each request.

use super::{
    outcome::REQUEUE,
    timeline::Timeline, //
};
use crate::kapi::{
    bindings,
    tracepoint::is_on, //
};
use core::ptr::NonNull;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// The driver's private data in each request (`blk_mq_rq_to_pdu()`).
pub(in crate::kapi) struct Pdu {
    /// The number of [`Handle`](super::request::Handle)s that exist. Dropping the last one ends the request.
    pub(super) handles: Atomic<i32>,
    /// The outcome set by [`Unanswered`](super::request::Unanswered), as
    /// [`Outcome::pack()`](super::outcome::Outcome::pack) returns it.
    pub(super) outcome: Atomic<u32>,
    /// The outcome set by [`Unsent`](super::request::Unsent), which takes precedence, or [`NOT_OVERRULED`]. In
    /// addition [`TRACED`] may be set.
    overruled: Atomic<u32>,
    /// The next request in a list of requests that are waiting to be sent.
    pub(super) next: Atomic<*mut bindings::request>,
    /// What the trace event `nbd_request_done` tells. It is of the request's last start only if that has set
    /// [`TRACED`].
    timeline: Timeline,
}

/// The value of `overruled` unless [`Pdu::overrule()`] was called. No packed outcome is equal to it.
const NOT_OVERRULED: u32 = 1 << 9;
/// The trace event `nbd_request_done` was switched on when the request was started.
///
/// This is a bit of `overruled` that no packed outcome has, so that a start without the event need not write anything else.
const TRACED: u32 = 1 << 10;

impl Pdu {
    pub(super) fn new() -> Self {
        Pdu {
            handles: Atomic::new(0),
            outcome: Atomic::new(0),
            overruled: Atomic::new(NOT_OVERRULED),
            next: Atomic::new(core::ptr::null_mut()),
            timeline: Timeline::new(),
        }
    }

    /// Notes that the request is being started, and that its outcome is not overruled.
    pub(super) fn start_undecided(&self) {
        self.overruled.store(NOT_OVERRULED, Relaxed);
        if is_on!(nbd_request_done) {
            self.timeline.start();
            self.overruled.store(NOT_OVERRULED | TRACED, Relaxed);
        }
    }

    /// Sets the outcome that takes precedence. Only the holder of `Unsent` calls this.
    pub(super) fn overrule(&self, outcome: u32) {
        let traced = self.overruled.load(Relaxed) & TRACED;
        self.overruled.store(outcome | traced, Relaxed);
    }

    /// Returns the packed outcome. Both handles must be gone.
    pub(super) fn final_outcome(&self) -> u32 {
        match self.overruled.load(Relaxed) {
            NOT_OVERRULED => self.outcome.load(Relaxed),
            other => self.unusual_outcome(other & !TRACED),
        }
    }

    /// The outcome of a request that was overruled, or is traced.
    #[cold]
    #[inline(never)]
    fn unusual_outcome(&self, overruled: u32) -> u32 {
        match overruled {
            NOT_OVERRULED => self.outcome.load(Relaxed),
            overruled => overruled,
        }
    }

    /// Returns where to note what happens to the request, if that is traced.
    pub(in crate::kapi) fn timeline(&self) -> Option<&Timeline> {
        (self.overruled.load(Relaxed) & TRACED != 0).then_some(&self.timeline)
    }

    /// Traces that the request ends, unless it is requeued.
    ///
    /// # Safety
    ///
    /// `rq` must be the request that this belongs to. It must have no handles left, and it must not have
    /// ended.
    #[inline(always)]
    pub(super) unsafe fn trace_end(&self, rq: NonNull<bindings::request>) {
        if is_on!(nbd_request_done) {
            // SAFETY: By this function's safety requirements.
            unsafe { self.trace_end_now(rq) };
        }
    }

    /// Does what [`Self::trace_end()`] does, if the event is switched on.
    ///
    /// # Safety
    ///
    /// Those of [`Self::trace_end()`].
    #[cold]
    #[inline(never)]
    unsafe fn trace_end_now(&self, rq: NonNull<bindings::request>) {
        let outcome = self.final_outcome();
        if outcome != REQUEUE {
            // The status is in the lowest byte.
            // SAFETY: By this function's safety requirements, the request was started and has not ended.
            unsafe { Timeline::report(self.timeline(), rq, outcome as u8) };
        }
    }
}

/// Traces that a request ends with the `blk_status_t` `status` without having been started, or started again.
///
/// # Safety
///
/// The driver must own the request, which must not have ended.
pub(super) unsafe fn trace_refusal(rq: NonNull<bindings::request>, status: u8) {
    if is_on!(nbd_request_done) {
        // SAFETY: By this function's safety requirements.
        unsafe { Timeline::report(None, rq, status) };
    }
}

/// Returns the private data of a request.
///
/// # Safety
///
/// `rq` must point to a request of a [`TagSet`](super::mq::TagSet) that exists during `'a`.
pub(super) unsafe fn pdu<'a>(rq: NonNull<bindings::request>) -> &'a Pdu {
    // SAFETY: By this function's safety requirements, the request is followed by a `Pdu` (see
    // `blk_mq_rq_to_pdu()`), which `init_request` wrote. It consists of atomics, so it may be
    // shared.
    unsafe { &*rq.as_ptr().add(1).cast::<Pdu>() }
}
