// SPDX-License-Identifier: GPL-2.0
//! What a disk can do, and how it wants to be asked: `struct queue_limits`.
//!
//! Source: `include/linux/blkdev.h`.

use super::{
    bindings,
    disk::{DiskRef, Sectors},
};
use kernel::{error::to_result, prelude::*};

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

/// How long what is in flight is waited for before limits change.
const DRAIN_SECONDS: u32 = 5;

impl DiskRef {
    /// Whether the disk says that it has a volatile cache (`blk_queue_write_cache()`).
    fn has_write_cache(&self) -> bool {
        // SAFETY: By the type invariant the disk is valid; a racing change is the caller's business.
        let limits = unsafe { &raw const (*self.queue()).limits };
        // SAFETY: As above.
        let (features, flags) = unsafe { ((*limits).features, (*limits).flags) };
        features & bindings::BLK_FEAT_WRITE_CACHE != 0
            && flags & bindings::BLK_FLAG_WRITE_CACHE_DISABLED == 0
    }

    /// Sets what the disk can do, and its block size where one is given. The queue is frozen where
    /// there could be I/O and something changes. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where what is in flight has not ended within [`DRAIN_SECONDS`]; then nothing was changed.
    pub(crate) fn set_limits(&self, features: Features, block_bytes: Option<u32>) -> Result {
        let queue = self.queue();
        let idle = self.capacity() == Sectors(0) && !self.has_write_cache();
        // SAFETY: By the type invariant the disk is valid. This is `queue_limits_start_update()`: the
        // lock is released by the commit, or by hand (`queue_limits_cancel_update()`).
        unsafe {
            bindings::mutex_lock(&raw mut (*queue).limits_lock);
            let mut lim = (&raw const (*queue).limits).read();
            let changes = apply(&mut lim, features, block_bytes);
            let closed = if idle || block_bytes.is_none() {
                Ok(None)
            } else if changes {
                self.drain(DRAIN_SECONDS).map(Some)
            } else {
                bindings::mutex_unlock(&raw mut (*queue).limits_lock);
                return Ok(());
            };
            match closed {
                Ok(_closed) => to_result(bindings::queue_limits_commit_update(queue, &raw mut lim)),
                Err(e) => {
                    bindings::mutex_unlock(&raw mut (*queue).limits_lock);
                    Err(e)
                }
            }
        }
    }
}

/// nbd.c's `nbd_apply_limits()`. Returns whether anything is other than before.
fn apply(lim: &mut bindings::queue_limits, features: Features, block_bytes: Option<u32>) -> bool {
    let what_is_set = |lim: &bindings::queue_limits| {
        (
            lim.features,
            lim.max_hw_discard_sectors,
            lim.max_write_zeroes_sectors,
            lim.logical_block_size,
            lim.physical_block_size,
        )
    };
    let before = what_is_set(lim);
    let mut bit = |on: bool, bit: u32| {
        if on {
            lim.features |= bit;
        } else {
            lim.features &= !bit;
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
    lim.max_hw_discard_sectors = sectors(features.discard);
    lim.max_write_zeroes_sectors = sectors(features.write_zeroes);
    if let Some(bytes) = block_bytes {
        lim.logical_block_size = bytes;
        lim.physical_block_size = bytes;
    }
    what_is_set(lim) != before
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
