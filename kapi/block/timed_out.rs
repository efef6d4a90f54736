// SPDX-License-Identifier: GPL-2.0
//! Requests that have timed out.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use super::request::{
    extent,
    Extent, //
};
use crate::kapi::{
    bindings,
    task, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};

/// What has become of a request that timed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SinceTimeout {
    /// It is still in flight.
    InFlight,
    /// It was requeued and started again, so that it has a new deadline.
    Restarted,
    /// It has ended, or was requeued and not started again.
    NotStarted,
}

/// A request that has timed out.
///
/// The block layer holds a reference to it, but it may end at the same time, or be requeued and
/// started again. If the queue has an I/O scheduler, another request may then get its tag.
///
/// # Invariants
///
/// `rq` was passed to `timeout`, which has not returned yet.
pub(crate) struct TimedOutRequest<'a> {
    pub(super) rq: NonNull<bindings::request>,
    pub(super) _call: PhantomData<&'a ()>,
}

impl TimedOutRequest<'_> {
    /// Returns the extent of the request. It is only reliable enough for a log, since the request
    /// may end.
    pub(crate) fn extent(&self) -> Extent {
        // SAFETY: By the type invariant, the block layer holds a reference to the request.
        unsafe { extent(self.rq) }
    }

    /// Returns the number of the request's hardware queue, and its tag; `None` if it was requeued
    /// and has no tag.
    ///
    /// Only [`Self::since_timeout()`] tells whether the tag is still that of this request.
    pub(crate) fn tag(&self) -> Option<(u32, u32)> {
        // SAFETY: By the type invariant, the block layer holds a reference to the request. Another
        // CPU may change the tag at the same time; a word is never read torn.
        let tag = unsafe { (&raw const (*self.rq.as_ptr()).tag).read_volatile() };
        // SAFETY: By the type invariant, the block layer holds a reference to the request. Its hardware
        // context lives as long as the queue has requests.
        let hw_queue = unsafe { (*(*self.rq.as_ptr()).mq_hctx).queue_num };
        // `BLK_MQ_NO_TAG` is -1.
        Some((hw_queue, u32::try_from(tag).ok()?))
    }

    /// Returns what has become of the request, which had `tag` before.
    ///
    /// If it is [`SinceTimeout::InFlight`], then what was read of the driver's data of this tag
    /// since was that of this request, and from before it was requeued: `blk_add_timer()` writes
    /// the new deadline before the driver can start anything for it.
    pub(crate) fn since_timeout(&self, tag: (u32, u32)) -> SinceTimeout {
        let rq = self.rq.as_ptr();
        // SAFETY: By the type invariant, the block layer holds a reference to the request. Another
        // CPU may change these at the same time; a word is never read torn.
        let (state, deadline) = unsafe {
            (
                (&raw const (*rq).state).read_volatile(),
                (&raw const (*rq).deadline).read_volatile(),
            )
        };
        if state != bindings::mq_rq_state_MQ_RQ_IN_FLIGHT {
            return SinceTimeout::NotStarted;
        }
        let overdue = task::jiffies().wrapping_sub(deadline) as isize;
        if overdue < 0 || self.tag() != Some(tag) {
            return SinceTimeout::Restarted;
        }
        SinceTimeout::InFlight
    }

    /// Returns the time after which the request timed out, in jiffies.
    pub(crate) fn timeout_jiffies(&self) -> u32 {
        // SAFETY: By the type invariant, the block layer holds a reference to the request.
        unsafe { (*self.rq.as_ptr()).timeout }
    }
}
