// SPDX-License-Identifier: GPL-2.0
//! What netlink asks of a device, each in one step.

#![forbid(unsafe_code)]

use super::{
    config::Config,
    setup::checked_block_bytes,
    Device,
    State, //
};
use crate::kapi::{
    block::gendisk::File,
    task, //
};
use kernel::{
    prelude::*,
    str::CString, //
};

/// `NBD_CFLAG_DESTROY_ON_DISCONNECT`
const CFLAG_DESTROY_ON_DISCONNECT: u64 = 1 << 0;
/// `NBD_CFLAG_DISCONNECT_ON_CLOSE`
const CFLAG_DISCONNECT_ON_CLOSE: u64 = 1 << 1;

/// What netlink asks for: absent things stay as they are.
#[derive(Default)]
pub(crate) struct Setup<'a> {
    pub(crate) size_bytes: Option<u64>,
    pub(crate) block_bytes: Option<u64>,
    pub(crate) timeout_seconds: Option<u64>,
    pub(crate) dead_timeout_seconds: Option<u64>,
    pub(crate) server_flags: Option<u64>,
    pub(crate) client_flags: Option<u64>,
    pub(crate) sockets: KVec<u32>,
    pub(crate) backend: Option<&'a [u8]>,
}

impl Device {
    /// Sets it up and starts it (`nbd_genl_connect()`). Returns whether it did: it does not where somebody
    /// uses the device, or it is about to be removed. May sleep.
    ///
    /// # Errors
    ///
    /// Those of the steps; `EBUSY` where a socket is in use elsewhere.
    pub(crate) fn connect(&self, setup: &Setup<'_>) -> Result<bool> {
        let mut state = self.lock();
        if state.config.is_some() {
            return Ok(false);
        }
        match self.new_config(&mut state) {
            Ok(config) => config.bound = true,
            Err(e) if e == ENXIO => return Ok(false),
            Err(e) => return Err(e),
        }
        // The lock is held from here until the device has started: in between it would look as if it were
        // connected, and as if it could be disconnected.
        let set_up = self.set_up(&mut state, setup);
        let started = set_up.and_then(|()| self.start(state));
        started.map(|_| true).inspect_err(|_| self.put_config())
    }

    /// All that comes before the start.
    fn set_up(&self, state: &mut State, setup: &Setup<'_>) -> Result {
        self.apply(state, setup)?;
        let config = state.config_mut()?;
        if let Some(flags) = setup.server_flags {
            config.flags = flags as u32;
        }
        for fd in &setup.sockets {
            let fd = i32::try_from(*fd).map_err(|_| EINVAL)?;
            let socket = self.socket_from_fd(fd)?;
            config.sockets.push(socket, GFP_KERNEL)?;
        }
        if let Some(backend) = setup.backend {
            *self.backend.lock() = Some(c_string(backend)?);
        }
        self.add_file(File::Backend)?;
        config.has_backend_file = true;
        Ok(())
    }

    /// What connect and reconfigure have in common.
    fn apply(&self, state: &mut State, setup: &Setup<'_>) -> Result {
        let config = state.config.as_mut().ok_or(ENODEV)?;
        let size_bytes = setup.size_bytes.unwrap_or(config.size_bytes);
        let block_bytes = match setup.block_bytes {
            Some(bytes) if bytes != u64::from(config.block_bytes) => checked_block_bytes(bytes)?,
            _ => config.block_bytes,
        };
        if size_bytes != config.size_bytes || block_bytes != config.block_bytes {
            self.set_size(config, size_bytes, block_bytes)?;
        }
        if let Some(seconds) = setup.dead_timeout_seconds {
            config.dead_timeout_jiffies = seconds.saturating_mul(u64::from(task::HZ));
            if let Some(session) = &config.session {
                session.set_dead_timeout_jiffies(config.dead_timeout_jiffies);
            }
        }
        if let Some(flags) = setup.client_flags {
            config.disconnect_on_close = flags & CFLAG_DISCONNECT_ON_CLOSE != 0;
            let destroy = flags & CFLAG_DESTROY_ON_DISCONNECT != 0;
            self.usage.lock().destroy_on_disconnect = destroy;
        }
        if let Some(seconds) = setup.timeout_seconds {
            self.apply_timeout(state, seconds);
        }
        Ok(())
    }

    /// Changes a device that netlink has connected, and puts sockets in the place of dead connections
    /// (`nbd_genl_reconfigure()`). May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` where it is not connected by netlink or the image is another one, and those of the
    /// steps.
    pub(crate) fn reconfigure(&self, setup: &Setup<'_>) -> Result {
        let mut state = self.lock();
        // What an allocation would have written out to make room may wait for this very device.
        task::memalloc_noio(|| self.reconfigure_locked(&mut state, setup))
    }

    fn reconfigure_locked(&self, state: &mut State, setup: &Setup<'_>) -> Result {
        if let Some(backend) = &*self.backend.lock() {
            if setup.backend != Some(backend.to_bytes()) {
                pr_err!("nbd{}: the backend is not {backend:?}\n", self.index);
                return Err(EINVAL);
            }
        }
        let ready = |c: &KBox<Config>| c.bound && c.started;
        if !state.config.as_ref().is_some_and(ready) {
            pr_err!("nbd{}: not configured, cannot reconfigure\n", self.index);
            return Err(EINVAL);
        }
        self.apply(state, setup)?;
        let session = state.config.as_ref().and_then(|c| c.session.clone());
        let session = session.ok_or(EINVAL)?;
        for fd in &setup.sockets {
            let socket = self.socket_from_fd(*fd as i32)?;
            if !session.reconnect(&self.disk, &socket, self.stuck_jiffies)? {
                break;
            }
        }
        Ok(())
    }
}

/// A copy of `bytes`, whatever they are, up to the first zero (`nla_strdup()`, as C reads what that makes).
fn c_string(bytes: &[u8]) -> Result<CString> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
    let mut terminated = KVec::with_capacity(text.len() + 1, GFP_KERNEL)?;
    terminated.extend_from_slice(text, GFP_KERNEL)?;
    terminated.push(0, GFP_KERNEL)?;
    let text = CStr::from_bytes_with_nul(&terminated).map_err(|_| EINVAL)?;
    Ok(CString::try_from(text)?)
}
