// SPDX-License-Identifier: GPL-2.0
//! Disconnects a device, and drops its sockets.

#![forbid(unsafe_code)]

use super::{
    config::Config,
    Device, //
};
use crate::{
    kapi::block::disk::Sectors,
    rnbd_sock, //
};
use kernel::prelude::*;

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
    pub(super) fn disconnect_by_netlink(&self, backend: Option<&[u8]>) -> Result<bool> {
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
    /// Of a device that was lost, only the sockets are dropped that were passed since: nbd-client does
    /// this before it passes a new one.
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
            let lost = config.is_lost();
            if lost {
                config.end_idle_sockets();
            } else {
                config.end();
            }
            config.sockets = KVec::new();
            config.setup_by = None;
            config.interrupted = None;
            if lost {
                return Ok(false);
            }
            config.cleared = config.started;
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
    pub(super) fn reset_size(&self) {
        if self.disk.openers() <= 1 {
            self.disk.set_capacity(Sectors(0));
        }
    }
}
