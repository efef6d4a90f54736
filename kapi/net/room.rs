// SPDX-License-Identifier: GPL-2.0
//! Whether a socket has room for more to send, and asking it for a report once it has.
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)

use super::{
    kind::Kind,
    sock::Socket, //
};
use crate::kapi::{
    barrier::smp_mb,
    bindings, //
};
use kernel::sync::atomic::Full;

/// The purpose for which room is needed. It corresponds to the argument `wake` of
/// `__sk_stream_is_writeable()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RoomFor {
    /// To send now: whether the socket accepts at least some data (`sk_stream_is_writeable()`,
    /// `unix_writable()`).
    Sending,
    /// To wake up a sender, in `sk_write_space`: whether enough room is free to make that worthwhile
    /// (`sk_stream_write_space()`). This is stricter than [`Self::Sending`] only on TCP, where less than half
    /// of `TCP_NOTSENT_LOWAT` may be unsent, instead of less than all of it.
    Wakeup,
}

impl Socket {
    /// Whether a sender that waits for room should be woken up: enough room is free to make that worthwhile
    /// (`sk_stream_write_space()`). True if sending was shut down, because no room is reported then (as in
    /// `tcp_poll()`).
    ///
    /// To be asked when the socket has called `sk_write_space`. The answer may be out of date at once. It may
    /// be true without room, where the kind of socket does not let this be known; the sender then has to ask
    /// again ([`Self::has_room_or_requests_report()`]).
    ///
    /// # Context
    ///
    /// Any context.
    pub(crate) fn has_room_for_sender(&self) -> bool {
        self.has_room(RoomFor::Wakeup)
    }

    /// Whether the send buffer has room. How much it must have depends on what the room is for.
    fn has_room(&self, room_for: RoomFor) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant of `Socket`, `sk` is valid. C reads both without a lock, too.
        let (limit, shutdown) = unsafe {
            (
                (&raw const (*sk).sk_sndbuf).read_volatile(),
                (&raw const (*sk).sk_shutdown).read_volatile(),
            )
        };
        if u32::from(shutdown) & bindings::SEND_SHUTDOWN != 0 {
            return true;
        }
        // SAFETY: `sk` is valid. `sk_stream_wspace()` reads this without a lock, too.
        let used = unsafe { (&raw const (*sk).sk_wmem_queued).read_volatile() };
        let is_stream_writeable = used < limit && limit.saturating_sub(used) >= used >> 1;
        match self.kind() {
            Kind::Tcp => {
                let wake = i32::from(room_for == RoomFor::Wakeup);
                // The `struct sock` of `kernel::bindings` and ours are the same type in C.
                // SAFETY: By the type invariant of `Socket`, this is a TCP socket. The function is the
                // `stream_memory_free()` of TCP over IPv4 and IPv6 and of all protocols on top. C calls it
                // without a lock, too.
                is_stream_writeable && unsafe { bindings::tcp_stream_memory_free(sk.cast(), wake) }
            }
            // `mptcp_write_space()` has checked how much is unsent, before it calls `sk_write_space`.
            Kind::Mptcp => is_stream_writeable,
            Kind::Unix => {
                // SAFETY: `sk` is valid. `refcount_read()` is such a read, too.
                let used = unsafe { (&raw const (*sk).sk_wmem_alloc.refs.counter).read_volatile() };
                used.saturating_mul(4) <= limit
            }
            // Its transports cannot be asked without the socket's lock. They also call `sk_write_space` when
            // a packet is freed, which may give no room.
            Kind::Vsock => true,
        }
    }

    /// Returns whether the send buffer has room for [`RoomFor::Sending`]. Otherwise makes the socket call
    /// [`Events::write_space()`](super::hook::Events::write_space) once there is room for
    /// [`RoomFor::Wakeup`].
    ///
    /// A send that finds no room has that effect, too, but only until the next call of the callback. The
    /// room that this was about may be gone.
    ///
    /// # Context
    ///
    /// Process context. May sleep to get the socket's lock.
    pub(crate) fn has_room_or_requests_report(&self) -> bool {
        match self.kind() {
            Kind::Tcp | Kind::Unix => {}
            // What has to be checked is private to the protocol, and polling makes them report room, as well.
            Kind::Mptcp | Kind::Vsock => {
                let room = bindings::EPOLLOUT | bindings::EPOLLHUP | bindings::EPOLLERR;
                return self.poll() & room != 0 || self.peer_has_stopped_reading();
            }
        }
        if self.has_room(RoomFor::Sending) {
            return true;
        }
        // As `tcp_poll()` does.
        // SAFETY: By the type invariant of `Socket`, the socket is valid.
        unsafe {
            let flags = &raw mut (*self.as_ptr()).flags;
            bindings::set_bit(bindings::SOCK_NOSPACE as usize, flags);
        }
        // Pairs with the barrier before the callback looks whether the owner waits: either it sees what the
        // caller has stored, or this sees the room.
        smp_mb(Full);
        self.has_room(RoomFor::Sending)
    }

    /// Returns whether sending fails because the peer of a vsock socket has shut down its receiving side.
    /// `vsock_poll()` leaves this out, and the socket reports it once, by `sk_state_change`.
    fn peer_has_stopped_reading(&self) -> bool {
        if self.kind() != Kind::Vsock {
            return false;
        }
        // SAFETY: By the type invariant of `Socket`, this is a vsock socket and valid, so it is a `struct
        // vsock_sock`, which has this field. `vsock_poll()` reads it without the socket's lock, too.
        let shutdown = unsafe {
            let field = self.sk().byte_add(bindings::OFFSET_PEER_SHUTDOWN);
            field.cast::<u32>().read_volatile()
        };
        shutdown & bindings::RCV_SHUTDOWN != 0
    }
}
