// SPDX-License-Identifier: GPL-2.0
//! Freezing the queue of a disk.
//!
//! A *frozen* queue admits no new requests, and none is in flight. The `kernel` crate (7.3) does not
//! offer this.
//!
//! C header: [`include/linux/blk-mq.h`](srctree/include/linux/blk-mq.h)

use super::disk::DiskRef;
use crate::kapi::{
    bindings,
    task::{
        self,
        Deadline, //
    },
};
use core::marker::PhantomData;
use kernel::{
    ffi,
    prelude::*, //
};

impl DiskRef {
    /// Freezes the queue until the returned guard is dropped, if that is possible by `deadline`.
    ///
    /// The wait is limited because requests in flight may wait for a server that no longer answers.
    ///
    /// # Errors
    ///
    /// `EBUSY` if requests are still in flight at the deadline; the queue is then not frozen.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn freeze_until(&self, deadline: &Deadline) -> Result<FreezeGuard<'_>> {
        let guard = self.freeze_start();
        let jiffies = deadline.jiffies_left() as ffi::c_ulong;
        // SAFETY: By the type invariant, the queue is valid. Its freeze was started above.
        let left = unsafe { bindings::blk_mq_freeze_queue_wait_timeout(guard.queue, jiffies) };
        if left == 0 {
            return Err(EBUSY);
        }
        Ok(guard)
    }

    fn freeze_start(&self) -> FreezeGuard<'_> {
        let queue = self.queue();
        let noio = task::memalloc_noio_save();
        // SAFETY: By the type invariant, the queue is valid.
        unsafe { bindings::blk_freeze_queue_start(queue) };
        // INVARIANT: The current task started the freeze above.
        FreezeGuard {
            queue,
            noio,
            _disk: PhantomData,
        }
    }
}

/// A queue whose freeze was started: it admits no new requests until the guard is dropped.
///
/// Memory allocations of the current task do not wait for I/O meanwhile, as that might be I/O to
/// this queue (see `blk_mq_freeze_queue()`).
///
/// # Invariants
///
/// The current task has started a freeze of `queue`, which is valid for `'a`, and not ended it.
pub(super) struct FreezeGuard<'a> {
    queue: *mut bindings::request_queue,
    noio: u32,
    _disk: PhantomData<&'a DiskRef>,
}

impl Drop for FreezeGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the queue is valid. This is the task that started the
        // freeze, as the type is not `Send`.
        unsafe { bindings::blk_mq_unfreeze_queue_nomemrestore(self.queue) };
        task::memalloc_noio_restore(self.noio);
    }
}
