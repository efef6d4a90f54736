// SPDX-License-Identifier: GPL-2.0
//! The lifetime of a device's configuration: open, close, and what the last put undoes.

#![forbid(unsafe_code)]

use super::{
    config::Config,
    disconnect::Target,
    Device,
    State,
    DEFAULT_TIMEOUT_SECONDS,
    USUAL_SIZES, //
};
use crate::kapi::{
    block::{
        disk::OpenMutexHeld,
        gendisk::{
            File,
            Purpose, //
        },
    },
    task, //
};
use kernel::{
    prelude::*,
    sync::atomic::Relaxed, //
};

impl Device {
    /// Opens the device (`nbd_open()`).
    ///
    /// # Errors
    ///
    /// - `EIO`: the partition table is to be read, and the device has lost its connections.
    /// - Those of [`Self::new_config()`].
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn open(&self, purpose: Purpose) -> Result {
        let mut state = self.state.lock();
        self.wait_for_first_block(&mut state);
        let scanner = state.is_scanner();
        match &mut state.config {
            Some(config) => {
                self.put_scan_off(config, purpose)?;
                config.references += 1;
                config.opened_since_connect |= config.bound && !scanner;
                config.opened_by_scanner |= scanner;
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
        self.prepare_close();
        // A close that belongs to an open before the connect says nothing about the session.
        let wanted = |c: &mut Config| Ok(c.disconnect_on_close && c.opened_since_connect);
        let disconnect = openers == 0 && self.with_config(wanted).unwrap_or(false);
        // This fails only for a device that is not the one that is meant.
        if disconnect && self.disconnect_by_netlink(Target::Any).unwrap_or(false) {
            self.put_config(held);
        }
        self.put_config(held);
    }

    /// Ends the session if nobody waits for its end in `NBD_DO_IT` again
    /// ([`Config::is_abandoned()`]), and notes the close of the task that reads the partition table.
    fn prepare_close(&self) {
        // This does not wait for a start that is in progress: the caller holds the `open_mutex`, and
        // nobody is in `NBD_DO_IT` then.
        let mut state = self.state.lock();
        let scanner = state.is_scanner();
        let Some(config) = &mut state.config else {
            return;
        };
        if scanner {
            config.opened_by_scanner = false;
        }
        if config.is_abandoned() {
            config.interrupted = None;
            config.end_for_good(&self.disk);
        }
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
            self.set_owner(None);
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
        self.set_owner(None);
        let mut usage = self.usage.lock();
        usage.in_use = false;
        let dying = usage.destroy_on_disconnect && !usage.dying;
        usage.dying |= dying;
        drop(usage);
        if dying {
            self.jobs.clone().queue_jobs();
        }
    }

    /// Releases the last session, which no operation of the queue uses any more when this returns.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn release_session(&self) {
        drop(self.session.release(&self.disk));
    }

    /// Undoes what was configured, as in `nbd_config_put()`, and removes the partitions if `held` is
    /// given. A device that has not got its size has none. The caller holds the configuration lock.
    fn tear_down(&self, held: Option<&OpenMutexHeld<'_>>, config: &mut Config) {
        self.show(None);
        self.remove_debugfs();
        config.end(&self.disk);
        if config.session.is_some() {
            // Nothing is in flight, and requests that arrive from now on are failed. The session is
            // released by a work item, since that waits for a grace period of SRCU.
            self.session.retract(&self.disk);
            let mut usage = self.usage.lock();
            usage.session_retracted = true;
            usage.debugfs_wanted = false;
            drop(usage);
            self.jobs.clone().queue_jobs();
        }
        self.disk.invalidate();
        if let Some(held) = held {
            held.drop_partitions();
        }
        self.disk.reset_limits(USUAL_SIZES);
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
