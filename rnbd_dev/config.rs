// SPDX-License-Identifier: GPL-2.0
//! What user space has configured for a device (`struct nbd_config`).

#![forbid(unsafe_code)]

use super::{
    running::Running,
    USUAL_SIZES, //
};
use crate::{
    kapi::{
        block::{
            disk::DiskRef,
            limits::RequestSizes, //
        },
        errno::ENOKEY,
        net::{
            namespace::Namespace,
            sock::{
                Ending,
                Socket, //
            }, //
        },
        task::{
            self,
            ModuleRef,
            TaskId, //
        },
    },
    pure::proto::flags,
    rnbd_session::Session,
    rnbd_table::Structured, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// The block size in bytes until one is set (`NBD_DEF_BLKSIZE_BITS`).
pub(super) const DEFAULT_BLOCK_BYTES: u32 = 1024;

/// The size and the block size of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u32,
}

/// Whether a partition table is to be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scan {
    /// It was read, or is not to be read.
    Done,
    /// It is read as soon as the server replies. An open waits for that.
    Wanted,
    /// As before, but the server takes too long for an open to wait.
    Late,
}

/// The configuration of a device, from the first open to the last put (`struct nbd_config`).
pub(crate) struct Config {
    /// The reference count: one for each open, and one for netlink while it has connected the
    /// device (`config_refs`).
    pub(super) references: u32,
    /// The server's transmission flags (`NBD_FLAG_*`).
    pub(super) flags: u32,
    pub(super) size_bytes: u64,
    pub(super) block_bytes: u32,
    /// How large requests may be.
    pub(super) sizes: RequestSizes,
    /// All sockets must be encrypted by TLS in the kernel.
    pub(super) needs_tls: bool,
    /// The server answers reads by structured replies only.
    pub(super) needs_structured: bool,
    /// What the disk of a started device has.
    pub(super) disk_has: Geometry,
    pub(super) sockets: KVec<Socket>,
    /// A program has begun to set the device up by ioctl.
    pub(super) set_up_by_ioctl: bool,
    /// The task that passes sockets by ioctl. No other task may add sockets (`task_setup`).
    pub(super) setup_by: Option<TaskId>,
    /// The device was started. Before the last put, it can only be started again if it
    /// [was lost](Self::is_lost).
    pub(super) started: bool,
    /// The session. It exists from its start to the last put.
    pub(super) session: Option<Arc<Session>>,
    pub(super) disconnect_requested: bool,
    /// The session was ended by `NBD_CLEAR_SOCK`, or with the process that had started it.
    pub(super) ended: bool,
    /// The process that was in `NBD_DO_IT` last.
    pub(super) runner: Option<TaskId>,
    /// How often the session had been lost when the size was set last.
    pub(super) sized_at: Option<u32>,
    /// The task whose `NBD_DO_IT` was interrupted by a signal. Its process may call it again.
    pub(super) interrupted: Option<Interrupted>,
    /// The device was configured by netlink: of the ioctls, only those that disconnect are allowed
    /// (`NBD_RT_BOUND`).
    pub(super) bound: bool,
    /// Netlink holds a reference (`NBD_RT_HAS_CONFIG_REF`).
    pub(super) held_by_netlink: bool,
    /// The last close disconnects the device (`NBD_RT_DISCONNECT_ON_CLOSE`).
    pub(super) disconnect_on_close: bool,
    /// The device has been opened since netlink began to connect it. Until then, no close is one for
    /// which [`Self::disconnect_on_close`] is meant.
    pub(super) opened_since_connect: bool,
    pub(super) has_backend_file: bool,
    /// The network namespace of whoever has connected the device by netlink.
    pub(super) namespace: Option<Arc<Namespace>>,
    pub(super) scan: Scan,
    /// No partition table is looked for.
    pub(super) never_scans: bool,
    /// How often in a row connections were lost while the partition table was read.
    pub(super) lost_scans: u32,
    /// One of the references is that of the open which reads the partition table.
    pub(super) opened_by_scanner: bool,
    /// What is told about the session.
    pub(super) running: Option<Arc<Running>>,
    pub(super) dead_timeout_jiffies: u64,
    module: ModuleRef,
}

/// A session for whose end a task waits in `NBD_DO_IT`.
pub(super) struct Wait {
    pub(super) session: Arc<Session>,
    /// How often the session had lost its last connection when the wait began
    /// ([`Table::losses()`](crate::rnbd_table::Table::losses)).
    pub(super) losses: u32,
}

impl Wait {
    /// Returns the wait for the next loss of the session.
    pub(super) fn new(session: Arc<Session>) -> Self {
        let losses = session.table().losses();
        Wait { session, losses }
    }
}

/// A task that a signal has interrupted in `NBD_DO_IT`.
pub(super) struct Interrupted {
    task: TaskId,
    process: TaskId,
    wait: Wait,
}

impl Interrupted {
    /// The current task, which was interrupted in `wait`.
    pub(super) fn current(wait: Wait) -> Self {
        Interrupted {
            task: TaskId::current(),
            process: TaskId::current_process(),
            wait,
        }
    }
}

impl Config {
    /// Returns the wait that the current process continues by calling `NBD_DO_IT` again after a
    /// signal.
    pub(super) fn resume(&mut self) -> Option<Wait> {
        let process = TaskId::current_process();
        let interrupted = self.interrupted.take_if(|i| i.process == process)?;
        Some(interrupted.wait)
    }

    /// Returns whether the session of a device that was configured by ioctl has lost all its
    /// connections, although nobody has ended it.
    ///
    /// It can be started again with new sockets.
    pub(super) fn is_lost(&self) -> bool {
        let lost = |s: &Arc<Session>| s.table().unreaped_connections() == 0;
        let asked_for = self.disconnect_requested || self.ended;
        !self.bound && !asked_for && self.session.as_ref().is_some_and(lost)
    }

    /// Returns whether the size was set since the session was lost. Only a program that wants to start
    /// the device again does that first.
    pub(super) fn is_being_restarted(&self) -> bool {
        let losses = self.session.as_ref().map(|s| s.table().losses());
        self.is_lost() && self.sized_at == losses
    }

    /// Returns whether the current process may pass sockets to a device that was lost.
    ///
    /// A program that looks for a free device by passing it a socket must not get this one, whose users
    /// would continue with another image.
    pub(super) fn may_restart(&self) -> bool {
        let same = self.runner == Some(TaskId::current_process());
        self.is_lost() && (same || self.is_being_restarted())
    }

    /// Ends the session for good.
    pub(super) fn end_for_good(&mut self, disk: &DiskRef) {
        self.ended = self.started;
        self.end(disk);
    }

    /// Returns whether settings take effect immediately.
    pub(super) fn is_running(&self) -> bool {
        self.started && !self.is_lost()
    }

    /// Returns whether the current task, which closes the device, was interrupted in `NBD_DO_IT`
    /// and does not wait again: the same thread closes the device, or the process exits.
    pub(super) fn is_abandoned(&self) -> bool {
        self.interrupted.as_ref().is_some_and(|i| {
            let current = i.wait.session.table().losses() == i.wait.losses;
            let same_process = i.process == TaskId::current_process();
            current && (i.task == TaskId::current() || (same_process && task::is_exiting()))
        })
    }

    /// Returns an empty configuration with one reference, which belongs to the caller.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the module is being unloaded.
    pub(super) fn new() -> Result<Self> {
        Ok(Self::empty(ModuleRef::get().ok_or(ENODEV)?))
    }

    /// Forgets everything but the references.
    pub(super) fn reset(&mut self) {
        *self = Config {
            references: self.references,
            ..Self::empty(self.module.clone())
        };
    }

    fn empty(module: ModuleRef) -> Self {
        Config {
            references: 1,
            flags: 0,
            size_bytes: 0,
            block_bytes: DEFAULT_BLOCK_BYTES,
            sizes: USUAL_SIZES,
            needs_tls: false,
            needs_structured: false,
            disk_has: Geometry {
                size_bytes: 0,
                block_bytes: DEFAULT_BLOCK_BYTES,
            },
            sockets: KVec::new(),
            set_up_by_ioctl: false,
            setup_by: None,
            started: false,
            session: None,
            disconnect_requested: false,
            ended: false,
            runner: None,
            sized_at: None,
            interrupted: None,
            bound: false,
            held_by_netlink: false,
            disconnect_on_close: false,
            opened_since_connect: false,
            has_backend_file: false,
            namespace: None,
            scan: Scan::Done,
            never_scans: false,
            lost_scans: 0,
            opened_by_scanner: false,
            running: None,
            dead_timeout_jiffies: 0,
            module,
        }
    }

    /// Returns whether the server sends structured replies.
    pub(super) fn structured(&self) -> Structured {
        if self.needs_structured {
            Structured::Required
        } else if self.flags & flags::SEND_DF != 0 {
            Structured::Possible
        } else {
            Structured::No
        }
    }

    /// Checks that a socket may be used for the device.
    ///
    /// # Errors
    ///
    /// `ENOKEY`: it must be encrypted by TLS in the kernel, and is not.
    pub(super) fn check_encryption(&self, socket: &Socket) -> Result {
        if self.needs_tls && !socket.is_encrypted() {
            return Err(ENOKEY.into());
        }
        Ok(())
    }

    /// Returns whether the device has sockets for a session and has had none yet.
    pub(super) fn is_startable(&self) -> bool {
        !self.started && !self.sockets.is_empty()
    }

    /// Returns whether netlink has connected the device.
    pub(super) fn is_reconfigurable(&self) -> bool {
        self.bound && self.started
    }

    /// Returns whether the device is merely open: nothing has been set up since the first open, and
    /// no session was started.
    pub(super) fn is_idle(&self) -> bool {
        !self.set_up_by_ioctl && !self.bound && !self.started
    }

    /// Returns the sockets that no session uses. It skips those that another device has hooked.
    pub(super) fn idle_sockets(&self) -> impl Iterator<Item = &Socket> {
        self.sockets.iter().filter(|s| !s.is_hooked())
    }

    /// Ends the session, and shuts down the sockets that no session uses (`sock_shutdown()`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn end(&self, disk: &DiskRef) {
        if let Some(session) = &self.session {
            session.end(disk);
        }
        self.end_idle_sockets();
    }

    /// Shuts down the sockets that no session uses.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn end_idle_sockets(&self) {
        for socket in self.idle_sockets() {
            socket.end(Ending::Polite);
        }
    }
}
