// SPDX-License-Identifier: GPL-2.0
//! The lifetime of a device's configuration and of its session: open, close, start and disconnect.

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
    DEFAULT_TIMEOUT_SECONDS,
    QUEUE_DEPTH, //
};
use crate::{
    kapi::{
        block::{
            disk::{
                OpenMutexHeld,
                Sectors, //
            },
            gendisk::File, //
        },
        task, //
    },
    pure::proto::flags,
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
    /// Opens the device (`nbd_open()`).
    ///
    /// # Errors
    ///
    /// Those of [`Self::new_config()`].
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn open(&self) -> Result {
        let mut state = self.state.lock();
        if state.config.as_ref().is_none_or(|c| c.is_disconnected()) {
            self.scan_partitions_later();
        }
        match &mut state.config {
            Some(config) => {
                config.references += 1;
                config.opened_since_connect |= config.bound;
            }
            None => {
                self.new_config(&mut state)?;
            }
        }
        Ok(())
    }

    /// Closes the device, which `openers` other openers still have open (`nbd_release()`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn close(&self, held: &OpenMutexHeld<'_>, openers: u32) {
        self.end_abandoned_session();
        // A close that belongs to an open before the connect says nothing about the session.
        let wanted = |c: &mut Config| Ok(c.disconnect_on_close && c.opened_since_connect);
        let disconnect = openers == 0 && self.with_config(wanted).unwrap_or(false);
        // This fails only for a device with another backend than the one that is named.
        if disconnect && self.disconnect_by_netlink(None).unwrap_or(false) {
            self.put_config(held);
        }
        self.put_config(held);
    }

    /// Ends the session if nobody waits for its end in `NBD_DO_IT` again
    /// ([`Config::is_abandoned()`]).
    fn end_abandoned_session(&self) {
        // It fails only if there is no configuration.
        let _ = self.with_config(|config| {
            if config.is_abandoned() {
                config.interrupted = None;
                config.end();
            }
            Ok(())
        });
    }

    /// Creates a configuration with one reference (`nbd_alloc_and_init_config()`). The device must
    /// not have one.
    ///
    /// # Errors
    ///
    /// - `ENXIO`: the device is about to be removed.
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    pub(super) fn new_config<'a>(&self, state: &'a mut State) -> Result<&'a mut Config> {
        let config = KBox::new(Config::new()?, GFP_KERNEL)?;
        let mut usage = self.usage.lock();
        if usage.dying {
            return Err(ENXIO);
        }
        usage.in_use = true;
        Ok(state.config.insert(config))
    }

    /// Puts a reference to the configuration (`nbd_config_put()`).
    ///
    /// The last put ends the session, frees the configuration, and schedules the removal of the
    /// device if it is to be destroyed on disconnect. The device has no openers then, and `held`
    /// keeps new ones out.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn put_config(&self, held: &OpenMutexHeld<'_>) {
        self.put_config_locked(Some(held), &mut self.state.lock());
    }

    /// Puts a reference to the configuration under the configuration lock; see
    /// [`Self::put_config()`]. Without `held`, the device must not have got its size.
    fn put_config_locked(&self, held: Option<&OpenMutexHeld<'_>>, state: &mut State) {
        let last = state.config.as_mut().is_some_and(|config| {
            config.references -= 1;
            config.references == 0
        });
        if !last {
            return;
        }
        if let Some(mut config) = state.config.take() {
            self.tear_down(held, &mut config);
            self.reset_timeout(state);
            self.mark_unused();
        }
    }

    /// Undoes a connect that has failed, under the configuration lock, and puts netlink's reference.
    ///
    /// Programs that have the device open find it as they have opened it.
    pub(super) fn undo_connect(&self, state: &mut State) {
        if let Some(config) = state.config.as_mut().filter(|c| c.references > 1) {
            self.tear_down(None, config);
            config.reset();
            self.reset_timeout(state);
            self.usage.lock().destroy_on_disconnect = false;
        }
        self.put_config_locked(None, state);
    }

    /// Resets the request timeout, under the configuration lock.
    fn reset_timeout(&self, state: &mut State) {
        state.timeout_jiffies = 0;
        self.disk
            .set_request_timeout(DEFAULT_TIMEOUT_SECONDS * task::HZ);
    }

    /// Marks the device as unused, and schedules its removal if it is to be destroyed on
    /// disconnect.
    ///
    /// The caller holds the configuration lock.
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

    /// Undoes what was configured, as in `nbd_config_put()`, and removes the partitions if `held` is
    /// given. A device that has not got its size has none. The caller holds the configuration lock.
    fn tear_down(&self, held: Option<&OpenMutexHeld<'_>>, config: &mut Config) {
        config.remove_debugfs();
        config.end();
        if config.session.is_some() {
            // Nothing is in flight, and requests that arrive from now on are failed.
            let gone = self.session.retract(&self.disk.freeze());
            drop(gone);
        }
        self.disk.invalidate();
        if let Some(held) = held {
            held.drop_partitions();
        }
        self.disk.reset_limits();
        // The next session decides whether it is read-only.
        self.disk.clear_read_only_of_user();
        if config.started {
            self.remove_file(File::Pid);
        }
        self.pid.store(0, Relaxed);
        if config.has_backend_file {
            self.remove_file(File::Backend);
        }
        // This is reset even if the sysfs file was not created: the next backend is another one.
        *self.backend.lock() = None;
        if config.started {
            // What happens from now on is not about the image.
            self.disk.force_media_change();
        }
        // udev looks at the device when it receives an event, so these come last.
        self.disk.set_read_only(false);
        if config.size_bytes != 0 {
            self.disk.uevent_change();
        }
    }
}

// Sessions.

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

    /// Sends a disconnect on all connections (`NBD_DISCONNECT`).
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device has no configuration.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn disconnect(&self) -> Result {
        self.with_config(|config| {
            self.send_disconnect(config);
            Ok(())
        })
    }

    /// Sends a disconnect on all connections, or on the sockets if there is no session
    /// (`nbd_disconnect()`).
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

    /// Disconnects the device, waits until all connections are reaped, and puts netlink's reference
    /// (`nbd_disconnect_and_put()`).
    ///
    /// If `backend` is given, only a device that was connected with this backend identifier is
    /// disconnected.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the device was connected without a backend identifier or with another one, or it
    /// has no configuration although an identifier was given.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn disconnect_and_put(&self, backend: Option<&[u8]>) -> Result {
        if self.disconnect_by_netlink(backend)? {
            // The session has ended, so nobody holds this lock for long.
            self.put_config(&self.disk.lock_open_mutex());
        }
        Ok(())
    }

    /// Sends a disconnect on all connections, and waits until they are reaped. The arguments and
    /// errors are those of [`Self::disconnect_and_put()`].
    ///
    /// Returns whether netlink's reference to the configuration is now the caller's to put.
    fn disconnect_by_netlink(&self, backend: Option<&[u8]>) -> Result<bool> {
        // This is one step under the lock, since a device that is configured later must not be
        // disconnected.
        let mut state = self.lock();
        if backend.is_some_and(|backend| !self.has_backend(backend)) {
            pr_err!(
                "nbd{}: not disconnected: the device has another backend\n",
                self.index
            );
            return Err(EINVAL);
        }
        let put = state.config.as_mut().is_some_and(|config| {
            self.send_disconnect(config);
            config.end();
            config.setup_by = None;
            config.interrupted = None;
            config.bound = false;
            core::mem::take(&mut config.held_by_netlink)
        });
        Ok(put)
    }

    /// Returns whether the device was connected with this backend identifier. The answer does not
    /// change while the configuration lock is held.
    fn has_backend(&self, backend: &[u8]) -> bool {
        let ours = self.backend.lock();
        ours.as_ref().is_some_and(|ours| ours.to_bytes() == backend)
    }

    /// Ends the session at once and drops the sockets (`NBD_CLEAR_SOCK`, `nbd_clear_sock_ioctl()`).
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device has no configuration.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn clear_sockets(&self) -> Result {
        let put = self.with_config(|config| {
            config.end();
            config.sockets = KVec::new();
            config.setup_by = None;
            config.interrupted = None;
            self.disk.force_media_change();
            // This happens under the lock: a task that returns from `NBD_DO_IT` still has the
            // device open, and is counted as an opener.
            self.reset_size();
            Ok(core::mem::take(&mut config.held_by_netlink))
        })?;
        if put {
            self.put_config(&self.disk.lock_open_mutex());
        }
        Ok(())
    }

    /// Sets the size to 0 if at most one opener is left (`nbd_bdev_reset()`).
    fn reset_size(&self) {
        if self.disk.openers() <= 1 {
            self.disk.set_capacity(Sectors(0));
        }
    }
}
