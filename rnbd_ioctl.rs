// SPDX-License-Identifier: GPL-2.0
//! The block device operations of `/dev/nbdN` (`nbd_fops`), with the ioctls of nbd.
//!
//! This is one of the two front ends; the other one is `rnbd_netlink.rs`.
//!
//! C header: [`include/uapi/linux/nbd.h`](srctree/include/uapi/linux/nbd.h)

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        block::{
            disk::OpenMutexHeld,
            gendisk::{
                BlockDevice,
                Purpose, //
            },
        },
        task, //
    },
    rnbd_dev::{
        Device,
        Nbd, //
    },
};
use kernel::{
    ioctl::{
        _IO,
        _IOC_TYPE, //
    },
    prelude::*,
    sync::atomic::Relaxed, //
};

const TYPE: u32 = 0xab;
const NBD_SET_SOCK: u32 = _IO(TYPE, 0);
const NBD_SET_BLKSIZE: u32 = _IO(TYPE, 1);
const NBD_SET_SIZE: u32 = _IO(TYPE, 2);
const NBD_DO_IT: u32 = _IO(TYPE, 3);
const NBD_CLEAR_SOCK: u32 = _IO(TYPE, 4);
const NBD_CLEAR_QUE: u32 = _IO(TYPE, 5);
const NBD_PRINT_DEBUG: u32 = _IO(TYPE, 6);
const NBD_SET_SIZE_BLOCKS: u32 = _IO(TYPE, 7);
const NBD_DISCONNECT: u32 = _IO(TYPE, 8);
const NBD_SET_TIMEOUT: u32 = _IO(TYPE, 9);
const NBD_SET_FLAGS: u32 = _IO(TYPE, 10);

impl BlockDevice for Nbd {
    fn open(device: &Device, purpose: Purpose) -> Result {
        device.open(purpose)
    }

    fn release(device: &Device, held: &OpenMutexHeld<'_>, openers: u32) {
        device.close(held, openers);
    }

    fn ioctl(device: &Device, cmd: u32, arg: usize) -> Result<usize> {
        ioctl(device, cmd, arg)
    }

    fn pid(&self) -> i32 {
        self.pid.load(Relaxed)
    }

    fn backend(&self, print: impl FnOnce(&CStr) -> isize) -> isize {
        print(self.backend.lock().as_deref().unwrap_or(c""))
    }
}

/// Handles an ioctl, native or compat (`nbd_ioctl()`). The argument is a number, never a pointer.
///
/// # Errors
///
/// - `EPERM`: the caller does not have `CAP_SYS_ADMIN`.
/// - `EINVAL`: the ioctl is not one of nbd, or the device was configured by netlink.
/// - `ENOTTY`: nbd does not have this ioctl.
/// - Those of the operation.
///
/// # Context
///
/// May sleep.
fn ioctl(device: &Device, cmd: u32, arg: usize) -> Result<usize> {
    if !task::may_administer() {
        return Err(EPERM);
    }
    if _IOC_TYPE(cmd) != TYPE {
        return Err(EINVAL);
    }
    // Of a device that was configured by netlink, all but the first two fail. Each operation checks
    // that under the lock, since netlink can connect a device that is merely open at any time.
    match cmd {
        NBD_DISCONNECT => device.disconnect(),
        NBD_CLEAR_SOCK => device.clear_sockets(),
        NBD_SET_SOCK => device.add_socket(arg),
        NBD_SET_BLKSIZE => device.set_block_bytes(arg),
        NBD_SET_SIZE => device.set_size_bytes(arg),
        NBD_SET_SIZE_BLOCKS => device.set_size_blocks(arg),
        NBD_SET_TIMEOUT => device.set_timeout_seconds(arg),
        NBD_SET_FLAGS => device.set_flags(arg),
        NBD_DO_IT => device.run(),
        // These are accepted for compatibility only. The end of a session clears the queue, and
        // there is no list of requests to print.
        NBD_CLEAR_QUE | NBD_PRINT_DEBUG => device.check_ioctl(),
        _ => device.check_ioctl().and(Err(ENOTTY)),
    }
    .map(|()| 0)
}
