// SPDX-License-Identifier: GPL-2.0
//! The limits of a disk's queue: `struct queue_limits`.
//!
//! The `kernel` crate (7.3) sets limits only when it creates a disk, and only the block sizes and
//! the rotational flag.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use super::disk::{
    DiskRef,
    OpenMutexHeld,
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

/// The size of a sector, in bytes.
pub(crate) const SECTOR_BYTES: u32 = 1 << bindings::SECTOR_SHIFT;

/// The limits with which a disk is created. All others have the block layer's defaults.
pub(crate) struct FixedLimits {
    pub(crate) max_hw_sectors: u32,
    pub(crate) max_segments: u16,
    pub(crate) max_segment_size: u32,
    pub(crate) io_opt_bytes: u32,
}

/// How large requests may be, and how large they had better be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestSizes {
    /// The physical block size. If the logical one is larger, that counts.
    pub(crate) physical_block_bytes: u32,
    /// The optimal size, which also determines how much is read ahead. The block layer rounds it down to
    /// physical blocks.
    pub(crate) io_opt_bytes: u32,
    /// The largest size, which is at least a page and a logical block.
    pub(crate) max_hw_sectors: u32,
}

/// The features of a disk that may change while it exists.
#[derive(Clone, Copy, Default)]
pub(crate) struct Features {
    pub(crate) write_cache: bool,
    pub(crate) fua: bool,
    pub(crate) rotational: bool,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
    /// Zeroing need not write zeroes, where it may unmap. Programs that prefer that to writing
    /// (`FALLOC_FL_WRITE_ZEROES`) are refused without this feature. It needs `write_zeroes`.
    pub(crate) fast_zeroes: bool,
}

/// How long a change of the limits waits for locks, and for requests in flight.
const TIMEOUT_SECONDS: u32 = 5;

/// The interval at which [`DiskRef::update()`] tries the lock of the limits.
const POLL_INTERVAL: Delta = Delta::from_millis(10);

impl DiskRef {
    /// Returns whether the disk reports a volatile write cache (`blk_queue_write_cache()`).
    fn has_write_cache(&self) -> bool {
        // SAFETY: By the type invariant, the queue is valid.
        let limits = unsafe { &raw const (*self.queue()).limits };
        // SAFETY: The limits are part of the queue. Other tasks may write the fields at the same
        // time, but a word is never read torn.
        let (features, flags) = unsafe {
            (
                (&raw const (*limits).features).read_volatile(),
                (&raw const (*limits).flags).read_volatile(),
            )
        };
        features & bindings::BLK_FEAT_WRITE_CACHE != 0
            && flags & bindings::BLK_FLAG_WRITE_CACHE_DISABLED == 0
    }

    /// Returns the logical block size in bytes.
    pub(crate) fn block_bytes(&self) -> u32 {
        // SAFETY: By the type invariant, the queue is valid. Other tasks may write the field at the
        // same time, but a word is never read torn.
        unsafe { (&raw const (*self.queue()).limits.logical_block_size).read_volatile() }
    }

    /// Sets the features of the disk.
    ///
    /// If anything changes, and the disk may have I/O, the queue is frozen meanwhile.
    ///
    /// # Errors
    ///
    /// Those of [`Self::update()`].
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn set_features(&self, features: Features) -> Result {
        self.update(|limits| limits.with(features))
    }

    /// Changes the limits.
    ///
    /// # Errors
    ///
    /// Nothing was changed if this fails.
    ///
    /// - `EBUSY` if requests in flight did not end within [`TIMEOUT_SECONDS`], or if another task
    ///   held the lock of the limits for so long. That task may be waiting for the same requests.
    /// - `EINVAL` if the block layer rejects the combination of limits.
    ///
    /// # Context
    ///
    /// May sleep.
    fn update(&self, change: impl Fn(ChangeableLimits) -> ChangeableLimits) -> Result {
        // Such a disk gets no I/O: it has no sectors, and no cache to be flushed.
        let idle = self.capacity() == Sectors(0) && !self.has_write_cache();
        // SAFETY: By the type invariant, the queue is valid, and its limits are part of it.
        let before = unsafe { ChangeableLimits::read(&raw const (*self.queue()).limits) };
        if !idle && change(before) == before {
            return Ok(());
        }
        let deadline = Deadline::after_seconds(TIMEOUT_SECONDS);
        let mut locked = self.lock_limits_until(&deadline)?;
        locked.change(change);
        if idle {
            return locked.commit();
        }
        let _guard = self.freeze_until(&deadline)?;
        locked.commit()
    }

    /// Clears the features of the disk, and what user space has written to `queue/write_cache`, and sets the
    /// sizes of requests. The logical block size stays, and so do the other settings that user space has made in
    /// sysfs.
    ///
    /// # Context
    ///
    /// May sleep. Requests that are in flight or arrive must end without a server: another task that
    /// holds the lock of the limits may wait for them, and this function waits for that lock without
    /// a limit.
    pub(crate) fn reset_limits(&self, sizes: RequestSizes) {
        // SAFETY: By the type invariant, the queue is valid.
        unsafe { bindings::mutex_lock(&raw mut (*self.queue()).limits_lock) };
        // SAFETY: The lock was taken above.
        let mut locked = unsafe { self.locked_limits() };
        locked.change(|limits| ChangeableLimits {
            sizes,
            ..limits.with(Features::default())
        });
        locked.new.flags &= !bindings::BLK_FLAG_WRITE_CACHE_DISABLED;
        // The block layer rejects only inconsistent limits, and these are consistent.
        let _ = locked.commit();
    }

    /// Locks and copies the limits, or fails with `EBUSY` at the deadline. May sleep.
    fn lock_limits_until(&self, deadline: &Deadline) -> Result<LockedLimits<'_>> {
        let queue = self.queue();
        // SAFETY: By the type invariant, the queue is valid.
        while unsafe { bindings::mutex_trylock(&raw mut (*queue).limits_lock) } == 0 {
            if deadline.jiffies_left() == 0 {
                return Err(EBUSY);
            }
            fsleep(POLL_INTERVAL);
        }
        // SAFETY: The lock was taken above.
        Ok(unsafe { self.locked_limits() })
    }

    /// Does the rest of `queue_limits_start_update()`: copies the limits.
    ///
    /// # Safety
    ///
    /// The current task must hold the queue's `limits_lock`. The returned value takes over the duty
    /// to release it.
    unsafe fn locked_limits(&self) -> LockedLimits<'_> {
        let queue = self.queue();
        // SAFETY: By the type invariant, the queue is valid. Tasks that write the limits hold the
        // lock, which by this function's safety requirements the current task holds.
        let new = unsafe { (&raw const (*queue).limits).read() };
        // INVARIANT: By this function's safety requirements, the current task holds the lock and
        // leaves it to the returned value.
        LockedLimits {
            queue,
            new,
            _disk: PhantomData,
        }
    }
}

impl OpenMutexHeld<'_> {
    /// Sets the logical and the physical block size of a disk that has no sectors yet, in bytes, and
    /// adapts the blocks of its page cache. Returns whether those are large enough.
    ///
    /// Blocks of the page cache that are large enough stay as they are, as user space can choose
    /// their size (`BLKBSZSET`). The exception is those that the last logical block size had made
    /// larger than a page.
    ///
    /// # Errors
    ///
    /// Those of [`DiskRef::update()`]. The block size was not changed then.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn set_first_block_bytes(&self, block_bytes: u32) -> Result<bool> {
        let last = self.disk().block_bytes();
        let usual = block_bytes.max(bindings::PAGE_SIZE as u32);
        let deadline = Deadline::after_seconds(TIMEOUT_SECONDS);
        let grown = self.set_cache_blocks(usual, &deadline, |now| now < block_bytes);
        self.update_block_bytes(block_bytes, |limits| RequestSizes {
            physical_block_bytes: block_bytes,
            ..limits
        })?;
        // Blocks that are too large work, except for swap.
        let _ = self.set_cache_blocks(usual, &deadline, |now| now == last && now > usual);
        Ok(grown.is_ok())
    }

    /// Sets the block size of the disk in bytes, and the sizes of requests, which the block layer has rounded for
    /// the last one. The blocks of its page cache stay as they are: a page fault may be about to use them.
    ///
    /// If the disk may have I/O, the queue is frozen meanwhile.
    ///
    /// # Errors
    ///
    /// See [`BlockSizeError`]. The block size was not changed if this fails.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn set_block_bytes(
        &self,
        block_bytes: u32,
        sizes: RequestSizes,
    ) -> core::result::Result<(), BlockSizeError> {
        if self.has_cache_blocks_below(block_bytes) {
            return Err(BlockSizeError::CacheInUse);
        }
        self.update_block_bytes(block_bytes, |_| sizes)
            .map_err(BlockSizeError::Limits)
    }

    fn update_block_bytes(
        &self,
        block_bytes: u32,
        sizes: impl Fn(RequestSizes) -> RequestSizes,
    ) -> Result {
        self.disk().update(|limits| ChangeableLimits {
            block_bytes,
            sizes: sizes(limits.sizes),
            ..limits
        })
    }
}

/// Why the block size of a disk was not changed.
pub(crate) enum BlockSizeError {
    /// Somebody uses a page cache whose blocks are too small (`EBUSY`).
    CacheInUse,
    /// The error of [`DiskRef::update()`].
    Limits(Error),
}

/// The locked limits of a queue, and the changed copy to be committed. Dropping it cancels the
/// update.
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
    fn change(&mut self, change: impl FnOnce(ChangeableLimits) -> ChangeableLimits) {
        // SAFETY: A reference is valid for reads.
        let before = unsafe { ChangeableLimits::read(&self.new) };
        change(before).write(&mut self.new);
    }

    /// Commits the changed limits, and unlocks them (`queue_limits_commit_update()`).
    ///
    /// # Errors
    ///
    /// `EINVAL` if the block layer rejects the limits.
    fn commit(self) -> Result {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: By the type invariant, the queue is valid and the current task holds the lock.
        // The call releases the lock, even if it fails, and `drop()` does not run.
        to_result(unsafe { bindings::queue_limits_commit_update(this.queue, &raw mut this.new) })
    }
}

impl Drop for LockedLimits<'_> {
    /// Cancels the update (`queue_limits_cancel_update()`).
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the queue is valid and the current task holds the lock.
        unsafe { bindings::mutex_unlock(&raw mut (*self.queue).limits_lock) };
    }
}

/// The limits that the driver changes while a disk exists.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ChangeableLimits {
    /// `BLK_FEAT_*`, including those that the driver does not change.
    features: u32,
    max_hw_discard_sectors: u32,
    max_write_zeroes_sectors: u32,
    /// It is 0 or the same.
    max_hw_wzeroes_unmap_sectors: u32,
    /// The logical block size.
    block_bytes: u32,
    sizes: RequestSizes,
}

impl ChangeableLimits {
    /// Reads these fields of `limits`.
    ///
    /// # Safety
    ///
    /// `limits` must be valid for reads. Other tasks may write the fields at the same time.
    unsafe fn read(limits: *const bindings::queue_limits) -> Self {
        // SAFETY: By this function's safety requirements, `limits` is valid. Each field is a word,
        // which is never read torn.
        unsafe {
            ChangeableLimits {
                features: (&raw const (*limits).features).read_volatile(),
                max_hw_discard_sectors: (&raw const (*limits).max_hw_discard_sectors)
                    .read_volatile(),
                max_write_zeroes_sectors: (&raw const (*limits).max_write_zeroes_sectors)
                    .read_volatile(),
                max_hw_wzeroes_unmap_sectors: (&raw const (*limits).max_hw_wzeroes_unmap_sectors)
                    .read_volatile(),
                block_bytes: (&raw const (*limits).logical_block_size).read_volatile(),
                sizes: RequestSizes {
                    physical_block_bytes: (&raw const (*limits).physical_block_size)
                        .read_volatile(),
                    io_opt_bytes: (&raw const (*limits).io_opt).read_volatile(),
                    max_hw_sectors: (&raw const (*limits).max_hw_sectors).read_volatile(),
                },
            }
        }
    }

    /// Writes these fields of `limits`, and those that depend on the block size.
    fn write(self, limits: &mut bindings::queue_limits) {
        limits.features = self.features;
        limits.max_hw_discard_sectors = self.max_hw_discard_sectors;
        limits.max_write_zeroes_sectors = self.max_write_zeroes_sectors;
        limits.max_hw_wzeroes_unmap_sectors = self.max_hw_wzeroes_unmap_sectors;
        limits.logical_block_size = self.block_bytes;
        let physical = self.sizes.physical_block_bytes.max(self.block_bytes);
        limits.physical_block_size = physical;
        limits.io_opt = self.sizes.io_opt_bytes;
        limits.max_hw_sectors = self.sizes.max_hw_sectors;
        // The block layer would only raise these.
        limits.io_min = physical;
        limits.discard_granularity = physical;
        // A user's limit below one block, which the block layer does not refuse, stops all I/O.
        if limits.max_user_sectors != 0 {
            let block_sectors = self.block_bytes >> bindings::SECTOR_SHIFT;
            limits.max_user_sectors = limits.max_user_sectors.max(block_sectors);
        }
    }

    /// Applies `features` as `nbd_apply_limits()` of nbd.c does.
    fn with(mut self, features: Features) -> Self {
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
        let fast = features.write_zeroes && features.fast_zeroes;
        self.max_hw_wzeroes_unmap_sectors = sectors(fast);
        self
    }
}

/// Returns whether the block layer supports blocks of this size, in bytes
/// (`blk_validate_block_size()`).
pub(crate) fn valid_block_size(bytes: usize) -> bool {
    // `BLK_MAX_BLOCK_SIZE`: with transparent huge pages, a block may be larger than a page.
    const MAX: usize = if cfg!(CONFIG_TRANSPARENT_HUGEPAGE) {
        64 << 10
    } else {
        bindings::PAGE_SIZE
    };
    (512..=MAX).contains(&bytes) && bytes.is_power_of_two()
}
