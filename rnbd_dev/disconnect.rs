// SPDX-License-Identifier: GPL-2.0
//! Disconnects a device, and drops its sockets.

#![forbid(unsafe_code)]

use super::{
    config::Config,
    Device,
    State, //
};
use crate::{
    kapi::{
        block::disk::Sectors,
        net::port::Sender, //
    },
    rnbd_sock, //
};
use kernel::prelude::*;

/// Which device is to be disconnected.
#[derive(Clone, Copy)]
pub(crate) enum Target<'a> {
    /// Whatever is connected at its index.
    Any,
    /// The one that was connected with this backend identifier.
    Backend(&'a [u8]),
    /// The one that is owned by this netlink socket.
    Owner(&'a Sender),
}

impl Device {
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
    /// # Errors
    ///
    /// `EINVAL`: `target` is not this device. A device without a configuration has neither a backend
    /// identifier nor an owner.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn disconnect_and_put(&self, target: Target<'_>) -> Result {
        let mut state = self.lock();
        let scanner = state.scanner;
        let put = self.disconnect_locked(&mut state, target)?;
        drop(state);
        self.wait_for_scanner(scanner);
        if put {
            // The session has ended, so nobody holds this lock for long.
            self.put_config(&self.disk.lock_open_mutex());
        }
        Ok(())
    }

    /// Disconnects the device if it is owned by the netlink socket `owner`, which was closed.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn disconnect_owned(&self, owner: &Sender) {
        // If it fails, the device has another owner by now, or none.
        let _ = self.disconnect_and_put(Target::Owner(owner));
    }

    /// Sends a disconnect on all connections, and waits until they are reaped. The arguments and
    /// errors are those of [`Self::disconnect_and_put()`].
    ///
    /// Returns whether netlink's reference to the configuration is now the caller's to put.
    pub(super) fn disconnect_by_netlink(&self, target: Target<'_>) -> Result<bool> {
        self.disconnect_locked(&mut self.lock(), target)
    }

    /// Disconnects the device under the configuration lock; see [`Self::disconnect_by_netlink()`]. This
    /// is one step, since a device that is configured later must not be disconnected.
    fn disconnect_locked(&self, state: &mut State, target: Target<'_>) -> Result<bool> {
        match target {
            Target::Any => {}
            Target::Backend(backend) if self.has_backend(backend) => {}
            Target::Backend(_) => {
                pr_err!(
                    "nbd{}: not disconnected: the device has another backend\n",
                    self.index
                );
                return Err(EINVAL);
            }
            Target::Owner(owner) if self.is_owned_by(owner) => pr_info!(
                "nbd{}: its netlink socket was closed, disconnecting\n",
                self.index
            ),
            Target::Owner(_) => return Err(EINVAL),
        }
        self.set_owner(None);
        let put = state.config.as_mut().is_some_and(|config| {
            self.send_disconnect(config);
            config.end(&self.disk);
            config.setup_by = None;
            config.interrupted = None;
            config.bound = false;
            core::mem::take(&mut config.held_by_netlink)
        });
        Ok(put)
    }

    /// Returns whether this netlink socket owns the device. The answer does not change while the
    /// configuration lock is held.
    fn is_owned_by(&self, socket: &Sender) -> bool {
        let usage = self.usage.lock();
        usage.owner.as_ref().is_some_and(|owner| owner.is(socket))
    }

    /// Returns whether the device was connected with this backend identifier. The answer does not
    /// change while the configuration lock is held.
    fn has_backend(&self, backend: &[u8]) -> bool {
        let ours = self.backend.lock();
        ours.as_ref().is_some_and(|ours| ours.to_bytes() == backend)
    }

    /// Ends the session at once and drops the sockets (`NBD_CLEAR_SOCK`, `nbd_clear_sock_ioctl()`).
    ///
    /// If a lost device is being restarted, only the sockets are dropped that were passed since:
    /// nbd-client does this after it has set the size, and before it passes a new one.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device has no configuration.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn clear_sockets(&self) -> Result {
        let mut state = self.lock();
        let scanner = state.scanner;
        let config = state.config_mut()?;
        let restarting = config.is_being_restarted();
        if restarting {
            config.end_idle_sockets();
        } else {
            config.end_for_good(&self.disk);
        }
        config.sockets = KVec::new();
        config.setup_by = None;
        config.interrupted = None;
        if restarting {
            return Ok(());
        }
        self.disk.force_media_change();
        // This happens under the lock: a task that returns from `NBD_DO_IT` still has the device open,
        // and is counted as an opener.
        self.reset_size(config);
        let put = core::mem::take(&mut config.held_by_netlink);
        drop(state);
        self.wait_for_scanner(scanner);
        if put {
            self.put_config(&self.disk.lock_open_mutex());
        }
        Ok(())
    }

    /// Sets the size to 0 if at most one opener is left (`nbd_bdev_reset()`).
    pub(super) fn reset_size(&self, config: &Config) {
        if self.has_one_user(config) {
            self.disk.set_capacity(Sectors(0));
        }
    }

    /// Returns whether at most one opener is left, apart from the work item that reads the partition
    /// table.
    pub(super) fn has_one_user(&self, config: &Config) -> bool {
        let others = u32::from(config.opened_by_scanner) + u32::from(config.held_by_netlink);
        // The block layer counts the work item, too, and does not count a task any more that closes the
        // device, which still has its reference. Neither counts one yet that has just begun to open it.
        self.disk.openers() <= 1 || config.references - others <= 1
    }
}
