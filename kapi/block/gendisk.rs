// SPDX-License-Identifier: GPL-2.0
//! Disks: `struct gendisk` and its block device operations.
//!
//! Mirrors `kernel::block::mq::gen_disk`, which (7.3) has no open, release or ioctl, no limits and no
//! owner. Source: `include/linux/blkdev.h`.

use super::{
    disk::{
        DiskRef,
        QueueId, //
    },
    limits::FixedLimits,
    mq::{
        Operations,
        TagSet, //
    },
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

/// The driver's part of a disk, and what user space can do with it. All of it may sleep.
pub(crate) trait BlockDevice: Operations {
    /// Somebody opens the disk or a partition. The disk's `open_mutex` is held.
    fn open(disk: &GenDisk<Self>) -> Result;

    /// Somebody has closed it. `openers`: how many are left. The disk's `open_mutex` is held.
    fn release(disk: &GenDisk<Self>, openers: u32);

    /// An ioctl that the block layer does not handle itself, native or compat.
    fn ioctl(disk: &GenDisk<Self>, cmd: u32, arg: usize) -> Result<usize>;

    /// The number in the sysfs file `pid`.
    fn pid(&self) -> i32;

    /// Gives `print` what the sysfs file `backend` says.
    fn backend(&self, print: impl FnOnce(&CStr) -> isize) -> isize;
}

/// A block device's major number.
///
/// # Invariants
///
/// It is registered for `name`.
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
        // SAFETY: `name` ends with a zero and lives for ever; there is no probe function.
        to_result(unsafe { bindings::__register_blkdev(major, name.as_char_ptr(), None) })?;
        // INVARIANT: It was registered just now.
        Ok(Major { major, name })
    }
}

impl Drop for Major {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is registered with these values.
        unsafe { bindings::unregister_blkdev(self.major, self.name.as_char_ptr()) };
    }
}

/// Where a disk's numbers lie.
pub(crate) struct Numbers {
    pub(crate) major: u32,
    pub(crate) first_minor: u32,
    pub(crate) minors: u32,
}

/// A disk that user space can see. Dropping it removes the disk; the `T` goes when the last user of the
/// gendisk has gone.
///
/// # Invariants
///
/// `disk` is as [`GenDisk<T>`] says, was added, and is removed only by [`Self::remove()`]. This holds a
/// reference to it.
pub(crate) struct Disk<T: BlockDevice> {
    disk: NonNull<bindings::gendisk>,
    removed: Atomic<i32>,
    _data: PhantomData<KBox<T>>,
}

// SAFETY: Every task may remove a disk and let go of it, and `T` is `Send` and `Sync`.
unsafe impl<T: BlockDevice> Send for Disk<T> {}
// SAFETY: `&Disk` offers a `&GenDisk`, which is `Sync`, and the removal, which happens once.
unsafe impl<T: BlockDevice> Sync for Disk<T> {}

/// What a gendisk's `private_data` points to.
#[pin_data]
struct Private<T: BlockDevice> {
    /// The queue refers to it for as long as there is the disk. It goes first, since that sleeps: when the
    /// last workqueue that `data` refers to has been let go of, the module may be unloaded as soon as this
    /// task sleeps.
    _tags: Arc<TagSet<T>>,
    #[pin]
    data: T,
}

impl<T: BlockDevice> Disk<T> {
    /// Makes a disk and shows it to user space. `init` makes the driver's part of it. May sleep.
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
        // SAFETY: The tag set is set up, and outlives the disk: `tags` is dropped after `put_disk()` where
        // this fails, and else with what `free_disk` frees.
        let disk = from_err_ptr(unsafe {
            bindings::__blk_mq_alloc_disk(
                tags.as_ptr(),
                &mut lim,
                core::ptr::null_mut(),
                kernel::static_lock_class!().as_ptr(),
            )
        })?;
        let disk = NonNull::new(disk).ok_or(ENOMEM)?;
        // A disk that was never added does not call `free_disk`.
        Self::fill_and_add(disk, tags.clone(), numbers, name, init).inspect_err(|_| {
            // SAFETY: It is a disk that was not added, and the reference is ours.
            unsafe { bindings::put_disk(disk.as_ptr()) }
        })?;
        // INVARIANT: `fill_and_add()` has added it; the reference is that of the allocation.
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
        // SAFETY: The disk was allocated, with its queue.
        let queue = unsafe { (*raw).queue };
        let private = KBox::pin_init(
            try_pin_init!(Private {
                _tags: tags,
                data <- init(QueueId::new(queue)),
            }? Error),
            GFP_KERNEL,
        )?;
        // SAFETY: It stays where it is: it is only ever seen behind a shared reference, and dropped.
        let private = KBox::into_raw(unsafe { Pin::into_inner_unchecked(private) });
        // SAFETY: `private` is valid, and this only takes the address of a field.
        let data = unsafe { &raw mut (*private).data };
        // SAFETY: Nobody else knows the disk yet.
        let gendisk = unsafe { &mut *raw };
        gendisk.major = numbers.major as i32;
        gendisk.first_minor = numbers.first_minor as i32;
        gendisk.minors = numbers.minors as i32;
        gendisk.fops = &Self::FOPS;
        gendisk.private_data = private.cast();
        // SAFETY: Nobody else knows its queue yet.
        unsafe { (*queue).queuedata = data.cast() };
        let added = Self::set_name(&mut gendisk.disk_name, name).and_then(|()| {
            let none = core::ptr::null_mut();
            // SAFETY: The disk is complete, and is added this once.
            to_result(unsafe { bindings::device_add_disk(none, raw, core::ptr::null_mut()) })
        });
        added.inspect_err(|_| {
            // SAFETY: It came from `into_raw()`; the disk was not added, so nobody uses it.
            drop(unsafe { KBox::from_raw(private) });
        })
    }

    fn set_name(to: &mut [ffi::c_char], name: fmt::Arguments<'_>) -> Result {
        NameWriter { to, len: 0 }
            .write_fmt(name)
            .map_err(|_| EINVAL)
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
        // SAFETY: The block layer calls this for a disk with our `FOPS`, which it holds.
        let disk = unsafe { GenDisk::from_raw(disk) };
        from_result(|| T::open(disk).map(|()| 0))
    }

    /// `block_device_operations.release`
    ///
    /// # Safety
    ///
    /// As for [`Self::open()`].
    unsafe extern "C" fn release(disk: *mut bindings::gendisk) {
        // SAFETY: The block layer calls this for a disk with our `FOPS`, which it holds.
        let disk = unsafe { GenDisk::from_raw(disk) };
        T::release(disk, disk.disk.openers());
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
        // SAFETY: The block layer passes a block device that is open, of a disk with our `FOPS`.
        let disk = unsafe { GenDisk::from_raw((*bdev).bd_disk) };
        from_result(|| T::ioctl(disk, cmd, arg).map(|v| v as ffi::c_int))
    }

    /// `block_device_operations.free_disk`
    ///
    /// # Safety
    ///
    /// `disk` must be a disk of this type, and this the last use of it.
    unsafe extern "C" fn free_disk(disk: *mut bindings::gendisk) {
        // SAFETY: The block layer calls this for a disk with our `FOPS`.
        let private = unsafe { (*disk).private_data.cast::<Private<T>>() };
        // SAFETY: It came from `KBox::into_raw()`, and nobody uses the disk or its queue any more.
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

    /// Takes the disk away from user space, unless that was begun before. Waits for everything in
    /// flight; may sleep.
    pub(crate) fn remove(&self) {
        if self.removed.xchg(1, Full) == 0 {
            // SAFETY: By the type invariant it was added, and nobody has come here before.
            unsafe { bindings::del_gendisk(self.disk.as_ptr()) };
        }
    }
}

impl<T: BlockDevice> core::ops::Deref for Disk<T> {
    type Target = GenDisk<T>;

    fn deref(&self) -> &GenDisk<T> {
        // SAFETY: By the type invariant it is one, and `self` holds a reference.
        unsafe { GenDisk::from_raw(self.disk.as_ptr()) }
    }
}

impl<T: BlockDevice> Drop for Disk<T> {
    fn drop(&mut self) {
        self.remove();
        // SAFETY: By the type invariant this is our reference.
        unsafe { bindings::put_disk(self.disk.as_ptr()) };
    }
}

/// A disk whose driver's part is a `T`: who has a reference to it can use both. It cannot be kept.
///
/// # Invariants
///
/// Its `private_data` is a [`Private<T>`], which `free_disk` frees.
#[repr(transparent)]
pub(crate) struct GenDisk<T: BlockDevice> {
    /// What can be done with any disk.
    pub(crate) disk: DiskRef,
    _data: PhantomData<T>,
}

impl<T: BlockDevice> GenDisk<T> {
    /// # Safety
    ///
    /// `disk` must be a disk that [`Disk::<T>::add()`] has made, and the caller hold it for `'a`.
    unsafe fn from_raw<'a>(disk: *mut bindings::gendisk) -> &'a Self {
        // SAFETY: By this function's precondition it is valid for `'a`, and both types are transparent.
        // INVARIANT: `Disk::<T>::add()` has set its `private_data`.
        unsafe { &*disk.cast::<Self>() }
    }

    /// # Safety
    ///
    /// `dev` must be the device of a disk that [`Disk::<T>::add()`] has made, and the caller hold it for
    /// `'a`.
    unsafe fn from_device<'a>(dev: *mut bindings::device) -> &'a Self {
        // SAFETY: By this function's precondition it is a disk's, whose device is that of its first block
        // device (`dev_to_disk()`).
        let disk = unsafe {
            let bdev = kernel::container_of!(dev, bindings::block_device, bd_device);
            (*bdev).bd_disk
        };
        // SAFETY: By this function's precondition `Disk::<T>::add()` has made it, and the caller holds it.
        unsafe { Self::from_raw(disk) }
    }

    /// Makes a sysfs file of this disk. May sleep.
    pub(crate) fn add_file(&self, file: File) -> Result {
        // SAFETY: The disk is valid and of the type that the attribute is for, which lives for ever.
        to_result(unsafe {
            bindings::device_create_file(self.disk.device(), Self::attribute(file))
        })
    }

    /// Removes a sysfs file again. Waits for its readers.
    pub(crate) fn remove_file(&self, file: File) {
        // SAFETY: The disk is valid; where it has no such file nothing happens.
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
        // SAFETY: `add_file()` has made the file for a disk of this type, which sysfs holds.
        let disk = unsafe { Self::from_device(dev) };
        // SAFETY: sysfs gives a page; the format asks for one number.
        unsafe { bindings::sysfs_emit(buf, c"%d\n".as_char_ptr(), disk.pid()) as isize }
    }

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
        // SAFETY: `add_file()` has made the file for a disk of this type, which sysfs holds.
        let disk = unsafe { Self::from_device(dev) };
        disk.backend(|backend| {
            let format = c"%s\n".as_char_ptr();
            // SAFETY: sysfs gives a page; the format asks for one string, and this one ends with a zero.
            unsafe { bindings::sysfs_emit(buf, format, backend.as_char_ptr()) as isize }
        })
    }
}

impl<T: BlockDevice> core::ops::Deref for GenDisk<T> {
    type Target = T;

    /// The driver's part of the disk.
    fn deref(&self) -> &T {
        // SAFETY: By the type invariant it is a `Private<T>`, which lives for as long as the disk.
        let private = unsafe { &*(*self.disk.as_ptr()).private_data.cast::<Private<T>>() };
        &private.data
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
