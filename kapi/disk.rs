// SPDX-License-Identifier: GPL-2.0
//! Disks: `struct gendisk` and its block device operations.
//!
//! Mirrors `kernel::block::mq::gen_disk`, which (7.3) has no open, release or ioctl, no limits and no
//! owner. Source: `include/linux/blkdev.h`.

use super::{
    bindings,
    limits::FixedLimits,
    mq::{Operations, TagSet},
    published::{Dispatched, Published},
};
use core::{fmt::Write, marker::PhantomData, ptr::NonNull};
use kernel::{
    error::{from_err_ptr, from_result, to_result},
    ffi, fmt,
    prelude::*,
    sync::{
        atomic::{Atomic, Full, Relaxed},
        Arc,
    },
};

/// What user space can do with a disk. All of it may sleep.
pub(crate) trait BlockDevice: Operations {
    /// Somebody opens the disk or a partition. The disk's `open_mutex` is held.
    fn open(&self) -> Result;

    /// Somebody has closed it. `openers`: how many are left. The disk's `open_mutex` is held.
    fn release(&self, openers: u32);

    /// An ioctl that the block layer does not handle itself, native or compat.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<usize>;

    /// The number in the sysfs file `pid`.
    fn pid(&self) -> i32;

    /// Gives `print` what the sysfs file `backend` says.
    fn backend(&self, print: impl FnOnce(&CStr) -> isize) -> isize;
}

/// A number of 512-byte sectors.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sectors(pub(crate) u64);

/// A block device's major number, registered.
pub(crate) struct Major {
    major: u32,
    name: &'static CStr,
}

impl Major {
    /// Registers `major` for `name`. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where somebody has it.
    pub(crate) fn register(major: u32, name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` lives for ever; there is no probe function.
        to_result(unsafe { bindings::__register_blkdev(major, name.as_char_ptr(), None) })?;
        Ok(Major { major, name })
    }
}

impl Drop for Major {
    fn drop(&mut self) {
        // SAFETY: It was registered with these values.
        unsafe { bindings::unregister_blkdev(self.major, self.name.as_char_ptr()) };
    }
}

/// Where a disk's numbers lie.
pub(crate) struct Numbers {
    pub(crate) major: u32,
    pub(crate) first_minor: u32,
    pub(crate) minors: u32,
}

/// A disk that user space can see, its tags, and the driver's `T` for it. Dropping it removes the disk;
/// the `T` goes when the last user of the gendisk has gone.
///
/// # Invariants
///
/// `disk` was allocated and added, its `private_data` and its queue's `queuedata` are a `T` that
/// `free_disk` frees, and its tag set is `tags`.
pub(crate) struct Disk<T: BlockDevice> {
    disk: NonNull<bindings::gendisk>,
    tags: Option<Pin<KBox<TagSet<T>>>>,
    removed: Atomic<i32>,
    _data: PhantomData<KBox<T>>,
}

// SAFETY: A disk may be removed by any task, and `T` is `Send` and `Sync`.
unsafe impl<T: BlockDevice> Send for Disk<T> {}
// SAFETY: As above.
unsafe impl<T: BlockDevice> Sync for Disk<T> {}

impl<T: BlockDevice> Disk<T> {
    /// Makes a disk and shows it to user space. `init` makes the driver's part of it. May sleep.
    pub(crate) fn add<I: PinInit<T, Error>>(
        tags: Pin<KBox<TagSet<T>>>,
        limits: FixedLimits,
        numbers: Numbers,
        name: fmt::Arguments<'_>,
        init: impl FnOnce(DiskRef) -> I,
    ) -> Result<Self> {
        let mut lim: bindings::queue_limits = pin_init::zeroed();
        lim.max_hw_sectors = limits.max_hw_sectors;
        lim.max_segments = limits.max_segments;
        lim.max_segment_size = limits.max_segment_size;
        lim.io_opt = limits.io_opt_bytes;
        // SAFETY: The tag set is set up, and outlives the disk: it is dropped after `del_gendisk()`.
        let disk = from_err_ptr(unsafe {
            bindings::__blk_mq_alloc_disk(
                tags.as_ptr(),
                &mut lim,
                core::ptr::null_mut(),
                kernel::static_lock_class!().as_ptr(),
            )
        })?;
        // SAFETY: `from_err_ptr()` gives no null for an allocation that succeeded.
        let disk = unsafe { NonNull::new_unchecked(disk) };
        // A disk that was never added does not call `free_disk`.
        Self::fill_and_add(disk, numbers, name, init).inspect_err(|_| {
            // SAFETY: This is the only reference to the disk, which was not added.
            unsafe { bindings::put_disk(disk.as_ptr()) }
        })?;
        // INVARIANT: `fill_and_add()` saw to it.
        Ok(Disk {
            disk,
            tags: Some(tags),
            removed: Atomic::new(0),
            _data: PhantomData,
        })
    }

    fn fill_and_add<I: PinInit<T, Error>>(
        disk: NonNull<bindings::gendisk>,
        numbers: Numbers,
        name: fmt::Arguments<'_>,
        init: impl FnOnce(DiskRef) -> I,
    ) -> Result {
        let raw = disk.as_ptr();
        // INVARIANT: The `T` that gets this lives in the disk, so not longer than it.
        let data = KBox::pin_init(init(DiskRef { disk }), GFP_KERNEL)?;
        // SAFETY: The `T` stays where it is: it is only ever seen as `&T`, and dropped.
        let data = KBox::into_raw(unsafe { Pin::into_inner_unchecked(data) });
        // SAFETY: Nobody else knows the disk yet.
        let added = unsafe {
            (*raw).major = numbers.major as i32;
            (*raw).first_minor = numbers.first_minor as i32;
            (*raw).minors = numbers.minors as i32;
            (*raw).fops = &Self::FOPS;
            (*raw).private_data = data.cast();
            (*(*raw).queue).queuedata = data.cast();
            Self::set_name(&mut (*raw).disk_name, name).and_then(|()| {
                to_result(bindings::device_add_disk(
                    core::ptr::null_mut(),
                    raw,
                    core::ptr::null_mut(),
                ))
            })
        };
        added.inspect_err(|_| {
            // SAFETY: It came from `into_raw()`; the disk was not added, so nobody uses it.
            drop(unsafe { KBox::from_raw(data) });
        })
    }

    fn set_name(to: &mut [ffi::c_char], name: fmt::Arguments<'_>) -> Result {
        NameWriter { to, len: 0 }
            .write_fmt(name)
            .map_err(|_| EINVAL)
    }

    /// # Safety
    ///
    /// `disk` must be a disk of this type, and live for `'a`.
    unsafe fn from_disk<'a>(disk: *mut bindings::gendisk) -> &'a T {
        // SAFETY: The caller promises so.
        unsafe { &*(*disk).private_data.cast::<T>() }
    }

    /// # Safety
    ///
    /// `dev` must be the device of a disk of this type, and the disk live for `'a`.
    unsafe fn from_device<'a>(dev: *mut bindings::device) -> &'a T {
        // SAFETY: The caller promises so (`dev_to_disk()`).
        unsafe {
            let bdev = kernel::container_of!(dev, bindings::block_device, bd_device);
            Self::from_disk((*bdev).bd_disk)
        }
    }

    /// `block_device_operations.open`
    ///
    /// # Safety
    ///
    /// `disk` must be a disk of this type that the caller holds.
    unsafe extern "C" fn open(
        disk: *mut bindings::gendisk,
        _mode: bindings::blk_mode_t,
    ) -> ffi::c_int {
        // SAFETY: The block layer passes a disk of ours and holds a reference to it.
        from_result(|| unsafe { Self::from_disk(disk) }.open().map(|()| 0))
    }

    /// `block_device_operations.release`
    ///
    /// # Safety
    ///
    /// As for [`Self::open()`].
    unsafe extern "C" fn release(disk: *mut bindings::gendisk) {
        // SAFETY: As above.
        let data = unsafe { Self::from_disk(disk) };
        // SAFETY: As above.
        data.release(unsafe { openers(disk) });
    }

    /// `block_device_operations.ioctl` and `.compat_ioctl`
    ///
    /// # Safety
    ///
    /// `bdev` must be of a disk of this type, and open.
    unsafe extern "C" fn ioctl(
        bdev: *mut bindings::block_device,
        _mode: bindings::blk_mode_t,
        cmd: ffi::c_uint,
        arg: ffi::c_ulong,
    ) -> ffi::c_int {
        // SAFETY: The block layer passes a block device of ours that is open.
        let data = unsafe { Self::from_disk((*bdev).bd_disk) };
        from_result(|| data.ioctl(cmd, arg).map(|v| v as ffi::c_int))
    }

    /// `block_device_operations.free_disk`
    ///
    /// # Safety
    ///
    /// `disk` must be a disk of this type, and this the last use of it.
    unsafe extern "C" fn free_disk(disk: *mut bindings::gendisk) {
        // SAFETY: `private_data` came from `KBox::into_raw()`, and this was the last reference.
        drop(unsafe { KBox::from_raw((*disk).private_data.cast::<T>()) });
    }

    /// `device_attribute.show` of the file `pid`
    ///
    /// # Safety
    ///
    /// `dev` must be the device of a disk of this type, and `buf` a page.
    unsafe extern "C" fn pid_show(
        dev: *mut bindings::device,
        _attr: *mut bindings::device_attribute,
        buf: *mut ffi::c_char,
    ) -> isize {
        // SAFETY: The caller promises so.
        let data = unsafe { Self::from_device(dev) };
        // SAFETY: sysfs gives a page.
        unsafe { bindings::sysfs_emit(buf, c"%d\n".as_char_ptr(), data.pid()) as isize }
    }

    const FOPS: bindings::block_device_operations = bindings::block_device_operations {
        owner: (&raw const bindings::__this_module).cast_mut(),
        open: Some(Self::open),
        release: Some(Self::release),
        ioctl: Some(Self::ioctl),
        compat_ioctl: Some(Self::ioctl),
        free_disk: Some(Self::free_disk),
        ..pin_init::zeroed()
    };

    /// `device_attribute.show` of the file `backend`
    ///
    /// # Safety
    ///
    /// As for [`Self::pid_show()`].
    unsafe extern "C" fn backend_show(
        dev: *mut bindings::device,
        _attr: *mut bindings::device_attribute,
        buf: *mut ffi::c_char,
    ) -> isize {
        // SAFETY: The caller promises so.
        unsafe { Self::from_device(dev) }.backend(|backend| {
            let format = c"%s\n".as_char_ptr();
            // SAFETY: sysfs gives a page; the string ends with a zero.
            unsafe { bindings::sysfs_emit(buf, format, backend.as_char_ptr()) as isize }
        })
    }

    const FILES: [bindings::device_attribute; 2] = [
        attribute(c"pid", Self::pid_show),
        attribute(c"backend", Self::backend_show),
    ];

    /// Makes a sysfs file of this disk. May sleep.
    pub(crate) fn add_file(disk: &DiskRef, file: File) -> Result {
        let files: &'static [bindings::device_attribute; 2] = &Self::FILES;
        let [pid, backend] = files;
        let attr = match file {
            File::Pid => pid,
            File::Backend => backend,
        };
        // SAFETY: The disk is one of ours and was added; the attribute lives for ever.
        to_result(unsafe { bindings::device_create_file(disk.device(), attr) })
    }

    /// Removes a sysfs file again. Waits for its readers.
    pub(crate) fn remove_file(disk: &DiskRef, file: File) {
        let files: &'static [bindings::device_attribute; 2] = &Self::FILES;
        let [pid, backend] = files;
        let attr = match file {
            File::Pid => pid,
            File::Backend => backend,
        };
        // SAFETY: As above.
        unsafe { bindings::device_remove_file(disk.device(), attr) };
    }
}

impl<T: BlockDevice> core::ops::Deref for Disk<T> {
    type Target = T;

    /// The driver's part of the disk.
    fn deref(&self) -> &T {
        // SAFETY: By the type invariant `private_data` is a `T`, which lives until the last reference
        // to the disk goes, and `self` holds one.
        unsafe { Self::from_disk(self.disk.as_ptr()) }
    }
}

/// A sysfs file of a disk.
#[derive(Clone, Copy)]
pub(crate) enum File {
    /// [`BlockDevice::pid()`]
    Pid,
    /// [`BlockDevice::backend()`]
    Backend,
}

type Show = unsafe extern "C" fn(
    *mut bindings::device,
    *mut bindings::device_attribute,
    *mut ffi::c_char,
) -> isize;

const fn attribute(name: &'static CStr, show: Show) -> bindings::device_attribute {
    let mut attr: bindings::device_attribute = pin_init::zeroed();
    attr.attr.name = kernel::str::as_char_ptr_in_const_context(name);
    attr.attr.mode = 0o444;
    attr.__bindgen_anon_1.show = Some(show);
    attr
}

impl<T: BlockDevice> Disk<T> {
    /// Takes the disk away from user space, unless that was begun before. Waits for everything in
    /// flight; may sleep.
    pub(crate) fn remove(&self) {
        if self.removed.xchg(1, Full) == 0 {
            // SAFETY: By the type invariant it was added, and nobody has come here before.
            unsafe { bindings::del_gendisk(self.disk.as_ptr()) };
        }
    }
}

impl<T: BlockDevice> Drop for Disk<T> {
    fn drop(&mut self) {
        self.remove();
        drop(self.tags.take());
        // SAFETY: This was our reference.
        unsafe { bindings::put_disk(self.disk.as_ptr()) };
    }
}

/// Writes a name into a field that is all zeroes, and leaves at least the last of them.
struct NameWriter<'a> {
    to: &'a mut [ffi::c_char],
    len: usize,
}

impl Write for NameWriter<'_> {
    fn write_str(&mut self, name: &str) -> core::fmt::Result {
        let end = self.len + name.len();
        if end >= self.to.len() {
            return Err(core::fmt::Error);
        }
        let to = self.to.get_mut(self.len..end).ok_or(core::fmt::Error)?;
        for (to, byte) in to.iter_mut().zip(name.bytes()) {
            *to = byte as ffi::c_char;
        }
        self.len = end;
        Ok(())
    }
}

/// # Safety
///
/// `disk` must be valid.
unsafe fn openers(disk: *mut bindings::gendisk) -> u32 {
    // SAFETY: The caller promises that `disk` is valid. Others count openers meanwhile.
    unsafe {
        let count = &raw mut (*(*disk).part0).bd_openers.counter;
        Atomic::<i32>::from_ptr(count).load(Relaxed) as u32
    }
}

/// A disk, for the part of the driver that lives in it.
///
/// # Invariants
///
/// `disk` is valid for as long as this exists.
pub(crate) struct DiskRef {
    disk: NonNull<bindings::gendisk>,
}

// SAFETY: Everything that it offers may be called by any task.
unsafe impl Send for DiskRef {}
// SAFETY: As above.
unsafe impl Sync for DiskRef {}

impl DiskRef {
    pub(super) fn queue(&self) -> *mut bindings::request_queue {
        // SAFETY: By the type invariant the disk is valid; its queue does not change.
        unsafe { (*self.disk.as_ptr()).queue }
    }

    fn device(&self) -> *mut bindings::device {
        // SAFETY: By the type invariant the disk is valid (`disk_to_dev()`).
        unsafe { &raw mut (*(*self.disk.as_ptr()).part0).bd_device }
    }

    /// Something that this disk's queue operations can read.
    pub(crate) fn published<T>(&self) -> Published<T> {
        Published::new(self.queue())
    }

    /// Something that this disk's dispatches can read.
    pub(crate) fn dispatched<T>(&self, value: Arc<T>) -> Dispatched<T> {
        Dispatched::new(self.queue(), value)
    }

    /// Has all hardware queues run, by and by.
    pub(crate) fn run_queues(&self) {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { bindings::blk_mq_run_hw_queues(self.queue(), true) };
    }

    /// How many have the disk or one of its partitions open (`disk_openers()`).
    pub(crate) fn openers(&self) -> u32 {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { openers(self.disk.as_ptr()) }
    }

    /// The disk's size (`get_capacity()`).
    pub(crate) fn capacity(&self) -> Sectors {
        // SAFETY: By the type invariant the disk is valid. A torn read is impossible on 64 bits.
        Sectors(unsafe {
            (&raw const (*(*self.disk.as_ptr()).part0).bd_nr_sectors).read_volatile()
        })
    }

    /// Sets the size without telling anybody.
    pub(crate) fn set_capacity(&self, size: Sectors) {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { bindings::set_capacity(self.disk.as_ptr(), size.0) };
    }

    /// Sets the size; tells user space and the log where it has changed to or from something other
    /// than zero. Returns whether it told.
    pub(crate) fn set_capacity_and_notify(&self, size: Sectors) -> bool {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { bindings::set_capacity_and_notify(self.disk.as_ptr(), size.0) }
    }

    /// Sends user space a "change" uevent. May sleep.
    pub(crate) fn uevent_change(&self) {
        // SAFETY: By the type invariant the disk is valid. An event that is lost cannot be helped.
        unsafe {
            bindings::kobject_uevent(
                &raw mut (*self.device()).kobj,
                bindings::kobject_action_KOBJ_CHANGE,
            )
        };
    }

    /// Sets or clears read-only.
    pub(crate) fn set_read_only(&self, ro: bool) {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { bindings::set_disk_ro(self.disk.as_ptr(), ro) };
    }

    /// The next open reads the partition table.
    pub(crate) fn need_partition_scan(&self) {
        // SAFETY: By the type invariant the disk is valid; others change other bits meanwhile.
        unsafe {
            bindings::set_bit(
                bindings::GD_NEED_PART_SCAN as usize,
                &raw mut (*self.disk.as_ptr()).state,
            )
        };
    }

    /// Drops what is cached of the disk, and sets its size to zero. May sleep.
    pub(crate) fn invalidate(&self) {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { bindings::invalidate_disk(self.disk.as_ptr()) };
    }

    /// Says that the medium has changed: user space is told, what is cached is dropped. May sleep.
    pub(crate) fn force_media_change(&self) {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { bindings::disk_force_media_change(self.disk.as_ptr()) };
    }

    /// Asks for `count` hardware queues; the block layer makes at most one for each CPU. The queue is
    /// frozen where the number changes. May sleep.
    pub(crate) fn set_hw_queues(&self, count: u32) {
        // SAFETY: By the type invariant the disk is valid, and so is its queue's tag set.
        unsafe {
            let tags = (*self.queue()).tag_set;
            if (*tags).nr_hw_queues != count {
                bindings::blk_mq_update_nr_hw_queues(tags, count as i32);
            }
        }
    }

    /// How many hardware queues there are.
    pub(crate) fn hw_queues(&self) -> u32 {
        // SAFETY: By the type invariant the disk is valid, and so is its queue's tag set.
        unsafe { (*(*self.queue()).tag_set).nr_hw_queues }
    }

    /// How long a request may take, in jiffies.
    pub(crate) fn set_request_timeout(&self, jiffies: u32) {
        // SAFETY: By the type invariant the disk is valid.
        unsafe { bindings::blk_queue_rq_timeout(self.queue(), jiffies) };
    }
}
