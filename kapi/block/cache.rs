// SPDX-License-Identifier: GPL-2.0
//! The page cache of a disk, as far as it depends on the block size.
//!
//! The page cache of a block device transfers data in blocks of its own. The kernel chooses their
//! size when the device is opened while nobody else has it open. If the logical block size becomes
//! larger than that later, all buffered I/O fails, and so does the search for partitions. The
//! `kernel` crate (7.3) has nothing similar.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)
//! C header: [`include/linux/pagemap.h`](srctree/include/linux/pagemap.h)

use super::{
    disk::OpenMutexHeld,
    limits::valid_block_size, //
};
use crate::kapi::{
    bindings,
    task::Deadline, //
};
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
    types::ScopeGuard, //
};

impl OpenMutexHeld<'_> {
    /// Gives those page caches of the disk and its partitions that are in use, and for whose block
    /// size in bytes `which` returns true, blocks of `bytes`. The others have their size chosen by
    /// the next open.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: `bytes` is not valid.
    /// - `EBUSY`: the disk has sectors, or something is cached, or a file system is mounted, or
    ///   another task holds the locks of the page cache until `deadline`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn set_cache_blocks(
        &self,
        bytes: u32,
        deadline: &Deadline,
        which: impl Fn(u32) -> bool,
    ) -> Result {
        for cache in self.caches() {
            if cache.is_open() && which(cache.block_bytes()) {
                cache.set_block_bytes(bytes, deadline)?;
            }
        }
        Ok(())
    }

    /// Returns whether a page cache of the disk or of its partitions is in use that has smaller blocks
    /// than `bytes`.
    pub(super) fn has_cache_blocks_below(&self, bytes: u32) -> bool {
        self.caches()
            .any(|cache| cache.is_open() && cache.block_bytes() < bytes)
    }

    /// Returns the page caches of the whole disk and of its partitions.
    fn caches(&self) -> impl Iterator<Item = Cache<'_>> {
        let mut index = 0;
        core::iter::from_fn(move || {
            // SAFETY: By its type invariant, the disk is valid.
            let table = unsafe { &raw mut (*self.disk().as_ptr()).part_tbl };
            // SAFETY: The table is part of the disk, and `index` is valid.
            let device =
                unsafe { bindings::xa_find(table, &mut index, usize::MAX, bindings::XA_PRESENT) };
            index += 1;
            // INVARIANT: The table contains block devices of the disk. By the type invariant of
            // `self`, the current task holds the `open_mutex`.
            Some(Cache {
                device: NonNull::new(device.cast())?,
                _held: PhantomData,
            })
        })
    }
}

/// The page cache of a block device: a whole disk or a partition.
///
/// # Invariants
///
/// `device` is a block device of a disk whose `open_mutex` the current task holds during `'a`. So
/// nobody opens, closes or removes it, or reads the partition table through its page cache.
struct Cache<'a> {
    device: NonNull<bindings::block_device>,
    _held: PhantomData<&'a OpenMutexHeld<'a>>,
}

impl Cache<'_> {
    fn mapping(&self) -> *mut bindings::address_space {
        // SAFETY: By the type invariant, the block device is valid. Its mapping never changes.
        unsafe { (*self.device.as_ptr()).bd_mapping }
    }

    fn inode(&self) -> *mut bindings::inode {
        // SAFETY: The mapping is part of the inode of the block device, which is valid.
        unsafe { (*self.mapping()).host }
    }

    /// Returns whether somebody has the block device open.
    fn is_open(&self) -> bool {
        // SAFETY: By the type invariant, the block device is valid.
        let count = unsafe { &raw mut (*self.device.as_ptr()).bd_openers.counter };
        // SAFETY: The counter is valid, and is only ever changed atomically.
        unsafe { Atomic::<i32>::from_ptr(count).load(Relaxed) != 0 }
    }

    /// Returns the size of the blocks in bytes (`i_blocksize()`).
    fn block_bytes(&self) -> u32 {
        // SAFETY: By the type invariant, the inode is valid. A byte is never read torn.
        1 << unsafe { (&raw const (*self.inode()).i_blkbits).read_volatile() }
    }

    /// Sets the size of the blocks as `set_blocksize()` does, but only if nobody can use the page
    /// cache, so that nothing has to be written or dropped.
    ///
    /// # Errors
    ///
    /// `EBUSY` and `EINVAL`; see [`OpenMutexHeld::set_cache_blocks()`].
    fn set_block_bytes(&self, bytes: u32, deadline: &Deadline) -> Result {
        if !valid_block_size(bytes as usize) {
            return Err(EINVAL);
        }
        let (device, mapping, inode) = (self.device.as_ptr(), self.mapping(), self.inode());
        // A page fault or a `splice()` chooses the size of its pages before it takes a lock, but only
        // if there is something to be read.
        // SAFETY: By the type invariant, the inode is valid. A word is never read torn.
        if unsafe { (&raw const (*inode).i_size).read_volatile() } != 0 {
            return Err(EBUSY);
        }
        // SAFETY: By the type invariant, the inode is valid, and so is its lock.
        let _inode_locked = unsafe { write_lock(&raw mut (*inode).i_rwsem, deadline) }?;
        // SAFETY: By the type invariant, the mapping is valid, and so is its lock.
        let _mapping_locked = unsafe { write_lock(&raw mut (*mapping).invalidate_lock, deadline) }?;
        // As long as a file system is mounted, the block device has these operations, which change
        // only with the `open_mutex` held.
        // SAFETY: By the type invariant, the block device is valid.
        let is_mounted = unsafe { !(*device).bd_holder_ops.is_null() };
        // SAFETY: By the type invariant, the mapping is valid. A word is never read torn.
        let pages = unsafe { (&raw const (*mapping).nrpages).read_volatile() };
        if is_mounted || pages != 0 {
            return Err(EBUSY);
        }
        // SAFETY: By the type invariant, the inode and the mapping are valid. There are no pages, and
        // nobody adds any: there is nothing to be read or written, there is no file system, the
        // `open_mutex` keeps the partition scan away, and others, such as `swapon()`, hold a lock.
        unsafe {
            (&raw mut (*inode).i_blkbits).write_volatile(bytes.trailing_zeros() as u8);
            set_min_folio_bytes(mapping, bytes);
        }
        Ok(())
    }
}

/// Locks a semaphore for writing until the returned value is dropped, or fails with `EBUSY` at the
/// deadline. May sleep.
///
/// # Safety
///
/// `semaphore` must be valid as long as the returned value exists.
unsafe fn write_lock(
    semaphore: *mut bindings::rw_semaphore,
    deadline: &Deadline,
) -> Result<impl Drop> {
    // SAFETY: By this function's safety requirements.
    while unsafe { bindings::down_write_trylock(semaphore) } == 0 {
        if deadline.jiffies_left() == 0 {
            return Err(EBUSY);
        }
        fsleep(Delta::from_millis(1));
    }
    Ok(ScopeGuard::new(move || {
        // SAFETY: By this function's safety requirements. The semaphore was locked above.
        unsafe { bindings::up_write(semaphore) }
    }))
}

/// Sets the size of the smallest folios of a page cache, in bytes
/// (`mapping_set_folio_min_order()`).
///
/// # Safety
///
/// `mapping` must be that of a block device that has been opened, and its page cache must be empty
/// and stay so meanwhile.
unsafe fn set_min_folio_bytes(mapping: *mut bindings::address_space, bytes: u32) {
    const SHIFT: u32 = bindings::mapping_flags_AS_FOLIO_ORDER_MIN;
    const MASK: usize = ((1 << bindings::mapping_flags_AS_FOLIO_ORDER_BITS) - 1) << SHIFT;
    let pages = (bytes as usize).div_ceil(bindings::PAGE_SIZE);
    let order = pages.trailing_zeros() as usize;
    // SAFETY: By this function's safety requirements. Other tasks change the flags atomically.
    let flags = unsafe { Atomic::<usize>::from_ptr(&raw mut (*mapping).flags) };
    loop {
        let old = flags.load(Relaxed);
        let new = old & !MASK | order << SHIFT;
        if flags.cmpxchg(old, new, Relaxed).is_ok() {
            return;
        }
    }
}
