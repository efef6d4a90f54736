// SPDX-License-Identifier: GPL-2.0
//! Queues that nothing new gets into, for as long as what they are used with changes.
//!
//! Source: `include/linux/blk-mq.h`.

use super::disk::DiskRef;
use crate::kapi::{
    bindings,
    task::Deadline, //
};
use core::marker::PhantomData;
use kernel::{
    ffi,
    prelude::*, //
};

impl DiskRef {
    /// Lets nothing new into the queue until the returned guard goes, and waits for what is in flight,
    /// but not for ever: that may wait for a server that says nothing. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where something is in flight at the `deadline`.
    pub(super) fn freeze_until(&self, deadline: &Deadline) -> Result<FreezeGuard<'_>> {
        let guard = self.freeze_start();
        let jiffies = deadline.jiffies_left() as ffi::c_ulong;
        // SAFETY: By the type invariant the disk is valid, and so is its queue, which was closed just now.
        let left = unsafe { bindings::blk_mq_freeze_queue_wait_timeout(guard.queue, jiffies) };
        if left == 0 {
            return Err(EBUSY);
        }
        Ok(guard)
    }

    /// Stops the queue: when this returns nothing is in flight and no operation runs, until the
    /// returned guard goes. May sleep; everything in flight must be about to end.
    pub(crate) fn freeze(&self) -> Frozen<'_> {
        let guard = self.freeze_start();
        // SAFETY: By the type invariant the disk is valid.
        unsafe {
            bindings::blk_mq_freeze_queue_wait(guard.queue);
            bindings::blk_mq_quiesce_queue(guard.queue);
        }
        // INVARIANT: It was closed, drained and quiesced.
        Frozen { guard }
    }

    fn freeze_start(&self) -> FreezeGuard<'_> {
        let queue = self.queue();
        // SAFETY: By the type invariant the disk is valid. Allocations while it is frozen must not wait
        // for I/O to it, hence the flag (`blk_mq_freeze_queue()`).
        unsafe {
            let task = bindings::get_current();
            let had_noio = (*task).flags & bindings::PF_MEMALLOC_NOIO;
            (*task).flags |= bindings::PF_MEMALLOC_NOIO;
            bindings::blk_freeze_queue_start(queue);
            // INVARIANT: It was closed just now.
            FreezeGuard {
                queue,
                had_noio,
                _disk: PhantomData,
            }
        }
    }
}

/// A queue that nothing new gets into.
///
/// # Invariants
///
/// It was closed by [`DiskRef::freeze_start()`], by the current task.
pub(super) struct FreezeGuard<'a> {
    queue: *mut bindings::request_queue,
    had_noio: u32,
    _disk: PhantomData<&'a DiskRef>,
}

impl Drop for FreezeGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. The type is not `Send`, so this is the same task.
        unsafe {
            bindings::blk_mq_unfreeze_queue_nomemrestore(self.queue);
            let task = bindings::get_current();
            (*task).flags = (*task).flags & !bindings::PF_MEMALLOC_NOIO | self.had_noio;
        }
    }
}

/// A queue that is frozen and quiesced.
///
/// # Invariants
///
/// It is, by [`DiskRef::freeze()`].
pub(crate) struct Frozen<'a> {
    guard: FreezeGuard<'a>,
}

impl Frozen<'_> {
    pub(super) fn queue(&self) -> *mut bindings::request_queue {
        self.guard.queue
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant. It is unfrozen after this.
        unsafe { bindings::blk_mq_unquiesce_queue(self.guard.queue) };
    }
}
