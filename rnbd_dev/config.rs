// SPDX-License-Identifier: GPL-2.0
//! What user space has set up for a device (`struct nbd_config`).

#![forbid(unsafe_code)]

use super::debugfs::{
    FileData, //
    Files,
};
use crate::{
    kapi::{
        net::sock::{
            Ending,
            Socket, //
        },
        task::{
            ModuleRef,
            TaskId, //
        },
    },
    rnbd_session::Session, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The block size until one is set (`NBD_DEF_BLKSIZE_BITS`).
pub(super) const DEFAULT_BLOCK_BYTES: u32 = 1024;

/// What user space has set up, from the first open to the last close (`struct nbd_config`).
pub(crate) struct Config {
    /// Opens, and the connection that netlink made.
    pub(super) references: u32,
    /// `NBD_FLAG_*`.
    pub(super) flags: u32,
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u32,
    pub(super) sockets: KVec<Socket>,
    /// The task that hands over sockets: no other may.
    pub(super) setup_by: Option<TaskId>,
    /// The device was started; it is not started again before the last close.
    pub(super) started: bool,
    /// The session, from its start to the last close.
    pub(super) session: Option<Arc<Session>>,
    pub(super) disconnect_requested: bool,
    /// Set up by netlink: ioctls may only end it (`NBD_RT_BOUND`).
    pub(super) bound: bool,
    /// Netlink holds a reference (`NBD_RT_HAS_CONFIG_REF`).
    pub(super) held_by_netlink: bool,
    /// The last close disconnects (`NBD_RT_DISCONNECT_ON_CLOSE`).
    pub(super) disconnect_on_close: bool,
    pub(super) has_backend_file: bool,
    /// What debugfs shows of the session, and the files there.
    pub(super) debugfs_data: Option<Arc<FileData>>,
    pub(super) debugfs_files: Option<Files>,
    pub(super) dead_timeout_jiffies: u64,
    _module: ModuleRef,
}

impl Config {
    /// Nothing is set up. Whoever makes it has the one reference.
    ///
    /// # Errors
    ///
    /// `ENODEV` where the module is about to go.
    pub(super) fn new() -> Result<Self> {
        Ok(Config {
            references: 1,
            flags: 0,
            size_bytes: 0,
            block_bytes: DEFAULT_BLOCK_BYTES,
            sockets: KVec::new(),
            setup_by: None,
            started: false,
            session: None,
            disconnect_requested: false,
            bound: false,
            held_by_netlink: false,
            disconnect_on_close: false,
            has_backend_file: false,
            debugfs_data: None,
            debugfs_files: None,
            dead_timeout_jiffies: 0,
            _module: ModuleRef::get().ok_or(ENODEV)?,
        })
    }

    /// nbd.c's `nbd_disconnected()`
    pub(crate) fn is_disconnected(&self) -> bool {
        let ended = |s: &Arc<Session>| s.table().fate.snapshot().is_disconnected();
        self.session
            .as_ref()
            .map_or(self.disconnect_requested, ended)
    }

    /// Removes the files in debugfs. Waits for their readers.
    pub(super) fn remove_debugfs(&mut self) {
        self.debugfs_files = None;
    }

    /// The sockets, where no session has taken them over. One that another device uses is not ours.
    pub(super) fn idle_sockets(&self) -> impl Iterator<Item = &Socket> {
        let idle = self.session.is_none();
        self.sockets.iter().filter(move |s| idle && !s.is_hooked())
    }

    /// Ends the session, or the connections of sockets that none has taken over (`sock_shutdown()`).
    /// May sleep.
    pub(super) fn end(&self) {
        if let Some(session) = &self.session {
            session.end();
        }
        for socket in self.idle_sockets() {
            socket.end(Ending::Polite);
        }
    }

    /// Whether it was set up by netlink.
    pub(crate) fn is_bound(&self) -> bool {
        self.bound
    }
}
