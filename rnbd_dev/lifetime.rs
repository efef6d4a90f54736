// SPDX-License-Identifier: GPL-2.0
//! From the first open, or the connect, to the last close, or the disconnect; and the session in between.

#![forbid(unsafe_code)]

use super::{
    config::Config,
    debugfs::{
        self,
        FileData, //
    },
    Device,
    State,
    DEFAULT_TIMEOUT_SECONDS,
    QUEUE_DEPTH, //
};
use crate::{
    kapi::{
        block::{
            disk::Sectors,
            gendisk::File, //
        },
        task, //
    },
    pure::{
        proto::flags, //
    },
    rnbd_session::{
        Options,
        Session, //
    },
    rnbd_sock, //
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
    /// Somebody opens the device (`nbd_open()`). May sleep.
    ///
    /// # Errors
    ///
    /// Those of [`Self::new_config()`].
    pub(crate) fn open(&self) -> Result {
        let mut state = self.state.lock();
        if state.config.as_ref().is_none_or(|c| c.is_disconnected()) {
            self.scan_partitions_later();
        }
        match &mut state.config {
            Some(config) => config.references += 1,
            None => {
                self.new_config(&mut state)?;
            }
        }
        Ok(())
    }

    /// Somebody has closed the device, and `openers` are left (`nbd_release()`). May sleep.
    pub(crate) fn close(&self, openers: u32) {
        let disconnect = openers == 0
            && self
                .with_config(|config| Ok(config.disconnect_on_close))
                .unwrap_or(false);
        if disconnect {
            self.disconnect_and_put();
        }
        self.put_config();
    }

    /// Makes a configuration, with one reference (`nbd_alloc_and_init_config()`). There is none.
    ///
    /// # Errors
    ///
    /// `ENXIO` where the device is about to be removed, `ENODEV` where the module is about to go,
    /// `ENOMEM`.
    pub(super) fn new_config<'a>(&self, state: &'a mut State) -> Result<&'a mut Config> {
        let config = KBox::new(Config::new()?, GFP_KERNEL)?;
        let mut usage = self.usage.lock();
        if usage.dying {
            return Err(ENXIO);
        }
        usage.in_use = true;
        Ok(state.config.insert(config))
    }

    /// Lets go of the configuration (`nbd_config_put()`). The last one ends the session, and the device
    /// where it is not wanted any more. May sleep.
    pub(super) fn put_config(&self) {
        let mut state = self.state.lock();
        let last = state.config.as_mut().is_some_and(|config| {
            config.references -= 1;
            config.references == 0
        });
        if !last {
            return;
        }
        if let Some(mut config) = state.config.take() {
            self.tear_down(&mut config);
            state.timeout_jiffies = 0;
            self.disk
                .set_request_timeout(DEFAULT_TIMEOUT_SECONDS * task::HZ);
            self.mark_unused();
        }
    }

    /// Nobody uses the device any more. Has it removed where it was to go. The configuration lock is held.
    fn mark_unused(&self) {
        let mut usage = self.usage.lock();
        usage.in_use = false;
        let dying = usage.destroy_on_disconnect && !usage.dying;
        usage.dying |= dying;
        drop(usage);
        if dying {
            self.remover.clone().remove_later();
        }
    }

    /// Undoes what was set up. The lock is held.
    fn tear_down(&self, config: &mut Config) {
        config.remove_debugfs();
        config.end();
        if config.session.is_some() {
            // Nothing is in flight any more, and what comes in is refused.
            let gone = self.session.retract(&self.disk.freeze());
            drop(gone);
        }
        self.disk.invalidate();
        self.disk.reset_limits();
        if config.size_bytes != 0 {
            self.disk.uevent_change();
        }
        if config.started {
            self.remove_file(File::Pid);
        }
        self.pid.store(0, Relaxed);
        if config.has_backend_file {
            self.remove_file(File::Backend);
        }
        // Also where the file could not be made: the next image is another one.
        *self.backend.lock() = None;
    }
}

// The session.

impl Device {
    /// Runs a session until its last connection has gone, or a signal comes (`NBD_DO_IT`,
    /// `nbd_start_device_ioctl()`).
    ///
    /// # Errors
    ///
    /// `EBUSY` where the device was started already or a socket is in use elsewhere, `EINVAL` without a
    /// socket or with several that the server does not allow, `ERESTARTSYS` after a signal.
    pub(crate) fn run(&self) -> Result {
        let session = self.start(self.lock())?;
        self.scan_partitions_later();
        let signal = session.table().wait_all_reaped_interruptible();
        if signal {
            session.end();
        }
        self.with_config(|_| {
            self.reset_size();
            Ok(())
        })?;
        if signal {
            return Err(ERESTARTSYS);
        }
        Ok(())
    }

    /// `nbd_start_device()`
    pub(super) fn start(&self, mut state: MutexGuard<'_, State>) -> Result<Arc<Session>> {
        let sockets = self.check_startable(state.config_mut()?)?;
        let mut state = self.set_hw_queues(state, sockets as u32);
        let timeout_jiffies = state.timeout_jiffies;
        let config = state.config_mut()?;
        let session = self.start_locked(config, timeout_jiffies)?;
        // They are the session's now, which lets go of those that are replaced.
        config.sockets = KVec::new();
        // Whoever ends it next lets go of this, too.
        config.held_by_netlink = config.bound;
        Ok(session)
    }

    /// With how many sockets the device can be started.
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

    fn start_locked(&self, config: &mut Config, timeout_jiffies: u32) -> Result<Arc<Session>> {
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

    /// Publishes a session, and shows it to user space.
    fn publish_session(&self, config: &mut Config, session: &Arc<Session>) -> Result {
        self.add_file(File::Pid).inspect_err(|_| {
            pr_err!("nbd{}: cannot make the file pid\n", self.index);
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
        // As nbd.c: without these files the device works all the same.
        config.debugfs_files = debugfs::add_files(&self.debugfs, self.index, data.clone()).ok();
        config.debugfs_data = Some(data);
        self.disk
            .set_read_only(config.flags & flags::READ_ONLY != 0);
        self.session.publish(session.clone()).map_err(|_| EBUSY)?;
        self.set_size(config, config.size_bytes, config.block_bytes)
    }

    /// Asks the servers to end the session. May sleep.
    pub(crate) fn disconnect(&self) -> Result {
        self.with_config(|config| {
            self.send_disconnect(config);
            Ok(())
        })
    }

    /// `nbd_disconnect()`
    fn send_disconnect(&self, config: &mut Config) {
        pr_info!("nbd{}: NBD_DISCONNECT\n", self.index);
        self.usage.lock().disconnect_requested = true;
        config.disconnect_requested = true;
        if let Some(session) = &config.session {
            session.send_disconnect();
            return;
        }
        for socket in config.idle_sockets() {
            if let Err(e) = rnbd_sock::send_disconnect_on(socket) {
                pr_err!("nbd{}: send disconnect failed ({e:?})\n", self.index);
            }
        }
    }

    /// Disconnects, waits until nothing of the session runs, and lets go of what netlink holds
    /// (`nbd_disconnect_and_put()`). May sleep.
    pub(crate) fn disconnect_and_put(&self) {
        // In one step: what comes afterwards is another session. It can only fail where there is none.
        let put = self.with_config(|config| {
            self.send_disconnect(config);
            config.end();
            config.setup_by = None;
            config.bound = false;
            Ok(core::mem::take(&mut config.held_by_netlink))
        });
        if put.unwrap_or(false) {
            self.put_config();
        }
    }

    /// Ends the session at once, and forgets the sockets (`nbd_clear_sock_ioctl()`). May sleep.
    pub(crate) fn clear_sockets(&self) -> Result {
        let put = self.with_config(|config| {
            config.end();
            config.sockets = KVec::new();
            config.setup_by = None;
            self.disk.force_media_change();
            // Under the lock: who returns from NBD_DO_IT has not closed the device yet, and counts.
            self.reset_size();
            Ok(core::mem::take(&mut config.held_by_netlink))
        })?;
        if put {
            self.put_config();
        }
        Ok(())
    }

    /// `nbd_bdev_reset()`
    fn reset_size(&self) {
        if self.disk.openers() <= 1 {
            self.disk.set_capacity(Sectors(0));
        }
    }
}
