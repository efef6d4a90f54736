// SPDX-License-Identifier: GPL-2.0
//! The netlink requests to connect and to reconfigure a device. Each is one step for everybody who
//! takes the configuration lock by [`Device::lock()`].

#![forbid(unsafe_code)]

use super::{
    config::Config,
    sizes::checked_block_bytes,
    Device,
    State,
    USUAL_SIZES, //
};
use crate::kapi::{
    block::{
        disk::OpenMutexHeld,
        gendisk::File,
        limits::RequestSizes, //
    },
    net::{
        namespace::Namespace,
        port::Sender, //
    },
    task, //
};
use kernel::{
    prelude::*,
    str::CString,
    sync::Arc, //
};

/// See `NBD_CFLAG_DESTROY_ON_DISCONNECT`.
pub(crate) const CFLAG_DESTROY_ON_DISCONNECT: u64 = 1 << 0;
/// See `NBD_CFLAG_DISCONNECT_ON_CLOSE`.
pub(crate) const CFLAG_DISCONNECT_ON_CLOSE: u64 = 1 << 1;

/// The device is disconnected when the netlink socket that has sent this is closed. nbd.c does not have
/// this flag, and ignores it.
pub(crate) const CFLAG_DISCONNECT_ON_RELEASE: u64 = 1 << 32;

/// The attributes of a netlink request. A setting whose attribute is absent stays as it is.
#[derive(Default)]
pub(crate) struct Setup<'a> {
    pub(crate) size_bytes: Option<u64>,
    pub(crate) block_bytes: Option<u64>,
    pub(crate) timeout_jiffies: Option<u64>,
    pub(crate) dead_timeout_jiffies: Option<u64>,
    pub(crate) server_flags: Option<u64>,
    pub(crate) client_flags: Option<u64>,
    pub(crate) sockets: KVec<u32>,
    pub(crate) backend: Option<&'a [u8]>,
    /// The socket that has sent the request, if it becomes the owner of the device.
    pub(crate) owner: Option<Arc<Sender>>,
    /// The network namespace of the sender, if the device is to be connected.
    pub(crate) namespace: Option<Arc<Namespace>>,
    /// How large requests may be, if the device is to be connected.
    pub(crate) sizes: Option<RequestSizes>,
    /// No partition table is looked for.
    pub(crate) never_scans: bool,
    /// All sockets must be encrypted by TLS in the kernel, also those that come later.
    pub(crate) needs_tls: bool,
    /// The server answers reads by structured replies only.
    pub(crate) needs_structured: bool,
}

impl Setup<'_> {
    /// Returns whether the sender becomes the owner of the device.
    pub(crate) fn makes_owner(&self) -> bool {
        let flags = self.client_flags.unwrap_or(0);
        flags & CFLAG_DISCONNECT_ON_RELEASE != 0
    }
}

impl Device {
    /// Configures and starts the device (`nbd_genl_connect()`).
    ///
    /// A device that programs merely have open can be connected: they have it open afterwards as if
    /// they had opened it then.
    ///
    /// Returns false if the device is in use or about to be removed.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: there is no socket, or several that the server's flags do not allow, or one that
    ///   is neither TCP, MPTCP, nor a vsock or UNIX stream socket, or a size or limits that the block
    ///   layer does not accept.
    /// - `EBADF`, `ENOTSOCK`: a file descriptor is not that of a socket.
    /// - `ENOTCONN`: a socket is not connected, and never was.
    /// - `ENOKEY`: a socket must be encrypted by TLS, and is not.
    /// - `EBUSY`: a socket is in use by another device or by another part of the kernel, or the
    ///   disk's limits are.
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`, and those of creating a sysfs file.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn connect(&self, setup: &Setup<'_>) -> Result<bool> {
        let block_bytes = setup.block_bytes.unwrap_or(0);
        let wanted = |c: Option<&Config>| {
            let free = c.is_none_or(Config::is_idle);
            free.then_some(checked_block_bytes(block_bytes).ok()?)
        };
        let (mut state, held) = self.lock_for_block_size(|| Ok(self.lock()), wanted)?;
        if !self.take_config(&mut state)? {
            return Ok(false);
        }
        // The lock, or `State::starting`, is held until the device has started, or everything has been
        // undone. In between the device would look connected, and could be disconnected.
        let (mut state, started) = match self.set_up(&mut state, setup) {
            Ok(()) => self.start(state, held),
            Err(e) => (state, Err(e)),
        };
        started
            .map(|_| true)
            .inspect_err(|_| self.undo_connect(&mut state))
    }

    /// Takes a reference to the configuration for netlink: to a new one, or to that of a device that
    /// is merely open.
    ///
    /// Returns false if the device is in use or about to be removed.
    ///
    /// # Errors
    ///
    /// `ENODEV` and `ENOMEM`; see [`Self::connect()`].
    fn take_config(&self, state: &mut State) -> Result<bool> {
        match &mut state.config {
            Some(config) if config.is_idle() => {
                config.references += 1;
                // A disconnect that was requested before this is not one of this session.
                config.disconnect_requested = false;
            }
            Some(_) => return Ok(false),
            None => match self.new_config(state) {
                Ok(_) => {}
                Err(e) if e == ENXIO => return Ok(false),
                Err(e) => return Err(e),
            },
        }
        state.config_mut()?.bound = true;
        Ok(true)
    }

    /// Configures the device, up to the start.
    ///
    /// # Errors
    ///
    /// Those of [`Self::connect()`] except for the ones that starting a session adds.
    fn set_up(&self, state: &mut State, setup: &Setup<'_>) -> Result {
        self.apply(state, None, setup)?;
        let config = state.config_mut()?;
        if let Some(flags) = setup.server_flags {
            config.flags = flags as u32;
        }
        config.sizes = setup.sizes.unwrap_or(USUAL_SIZES);
        config.never_scans = setup.never_scans;
        config.needs_tls = setup.needs_tls;
        config.needs_structured = setup.needs_structured;
        for fd in &setup.sockets {
            let fd = i32::try_from(*fd).map_err(|_| EINVAL)?;
            let socket = self.socket_from_fd(fd)?;
            config.check_encryption(&socket)?;
            config.sockets.push(socket, GFP_KERNEL)?;
        }
        if let Some(backend) = setup.backend {
            *self.backend.lock() = Some(c_string(backend)?);
        }
        self.add_file(File::Backend).inspect_err(|_| {
            pr_err!("nbd{}: cannot create the file backend\n", self.index);
        })?;
        config.has_backend_file = true;
        config.namespace = setup.namespace.clone();
        self.set_owner(setup.owner.clone());
        Ok(())
    }

    /// Applies the settings that connect and reconfigure have in common.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the size or the block size is not valid, or a request of one block would be too large for the
    ///   server.
    /// - `EBUSY`: see [`Self::set_size()`].
    /// - `ENODEV`: the device has no configuration.
    fn apply(
        &self,
        state: &mut State,
        held: Option<&OpenMutexHeld<'_>>,
        setup: &Setup<'_>,
    ) -> Result {
        let config = state.config.as_mut().ok_or(ENODEV)?;
        let size_bytes = setup.size_bytes.unwrap_or(config.size_bytes);
        let block_bytes = match setup.block_bytes {
            Some(bytes) if bytes != u64::from(config.block_bytes) => checked_block_bytes(bytes)?,
            _ => config.block_bytes,
        };
        if size_bytes != config.size_bytes || block_bytes != config.block_bytes {
            self.set_size(config, held, size_bytes, block_bytes)?;
        }
        if let Some(jiffies) = setup.dead_timeout_jiffies {
            config.dead_timeout_jiffies = jiffies;
            if let Some(session) = &config.session {
                session.set_dead_timeout_jiffies(config.dead_timeout_jiffies);
            }
        }
        if let Some(flags) = setup.client_flags {
            config.disconnect_on_close = flags & CFLAG_DISCONNECT_ON_CLOSE != 0;
            let destroy = flags & CFLAG_DESTROY_ON_DISCONNECT != 0;
            self.usage.lock().destroy_on_disconnect = destroy;
        }
        if let Some(jiffies) = setup.timeout_jiffies {
            self.apply_timeout(state, jiffies);
        }
        Ok(())
    }

    /// Changes a device that was connected by netlink, and replaces dead connections
    /// (`nbd_genl_reconfigure()`).
    ///
    /// If the device allows it, a stuck connection is replaced when no connection is dead.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the device was not connected by netlink, the backend identifier differs, or one
    ///   of the new settings or sockets is not valid.
    /// - `EBADF`, `ENOTSOCK`: a file descriptor is not that of a socket.
    /// - `ENOTCONN`: a socket is not connected.
    /// - `ENOKEY`: a socket must be encrypted by TLS, and is not.
    /// - `EBUSY`: a socket is in use, or the block size cannot be changed now (see
    ///   [`Self::set_size()`]).
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn reconfigure(&self, setup: &Setup<'_>) -> Result {
        let wanted = |c: Option<&Config>| {
            let ready = c.is_some_and(|c| c.is_reconfigurable());
            ready.then_some(checked_block_bytes(setup.block_bytes?).ok()?)
        };
        let (mut state, held) = self.lock_for_block_size(|| Ok(self.lock()), wanted)?;
        // An allocation must not wait for writeback, which may be waiting for this very device.
        task::memalloc_noio(|| self.reconfigure_locked(&mut state, held.as_deref(), setup))
    }

    /// Reconfigures the device under the configuration lock. The errors are those of
    /// [`Self::reconfigure()`].
    fn reconfigure_locked(
        &self,
        state: &mut State,
        held: Option<&OpenMutexHeld<'_>>,
        setup: &Setup<'_>,
    ) -> Result {
        if let Some(backend) = &*self.backend.lock() {
            if setup.backend != Some(backend.to_bytes()) {
                pr_err!("nbd{}: the backend is not {backend:?}\n", self.index);
                return Err(EINVAL);
            }
        }
        if !state.config.as_ref().is_some_and(|c| c.is_reconfigurable()) {
            pr_err!("nbd{}: not configured, cannot reconfigure\n", self.index);
            return Err(EINVAL);
        }
        self.apply(state, held, setup)?;
        let session = state.config.as_ref().and_then(|c| c.session.clone());
        let session = session.ok_or(EINVAL)?;
        for fd in &setup.sockets {
            let socket = self.socket_from_fd(*fd as i32)?;
            state.config_mut()?.check_encryption(&socket)?;
            if !session.reconnect(&self.disk, &socket, self.stuck_jiffies)? {
                break;
            }
            self.queue_wanted_scan(state.config_mut()?);
        }
        // A request that fails does not make its sender the owner.
        if setup.client_flags.is_some() {
            self.set_owner(setup.owner.clone());
        }
        Ok(())
    }
}

/// Copies `bytes` up to the first NUL byte, without checking their encoding (`nla_strdup()`).
fn c_string(bytes: &[u8]) -> Result<CString> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
    let mut terminated = KVec::with_capacity(text.len() + 1, GFP_KERNEL)?;
    terminated.extend_from_slice(text, GFP_KERNEL)?;
    terminated.push(0, GFP_KERNEL)?;
    let text = CStr::from_bytes_with_nul(&terminated).map_err(|_| EINVAL)?;
    Ok(CString::try_from(text)?)
}
