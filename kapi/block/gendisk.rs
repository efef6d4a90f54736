// SPDX-License-Identifier: GPL-2.0
//! Disks: `struct gendisk`, its block device operations and its sysfs files.
//!
//! Mirrors `kernel::block::mq::gen_disk`, which (7.3) has no block device operations, no owner, no
//! fixed device numbers, no sysfs files, and of the limits only the block sizes and the rotational
//! flag.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use super::{
    disk::{
        DiskRef,
        OpenMutexHeld,
        QueueId, //
    },
    limits::FixedLimits,
    mq::{
        Operations,
        TagSet, //
    },
    published,
};
use crate::kapi::bindings;
use core::{
    fmt::Write,
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::{
        from_err_ptr,
        from_result,
        to_result, //
    },
    ffi,
    fmt,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full, //
        },
        Arc, //
    }, //
};

/// The data that a driver attaches to a disk, and its block device operations.
///
/// # Context
///
/// All operations may sleep.
pub(crate) trait BlockDevice: Operations {
    /// Called when the disk or one of its partitions is opened, with the disk's `open_mutex` held.
    fn open(disk: &GenDisk<Self>, purpose: Purpose) -> Result;

    /// Called when the disk or one of its partitions was closed, with the disk's `open_mutex` held.
    /// `openers` is the number of remaining openers.
    fn release(disk: &GenDisk<Self>, held: &OpenMutexHeld<'_>, openers: u32);

    /// Called for an ioctl that the block layer does not handle itself, native or compat.
    fn ioctl(disk: &GenDisk<Self>, cmd: u32, arg: usize) -> Result<usize>;

    /// Returns the number for the sysfs file `pid`.
    fn pid(&self) -> i32;

    /// Passes the contents of the sysfs file `backend` to `print`, and returns what that returns.
    fn backend(&self, print: impl FnOnce(&CStr) -> isize) -> isize;
}

/// What a disk is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Anything, which an unreadable partition table does not prevent.
    Use,
    /// To read the partition table, so that the open fails if that fails (`BLK_OPEN_STRICT_SCAN`).
    Scan,
}

/// The device numbers of a disk and its partitions.
pub(crate) struct Numbers {
    pub(crate) major: u32,
    pub(crate) first_minor: u32,
    pub(crate) minors: u32,
}

/// A disk that is visible to user space.
///
/// Dropping it removes the disk. The `T` is dropped later, when the last user of the gendisk is
/// gone.
///
/// # Invariants
///
/// `disk` satisfies the invariants of [`GenDisk<T>`]. It was added, and only [`Self::remove()`]
/// removes it. A `Disk` owns a reference to it.
pub(crate) struct Disk<T: BlockDevice> {
    disk: NonNull<bindings::gendisk>,
    removed: Atomic<i32>,
    _data: PhantomData<KBox<T>>,
}

// SAFETY: Any task may remove a disk and drop a reference to it. `T` is `Send` and `Sync`.
unsafe impl<T: BlockDevice> Send for Disk<T> {}
// SAFETY: `&Disk` offers a `&GenDisk`, which is `Sync`, and `remove()`, which removes the disk only
// once.
unsafe impl<T: BlockDevice> Sync for Disk<T> {}

/// The data that the `private_data` of a gendisk points to.
#[pin_data]
struct Private<T: BlockDevice> {
    /// The tag set of the queue, which refers to it as long as the disk exists. It must be dropped
    /// before `data`, since that sleeps: once `data` has dropped its last reference to a workqueue,
    /// the module may be unloaded as soon as this task sleeps.
    _tags: Arc<TagSet<T>>,
    #[pin]
    data: T,
}

impl<T: BlockDevice> Disk<T> {
    /// Creates a disk and makes it visible to user space. `init` initialises the driver's data.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn add<I: PinInit<T, Error>>(
        tags: Arc<TagSet<T>>,
        limits: FixedLimits,
        numbers: Numbers,
        name: fmt::Arguments<'_>,
        init: impl FnOnce(QueueId) -> I,
    ) -> Result<Self> {
        let mut lim: bindings::queue_limits = pin_init::zeroed();
        lim.max_hw_sectors = limits.max_hw_sectors;
        lim.max_segments = limits.max_segments;
        lim.max_segment_size = limits.max_segment_size;
        lim.io_opt = limits.io_opt_bytes;
        // SAFETY: The tag set is initialised and outlives the disk. If this function fails, `tags`
        // is dropped after `put_disk()`; otherwise `free_disk` drops it.
        let disk = from_err_ptr(unsafe {
            bindings::__blk_mq_alloc_disk(
                tags.as_ptr(),
                &mut lim,
                core::ptr::null_mut(),
                kernel::static_lock_class!().as_ptr(),
            )
        })?;
        let disk = NonNull::new(disk).ok_or(ENOMEM)?;
        // The block layer does not call `free_disk` for a disk that was never added.
        Self::fill_and_add(disk, tags.clone(), numbers, name, init).inspect_err(|_| {
            // SAFETY: The disk was not added, and its only reference is dropped here.
            unsafe { bindings::put_disk(disk.as_ptr()) }
        })?;
        // INVARIANT: `fill_and_add()` added the disk. The reference is that of the allocation.
        Ok(Disk {
            disk,
            removed: Atomic::new(0),
            _data: PhantomData,
        })
    }

    fn fill_and_add<I: PinInit<T, Error>>(
        disk: NonNull<bindings::gendisk>,
        tags: Arc<TagSet<T>>,
        numbers: Numbers,
        name: fmt::Arguments<'_>,
        init: impl FnOnce(QueueId) -> I,
    ) -> Result {
        let raw = disk.as_ptr();
        // SAFETY: The disk was just allocated, with a queue.
        let queue = unsafe { (*raw).queue };
        let private = KBox::pin_init(
            try_pin_init!(Private {
                _tags: tags,
                data <- init(QueueId::new(queue)),
            }? Error),
            GFP_KERNEL,
        )?;
        // SAFETY: The value is never moved: it is used through shared references, and dropped in
        // place.
        let private = KBox::into_raw(unsafe { Pin::into_inner_unchecked(private) });
        // SAFETY: `private` is valid; this only computes the address of a field.
        let data = unsafe { &raw mut (*private).data };
        // SAFETY: The disk is valid, and nothing else uses it yet.
        let gendisk = unsafe { &mut *raw };
        gendisk.major = numbers.major as i32;
        gendisk.first_minor = numbers.first_minor as i32;
        gendisk.minors = numbers.minors as i32;
        gendisk.fops = &Self::FOPS;
        gendisk.private_data = private.cast();
        // SAFETY: The queue is valid, and nothing else uses it yet.
        unsafe { (*queue).queuedata = data.cast() };
        let added = Self::set_name(&mut gendisk.disk_name, name).and_then(|()| {
            let none = core::ptr::null_mut();
            // SAFETY: The disk is complete, and is added only once.
            to_result(unsafe { bindings::device_add_disk(none, raw, core::ptr::null_mut()) })
        });
        added.inspect_err(|_| {
            // SAFETY: `private` was returned by `into_raw()`. The disk was not added, so nothing
            // uses it.
            drop(unsafe { KBox::from_raw(private) });
        })
    }

    fn set_name(to: &mut [ffi::c_char], name: fmt::Arguments<'_>) -> Result {
        NameWriter { to, len: 0 }
            .write_fmt(name)
            .map_err(|_| EINVAL)
    }

    /// Implements `block_device_operations.open`.
    ///
    /// # Safety
    ///
    /// `disk` must be a disk of this type, to which the caller holds a reference.
    unsafe extern "C" fn open(
        disk: *mut bindings::gendisk,
        mode: bindings::blk_mode_t,
    ) -> ffi::c_int {
        // SAFETY: By this function's safety requirements. The block layer calls it for disks with
        // `FOPS`.
        let disk = unsafe { GenDisk::from_raw(disk) };
        let purpose = match mode & bindings::BLK_OPEN_STRICT_SCAN {
            0 => Purpose::Use,
            _ => Purpose::Scan,
        };
        from_result(|| T::open(disk, purpose).map(|()| 0))
    }

    /// Implements `block_device_operations.release`.
    ///
    /// # Safety
    ///
    /// As for [`Self::open()`].
    unsafe extern "C" fn release(disk: *mut bindings::gendisk) {
        // SAFETY: By this function's safety requirements. The block layer calls it for disks with
        // `FOPS`.
        let disk = unsafe { GenDisk::from_raw(disk) };
        // SAFETY: The block layer calls this with the `open_mutex` held (`blkdev_put_whole()`).
        let held = unsafe { OpenMutexHeld::new(&disk.disk) };
        T::release(disk, &held, disk.disk.openers());
    }

    /// Implements `block_device_operations.ioctl` and `.compat_ioctl`.
    ///
    /// # Safety
    ///
    /// `bdev` must be an open block device of a disk of this type.
    unsafe extern "C" fn ioctl(
        bdev: *mut bindings::block_device,
        _mode: bindings::blk_mode_t,
        cmd: ffi::c_uint,
        arg: ffi::c_ulong,
    ) -> ffi::c_int {
        // SAFETY: By this function's safety requirements. The block layer calls it for disks with
        // `FOPS`, and an open block device holds a reference to its disk.
        let disk = unsafe { GenDisk::from_raw((*bdev).bd_disk) };
        from_result(|| T::ioctl(disk, cmd, arg).map(|v| v as ffi::c_int))
    }

    /// Implements `block_device_operations.free_disk`.
    ///
    /// # Safety
    ///
    /// `disk` must be a disk of this type that nothing uses any more.
    unsafe extern "C" fn free_disk(disk: *mut bindings::gendisk) {
        // SAFETY: By this function's safety requirements, the disk is valid and of this type.
        let private = unsafe { (*disk).private_data.cast::<Private<T>>() };
        // SAFETY: `private` was returned by `KBox::into_raw()`. By this function's safety
        // requirements, nothing uses the disk any more.
        drop(unsafe { KBox::from_raw(private) });
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

    /// Removes the disk from user space and waits for all requests in flight, and for all dispatches.
    ///
    /// If the removal has already begun, returns at once.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn remove(&self) {
        if self.removed.xchg(1, Full) == 0 {
            // SAFETY: By the type invariant, the disk was added. The exchange lets only one caller
            // pass.
            unsafe { bindings::del_gendisk(self.disk.as_ptr()) };
            // `queue_rq` may still be running although its request has ended. What it uses is freed
            // with the disk: the driver's data, and the queue.
            let gendisk: &GenDisk<T> = self;
            published::wait_for_dispatches(&gendisk.disk);
        }
    }
}

impl<T: BlockDevice> core::ops::Deref for Disk<T> {
    type Target = GenDisk<T>;

    fn deref(&self) -> &GenDisk<T> {
        // SAFETY: By the type invariant, the disk is a `GenDisk<T>`, and `self` holds a reference
        // to it.
        unsafe { GenDisk::from_raw(self.disk.as_ptr()) }
    }
}

impl<T: BlockDevice> Drop for Disk<T> {
    fn drop(&mut self) {
        self.remove();
        // SAFETY: By the type invariant, `self` owns this reference.
        unsafe { bindings::put_disk(self.disk.as_ptr()) };
    }
}

/// A disk to which a driver attached a `T`.
///
/// There are only references to it, which kapi lends; they cannot be kept. A reference gives access
/// to the disk and, by `Deref`, to the `T`.
///
/// # Invariants
///
/// The disk satisfies the invariants of [`DiskRef`]. Its `private_data` points to a [`Private<T>`],
/// which `free_disk` frees.
#[repr(transparent)]
pub(crate) struct GenDisk<T: BlockDevice> {
    /// The operations that do not depend on `T`.
    pub(crate) disk: DiskRef,
    _data: PhantomData<T>,
}

impl<T: BlockDevice> GenDisk<T> {
    /// # Safety
    ///
    /// `disk` must have been created by [`Disk::<T>::add()`], and must not be freed during `'a`.
    unsafe fn from_raw<'a>(disk: *mut bindings::gendisk) -> &'a Self {
        // SAFETY: By this function's safety requirements, the disk is valid during `'a`. Both types
        // are transparent.
        // INVARIANT: `Disk::<T>::add()` has set the `private_data`.
        unsafe { &*disk.cast::<Self>() }
    }

    /// # Safety
    ///
    /// `dev` must be the device of a disk that was created by [`Disk::<T>::add()`] and is not freed
    /// during `'a`.
    unsafe fn from_device<'a>(dev: *mut bindings::device) -> &'a Self {
        // SAFETY: By this function's safety requirements, this is the device of a disk, which is
        // embedded in the disk's first block device (`dev_to_disk()`).
        let disk = unsafe {
            let bdev = kernel::container_of!(dev, bindings::block_device, bd_device);
            (*bdev).bd_disk
        };
        // SAFETY: By this function's safety requirements, `Disk::<T>::add()` created the disk,
        // which is not freed during `'a`.
        unsafe { Self::from_raw(disk) }
    }

    /// Creates a sysfs file of this disk.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn add_file(&self, file: File) -> Result {
        // SAFETY: By the type invariant, the disk is valid and of the type that the attribute is
        // for. The attribute is static.
        to_result(unsafe {
            bindings::device_create_file(self.disk.device(), Self::attribute(file))
        })
    }

    /// Removes a sysfs file, if it exists. Waits for tasks that read it.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn remove_file(&self, file: File) {
        // SAFETY: By the type invariant, the disk is valid. If it has no such file, nothing
        // happens.
        unsafe { bindings::device_remove_file(self.disk.device(), Self::attribute(file)) };
    }

    fn attribute(file: File) -> &'static bindings::device_attribute {
        const fn attribute(name: &'static CStr, show: Show) -> bindings::device_attribute {
            let mut attr: bindings::device_attribute = pin_init::zeroed();
            attr.attr.name = kernel::str::as_char_ptr_in_const_context(name);
            attr.attr.mode = 0o444;
            attr.__bindgen_anon_1.show = Some(show);
            attr
        }
        match file {
            File::Pid => const { &attribute(c"pid", Self::pid_show) },
            File::Backend => const { &attribute(c"backend", Self::backend_show) },
        }
    }

    /// Implements `device_attribute.show` of the file `pid`.
    ///
    /// # Safety
    ///
    /// `dev` must be the device of a disk of this type, and `buf` the start of a page.
    unsafe extern "C" fn pid_show(
        dev: *mut bindings::device,
        _attr: *mut bindings::device_attribute,
        buf: *mut ffi::c_char,
    ) -> isize {
        // SAFETY: By this function's safety requirements. `add_file()` created the file for a disk
        // of this type, and sysfs keeps the disk until this returns.
        let disk = unsafe { Self::from_device(dev) };
        // SAFETY: By this function's safety requirements, `buf` is a page. The format takes one
        // number.
        unsafe { bindings::sysfs_emit(buf, c"%d\n".as_char_ptr(), disk.pid()) as isize }
    }

    /// Implements `device_attribute.show` of the file `backend`.
    ///
    /// # Safety
    ///
    /// As for [`Self::pid_show()`].
    unsafe extern "C" fn backend_show(
        dev: *mut bindings::device,
        _attr: *mut bindings::device_attribute,
        buf: *mut ffi::c_char,
    ) -> isize {
        // SAFETY: By this function's safety requirements. `add_file()` created the file for a disk
        // of this type, and sysfs keeps the disk until this returns.
        let disk = unsafe { Self::from_device(dev) };
        disk.backend(|backend| {
            let format = c"%s\n".as_char_ptr();
            // SAFETY: By this function's safety requirements, `buf` is a page. The format takes one
            // NUL-terminated string.
            unsafe { bindings::sysfs_emit(buf, format, backend.as_char_ptr()) as isize }
        })
    }
}

impl<T: BlockDevice> core::ops::Deref for GenDisk<T> {
    type Target = T;

    /// Returns the driver's data.
    fn deref(&self) -> &T {
        // SAFETY: By the type invariant, `private_data` is a `Private<T>`, which lives as long as
        // the disk.
        let private = unsafe { &*(*self.disk.as_ptr()).private_data.cast::<Private<T>>() };
        &private.data
    }
}

/// A sysfs file of a disk.
#[derive(Clone, Copy)]
pub(crate) enum File {
    /// The file `pid`, which shows [`BlockDevice::pid()`].
    Pid,
    /// The file `backend`, which shows [`BlockDevice::backend()`].
    Backend,
}

type Show = unsafe extern "C" fn(
    *mut bindings::device,
    *mut bindings::device_attribute,
    *mut ffi::c_char,
) -> isize;

/// Writes a name into a field of zeroes, and leaves at least the last of them as the terminator.
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
