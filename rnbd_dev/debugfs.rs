// SPDX-License-Identifier: GPL-2.0
//! The files of a running session in `/sys/kernel/debug/nbd/nbdN/` (`nbd_dev_dbg_init()`).
//!
//! These are nbd.c's files `tasks`, `size_bytes`, `timeout`, `blocksize_bits` and `flags`, and in
//! addition `connections`.

#![forbid(unsafe_code)]

use super::{
    running::Running,
    Device, //
};
use crate::{
    kapi::task,
    pure::proto::flags, //
};
use kernel::{
    debugfs::{
        Dir,
        Scope, //
    },
    fmt,
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    },
};

/// The files of a session. Dropping it removes them, and waits for tasks that are reading them.
pub(super) type Files = Pin<KBox<Scope<Arc<Running>>>>;

impl Device {
    /// Creates the files of the session, if there is one without them. The start leaves that to a work item,
    /// because it would take a quarter longer.
    ///
    /// This does not take the configuration lock: a task may sleep in debugfs's directory, which has a lock
    /// of its own, for as long as its memory is on a device without a server.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn add_debugfs(&self) {
        let mut files = self.debugfs_files.lock();
        if files.is_some() {
            return;
        }
        if let Some(running) = self.running() {
            // An allocation must not wait for writeback, which may be waiting for this very device. As in
            // nbd.c, the device works even without the files.
            let added = task::memalloc_noio(|| add_files(&self.debugfs, self.index, running));
            *files = added.ok();
        }
    }

    /// Removes the files (`nbd_dev_dbg_close()`). The session must not be shown any more.
    ///
    /// # Context
    ///
    /// Waits for tasks that are reading the files.
    pub(super) fn remove_debugfs(&self) {
        *self.debugfs_files.lock() = None;
    }
}

/// Creates the files of `nbd{index}` in the directory `root`.
///
/// # Errors
///
/// `ENOMEM`.
///
/// # Context
///
/// May sleep.
fn add_files(root: &Dir, index: u32, data: Arc<Running>) -> Result<Files> {
    let name = kernel::str::CString::try_from_fmt(fmt!("nbd{index}"))?;
    KBox::pin_init(
        root.scope(data, &name, |data: &Arc<Running>, dir| {
            dir.read_callback_file(c"connections", data, &|s: &Arc<Running>, f| {
                s.session.describe_connections(f)
            });
            dir.read_callback_file(c"tasks", data, &|s: &Arc<Running>, f| {
                writeln!(f, "recv: {}", s.pid.load(Relaxed))
            });
            dir.read_callback_file(c"size_bytes", data, &|s: &Arc<Running>, f| {
                writeln!(f, "{}", s.size_bytes.load(Relaxed))
            });
            dir.read_callback_file(c"timeout", data, &|s: &Arc<Running>, f| {
                writeln!(f, "{}", s.session.table().timeout_jiffies())
            });
            dir.read_callback_file(c"blocksize_bits", data, &|s: &Arc<Running>, f| {
                writeln!(f, "{}", s.block_bytes.load(Relaxed).trailing_zeros())
            });
            // Who waits for all files waits for the last one.
            dir.read_callback_file(c"flags", data, &|s: &Arc<Running>, f| {
                write_flags(s.flags, f)
            });
        }),
        GFP_KERNEL,
    )
}

/// Writes the flags (`nbd_dbg_flags_show()`), and `NBD_FLAG_CAN_MULTI_CONN`, which nbd.c omits.
fn write_flags(flags: u32, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "Hex: 0x{flags:08x}\n\nKnown flags:\n")?;
    for (flag, name) in [
        (1 << 0, "NBD_FLAG_HAS_FLAGS"),
        (flags::READ_ONLY, "NBD_FLAG_READ_ONLY"),
        (flags::SEND_FLUSH, "NBD_FLAG_SEND_FLUSH"),
        (flags::SEND_FUA, "NBD_FLAG_SEND_FUA"),
        (flags::SEND_TRIM, "NBD_FLAG_SEND_TRIM"),
        (flags::SEND_WRITE_ZEROES, "NBD_FLAG_SEND_WRITE_ZEROES"),
        (flags::ROTATIONAL, "NBD_FLAG_ROTATIONAL"),
        (flags::CAN_MULTI_CONN, "NBD_FLAG_CAN_MULTI_CONN"),
    ] {
        if flags & flag != 0 {
            writeln!(f, "{name}")?;
        }
    }
    Ok(())
}
