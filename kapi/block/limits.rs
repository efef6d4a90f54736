// SPDX-License-Identifier: GPL-2.0
//! What a disk can do, and how it wants to be asked: `struct queue_limits`.
//!
//! Source: `include/linux/blkdev.h`.

use super::disk::{
    DiskRef,
    Sectors, //
};
use crate::kapi::{
    bindings,
    task::Deadline, //
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop, //
};
use kernel::{
    error::to_result,
    prelude::*,
    time::{
        delay::fsleep,
        Delta, //
    },
};

/// The limits that a disk is made with, besides the defaults of the block layer.
pub(crate) struct FixedLimits {
    pub(crate) max_hw_sectors: u32,
    pub(crate) max_segments: u16,
    pub(crate) max_segment_size: u32,
    pub(crate) io_opt_bytes: u32,
}

/// The features that a disk can do now.
#[derive(Clone, Copy, Default)]
pub(crate) struct Features {
    pub(crate) write_cache: bool,
    pub(crate) fua: bool,
    pub(crate) rotational: bool,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
}

/// How long to wait for whoever holds the limits' lock, and for what is in flight, before giving up.
const TIMEOUT_SECONDS: u32 = 5;

/// How often to try the limits' lock.
const POLL_INTERVAL: Delta = Delta::from_millis(10);

impl DiskRef {
    /// Whether the disk says that it has a volatile cache (`blk_queue_write_cache()`).
    fn has_write_cache(&self) -> bool {
        // SAFETY: By the type invariant the disk is valid, and so is its queue.
        let limits = unsafe { &raw const (*self.queue()).limits };
        // SAFETY: The queue is valid. Others may write the fields meanwhile; each is a word, which is never
        // seen in part.
        let (features, flags) = unsafe {
            (
                (&raw const (*limits).features).read_volatile(),
                (&raw const (*limits).flags).read_volatile(),
            )
        };
        features & bindings::BLK_FEAT_WRITE_CACHE != 0
            && flags & bindings::BLK_FLAG_WRITE_CACHE_DISABLED == 0
    }

    /// Sets what the disk can do, and its block size. The queue is frozen where there could be I/O and
    /// something changes. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where what is in flight has not ended within [`TIMEOUT_SECONDS`], or somebody else who
    /// changes limits, and may wait for the same, has not; then nothing was changed. `EINVAL` for limits
    /// that do not go together.
    pub(crate) fn set_limits(&self, features: Features, block_bytes: u32) -> Result {
        let idle = self.capacity() == Sectors(0) && !self.has_write_cache();
        // SAFETY: By the type invariant the disk is valid, and so are its queue and the queue's limits.
        let before = unsafe { ChangeableLimits::read(&raw const (*self.queue()).limits) };
        if !idle && before.with(features, Some(block_bytes)) == before {
            return Ok(());
        }
        let deadline = Deadline::after_seconds(TIMEOUT_SECONDS);
        let mut locked = self.lock_limits_until(&deadline)?;
        locked.change(features, Some(block_bytes));
        if idle {
            return locked.commit();
        }
        let _guard = self.freeze_until(&deadline)?;
        locked.commit()
    }

    /// Resets what the disk can do. Nothing may be in flight, nor come: somebody who is changing limits
    /// would wait for it with the lock held, and this waits for that lock. May sleep.
    pub(crate) fn reset_limits(&self) {
        // SAFETY: By the type invariant the disk is valid, and so is its queue.
        unsafe { bindings::mutex_lock(&raw mut (*self.queue()).limits_lock) };
        // SAFETY: They were locked just now.
        let mut locked = unsafe { self.locked_limits() };
        locked.change(Features::default(), None);
        // It can only fail for limits that do not go together, and these do.
        let _ = locked.commit();
    }

    fn lock_limits_until(&self, deadline: &Deadline) -> Result<LockedLimits<'_>> {
        let queue = self.queue();
        // SAFETY: By the type invariant the disk is valid, and so is its queue.
        while unsafe { bindings::mutex_trylock(&raw mut (*queue).limits_lock) } == 0 {
            if deadline.jiffies_left() == 0 {
                return Err(EBUSY);
            }
            fsleep(POLL_INTERVAL);
        }
        // SAFETY: They were locked just now.
        Ok(unsafe { self.locked_limits() })
    }

    /// The rest of `queue_limits_start_update()`.
    ///
    /// # Safety
    ///
    /// The current task must hold the queue's `limits_lock`, and leave it to what is returned.
    unsafe fn locked_limits(&self) -> LockedLimits<'_> {
        let queue = self.queue();
        // SAFETY: By the type invariant the disk is valid, and so is its queue; who writes the limits has
        // the lock, which is ours.
        let new = unsafe { (&raw const (*queue).limits).read() };
        // INVARIANT: The caller promises that the lock is held, and no longer the caller's.
        LockedLimits {
            queue,
            new,
            _disk: PhantomData,
        }
    }
}

/// The limits of a disk, which nobody else changes meanwhile, and what is to become of them.
///
/// # Invariants
///
/// `queue` is valid for `'a`, and the current task holds its `limits_lock`.
struct LockedLimits<'a> {
    queue: *mut bindings::request_queue,
    new: bindings::queue_limits,
    _disk: PhantomData<&'a DiskRef>,
}

impl LockedLimits<'_> {
    fn change(&mut self, features: Features, block_bytes: Option<u32>) {
        // SAFETY: A reference is valid for reads.
        let before = unsafe { ChangeableLimits::read(&self.new) };
        before.with(features, block_bytes).write(&mut self.new);
    }

    /// Makes them the disk's, and unlocks them.
    fn commit(self) -> Result {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: By the type invariant the queue is valid and its limits are locked by the current task.
        // This unlocks them, whatever it answers, and `drop` does not run.
        to_result(unsafe { bindings::queue_limits_commit_update(this.queue, &raw mut this.new) })
    }
}

impl Drop for LockedLimits<'_> {
    /// `queue_limits_cancel_update()`
    fn drop(&mut self) {
        // SAFETY: By the type invariant the queue is valid and the current task holds the lock.
        unsafe { bindings::mutex_unlock(&raw mut (*self.queue).limits_lock) };
    }
}

/// Those of the limits that the driver changes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ChangeableLimits {
    /// `BLK_FEAT_*`, also those that are none of ours.
    features: u32,
    max_hw_discard_sectors: u32,
    max_write_zeroes_sectors: u32,
    logical_block_size: u32,
    physical_block_size: u32,
}

impl ChangeableLimits {
    /// Reads these fields of `limits`.
    ///
    /// # Safety
    ///
    /// `limits` must be valid for reads. Other tasks may write the fields meanwhile.
    unsafe fn read(limits: *const bindings::queue_limits) -> Self {
        // SAFETY: By this function's safety requirements `limits` is valid. Each field is a word, which
        // is never seen in part.
        unsafe {
            ChangeableLimits {
                features: (&raw const (*limits).features).read_volatile(),
                max_hw_discard_sectors: (&raw const (*limits).max_hw_discard_sectors)
                    .read_volatile(),
                max_write_zeroes_sectors: (&raw const (*limits).max_write_zeroes_sectors)
                    .read_volatile(),
                logical_block_size: (&raw const (*limits).logical_block_size).read_volatile(),
                physical_block_size: (&raw const (*limits).physical_block_size).read_volatile(),
            }
        }
    }

    /// Writes these fields of `limits`.
    fn write(self, limits: &mut bindings::queue_limits) {
        limits.features = self.features;
        limits.max_hw_discard_sectors = self.max_hw_discard_sectors;
        limits.max_write_zeroes_sectors = self.max_write_zeroes_sectors;
        limits.logical_block_size = self.logical_block_size;
        limits.physical_block_size = self.physical_block_size;
    }

    /// nbd.c's `nbd_apply_limits()`, and the block size, where one is given.
    fn with(mut self, features: Features, block_bytes: Option<u32>) -> Self {
        let mut bit = |on: bool, bit: u32| {
            if on {
                self.features |= bit;
            } else {
                self.features &= !bit;
            }
        };
        bit(features.write_cache, bindings::BLK_FEAT_WRITE_CACHE);
        bit(features.fua, bindings::BLK_FEAT_FUA);
        bit(features.rotational, bindings::BLK_FEAT_ROTATIONAL);
        let sectors = |on: bool| {
            if on {
                u32::MAX >> bindings::SECTOR_SHIFT
            } else {
                0
            }
        };
        self.max_hw_discard_sectors = sectors(features.discard);
        self.max_write_zeroes_sectors = sectors(features.write_zeroes);
        if let Some(bytes) = block_bytes {
            self.logical_block_size = bytes;
            self.physical_block_size = bytes;
        }
        self
    }
}

/// Whether the block layer takes blocks of `bytes` (`blk_validate_block_size()`).
pub(crate) fn valid_block_size(bytes: usize) -> bool {
    // With transparent huge pages the page cache takes blocks larger than a page.
    const MAX: usize = if cfg!(CONFIG_TRANSPARENT_HUGEPAGE) {
        64 << 10
    } else {
        bindings::PAGE_SIZE
    };
    (512..=MAX).contains(&bytes) && bytes.is_power_of_two()
}
