// SPDX-License-Identifier: GPL-2.0
//! The files of a running session in `/sys/kernel/debug/nbd/nbdN/` (`nbd_dev_dbg_init()`).
//!
//! These are nbd.c's files `tasks`, `size_bytes`, `timeout`, `blocksize_bits` and `flags`, and in
//! addition `connections`.

#![forbid(unsafe_code)]

use super::Device;
use crate::{
    kapi::task,
    pure::{
        proto::flags, //
    },
    rnbd_session::Session, //
};
use kernel::{
    debugfs::{
        Dir,
        Scope, //
    },
    fmt,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
};

/// The data that the files show.
///
/// Reading a file takes no lock that the task which removes the files holds.
pub(super) struct FileData {
    pub(super) pid: Atomic<i32>,
    pub(super) session: Arc<Session>,
    pub(super) flags: u32,
    pub(super) size_bytes: Atomic<u64>,
    pub(super) block_bytes: Atomic<u32>,
}

/// The files of a session. Dropping it removes them, and waits for tasks that are reading them.
pub(super) type Files = Pin<KBox<Scope<Arc<FileData>>>>;

impl Device {
    /// Creates the files of a session, unless it has them or is gone. A start leaves this to a work item:
    /// it takes a quarter of the time of a start, and nothing else depends on it.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn add_debugfs(&self) {
        let mut state = self.lock();
        let Some(config) = &mut state.config else {
            return;
        };
        let missing = config.debugfs_files.is_none();
        let Some(data) = config.debugfs_data.clone().filter(|_| missing) else {
            return;
        };
        // An allocation must not wait for writeback, which may be waiting for this very device.
        let files = task::memalloc_noio(|| add_files(&self.debugfs, self.index, data));
        // As in nbd.c, the device works even without them.
        config.debugfs_files = files.ok();
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
fn add_files(root: &Dir, index: u32, data: Arc<FileData>) -> Result<Files> {
    let name = kernel::str::CString::try_from_fmt(fmt!("nbd{index}"))?;
    KBox::pin_init(
        root.scope(data, &name, |data: &Arc<FileData>, dir| {
            dir.read_callback_file(c"connections", data, &|s: &Arc<FileData>, f| {
                s.session.describe_connections(f)
            });
            dir.read_callback_file(c"tasks", data, &|s: &Arc<FileData>, f| {
                writeln!(f, "recv: {}", s.pid.load(Relaxed))
            });
            dir.read_callback_file(c"size_bytes", data, &|s: &Arc<FileData>, f| {
                writeln!(f, "{}", s.size_bytes.load(Relaxed))
            });
            dir.read_callback_file(c"timeout", data, &|s: &Arc<FileData>, f| {
                writeln!(f, "{}", s.session.table().timeout_jiffies())
            });
            dir.read_callback_file(c"blocksize_bits", data, &|s: &Arc<FileData>, f| {
                writeln!(f, "{}", s.block_bytes.load(Relaxed).trailing_zeros())
            });
            dir.read_callback_file(c"flags", data, &|s: &Arc<FileData>, f| {
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
