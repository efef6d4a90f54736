// SPDX-License-Identifier: GPL-2.0
//! What debugfs tells about a running session.

#![forbid(unsafe_code)]

use super::Device;
use crate::rnbd_session::Session;
use kernel::sync::{
    atomic::Atomic,
    Arc, //
};

/// The data of a session that was started, until its device is free again.
///
/// Reading it takes no lock that a task holds which waits for a server, or for the readers.
pub(crate) struct Running {
    pub(super) pid: Atomic<i32>,
    pub(super) session: Arc<Session>,
    /// The server's transmission flags (`NBD_FLAG_*`).
    pub(super) flags: u32,
    pub(super) size_bytes: Atomic<u64>,
    pub(super) block_bytes: Atomic<u32>,
}

impl Device {
    /// Returns the session that was started, unless the device is free again.
    pub(super) fn running(&self) -> Option<Arc<Running>> {
        self.usage.lock().running.clone()
    }

    /// Shows a session, or none. The caller holds the configuration lock.
    pub(super) fn show(&self, running: Option<Arc<Running>>) {
        let before = core::mem::replace(&mut self.usage.lock().running, running);
        // Not under the spin lock.
        drop(before);
    }
}
