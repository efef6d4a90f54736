// SPDX-License-Identifier: GPL-2.0
//! What debugfs and netlink tell about a running session.

#![forbid(unsafe_code)]

use super::Device;
use crate::{
    kapi::task,
    rnbd_session::Session, //
};
use kernel::{
    str::CStr,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
};

/// The data of a session that was started, until its device is free again.
///
/// Reading it takes no lock that a task holds which waits for a server, or for the readers.
pub(crate) struct Running {
    pub(super) pid: Atomic<i32>,
    pub(crate) session: Arc<Session>,
    /// The server's transmission flags (`NBD_FLAG_*`).
    pub(crate) flags: u32,
    /// The session was started by netlink.
    pub(crate) by_netlink: bool,
    pub(super) size_bytes: Atomic<u64>,
    pub(super) block_bytes: Atomic<u32>,
}

impl Running {
    /// Returns the identifier of the backend, if there is one.
    pub(crate) fn backend(&self) -> Option<&CStr> {
        self.session.table().origin.backend.as_deref()
    }

    /// Returns the process that has started the session.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.load(Relaxed)
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Relaxed)
    }

    pub(crate) fn block_bytes(&self) -> u32 {
        self.block_bytes.load(Relaxed)
    }

    /// Returns the request timeout in milliseconds, 0 if none was set.
    pub(crate) fn timeout_ms(&self) -> u64 {
        task::jiffies_to_ms(self.session.table().timeout_jiffies() as usize)
    }
}

impl Device {
    /// Returns the session that was started, unless the device is free again.
    pub(crate) fn running(&self) -> Option<Arc<Running>> {
        self.usage.lock().running.clone()
    }

    /// Shows a session, or none. The caller holds the configuration lock.
    pub(super) fn show(&self, running: Option<Arc<Running>>) {
        let before = core::mem::replace(&mut self.usage.lock().running, running);
        // Not under the spin lock.
        drop(before);
    }
}
