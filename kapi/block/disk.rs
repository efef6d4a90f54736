// SPDX-License-Identifier: GPL-2.0
//! What can be done with any disk.
//!
//! Source: `include/linux/blkdev.h`.

use crate::kapi::bindings;
use kernel::{
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    types::Opaque, //
};

/// A number of 512-byte sectors.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sectors(pub(crate) u64);

/// Which queue it is. It is compared only, never looked into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueueId(*mut bindings::request_queue);

impl QueueId {
    pub(super) fn new(queue: *mut bindings::request_queue) -> Self {
        QueueId(queue)
    }
}

/// A disk, whatever the driver's part of it is. It cannot be kept, and there is no value of it, only
/// references.
///
/// # Invariants
///
/// It was made by [`Disk::add()`](super::gendisk::Disk::add), with a queue, whose tag set lives as long as the disk.
#[repr(transparent)]
pub(crate) struct DiskRef(Opaque<bindings::gendisk>);

// SAFETY: Everything that `&DiskRef` offers may be called by any task.
unsafe impl Sync for DiskRef {}

impl DiskRef {
    pub(super) fn as_ptr(&self) -> *mut bindings::gendisk {
        self.0.get()
    }

    pub(super) fn queue(&self) -> *mut bindings::request_queue {
        // SAFETY: By the type invariant the disk has a queue, which does not change.
        unsafe { (*self.as_ptr()).queue }
    }

    fn part0(&self) -> *mut bindings::block_device {
        // SAFETY: A disk that is valid has a first block device, which does not change.
        unsafe { (*self.as_ptr()).part0 }
    }

    pub(super) fn device(&self) -> *mut bindings::device {
        // SAFETY: The first block device lives as long as the disk (`disk_to_dev()`).
        unsafe { &raw mut (*self.part0()).bd_device }
    }

    /// Has all hardware queues run, by and by.
    pub(crate) fn run_queues(&self) {
        // SAFETY: The disk is valid.
        unsafe { bindings::blk_mq_run_hw_queues(self.queue(), true) };
    }

    /// How many have the disk or one of its partitions open (`disk_openers()`).
    pub(crate) fn openers(&self) -> u32 {
        // SAFETY: The first block device lives as long as the disk.
        let count = unsafe { &raw mut (*self.part0()).bd_openers.counter };
        // SAFETY: It is a counter that others change atomically.
        unsafe { Atomic::<i32>::from_ptr(count).load(Relaxed) as u32 }
    }

    /// The disk's size (`get_capacity()`).
    pub(crate) fn capacity(&self) -> Sectors {
        // SAFETY: The first block device lives as long as the disk. Others change the size meanwhile, but
        // a torn read is impossible on 64 bits.
        Sectors(unsafe { (&raw const (*self.part0()).bd_nr_sectors).read_volatile() })
    }

    /// Sets the size without telling anybody.
    pub(crate) fn set_capacity(&self, size: Sectors) {
        // SAFETY: The disk is valid.
        unsafe { bindings::set_capacity(self.as_ptr(), size.0) };
    }

    /// Sets the size; tells user space and the log where it has changed to or from something other
    /// than zero. Returns whether it told.
    pub(crate) fn set_capacity_and_notify(&self, size: Sectors) -> bool {
        // SAFETY: The disk is valid.
        unsafe { bindings::set_capacity_and_notify(self.as_ptr(), size.0) }
    }

    /// Sends user space a "change" uevent. May sleep.
    pub(crate) fn uevent_change(&self) {
        // SAFETY: The device is valid. An event that is lost cannot be helped.
        unsafe {
            bindings::kobject_uevent(
                &raw mut (*self.device()).kobj,
                bindings::kobject_action_KOBJ_CHANGE,
            )
        };
    }

    /// Sets or clears read-only.
    pub(crate) fn set_read_only(&self, ro: bool) {
        // SAFETY: The disk is valid.
        unsafe { bindings::set_disk_ro(self.as_ptr(), ro) };
    }

    /// The next open reads the partition table.
    pub(crate) fn need_partition_scan(&self) {
        // SAFETY: The disk is valid; its state's bits are changed atomically.
        unsafe {
            bindings::set_bit(
                bindings::GD_NEED_PART_SCAN as usize,
                &raw mut (*self.as_ptr()).state,
            )
        };
    }

    /// Drops what is cached of the disk, and sets its size to zero. May sleep.
    pub(crate) fn invalidate(&self) {
        // SAFETY: The disk is valid.
        unsafe { bindings::invalidate_disk(self.as_ptr()) };
    }

    /// Says that the medium has changed: user space is told, what is cached is dropped. May sleep.
    pub(crate) fn force_media_change(&self) {
        // SAFETY: The disk is valid.
        unsafe { bindings::disk_force_media_change(self.as_ptr()) };
    }

    fn tags(&self) -> *mut bindings::blk_mq_tag_set {
        // SAFETY: The queue lives as long as the disk.
        unsafe { (*self.queue()).tag_set }
    }

    /// Asks for `count` hardware queues; the block layer makes at most one for each CPU. The queue is
    /// frozen where the number changes. May sleep.
    pub(crate) fn set_hw_queues(&self, count: u32) {
        if self.hw_queues() != count {
            // SAFETY: By the type invariant the tag set lives as long as the disk.
            unsafe { bindings::blk_mq_update_nr_hw_queues(self.tags(), count as i32) };
        }
    }

    /// How many hardware queues there are.
    pub(crate) fn hw_queues(&self) -> u32 {
        // SAFETY: By the type invariant the tag set lives as long as the disk. Others may change the number
        // meanwhile.
        unsafe { (&raw const (*self.tags()).nr_hw_queues).read_volatile() }
    }

    /// How long a request may take, in jiffies.
    pub(crate) fn set_request_timeout(&self, jiffies: u32) {
        // SAFETY: The queue lives as long as the disk.
        unsafe { bindings::blk_queue_rq_timeout(self.queue(), jiffies) };
    }
}
