// SPDX-License-Identifier: GPL-2.0
//! The netlink request to hand connections over to new sockets.

#![forbid(unsafe_code)]

use super::{
    config::Config,
    Device,
    State, //
};
use crate::{
    kapi::{
        errno::{
            ENOKEY,
            ENOTCONN, //
        },
        net::sock::Socket,
        task, //
    },
    rnbd_session::{
        handover::{
            About,
            Refusal,
            Which, //
        },
        Session, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// A request to hand connections over.
pub(crate) struct Handover<'a> {
    pub(crate) which: Which,
    /// File descriptors.
    pub(crate) sockets: KVec<i32>,
    /// For how many milliseconds the connections that are replaced may drain.
    pub(crate) drain_ms: u32,
    /// The identifier of the backend that the device is to have.
    pub(crate) backend: Option<&'a [u8]>,
}

impl Device {
    /// Replaces connections by new ones; see [`Session::hand_over()`].
    ///
    /// # Errors
    ///
    /// A refusal with one of these errors changes nothing but the sockets, which may have been shut down.
    ///
    /// - `EINVAL`: the device has another backend, or a file descriptor is that of a socket which is neither TCP,
    ///   MPTCP, nor a vsock or UNIX stream socket.
    /// - `EBADF`, `ENOTSOCK`: a file descriptor is not that of a socket.
    /// - `ENOTCONN`: the device is not connected, or a socket is not.
    /// - `ENOKEY`: a socket must be encrypted by TLS, and is not.
    /// - Those of [`Session::hand_over()`].
    ///
    /// # Context
    ///
    /// May sleep, but does not wait for a server.
    pub(crate) fn hand_over(&self, wanted: &Handover<'_>) -> Result<(), Refusal> {
        let mut state = self.lock();
        // An allocation must not wait for writeback, which may be waiting for this very device.
        task::memalloc_noio(|| self.hand_over_locked(&mut state, wanted))
    }

    /// Does the same under the configuration lock.
    fn hand_over_locked(&self, state: &mut State, wanted: &Handover<'_>) -> Result<(), Refusal> {
        let session = running_session(state.config.as_deref())?;
        if !self.may_have_backend(wanted.backend) {
            let words = c"the device has another backend";
            return Err(Refusal::new(EINVAL, About::Backend, words));
        }
        let mut sockets: KVec<Socket> = KVec::with_capacity(wanted.sockets.len(), GFP_KERNEL)?;
        for fd in &wanted.sockets {
            let socket = self.socket_from_fd(*fd).map_err(unusable)?;
            state
                .config_mut()?
                .check_encryption(&socket)
                .map_err(unusable)?;
            sockets.push(socket, GFP_KERNEL)?;
        }
        session.hand_over(&self.disk, wanted.which, &sockets, wanted.drain_ms)?;
        self.queue_wanted_scan(state.config_mut()?);
        Ok(())
    }

    /// Returns whether a request that names `backend` is for this device. As for `NBD_CMD_RECONFIGURE`, one for a
    /// device with a backend must name that.
    fn may_have_backend(&self, backend: Option<&[u8]>) -> bool {
        let ours = self.backend.lock();
        ours.as_ref().map(|ours| ours.to_bytes()) == backend
    }
}

/// Returns the session of a device, if it can be given other connections.
///
/// # Errors
///
/// `ENOTCONN`: the device is not connected, or is being disconnected.
fn running_session(config: Option<&Config>) -> Result<Arc<Session>, Refusal> {
    let session = config.filter(|c| c.started).and_then(|c| c.session.clone());
    let Some(session) = session else {
        let words = c"the device is not connected";
        return Err(Refusal::new(ENOTCONN, About::Device, words));
    };
    // This does not change while the configuration lock is held.
    if session.table().fate.snapshot().is_end_wanted() {
        let words = c"the device is being disconnected";
        return Err(Refusal::new(ENOTCONN, About::Device, words));
    }
    Ok(session)
}

/// Returns the refusal of a file descriptor that is not that of a socket which can be used.
fn unusable(error: Error) -> Refusal {
    let words = match error {
        e if e == EBADF => c"a file descriptor is not open",
        e if e == EINVAL => c"a socket must be TCP, MPTCP, vsock or UNIX",
        e if e == ENOTCONN => c"a socket is not connected",
        e if e == ENOKEY => c"a socket is not encrypted by TLS, as the device's must be",
        _ => c"a file descriptor is not that of a socket",
    };
    Refusal::new(error, About::Sockets, words)
}
