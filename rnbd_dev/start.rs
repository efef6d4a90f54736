// SPDX-License-Identifier: GPL-2.0
//! Starts a session, and waits for its end in `NBD_DO_IT`.

#![forbid(unsafe_code)]

use super::{
    config::{
        Config,
        Geometry,
        Interrupted,
        Wait, //
    },
    running::Running,
    Device,
    State,
    QUEUE_DEPTH, //
};
use crate::{
    kapi::{
        block::{
            disk::OpenMutexGuard,
            gendisk::File, //
        },
        net::{
            namespace::Namespace,
            sock::{
                Ending,
                Socket, //
            }, //
        },
        task::{
            self,
            TaskId, //
        }, //
    },
    pure::proto::flags,
    rnbd_events::{
        Connected,
        Notice,
        Origin,
        Size, //
    },
    rnbd_session::{
        Options,
        Session, //
    },
};
use kernel::{
    prelude::*,
    str::CString,
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
    /// A device that was lost is started again if sockets were passed since.
    ///
    /// # Errors
    ///
    /// - Those of [`Self::lock_for_ioctl()`], [`Self::lock_for_block_size()`], [`Self::start()`] and
    ///   [`Self::restart()`].
    /// - `ERESTARTSYS`: a signal has interrupted the wait.
    /// - `EPIPE`: the connections have ended although nobody has disconnected the device or dropped
    ///   its sockets. Current nbd.c returns 0, but nbd-client and qemu-nbd expect this.
    ///
    /// # Context
    ///
    /// May sleep, for as long as the session lasts.
    pub(crate) fn run(&self) -> Result {
        let wait = self.start_or_resume()?;
        let interrupted = wait
            .session
            .table()
            .wait_all_reaped_interruptible(wait.losses);
        let mut state = self.lock();
        let scanner = state.scanner;
        let (has_ended, result) = self.leave_session(state.config_mut()?, wait, interrupted);
        drop(state);
        if has_ended {
            // The device is free once the caller has closed it.
            self.wait_for_scanner(scanner);
        }
        result
    }

    /// Decides what becomes of the session at the end of a `wait` for it in `NBD_DO_IT`, and what that
    /// call answers; see [`Self::run()`]. The caller holds the configuration lock.
    ///
    /// Returns whether the session has ended, for everybody.
    fn leave_session(&self, config: &mut Config, wait: Wait, interrupted: bool) -> (bool, Result) {
        let table = wait.session.table();
        let gone = table.losses() != wait.losses || table.unreaped_connections() == 0;
        let killed = task::is_killed();
        if interrupted && !gone && !killed {
            config.interrupted = Some(Interrupted::current(wait));
            return (false, Err(ERESTARTSYS));
        }
        if table.unreaped_connections() > 0 && gone {
            // It was lost, and another task has started it again.
            return (false, Err(EPIPE));
        }
        if killed {
            config.end_for_good(&self.disk);
        }
        if config.is_lost() {
            let alone = self.has_one_user(config);
            if alone {
                // What waits for a connection would wait for this process, whose close waits for it.
                // Nobody else uses the device.
                wait.session.end(&self.disk);
            }
            return (alone, Err(EPIPE));
        }
        self.reset_size(config);
        let result = match interrupted {
            true => Err(ERESTARTSYS),
            false => Ok(()),
        };
        (true, result)
    }

    /// Starts the device, or starts it again, or finds the session for which the current process was
    /// waiting. The errors are those of [`Self::run()`].
    fn start_or_resume(&self) -> Result<Wait> {
        let wanted = |c: Option<&Config>| Some(c.filter(|c| c.is_startable())?.block_bytes);
        let (mut state, held) = self.lock_for_block_size(|| self.lock_for_ioctl(), wanted)?;
        let config = state.config_mut()?;
        if config.is_lost() && !config.sockets.is_empty() {
            // An allocation must not wait for writeback, which may be waiting for this very device.
            let session = task::memalloc_noio(|| self.restart(config))?;
            config.runner = Some(TaskId::current_process());
            return Ok(Wait::new(session));
        }
        if let Some(wait) = config.resume() {
            return Ok(wait);
        }
        let (mut state, started) = self.start(state, held);
        let wait = Wait::new(started?);
        state.config_mut()?.runner = Some(TaskId::current_process());
        Ok(wait)
    }

    /// Starts the device: takes over the sockets and publishes a session (`nbd_start_device()`).
    /// Returns the lock as well, whether this succeeds or not. `held` is needed if the block size of
    /// the disk changes.
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
        held: Option<OpenMutexGuard<'a>>,
    ) -> (MutexGuard<'a, State>, Result<Arc<Session>>) {
        let startable = state.config_mut().and_then(|config| {
            let sockets = self.check_startable(config)?;
            // Nobody opens the device between this and the new block size, on which the first opener
            // bases the page cache.
            if let Some(held) = held.as_deref() {
                self.set_first_block_bytes(held, config.block_bytes)?;
            }
            Ok(sockets)
        });
        drop(held);
        let sockets = match startable {
            Ok(sockets) => sockets,
            Err(e) => return (state, Err(e)),
        };
        let mut state = self.set_hw_queues(state, sockets as u32);
        let started = self.start_locked(&mut state);
        (state, started)
    }

    /// Restarts a lost device with the sockets that were passed since.
    ///
    /// The requests that wait for a connection continue. Programs that have the device open, and file
    /// systems on it, do not notice, so the sockets must be those of a server of the same image. As
    /// with `NBD_CMD_RECONFIGURE`, the server's flags stay those of the first connection, and sockets
    /// for which the session has no place are shut down.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: there are several sockets that the server's flags do not allow, or the size or the
    ///   block size has changed.
    /// - `EBUSY`, `ENOTCONN`: no socket can be used; see [`Session::reconnect()`].
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    ///
    /// The device is then as lost as before, without the sockets.
    ///
    /// # Context
    ///
    /// May sleep. The caller holds the configuration lock.
    fn restart(&self, config: &mut Config) -> Result<Arc<Session>> {
        let session = config.session.clone().ok_or(EINVAL)?;
        let sockets = core::mem::replace(&mut config.sockets, KVec::new());
        self.check_sockets(&sockets, session.flags())?;
        let wanted = Geometry {
            size_bytes: config.size_bytes,
            block_bytes: config.block_bytes,
        };
        let Geometry {
            size_bytes,
            block_bytes,
        } = config.disk_has;
        (config.size_bytes, config.block_bytes) = (size_bytes, block_bytes);
        if wanted != config.disk_has {
            pr_err!(
                "nbd{}: cannot be started again with {} bytes in blocks of {}: it has {size_bytes} in blocks of {block_bytes}\n",
                self.index,
                wanted.size_bytes,
                wanted.block_bytes
            );
            return Err(EINVAL);
        }
        if config.flags != session.flags() {
            pr_warn!(
                "nbd{}: the server's flags were {:#x}, and would be {:#x}: no change until the last close\n",
                self.index,
                session.flags(),
                config.flags
            );
            config.flags = session.flags();
        }
        self.reconnect_all(&session, &sockets)?;
        self.pid.store(task::current_pid(), Relaxed);
        if let Some(data) = &config.running {
            data.pid.store(task::current_pid(), Relaxed);
        }
        self.queue_wanted_scan(config);
        Ok(session)
    }

    /// Replaces dead connections of `session` by ones over `sockets`, and shuts down the sockets for
    /// which it has no place.
    ///
    /// # Errors
    ///
    /// Those of [`Session::reconnect()`] if no socket can be used.
    fn reconnect_all(&self, session: &Session, sockets: &[Socket]) -> Result {
        let mut first_error = None;
        let mut replaced = 0;
        for socket in sockets {
            match session.reconnect(&self.disk, socket, 0) {
                Ok(true) => replaced += 1,
                // There is no place for it. It is shut down here, because the kernel closes the file
                // only when the task returns to user space, which may be long from now.
                Ok(false) if !socket.is_hooked() => socket.end(Ending::Polite),
                Ok(false) => {}
                Err(e) => {
                    pr_err!("nbd{}: cannot use a socket ({e:?})\n", self.index);
                    first_error.get_or_insert(e);
                }
            }
        }
        match first_error {
            Some(e) if replaced == 0 => Err(e),
            _ => Ok(()),
        }
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
        self.check_sockets(&config.sockets, config.flags)?;
        Ok(config.sockets.len())
    }

    /// Checks that there are sockets, and not more than a server with these flags allows.
    ///
    /// # Errors
    ///
    /// `EINVAL`: there are none or too many.
    fn check_sockets(&self, sockets: &[Socket], flags: u32) -> Result {
        if sockets.is_empty() {
            return Err(EINVAL);
        }
        if sockets.len() > 1 && flags & flags::CAN_MULTI_CONN == 0 {
            pr_err!(
                "nbd{}: the server does not support several connections for a device\n",
                self.index
            );
            return Err(EINVAL);
        }
        Ok(())
    }

    /// Creates a session and publishes it, under the configuration lock. The errors are those of
    /// [`Self::start()`].
    fn create_session(&self, config: &mut Config, timeout_jiffies: u32) -> Result<Arc<Session>> {
        let origin = self.origin(config)?;
        let notices = [Notice::new(&origin)?, Notice::new(&origin)?];
        let options = Options {
            origin,
            shared: self.shared.clone(),
            hw_queues: self.disk.hw_queues(),
            depth: QUEUE_DEPTH,
            flags: config.flags,
            structured: config.structured(),
            by_ioctl: !config.bound,
            timeout_jiffies,
            dead_timeout_jiffies: match config.bound {
                true => config.dead_timeout_jiffies,
                false => self.dead_timeout_jiffies,
            },
        };
        let session = Session::new(&self.disk, &config.sockets, options)?;
        if let Err(e) = self.publish_session(config, &session) {
            session.end(&self.disk);
            return Err(e);
        }
        session.announce(self.connected(config, &session), notices);
        session.start_receiving();
        self.usage.lock().debugfs_wanted = true;
        self.note_wanted_scan(config);
        // A program that opens the device does not wait for that ([`Self::wait_for_first_block()`]).
        self.jobs.clone().queue_jobs_soon();
        Ok(session)
    }

    /// Returns the origin of the events of a session that is being started.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn origin(&self, config: &Config) -> Result<Arc<Origin>> {
        let backend = self
            .backend
            .lock()
            .as_ref()
            .map(|b| CString::try_from(&**b));
        let namespace = match &config.namespace {
            Some(namespace) => namespace.clone(),
            None => Arc::new(Namespace::of_current(), GFP_KERNEL)?,
        };
        let origin = Origin {
            device: self.index,
            backend: backend.transpose()?,
            namespace,
        };
        Ok(Arc::new(origin, GFP_KERNEL)?)
    }

    /// Returns what listeners are told of a session that was started.
    fn connected(&self, config: &Config, session: &Session) -> Connected {
        let (connections, _) = session.count();
        Connected {
            size: Size {
                bytes: config.size_bytes,
                block_bytes: config.block_bytes,
            },
            flags: config.flags,
            connections: connections as u32,
            pid: task::current_pid(),
            by_netlink: config.bound,
        }
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
        let running = Arc::new(
            Running {
                pid: Atomic::new(task::current_pid()),
                session: session.clone(),
                flags: config.flags,
                by_netlink: config.bound,
                size_bytes: Atomic::new(config.size_bytes),
                block_bytes: Atomic::new(config.block_bytes),
            },
            GFP_KERNEL,
        )?;
        config.running = Some(running.clone());
        self.show(Some(running));
        // The image gets a `diskseq` of its own.
        self.disk.force_media_change();
        // A write to `queue/write_cache` since the last session must not keep this one from
        // flushing. No request is sent yet that could be too large.
        self.disk.reset_limits(config.sizes);
        self.session.publish(session.clone()).map_err(|_| EBUSY)?;
        self.apply_size(config, None, config.size_bytes, config.block_bytes)?;
        // udev looks at the device when it receives an event, so these come last. Until the disk is
        // read-only, the session refuses writes.
        self.disk
            .set_read_only(config.flags & flags::READ_ONLY != 0);
        self.disk.uevent_change();
        Ok(())
    }
}
