// SPDX-License-Identifier: GPL-2.0
//! Starts a session, and waits for its end in `NBD_DO_IT`.

#![forbid(unsafe_code)]

use super::{
    config::{
        Config,
        Interrupted, //
    },
    debugfs::{
        self,
        FileData, //
    },
    Device,
    State,
    QUEUE_DEPTH, //
};
use crate::{
    kapi::{
        block::gendisk::File,
        task, //
    },
    pure::proto::flags,
    rnbd_session::{
        Options,
        Session, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        MutexGuard, //
    },
};

impl Device {
    /// Runs a session until its last connection was reaped, or a signal arrives (`NBD_DO_IT`,
    /// `nbd_start_device_ioctl()`).
    ///
    /// Only a signal that kills the process ends the session. After any other one, a stop or a
    /// debugger among them, the process waits for the same session if it calls this again, which the
    /// kernel does by itself if no handler was run.
    ///
    /// # Errors
    ///
    /// - Those of [`Self::lock_for_ioctl()`] and [`Self::start()`].
    /// - `ERESTARTSYS`: a signal has interrupted the wait.
    ///
    /// # Context
    ///
    /// May sleep, for as long as the session lasts.
    pub(crate) fn run(&self) -> Result {
        let mut state = self.lock_for_ioctl()?;
        let session = match state.config_mut()?.resume() {
            Some(session) => {
                drop(state);
                session
            }
            None => {
                let (state, started) = self.start(state);
                drop(state);
                let session = started?;
                self.scan_partitions_later();
                session
            }
        };
        let interrupted = session.table().wait_all_reaped_interruptible();
        if interrupted && !task::is_killed() {
            return self.with_config(|config| {
                config.interrupted = Some(Interrupted::current());
                Err(ERESTARTSYS)
            });
        }
        if interrupted {
            session.end();
        }
        self.with_config(|_| {
            self.reset_size();
            if interrupted {
                return Err(ERESTARTSYS);
            }
            Ok(())
        })
    }

    /// Starts the device: takes over the sockets and publishes a session (`nbd_start_device()`).
    /// Returns the lock as well, whether this succeeds or not.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: the device was started already, or a socket is in use by another device or by
    ///   another part of the kernel.
    /// - `EINVAL`: there is no socket, or several that the server's flags do not allow, or the
    ///   block layer does not accept the limits.
    /// - `ENOTCONN`: a socket is not connected, and never was.
    /// - `ENODEV`: the device has no configuration, or the module is being unloaded.
    /// - `ENOMEM`, and those of [`Self::set_size()`] and of creating a sysfs file.
    ///
    /// # Context
    ///
    /// May sleep. It drops the configuration lock while it changes the number of hardware queues.
    pub(super) fn start<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
    ) -> (MutexGuard<'a, State>, Result<Arc<Session>>) {
        let startable = state.config_mut().and_then(|c| self.check_startable(c));
        let sockets = match startable {
            Ok(sockets) => sockets,
            Err(e) => return (state, Err(e)),
        };
        let mut state = self.set_hw_queues(state, sockets as u32);
        let started = self.start_locked(&mut state);
        (state, started)
    }

    /// Starts the device under the configuration lock. The errors are those of [`Self::start()`].
    fn start_locked(&self, state: &mut State) -> Result<Arc<Session>> {
        let timeout_jiffies = state.timeout_jiffies;
        let config = state.config_mut()?;
        let session = self.create_session(config, timeout_jiffies)?;
        // The session has its own references to the sockets, and drops those of connections that
        // are replaced.
        config.sockets = KVec::new();
        // Netlink's reference is put by whoever disconnects the device.
        config.held_by_netlink = config.bound;
        Ok(session)
    }

    /// Checks that the device can be started, and returns the number of its sockets.
    ///
    /// # Errors
    ///
    /// `EBUSY` and `EINVAL`; see [`Self::start()`].
    fn check_startable(&self, config: &Config) -> Result<usize> {
        if config.started {
            return Err(EBUSY);
        }
        if config.sockets.is_empty() {
            return Err(EINVAL);
        }
        if config.sockets.len() > 1 && config.flags & flags::CAN_MULTI_CONN == 0 {
            pr_err!(
                "nbd{}: the server does not support several connections for a device\n",
                self.index
            );
            return Err(EINVAL);
        }
        Ok(config.sockets.len())
    }

    /// Creates a session and publishes it, under the configuration lock. The errors are those of
    /// [`Self::start()`].
    fn create_session(&self, config: &mut Config, timeout_jiffies: u32) -> Result<Arc<Session>> {
        let options = Options {
            device: self.index,
            shared: self.shared.clone(),
            hw_queues: self.disk.hw_queues(),
            depth: QUEUE_DEPTH,
            flags: config.flags,
            timeout_jiffies,
            dead_timeout_jiffies: config.dead_timeout_jiffies,
        };
        let session = Session::new(&self.disk, &config.sockets, options)?;
        if let Err(e) = self.publish_session(config, &session) {
            session.end();
            return Err(e);
        }
        session.start_receiving();
        Ok(session)
    }

    /// Makes a session visible, to user space and to the blk-mq operations.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`, and those of creating a sysfs file.
    /// - `EBUSY`: a session is published already.
    /// - Those of [`Self::set_size()`].
    fn publish_session(&self, config: &mut Config, session: &Arc<Session>) -> Result {
        self.add_file(File::Pid).inspect_err(|_| {
            pr_err!("nbd{}: cannot create the file pid\n", self.index);
        })?;
        config.started = true;
        config.session = Some(session.clone());
        self.pid.store(task::current_pid(), Relaxed);
        if config.disconnect_requested {
            session.table().fate.request_disconnect();
        }
        let data = Arc::new(
            FileData {
                pid: task::current_pid(),
                session: session.clone(),
                flags: config.flags,
                size_bytes: Atomic::new(config.size_bytes),
                block_bytes: Atomic::new(config.block_bytes),
            },
            GFP_KERNEL,
        )?;
        // As in nbd.c, the device works even without these files.
        config.debugfs_files = debugfs::add_files(&self.debugfs, self.index, data.clone()).ok();
        config.debugfs_data = Some(data);
        // The image gets a `diskseq` of its own.
        self.disk.force_media_change();
        // A write to `queue/write_cache` since the last session must not keep this one from
        // flushing.
        self.disk.reset_limits();
        self.session.publish(session.clone()).map_err(|_| EBUSY)?;
        self.apply_size(config, config.size_bytes, config.block_bytes)?;
        // udev looks at the device when it receives an event, so these come last. Until the disk is
        // read-only, the session refuses writes.
        self.disk
            .set_read_only(config.flags & flags::READ_ONLY != 0);
        self.disk.uevent_change();
        Ok(())
    }
}
