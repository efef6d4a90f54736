// SPDX-License-Identifier: GPL-2.0
//! Requests in flight, as seen by somebody who does not own them.
//!
//! The `kernel` crate (7.3) does not iterate over requests.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use super::disk::DiskRef;
use crate::{
    kapi::{
        bindings,
        task, //
    },
    pure::time::elapsed, //
};
use core::ffi::c_void;

/// A request that was started and has not ended. It may end at any time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InFlight {
    /// The number of its hardware queue.
    pub(crate) hw_queue: u32,
    /// Its tag, which is unique within the hardware queue.
    pub(crate) tag: u32,
    /// The time since the block layer made the request, in milliseconds. If it takes no time stamps
    /// (`queue/iostats` is 0), the time since the request or its timer was started last.
    pub(crate) age_ms: u64,
}

impl DiskRef {
    /// Calls `look` for each request in flight (`blk_mq_tagset_busy_iter()`).
    ///
    /// Returns false, and does not look, if the number of hardware queues is being changed.
    ///
    /// # Context
    ///
    /// May sleep, but does not wait. `look` must neither change the number of hardware queues nor wait for requests.
    pub(crate) fn look_at_requests<F: FnMut(InFlight)>(&self, mut look: F) -> bool {
        let tags = self.tags();
        // SAFETY: By the type invariant of `DiskRef`, the tag set lives as long as the disk.
        let semaphore = unsafe { &raw mut (*tags).update_nr_hwq_lock };
        // SAFETY: The semaphore was initialised with the tag set. Without it, the array that the iterator reads
        // could be freed (`blk_mq_update_nr_hw_queues()`).
        if unsafe { bindings::down_read_trylock(semaphore) } == 0 {
            return false;
        }
        let look = (&raw mut look).cast::<c_void>();
        // SAFETY: The tag set is valid, and its number of queues does not change while the semaphore is held.
        // `visit()` gets the pointer to `look`, which nothing else uses meanwhile, and which has its type.
        unsafe { bindings::blk_mq_tagset_busy_iter(tags, Some(visit::<F>), look) };
        // SAFETY: The semaphore was taken above.
        unsafe { bindings::up_read(semaphore) };
        true
    }
}

/// Implements `busy_tag_iter_fn`: calls the closure.
///
/// # Safety
///
/// The caller must hold a reference to `rq`, which has a hardware context and whose queue exists. `look` must point
/// to an `F` that nothing else uses.
unsafe extern "C" fn visit<F: FnMut(InFlight)>(
    rq: *mut bindings::request,
    look: *mut c_void,
) -> bool {
    // SAFETY: By this function's safety requirements, the request is valid. It may end or be requeued at the same
    // time; a word is never read torn. Its hardware context lives as long as the queue.
    let (hw_queue, tag) = unsafe {
        (
            (*(*rq).mq_hctx).queue_num,
            (&raw const (*rq).tag).read_volatile(),
        )
    };
    // `BLK_MQ_NO_TAG` is -1: it was requeued meanwhile.
    if let Ok(tag) = u32::try_from(tag) {
        // SAFETY: By this function's safety requirements, `look` is valid and not shared.
        let look = unsafe { &mut *look.cast::<F>() };
        look(InFlight {
            hw_queue,
            tag,
            // SAFETY: By this function's safety requirements, the request is valid.
            age_ms: unsafe { age_ms(rq) },
        });
    }
    true
}

/// Returns the age of a request in milliseconds; see [`InFlight::age_ms`].
///
/// # Safety
///
/// `rq` must be valid.
unsafe fn age_ms(rq: *const bindings::request) -> u64 {
    // SAFETY: By this function's safety requirements, the request is valid. Its timer may be restarted at the same
    // time; a word is never read torn.
    let (made_ns, deadline, timeout) = unsafe {
        (
            (&raw const (*rq).start_time_ns).read_volatile(),
            (&raw const (*rq).deadline).read_volatile(),
            (&raw const (*rq).timeout).read_volatile(),
        )
    };
    if made_ns == 0 {
        // `blk_add_timer()` has computed the deadline from the time at which it was called.
        let started = deadline.wrapping_sub(timeout as usize);
        return task::jiffies_to_ms(elapsed(task::jiffies(), started));
    }
    // SAFETY: The function may be called in any context.
    let now_ns = unsafe { bindings::ktime_get() } as u64;
    now_ns.saturating_sub(made_ns) / 1_000_000
}
