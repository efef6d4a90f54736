// SPDX-License-Identifier: GPL-2.0
//! Connected stream sockets that user space hands over: sending, receiving, death. What they tell of
//! themselves is in `hook.rs`.
//!
//! The `kernel` crate (7.3) has no sockets. Source: `include/linux/net.h`, `include/net/sock.h`.

use super::iov::{
    Iov,
    RecvIov,
    SendIov, //
};
use crate::kapi::bindings;
use core::{
    mem::MaybeUninit,
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    prelude::*, //
};

/// Why a file descriptor cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadSocket {
    /// It is no open file, or no socket: the errno of `sockfd_lookup()`.
    Fd(Error),
    /// Neither TCP nor a UNIX stream.
    Kind,
    /// It is not connected and never was.
    NotConnected,
}

/// What becomes of bytes that the peer has not read yet when a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// They are still delivered.
    Polite,
    /// They are thrown away where that is possible (TCP: a reset; a UNIX socket has no such thing).
    Reset,
}

/// A socket, and a reference to its file.
///
/// # Invariants
///
/// `socket` is valid, and so is its `sk`, which does not change, because we hold a reference to its
/// file. It is TCP or a UNIX stream.
pub(crate) struct Socket {
    socket: NonNull<bindings::socket>,
}

// SAFETY: Sockets may be used by any task, and lock themselves.
unsafe impl Send for Socket {}
// SAFETY: Sockets may be used by several tasks at a time, and lock themselves.
unsafe impl Sync for Socket {}

/// What follows data that is sent (`MSG_MORE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Further data, at once: a segment that is not full waits for it.
    More,
    /// Nothing that is known of.
    Nothing,
}

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
    /// The socket behind a file descriptor of the current process (`nbd_get_socket()`). May sleep.
    pub(crate) fn from_fd(fd: i32) -> core::result::Result<Self, BadSocket> {
        let mut err = 0;
        // SAFETY: `err` is valid for the write.
        let socket = unsafe { bindings::sockfd_lookup(fd, &mut err) };
        let Some(socket) = NonNull::new(socket) else {
            return Err(BadSocket::Fd(to_result(err).err().unwrap_or(EBADF)));
        };
        // INVARIANT: `sockfd_lookup()` took a reference to the file; dropping this puts it.
        let socket = Socket { socket };
        if !socket.is_tcp() && !socket.is_unix_stream() {
            return Err(BadSocket::Kind);
        }
        // SAFETY: By the type invariant `sk` is valid.
        if !unsafe { was_connected(socket.sk()) } {
            return Err(BadSocket::NotConnected);
        }
        Ok(socket)
    }

    /// The socket proper; valid for as long as this is.
    pub(super) fn sk(&self) -> *mut bindings::sock {
        // SAFETY: By the type invariant the socket is valid. kernel::bindings does not know the fields
        // of `struct sock`, our bindings do; it is the same type in C.
        unsafe { (*self.socket.as_ptr()).sk.cast() }
    }

    fn family(&self) -> u32 {
        // SAFETY: By the type invariant `sk` is valid. The family of a connected socket does not change
        // but from IPv6 to IPv4 (`IPV6_ADDRFORM`), which makes no difference here.
        u32::from(unsafe { (*self.sk()).__sk_common.skc_family })
    }

    /// `sk_is_tcp()`.
    fn is_tcp(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid; its kind does not change.
        let (kind, protocol) = unsafe { ((*sk).sk_type, (*sk).sk_protocol) };
        matches!(self.family(), bindings::AF_INET | bindings::AF_INET6)
            && u32::from(kind) == bindings::SOCK_STREAM
            && u32::from(protocol) == bindings::IPPROTO_TCP
    }

    /// `sk_is_stream_unix()`.
    fn is_unix_stream(&self) -> bool {
        // SAFETY: By the type invariant `sk` is valid; its type does not change.
        let kind = unsafe { (*self.sk()).sk_type };
        self.family() == bindings::AF_UNIX && u32::from(kind) == bindings::SOCK_STREAM
    }

    /// Sends as much of `data` as fits. Does not wait for room, but may sleep for the socket's lock.
    ///
    /// # Errors
    ///
    /// `EAGAIN` where nothing fits, or for want of memory; anything else means that the connection is
    /// gone.
    pub(crate) fn send(&self, data: SendIov<'_>, next: Next) -> Result<usize> {
        let mut flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
        if next == Next::More {
            flags |= bindings::MSG_MORE;
        }
        let sent = self.transfer(data.into_inner(), bindings::ITER_SOURCE, |socket, msg| {
            // SAFETY: The socket is valid; `msg` describes memory that lives during the call.
            unsafe {
                (*msg).msg_flags = flags;
                bindings::sock_sendmsg(socket, msg)
            }
        });
        // TCP says EAGAIN, too. A UNIX socket says what it is, and has taken nothing.
        sent.map_err(|e| match e {
            ENOBUFS | ENOMEM => EAGAIN,
            e => e,
        })
    }

    /// Receives at most as much as `data` has room for. Does not wait for data, but may sleep for the
    /// socket's lock.
    ///
    /// # Errors
    ///
    /// `EAGAIN` where nothing is there; `EPIPE` at the end of the stream; anything else means that the
    /// connection is gone.
    pub(crate) fn receive(&self, data: RecvIov<'_>) -> Result<usize> {
        let got = self.transfer(data.into_inner(), bindings::ITER_DEST, |socket, msg| {
            let flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
            // SAFETY: The socket is valid; `msg` describes memory that lives during the call.
            unsafe { bindings::sock_recvmsg(socket, msg, flags as i32) }
        })?;
        if got == 0 {
            return Err(EPIPE);
        }
        Ok(got)
    }

    fn transfer(
        &self,
        data: Iov<'_>,
        direction: u32,
        call: impl FnOnce(*mut bindings::socket, *mut bindings::msghdr) -> i32,
    ) -> Result<usize> {
        // SAFETY: It consists of numbers and pointers, for which zeroes are fine.
        let mut msg: bindings::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: The pieces describe memory that lives as long as `data`.
        unsafe {
            bindings::iov_iter_bvec(
                &mut msg.msg_iter,
                direction,
                data.pieces().as_ptr(),
                data.pieces().len(),
                data.bytes(),
            )
        };
        let result = in_io_context(|| call(self.socket.as_ptr(), &mut msg));
        to_result(result)?;
        Ok(result as usize)
    }

    /// Whether there is something to receive: data, the end of the stream, or an error. May be wrong
    /// about what happens at the same time; that is announced by
    /// [`Events::input_ready`](super::hook::Events::input_ready).
    pub(crate) fn has_input(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid; these are looked at as `tcp_poll()` does.
        unsafe {
            let shutdown = (&raw const (*sk).sk_shutdown).read_volatile();
            let err = (&raw const (*sk).sk_err).read_volatile();
            has_data(sk) || u32::from(shutdown) & bindings::RCV_SHUTDOWN != 0 || err != 0
        }
    }

    /// Whether there is an upper layer protocol on top of TCP, such as TLS. It can come at any time; once it
    /// is there it stays until the socket goes.
    pub(crate) fn has_upper_layer(&self) -> bool {
        // SAFETY: By the type invariant `sk` is valid, and TCP's or UNIX'.
        unsafe { has_upper_layer(self.sk()) }
    }

    /// Whether the send buffer has room. How much it must have depends on what the room is for.
    ///
    /// The answer may be out of date at once. A socket on which a send has found no room calls
    /// [`Events::write_space()`](super::hook::Events::write_space) when there is room again, also for
    /// [`RoomFor::Wakeup`].
    pub(crate) fn has_room(&self, room_for: RoomFor) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid; C reads the limit without a lock, too.
        let limit = unsafe { (&raw const (*sk).sk_sndbuf).read_volatile() };
        if self.family() == bindings::AF_UNIX {
            // SAFETY: `sk` is valid; `refcount_read()` is a plain read as well.
            let used = unsafe { (&raw const (*sk).sk_wmem_alloc.refs.counter).read_volatile() };
            return used.saturating_mul(4) <= limit;
        }
        // SAFETY: `sk` is valid; `sk_stream_wspace()` reads it without a lock, too.
        let used = unsafe { (&raw const (*sk).sk_wmem_queued).read_volatile() };
        if used >= limit || limit.saturating_sub(used) < used >> 1 {
            return false;
        }
        let wake = i32::from(room_for == RoomFor::Wakeup);
        // SAFETY: What is neither UNIX nor another kind is TCP by the type invariant, and this is the
        // `stream_memory_free()` of all that TCP is or has on top. It is called without a lock in C, too.
        // kernel::bindings' and our `struct sock` are the same type in C.
        unsafe { bindings::tcp_stream_memory_free(sk.cast(), wake) }
    }

    /// Ends the connection: nothing more is sent or received. May sleep.
    pub(crate) fn end(&self, ending: Ending) {
        // SAFETY: The socket is valid. Both calls may be repeated.
        unsafe {
            if ending == Ending::Reset && self.is_tcp() {
                // kernel::bindings' and our `struct sock` are the same type in C.
                bindings::tcp_abort(self.sk().cast(), bindings::ECONNABORTED as i32);
            }
            bindings::kernel_sock_shutdown(
                self.socket.as_ptr(),
                bindings::sock_shutdown_cmd_SHUT_RDWR,
            );
        }
    }

    /// Whether it is a connection of which neither side has ended anything, as far as this machine knows.
    pub(crate) fn is_connected(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid; these are looked at as `tcp_poll()` does.
        let (state, shutdown) = unsafe {
            (
                (&raw const (*sk).__sk_common.skc_state).read_volatile(),
                (&raw const (*sk).sk_shutdown).read_volatile(),
            )
        };
        state == bindings::TCP_ESTABLISHED && shutdown == 0
    }

    /// Locks the socket, as system calls do (`lock_sock()`). May sleep.
    pub(super) fn lock(&self) -> Locked<'_> {
        // SAFETY: By the type invariant `sk` is valid. kernel::bindings' and our `struct sock` are the same
        // type in C.
        unsafe { bindings::lock_sock_nested(self.sk().cast(), 0) };
        Locked(self)
    }

    /// Keeps its callbacks from running, and softirqs from this processor (`sk_callback_lock`). Nothing may
    /// sleep until it is dropped.
    pub(super) fn lock_callbacks(&self) -> LockedCallbacks<'_> {
        // SAFETY: By the type invariant `sk` is valid.
        unsafe { bindings::_raw_write_lock_bh(&raw mut (*self.sk()).sk_callback_lock) };
        LockedCallbacks(self)
    }

    /// Whether somebody has hooked it: then it is not the caller's to send on or to end.
    pub(crate) fn is_hooked(&self) -> bool {
        // SAFETY: By the type invariant `sk` is valid; the pointer is only compared.
        unsafe {
            !(&raw const (*self.sk()).sk_user_data)
                .read_volatile()
                .is_null()
        }
    }
}

impl Clone for Socket {
    fn clone(&self) -> Self {
        // SAFETY: By the type invariant we hold a reference to the file.
        unsafe { bindings::get_file((*self.socket.as_ptr()).file) };
        // INVARIANT: A reference was taken above.
        Socket {
            socket: self.socket,
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // SAFETY: By the type invariant we hold a reference to the file (`sockfd_put()`).
        unsafe { bindings::fput((*self.socket.as_ptr()).file) };
    }
}

/// Holds a socket's lock.
pub(super) struct Locked<'a>(&'a Socket);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: `Socket::lock()` has locked it.
        unsafe { bindings::release_sock(self.0.sk().cast()) };
    }
}

/// Holds the lock of a socket's callbacks for writing.
pub(super) struct LockedCallbacks<'a>(&'a Socket);

impl Drop for LockedCallbacks<'_> {
    fn drop(&mut self) {
        // SAFETY: `Socket::lock_callbacks()` has locked it.
        unsafe { bindings::_raw_write_unlock_bh(&raw mut (*self.0.sk()).sk_callback_lock) };
    }
}

/// Whether the socket is connected, or was until it was ended. A TCP socket that listens, or may begin to,
/// passes its callbacks on to the connections that come in on it, which are not ours.
///
/// # Safety
///
/// `sk` must be a socket, valid during the call, whose file somebody holds.
pub(super) unsafe fn was_connected(sk: *mut bindings::sock) -> bool {
    // SAFETY: The caller promises that `sk` is valid; this is looked at without its lock in C, too.
    let state = unsafe { (&raw const (*sk).__sk_common.skc_state).read_volatile() };
    match state {
        bindings::TCP_LISTEN | bindings::TCP_SYN_SENT => false,
        // `sk_shutdown` does not tell: `shutdown()` sets it also where there never was a connection, and
        // `listen()` asks for the state of the `struct socket` only.
        bindings::TCP_CLOSE => {
            // SAFETY: `sk` has its socket as long as its file is held.
            let state = unsafe {
                let socket = (*sk).sk_socket.cast::<bindings::socket>();
                (&raw const (*socket).state).read_volatile()
            };
            state == bindings::socket_state_SS_CONNECTED
        }
        _ => true,
    }
}

/// Whether it is a UNIX socket.
///
/// # Safety
///
/// `sk` must be a socket, valid during the call.
pub(super) unsafe fn is_unix(sk: *mut bindings::sock) -> bool {
    // SAFETY: The caller promises that `sk` is valid; the family of a UNIX socket never changes.
    u32::from(unsafe { (*sk).__sk_common.skc_family }) == bindings::AF_UNIX
}

/// Whether there is an upper layer protocol on top of TCP.
///
/// # Safety
///
/// `sk` must be a TCP or UNIX socket, valid during the call.
pub(super) unsafe fn has_upper_layer(sk: *mut bindings::sock) -> bool {
    // SAFETY: The caller promises that `sk` is valid.
    if unsafe { is_unix(sk) } {
        return false;
    }
    // SAFETY: A TCP socket is a `struct inet_connection_sock`; the pointer in it is only compared.
    let ops = unsafe {
        sk.byte_add(bindings::OFFSET_ULP_OPS)
            .cast::<*const u8>()
            .read_volatile()
    };
    !ops.is_null()
}

/// Whether something lies in a socket that was not received yet.
///
/// # Safety
///
/// `sk` must be a socket, valid during the call.
pub(super) unsafe fn has_data(sk: *mut bindings::sock) -> bool {
    // SAFETY: The caller promises that `sk` is valid; as `skb_queue_empty_lockless()`.
    unsafe {
        let queue = &raw const (*sk).sk_receive_queue;
        let first = (&raw const (*queue).__bindgen_anon_1.list.next).read_volatile();
        !core::ptr::eq(first.cast::<u8>(), queue.cast::<u8>())
    }
}

/// Runs `f` as I/O has to run: allocations may use the reserves and never wait for reclaim, and
/// security modules see the kernel, not whoever happens to write (as `__sock_xmit()`).
fn in_io_context<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: The current task changes its own flags and credentials, and puts them back.
    unsafe {
        let task = bindings::get_current();
        let had_memalloc = (*task).flags & bindings::PF_MEMALLOC;
        let creds = (*task).cred;
        (*task).flags |= bindings::PF_MEMALLOC;
        (*task).cred = bindings::init_task.cred;
        let result = f();
        (*task).cred = creds;
        (*task).flags = (*task).flags & !bindings::PF_MEMALLOC | had_memalloc;
        result
    }
}
