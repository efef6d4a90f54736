// SPDX-License-Identifier: GPL-2.0
//! The settings that both front ends share: sockets, flags and timeouts.

#![forbid(unsafe_code)]

use super::{
    config::Config,
    Device,
    State,
    DEFAULT_TIMEOUT_SECONDS, //
};
use crate::kapi::{
    errno::ENOTCONN,
    net::sock::{
        BadSocket,
        Socket, //
    },
    task::{
        self,
        TaskId, //
    },
};
use kernel::{
    prelude::*,
    sync::MutexGuard, //
};

/// The longest timeout in jiffies: `MAX_JIFFY_OFFSET`, limited to what 32 bits can hold.
const MAX_JIFFIES: u32 = u32::MAX / 4;

impl Device {
    /// Takes the configuration lock for an ioctl. Netlink cannot connect the device before the lock
    /// is dropped.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the device was configured by netlink.
    ///
    /// # Context
    ///
    /// May sleep, like [`Self::lock()`].
    pub(super) fn lock_for_ioctl(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.config.as_ref().is_some_and(|c| c.bound) {
            pr_err!(
                "nbd{}: cannot use ioctl interface on a netlink controlled device\n",
                self.index
            );
            return Err(EINVAL);
        }
        Ok(state)
    }

    /// Checks that the device can be used by ioctl.
    ///
    /// # Errors
    ///
    /// Those of [`Self::lock_for_ioctl()`].
    pub(crate) fn check_ioctl(&self) -> Result {
        drop(self.lock_for_ioctl()?);
        Ok(())
    }

    /// Calls `f`, which sets up something by ioctl, under the configuration lock. If it succeeds,
    /// netlink cannot connect the device before the last close.
    ///
    /// # Errors
    ///
    /// Those of [`Self::lock_for_ioctl()`], `ENODEV` if the device has no configuration, and those
    /// of `f`.
    pub(super) fn set_up_by_ioctl(&self, f: impl FnOnce(&mut Config) -> Result) -> Result {
        let mut state = self.lock_for_ioctl()?;
        let config = state.config_mut()?;
        f(config)?;
        config.set_up_by_ioctl = true;
        Ok(())
    }

    /// Adds a socket to those that the device will use (`nbd_add_socket()`). A device that was lost
    /// uses them once it is started again.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the file descriptor is out of range, or its socket is neither TCP, MPTCP,
    ///   nor a vsock or UNIX stream socket, or the device was configured by netlink.
    /// - `EBADF`, `ENOTSOCK`: the file descriptor is not that of a socket.
    /// - `ENOTCONN`: the socket is not connected, and never was.
    /// - `EBUSY`: the device was started already, or another task is configuring it.
    /// - `ENODEV`: the device has no configuration.
    /// - `ENOMEM`.
    pub(crate) fn add_socket(&self, fd: usize) -> Result {
        self.set_up_by_ioctl(|config| {
            let fd = i32::try_from(fd).map_err(|_| EINVAL)?;
            if config.started && !config.may_restart() {
                let why = match config.is_lost() {
                    true => "a device that has lost its server, whose size was not set since",
                    false => "a running device",
                };
                pr_err!("nbd{}: cannot add a socket to {why}\n", self.index);
                return Err(EBUSY);
            }
            let socket = self.socket_from_fd(fd)?;
            if config.is_lost() && config.sockets.is_empty() {
                // The task that has passed the sockets of the lost session need not pass the new ones.
                config.setup_by = None;
            }
            let me = TaskId::current();
            if *config.setup_by.get_or_insert(me) != me {
                pr_err!("nbd{}: being set up by another task\n", self.index);
                return Err(EBUSY);
            }
            // An allocation must not wait for writeback, which may be waiting for this very device.
            Ok(task::memalloc_noio(|| {
                config.sockets.push(socket, GFP_KERNEL)
            })?)
        })
    }

    /// Returns the socket of a file descriptor (`nbd_get_socket()`), and logs why it is not usable.
    ///
    /// # Errors
    ///
    /// `EBADF`, `ENOTSOCK`, `EINVAL` and `ENOTCONN`; see [`Self::add_socket()`].
    pub(super) fn socket_from_fd(&self, fd: i32) -> Result<Socket> {
        Socket::from_fd(fd).map_err(|e| match e {
            BadSocket::Fd(errno) => errno,
            BadSocket::Kind => {
                pr_err!(
                    "nbd{}: unsupported socket: should be TCP, MPTCP, vsock or UNIX\n",
                    self.index
                );
                EINVAL
            }
            BadSocket::NotConnected => {
                pr_err!("nbd{}: unsupported socket: not connected\n", self.index);
                ENOTCONN.into()
            }
        })
    }

    /// Sets the request timeout in seconds, 0 if none is set
    /// (`nbd_set_cmd_timeout()`).
    ///
    /// # Errors
    ///
    /// Those of [`Self::set_up_by_ioctl()`].
    pub(crate) fn set_timeout_seconds(&self, seconds: usize) -> Result {
        let mut state = self.lock_for_ioctl()?;
        self.apply_timeout(&mut state, task::seconds_to_jiffies(seconds as u64));
        state.config_mut()?.set_up_by_ioctl = true;
        Ok(())
    }

    /// Sets the request timeout in jiffies under the configuration lock, 0 if none is set.
    pub(super) fn apply_timeout(&self, state: &mut State, jiffies: u64) {
        // A value that is larger than the block layer's maximum must not wrap around to a short
        // timeout.
        let jiffies = u32::try_from(jiffies).map_or(MAX_JIFFIES, |j| j.min(MAX_JIFFIES));
        state.timeout_jiffies = jiffies;
        self.disk.set_request_timeout(match jiffies {
            0 => DEFAULT_TIMEOUT_SECONDS * task::HZ,
            _ => jiffies,
        });
        let session = state.config.as_ref().and_then(|c| c.session.as_ref());
        if let Some(session) = session {
            session.table().set_timeout_jiffies(jiffies);
        }
    }

    /// Sets the server's transmission flags. They take effect when the device is started or its
    /// size is set.
    ///
    /// # Errors
    ///
    /// Those of [`Self::set_up_by_ioctl()`].
    pub(crate) fn set_flags(&self, flags: usize) -> Result {
        self.set_up_by_ioctl(|config| {
            config.flags = flags as u32;
            Ok(())
        })
    }
}
