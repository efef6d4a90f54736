// SPDX-License-Identifier: GPL-2.0
//! Operations on any disk, whatever its driver.
//!
//! The `kernel` crate (7.3) has none of them: `kernel::block::mq::gen_disk` offers nothing to do
//! with a disk that was built.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use crate::kapi::{
    bindings,
    errno::ENODATA, //
};
use core::ops::Deref;
use kernel::{
    error::{
        from_err_ptr,
        to_result, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    types::{
        NotThreadSafe,
        Opaque, //
    },
};

/// A number of sectors of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sectors(pub(crate) u64);

/// The identity of a queue. It is only compared; the pointer is never dereferenced.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueId(*mut bindings::request_queue);

impl QueueId {
    pub(super) fn new(queue: *mut bindings::request_queue) -> Self {
        QueueId(queue)
    }
}

/// A disk, whatever type of data its driver attached to it.
///
/// There are only references to it, which kapi lends; they cannot be kept.
///
/// # Invariants
///
/// The disk was created by [`Disk::add()`](super::gendisk::Disk::add). It is valid and has a queue,
/// whose tag set lives as long as the disk.
#[repr(transparent)]
pub(crate) struct DiskRef(Opaque<bindings::gendisk>);

// SAFETY: Any task may call the methods of `&DiskRef`, also at the same time.
unsafe impl Sync for DiskRef {}

impl DiskRef {
    pub(super) fn as_ptr(&self) -> *mut bindings::gendisk {
        self.0.get()
    }

    pub(super) fn queue(&self) -> *mut bindings::request_queue {
        // SAFETY: By the type invariant, the disk is valid and has a queue, which never changes.
        unsafe { (*self.as_ptr()).queue }
    }

    fn part0(&self) -> *mut bindings::block_device {
        // SAFETY: By the type invariant, the disk is valid. It has a first block device, which
        // never changes.
        unsafe { (*self.as_ptr()).part0 }
    }

    pub(super) fn device(&self) -> *mut bindings::device {
        // SAFETY: The first block device lives as long as the disk. Its device is that of the disk
        // (`disk_to_dev()`).
        unsafe { &raw mut (*self.part0()).bd_device }
    }

    /// Runs all hardware queues, asynchronously.
    pub(crate) fn run_queues(&self) {
        // SAFETY: By the type invariant, the queue is valid.
        unsafe { bindings::blk_mq_run_hw_queues(self.queue(), true) };
    }

    /// Returns the number of openers of the disk and its partitions (`disk_openers()`).
    pub(crate) fn openers(&self) -> u32 {
        // SAFETY: The first block device lives as long as the disk.
        let count = unsafe { &raw mut (*self.part0()).bd_openers.counter };
        // SAFETY: The counter is valid, and is only ever changed atomically.
        unsafe { Atomic::<i32>::from_ptr(count).load(Relaxed) as u32 }
    }

    /// Returns the size of the disk (`get_capacity()`).
    pub(crate) fn capacity(&self) -> Sectors {
        // SAFETY: The first block device lives as long as the disk. Other tasks may change the size
        // at the same time, but a word of 64 bits is never read torn.
        Sectors(unsafe { (&raw const (*self.part0()).bd_nr_sectors).read_volatile() })
    }

    /// Sets the size, without notifying user space.
    pub(crate) fn set_capacity(&self, size: Sectors) {
        // SAFETY: By the type invariant, the disk is valid.
        unsafe { bindings::set_capacity(self.as_ptr(), size.0) };
    }

    /// Sets the size, and logs a change. Sends a uevent (`RESIZE=1`) if the size changed and
    /// neither the old nor the new one is zero.
    ///
    /// Returns whether it sent the uevent.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn set_capacity_and_notify(&self, size: Sectors) -> bool {
        // SAFETY: By the type invariant, the disk is valid.
        unsafe { bindings::set_capacity_and_notify(self.as_ptr(), size.0) }
    }

    /// Sends a "change" uevent.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn uevent_change(&self) {
        // SAFETY: By the type invariant, the device is valid. A failure is ignored, as there is no
        // remedy.
        unsafe {
            bindings::kobject_uevent(
                &raw mut (*self.device()).kobj,
                bindings::kobject_action_KOBJ_CHANGE,
            )
        };
    }

    /// Makes the disk read-only, or writable again. Sends a "change" uevent (`DISK_RO`) if this
    /// changes anything.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn set_read_only(&self, ro: bool) {
        // SAFETY: By the type invariant, the disk is valid.
        unsafe { bindings::set_disk_ro(self.as_ptr(), ro) };
    }

    /// Clears the read-only mark that user space sets on the whole disk with `BLKROSET`. The one of
    /// [`Self::set_read_only()`] stays: the disk is read-only if it has either.
    pub(crate) fn clear_read_only_of_user(&self) {
        // SAFETY: The first block device lives as long as the disk. Its flags are only ever changed
        // atomically (`bdev_clear_flag()`).
        unsafe {
            bindings::atomic_and(
                !(bindings::BD_READ_ONLY as i32),
                &raw mut (*self.part0()).__bd_flags,
            )
        };
    }

    /// Makes the next open read the partition table.
    pub(crate) fn need_partition_scan(&self) {
        // SAFETY: By the type invariant, the disk is valid. The bits of its state are changed
        // atomically.
        unsafe {
            bindings::set_bit(
                bindings::GD_NEED_PART_SCAN as usize,
                &raw mut (*self.as_ptr()).state,
            )
        };
    }

    /// Keeps the next open from reading the partition table. Returns whether it would have read it.
    pub(crate) fn cancel_partition_scan(&self) -> bool {
        // SAFETY: By the type invariant, the disk is valid. Other tasks may change the bits at the same
        // time, but a word is never read torn.
        let state = unsafe { (&raw const (*self.as_ptr()).state).read_volatile() };
        // SAFETY: By the type invariant, the disk is valid. The bits of its state are changed
        // atomically.
        unsafe {
            bindings::clear_bit(
                bindings::GD_NEED_PART_SCAN as usize,
                &raw mut (*self.as_ptr()).state,
            )
        };
        state & (1 << bindings::GD_NEED_PART_SCAN) != 0
    }

    /// Opens the disk, as a program does, and closes it. The open reads the partition table if that is
    /// [needed](Self::need_partition_scan).
    ///
    /// # Context
    ///
    /// May sleep, for as long as the requests take. [`BlockDevice::open()`] and
    /// [`BlockDevice::release()`] are called by this task, so it must hold none of the locks that they
    /// take.
    ///
    /// [`BlockDevice::open()`]: super::gendisk::BlockDevice::open
    /// [`BlockDevice::release()`]: super::gendisk::BlockDevice::release
    pub(crate) fn open_and_close(&self) {
        // SAFETY: The first block device lives as long as the disk, and its number does not change.
        let number = unsafe { (*self.part0()).bd_dev };
        // SAFETY: Any number may be passed. Without a holder, no holder operations are needed.
        let file = from_err_ptr(unsafe {
            bindings::bdev_file_open_by_dev(
                number,
                bindings::BLK_OPEN_READ,
                core::ptr::null_mut(),
                core::ptr::null(),
            )
        });
        if let Ok(file) = file {
            // SAFETY: The file was opened above, and its only reference is dropped here. A kernel
            // thread may close a file immediately.
            unsafe { bindings::__fput_sync(file) };
        }
    }

    /// Reads the first block, past the page cache, and drops it.
    ///
    /// # Errors
    ///
    /// - `ENODATA`: the disk has no sectors.
    /// - `ENOMEM`, and those of the request.
    ///
    /// # Context
    ///
    /// May sleep, for as long as the request takes. Memory is allocated in a way that may start I/O.
    pub(crate) fn read_first_block(&self) -> Result {
        if self.capacity() == Sectors(0) {
            return Err(ENODATA.into());
        }
        // SAFETY: By the type invariant, the queue is valid. A word is never read torn.
        let bytes = unsafe {
            (&raw const (*self.queue()).limits.logical_block_size).read_volatile() as usize
        };
        let mut block = KVec::from_elem(0u8, bytes, GFP_KERNEL)?;
        // SAFETY: The first block device lives as long as the disk. The buffer was allocated by
        // `kmalloc()`, and lives until the call returns, when the request is complete.
        to_result(unsafe {
            bindings::bdev_rw_virt(
                self.part0(),
                0,
                block.as_mut_ptr().cast(),
                bytes,
                bindings::req_op_REQ_OP_READ,
            )
        })
    }

    /// Drops the disk's page cache, and sets the size to zero.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn invalidate(&self) {
        // SAFETY: By the type invariant, the disk is valid.
        unsafe { bindings::invalidate_disk(self.as_ptr()) };
    }

    /// Gives the disk a new sequence number (`diskseq`), reports a media change to whoever uses the
    /// disk exclusively, and drops what is cached of it. Sends no uevent.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn force_media_change(&self) {
        // SAFETY: By the type invariant, the disk is valid.
        unsafe { bindings::disk_force_media_change(self.as_ptr()) };
    }

    pub(super) fn tags(&self) -> *mut bindings::blk_mq_tag_set {
        // SAFETY: By the type invariant, the queue is valid.
        unsafe { (*self.queue()).tag_set }
    }

    /// Changes the number of hardware queues to `count`, or to the number of CPUs if that is less.
    ///
    /// The queue is frozen while the number changes.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn set_hw_queues(&self, count: u32) {
        if self.hw_queues() != count {
            // SAFETY: By the type invariant, the tag set lives as long as the disk.
            unsafe { bindings::blk_mq_update_nr_hw_queues(self.tags(), count as i32) };
        }
    }

    /// Returns the number of hardware queues.
    pub(crate) fn hw_queues(&self) -> u32 {
        // SAFETY: By the type invariant, the tag set lives as long as the disk. Other tasks may
        // change the number at the same time, but a word is never read torn.
        unsafe { (&raw const (*self.tags()).nr_hw_queues).read_volatile() }
    }

    /// Sets the time after which a request times out, in jiffies.
    pub(crate) fn set_request_timeout(&self, jiffies: u32) {
        // SAFETY: By the type invariant, the queue is valid.
        unsafe { bindings::blk_queue_rq_timeout(self.queue(), jiffies) };
    }

    /// Takes the `open_mutex`: until the returned guard is dropped, nobody opens or closes the disk
    /// or its partitions.
    ///
    /// # Context
    ///
    /// May sleep. Another task may hold the lock while it reads the partition table or writes dirty
    /// pages, so the requests of the disk must end without a server. The lock must not be taken in
    /// [`BlockDevice::open()`] and [`BlockDevice::release()`], which are called with it.
    ///
    /// [`BlockDevice::open()`]: super::gendisk::BlockDevice::open
    /// [`BlockDevice::release()`]: super::gendisk::BlockDevice::release
    pub(crate) fn lock_open_mutex(&self) -> OpenMutexGuard<'_> {
        // SAFETY: By the type invariant, the disk is valid.
        unsafe { bindings::mutex_lock(&raw mut (*self.as_ptr()).open_mutex) };
        // SAFETY: The lock was taken above.
        unsafe { OpenMutexGuard::new(self) }
    }

    /// Takes the `open_mutex` like [`Self::lock_open_mutex()`], unless another task holds it.
    ///
    /// # Context
    ///
    /// May sleep, but does not wait. A task that opens or closes the disk may wait for locks of the
    /// caller.
    pub(crate) fn try_lock_open_mutex(&self) -> Option<OpenMutexGuard<'_>> {
        // SAFETY: By the type invariant, the disk is valid.
        if unsafe { bindings::mutex_trylock(&raw mut (*self.as_ptr()).open_mutex) } == 0 {
            return None;
        }
        // SAFETY: The lock was taken above.
        Some(unsafe { OpenMutexGuard::new(self) })
    }
}

/// The proof that the current task holds the `open_mutex` of a disk.
///
/// # Invariants
///
/// The current task holds the lock as long as this value exists.
pub(crate) struct OpenMutexHeld<'a> {
    disk: &'a DiskRef,
    _task: NotThreadSafe,
}

impl<'a> OpenMutexHeld<'a> {
    /// Returns the proof for a task that does not release the lock by itself.
    ///
    /// # Safety
    ///
    /// The current task must hold the `open_mutex` of `disk` until the returned value is gone.
    pub(super) unsafe fn new(disk: &'a DiskRef) -> Self {
        // INVARIANT: By this function's safety requirements.
        OpenMutexHeld {
            disk,
            _task: NotThreadSafe,
        }
    }

    pub(super) fn disk(&self) -> &'a DiskRef {
        self.disk
    }

    /// Removes all partitions of the disk, and sets its size to zero. If one is still open, they
    /// all stay.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn drop_partitions(&self) {
        // A disk without sectors is not searched for partitions again.
        self.disk.set_capacity(Sectors(0));
        // SAFETY: By the type invariants, the disk is valid and the current task holds its
        // `open_mutex`. A failure means that a partition is open, or that the disk is being removed
        // together with its partitions.
        unsafe { bindings::bdev_disk_changed(self.disk.as_ptr(), false) };
    }
}

/// A guard that releases the `open_mutex` of a disk when it is dropped.
///
/// # Invariants
///
/// The lock was taken by [`DiskRef::lock_open_mutex()`] or [`DiskRef::try_lock_open_mutex()`].
pub(crate) struct OpenMutexGuard<'a>(OpenMutexHeld<'a>);

impl<'a> OpenMutexGuard<'a> {
    /// # Safety
    ///
    /// The current task must have taken the `open_mutex` of `disk`, and leave it to the returned
    /// value.
    unsafe fn new(disk: &'a DiskRef) -> Self {
        // SAFETY: By this function's safety requirements, the lock is held until the returned value
        // is dropped.
        // INVARIANT: By this function's safety requirements.
        OpenMutexGuard(unsafe { OpenMutexHeld::new(disk) })
    }
}

impl<'a> Deref for OpenMutexGuard<'a> {
    type Target = OpenMutexHeld<'a>;

    fn deref(&self) -> &OpenMutexHeld<'a> {
        &self.0
    }
}

impl Drop for OpenMutexGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants, the disk is valid and the current task holds the lock.
        unsafe { bindings::mutex_unlock(&raw mut (*self.0.disk.as_ptr()).open_mutex) };
    }
}
