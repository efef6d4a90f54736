// SPDX-License-Identifier: GPL-2.0
//! The addresses of sockets.
//!
//! C header: [`include/linux/net.h`](srctree/include/linux/net.h)

use super::sock::Socket;
use crate::kapi::bindings;
use kernel::ffi;

/// `sizeof(struct sockaddr_storage)`, in words.
const WORDS: usize = 16;

/// The address of one side of a socket (`struct sockaddr`).
///
/// # Invariants
///
/// `len` is at most the size of `words`.
pub(crate) struct Address {
    words: [u64; WORDS],
    len: usize,
}

impl Address {
    /// Returns the address as C has it. That of a UNIX socket without a name is only its family.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: By the type invariant, there are as many bytes.
        unsafe { core::slice::from_raw_parts(self.words.as_ptr().cast(), self.len) }
    }
}

/// One side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Local,
    Peer,
}

impl Socket {
    /// Returns the address of one side (`getsockname()`, `getpeername()`), or `None` if the socket has none. A
    /// TCP socket that has lost its connection has no peer.
    ///
    /// # Context
    ///
    /// Process context, without a lock of the socket. May sleep.
    pub(crate) fn address(&self, side: Side) -> Option<Address> {
        let mut words = [0; WORDS];
        let to = words.as_mut_ptr().cast();
        let socket = self.as_ptr();
        // SAFETY: The socket is valid as long as `self`. `to` has room for any address.
        let len: ffi::c_int = unsafe {
            match side {
                Side::Local => bindings::kernel_getsockname(socket, to),
                Side::Peer => bindings::kernel_getpeername(socket, to),
            }
        };
        // INVARIANT: `len` is limited here.
        let len = usize::try_from(len).ok()?.min(size_of_val(&words));
        Some(Address { words, len })
    }
}
