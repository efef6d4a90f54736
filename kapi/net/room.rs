// SPDX-License-Identifier: GPL-2.0
//! Room in the send buffers of sockets: what each kind of socket checks before it reports room.
//!
//! C headers: [`include/net/sock.h`](srctree/include/net/sock.h),
//! [`include/net/tcp.h`](srctree/include/net/tcp.h)

use super::{
    kind::Kind,
    sock::Socket, //
};
use crate::kapi::bindings;

impl Socket {
    /// Whether there is room to send now. If not, the socket calls
    /// [`Events::write_space()`](super::hook::Events::write_space) when there is, with enough of it for
    /// [`Self::take_room()`].
    ///
    /// The answer may be out of date at once.
    ///
    /// # Context
    ///
    /// Process context. May sleep to get the socket's lock.
    pub(crate) fn has_room(&self) -> bool {
        match self.kind() {
            Kind::Tcp => self.stream_has_room() && self.tcp_has_room(0),
            Kind::Unix => self.unix_has_room(),
            // What limits the room is private to these protocols. Some transports of vsock report room only
            // after `poll()` has found none, too.
            Kind::Mptcp | Kind::Vsock => {
                let ready = bindings::EPOLLOUT | bindings::EPOLLERR | bindings::EPOLLHUP;
                self.poll() & ready != 0
            }
        }
    }

    /// Whether enough room is free to wake up a sender. This is what the socket's own `sk_write_space` would
    /// check.
    ///
    /// If so, clears `SOCK_NOSPACE`, as that does: the socket calls `sk_write_space` again only after another
    /// send or [`Self::has_room()`] has found no room. The caller must wake up the sender after this. Before
    /// it, the sender could find no room and set the flag first, which would then be lost: MPTCP calls
    /// `sk_write_space` without the lock that a sender holds.
    ///
    /// # Context
    ///
    /// In the `sk_write_space` callback.
    pub(crate) fn take_room(&self) -> bool {
        let has_room = self.has_room_for_wakeup();
        if has_room {
            // SAFETY: By its type invariant, `self` keeps the socket valid.
            unsafe {
                let socket = (*self.sk()).sk_socket;
                bindings::clear_bit(bindings::SOCK_NOSPACE as usize, &raw mut (*socket).flags);
            }
        }
        has_room
    }

    fn has_room_for_wakeup(&self) -> bool {
        match self.kind() {
            // As `sk_stream_write_space()`: less than half of `TCP_NOTSENT_LOWAT` may be unsent, instead of
            // less than all of it.
            Kind::Tcp => self.stream_has_room() && self.tcp_has_room(1),
            Kind::Unix => self.unix_has_room(),
            // `mptcp_write_space()` has checked `TCP_NOTSENT_LOWAT`.
            Kind::Mptcp => self.stream_has_room(),
            // Each transport calls `sk_write_space` when there is room, and some when there may be.
            Kind::Vsock => true,
        }
    }

    /// Whether the send buffer of a TCP or MPTCP socket has room, as the first part of
    /// `__sk_stream_is_writeable()`.
    fn stream_has_room(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant, `sk` is valid. `sk_stream_wspace()` reads both without a lock, too.
        let (limit, used) = unsafe {
            (
                (&raw const (*sk).sk_sndbuf).read_volatile(),
                (&raw const (*sk).sk_wmem_queued).read_volatile(),
            )
        };
        used < limit && limit.saturating_sub(used) >= used >> 1
    }

    /// Whether little enough of a TCP socket's data is unsent. `wake` is 1 to wake up a sender.
    fn tcp_has_room(&self, wake: i32) -> bool {
        if self.kind() != Kind::Tcp {
            return false;
        }
        // The `struct sock` of `kernel::bindings` and ours are the same type in C.
        // SAFETY: By its type invariant, `self` keeps `sk` valid, and it is a TCP socket. This function is the
        // `stream_memory_free()` of TCP over IPv4 and IPv6 and of all protocols on top. C calls it without a
        // lock, too.
        unsafe { bindings::tcp_stream_memory_free(self.sk().cast(), wake) }
    }

    /// Whether a UNIX socket has room, as `unix_writable()`.
    fn unix_has_room(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant, `sk` is valid. C reads both without a lock, too.
        let (limit, used) = unsafe {
            (
                (&raw const (*sk).sk_sndbuf).read_volatile(),
                (&raw const (*sk).sk_wmem_alloc.refs.counter).read_volatile(),
            )
        };
        used.saturating_mul(4) <= limit
    }
}
