// SPDX-License-Identifier: GPL-2.0
//! Whether a socket has room for more to send, and asking it for a report once it has.
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)

use super::sock::Socket;
use crate::kapi::bindings;
use kernel::sync::{
    atomic::Full,
    barrier::smp_mb, //
};

/// The purpose for which [`Socket::has_room()`] is asked. It corresponds to the argument `wake` of
/// `__sk_stream_is_writeable()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RoomFor {
    /// To send now: whether the socket accepts at least some data (`sk_stream_is_writeable()`,
    /// `unix_writable()`).
    Sending,
    /// To wake up a sender, in `sk_write_space`: whether enough room is free to make that worthwhile
    /// (`sk_stream_write_space()`). This is stricter than [`Self::Sending`] only on TCP, where less than half
    /// of `TCP_NOTSENT_LOWAT` may be unsent, instead of less than all of it.
    Wakeup,
}

impl Socket {
    /// Whether the send buffer has room. How much it must have depends on what the room is for. True if
    /// sending was shut down, because no room is reported then (as in `tcp_poll()`).
    ///
    /// The answer may be out of date at once.
    pub(crate) fn has_room(&self, room_for: RoomFor) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant, `sk` is valid. C reads both without a lock, too.
        let (limit, shutdown) = unsafe {
            (
                (&raw const (*sk).sk_sndbuf).read_volatile(),
                (&raw const (*sk).sk_shutdown).read_volatile(),
            )
        };
        if u32::from(shutdown) & bindings::SEND_SHUTDOWN != 0 {
            return true;
        }
        if self.family() == bindings::AF_UNIX {
            // SAFETY: `sk` is valid. `refcount_read()` is such a read, too.
            let used = unsafe { (&raw const (*sk).sk_wmem_alloc.refs.counter).read_volatile() };
            return used.saturating_mul(4) <= limit;
        }
        // SAFETY: `sk` is valid. `sk_stream_wspace()` reads this without a lock, too.
        let used = unsafe { (&raw const (*sk).sk_wmem_queued).read_volatile() };
        if used >= limit || limit.saturating_sub(used) < used >> 1 {
            return false;
        }
        let wake = i32::from(room_for == RoomFor::Wakeup);
        // The `struct sock` of `kernel::bindings` and ours are the same type in C.
        // SAFETY: By the type invariant, a socket that is not a UNIX socket is a TCP socket. This
        // function is the `stream_memory_free()` of TCP over IPv4 and IPv6 and of all protocols on top. C
        // calls it without a lock, too.
        unsafe { bindings::tcp_stream_memory_free(sk.cast(), wake) }
    }

    /// Returns whether the send buffer has room for [`RoomFor::Sending`]. Otherwise makes the socket call
    /// [`Events::write_space()`](super::hook::Events::write_space) once there is room for
    /// [`RoomFor::Wakeup`].
    ///
    /// A send that finds no room has that effect, too, but only until the next call of the callback. The
    /// room that this was about may be gone.
    pub(crate) fn has_room_or_requests_report(&self) -> bool {
        if self.has_room(RoomFor::Sending) {
            return true;
        }
        // As `tcp_poll()` does.
        // SAFETY: By the type invariant, the socket is valid.
        unsafe {
            let flags = &raw mut (*self.as_ptr()).flags;
            bindings::set_bit(bindings::SOCK_NOSPACE as usize, flags);
        }
        // Pairs with the barrier before the callback looks whether the owner waits: either it sees what the
        // caller has stored, or this sees the room.
        smp_mb(Full);
        self.has_room(RoomFor::Sending)
    }
}
