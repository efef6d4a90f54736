// SPDX-License-Identifier: GPL-2.0
//! Connected stream sockets that user space hands over: sending, receiving and shutting down. Their callbacks
//! are in `hook.rs`.
//!
//! C headers: [`include/linux/net.h`](srctree/include/linux/net.h),
//! [`include/net/sock.h`](srctree/include/net/sock.h)
//!
//! The `kernel` crate (7.3) has no sockets. The context in which data is sent and received
//! (`PF_MEMALLOC`, the credentials of the kernel) follows `__sock_xmit()` in `drivers/block/nbd.c`.
//! nvme-tcp and sunrpc set `PF_MEMALLOC` for their sockets, too.

use super::{
    iov::{
        Iov,
        RecvIov,
        SendIov, //
    },
    kind::{
        has_data,
        has_upper_layer,
        was_connected,
        Kind, //
    }, //
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
    /// The descriptor is not open, or is not a socket. Holds the error of `sockfd_lookup()`.
    Fd(Error),
    /// The socket is of none of the kinds that can be used ([`Kind`]).
    Kind,
    /// The socket is not connected and never was.
    NotConnected,
}

/// How to end a connection: what happens to bytes that were sent and that the peer has not received yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// They are still delivered.
    Polite,
    /// They are discarded, if the protocol can do that: TCP and MPTCP send a reset. On UNIX and vsock sockets
    /// this is the same as [`Self::Polite`].
    Reset,
}

/// A connected stream socket, with a reference to its file.
///
/// # Invariants
///
/// - This holds a reference to the file of `socket`. Therefore `socket` and its `sk` are valid, and `sk` does
///   not change.
/// - `socket` is of this `kind`.
pub(crate) struct Socket {
    socket: NonNull<bindings::socket>,
    kind: Kind,
}

// SAFETY: A socket may be used by any task. The socket calls take the locks that they need.
unsafe impl Send for Socket {}
// SAFETY: A socket may be used by several tasks at a time. The socket calls take the locks that they need.
unsafe impl Sync for Socket {}

/// What the caller will send next (`MSG_MORE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// More data, immediately. A segment that is not full waits for it.
    More,
    /// Nothing that is known yet.
    Nothing,
}

/// The operation `disconnect` of `struct proto`.
type Disconnect = unsafe extern "C" fn(*mut bindings::sock, i32) -> i32;

impl Socket {
    /// Returns the socket of a file descriptor of the current process (nbd.c's `nbd_get_socket()`).
    ///
    /// # Errors
    ///
    /// See [`BadSocket`].
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn from_fd(fd: i32) -> core::result::Result<Self, BadSocket> {
        let mut err = 0;
        // SAFETY: `err` is valid for the write.
        let socket = unsafe { bindings::sockfd_lookup(fd, &mut err) };
        let Some(socket) = NonNull::new(socket) else {
            return Err(BadSocket::Fd(to_result(err).err().unwrap_or(EBADF)));
        };
        // SAFETY: `sockfd_lookup()` has returned a socket and taken a reference to its file.
        let kind = unsafe { Kind::of((*socket.as_ptr()).sk.cast()) };
        let Some(kind) = kind else {
            // As `sockfd_put()`.
            // SAFETY: The reference to the file was taken above.
            unsafe { bindings::fput((*socket.as_ptr()).file) };
            return Err(BadSocket::Kind);
        };
        // INVARIANT: `sockfd_lookup()` has taken a reference to the file, and the socket is of this kind.
        let socket = Socket { socket, kind };
        // SAFETY: By the type invariant, `sk` is valid and this refers to its file.
        if !unsafe { was_connected(socket.sk()) } {
            return Err(BadSocket::NotConnected);
        }
        Ok(socket)
    }

    /// Returns the `struct sock`, which is valid for as long as `self` is.
    pub(super) fn sk(&self) -> *mut bindings::sock {
        // `kernel::bindings` does not know the fields of `struct sock`, our bindings do. It is the same
        // type in C.
        // SAFETY: By the type invariant, the socket is valid.
        unsafe { (*self.socket.as_ptr()).sk.cast() }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Sends as much of `data` as the socket has room for, and returns the number of bytes.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: there is no room, or no memory.
    /// - `EINTR`, `ERESTARTSYS`: a socket with TLS was interrupted by a signal.
    /// - Anything else: the connection is broken.
    ///
    /// # Context
    ///
    /// Process context. Does not wait for room, but may sleep to get the socket's lock.
    pub(crate) fn send(&self, data: SendIov<'_>, next: Next) -> Result<usize> {
        let mut flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
        if next == Next::More {
            flags |= bindings::MSG_MORE;
        }
        let sent = self.transfer(data.into_inner(), bindings::ITER_SOURCE, |socket, msg| {
            // SAFETY: The socket and `msg` are valid, and `msg` describes memory that lives during the call.
            unsafe {
                (*msg).msg_flags = flags;
                bindings::sock_sendmsg(socket, msg)
            }
        });
        // If there is no memory, TCP and MPTCP return EAGAIN. UNIX and vsock sockets return these errors, and
        // have accepted nothing.
        sent.map_err(|e| match e {
            ENOBUFS | ENOMEM => EAGAIN,
            e => e,
        })
    }

    /// Receives at most as many bytes as `data` has room for, and returns their number.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: there is nothing to receive.
    /// - `EPIPE`: the stream has ended.
    /// - Anything else: the connection is broken.
    ///
    /// # Context
    ///
    /// Process context. Does not wait for data, but may sleep to get the socket's lock.
    pub(crate) fn receive(&self, data: RecvIov<'_>) -> Result<usize> {
        let got = self.transfer(data.into_inner(), bindings::ITER_DEST, |socket, msg| {
            let flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
            // SAFETY: The socket and `msg` are valid, and `msg` describes memory that lives during the call.
            unsafe { bindings::sock_recvmsg(socket, msg, flags as i32) }
        })?;
        if got == 0 {
            return Err(EPIPE);
        }
        Ok(got)
    }

    /// Runs `call` on a message that describes `data`, in the context that I/O needs.
    fn transfer(
        &self,
        data: Iov<'_>,
        direction: u32,
        call: impl FnOnce(*mut bindings::socket, *mut bindings::msghdr) -> i32,
    ) -> Result<usize> {
        // SAFETY: A `struct msghdr` consists of integers and pointers, for which all zeroes is a valid value.
        let mut msg: bindings::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: By the type invariant of `Iov`, the pieces describe memory that lives as long as `data`.
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

    /// Whether there may be something to receive: data, the end of the stream, or an error. The answer may
    /// miss what arrives at the same time, which
    /// [`Events::input_ready()`](super::hook::Events::input_ready) then announces.
    pub(crate) fn has_input(&self) -> bool {
        // The transports of vsock have queues of their own.
        if self.kind == Kind::Vsock {
            return true;
        }
        let sk = self.sk();
        // SAFETY: By the type invariant, `sk` is valid. `tcp_poll()` reads these fields without a lock, too.
        unsafe {
            let shutdown = (&raw const (*sk).sk_shutdown).read_volatile();
            let err = (&raw const (*sk).sk_err).read_volatile();
            has_data(sk) || u32::from(shutdown) & bindings::RCV_SHUTDOWN != 0 || err != 0
        }
    }

    /// Whether there is an upper layer protocol on top of TCP, such as TLS. One can be added at any time, and
    /// stays until the socket is closed.
    pub(crate) fn has_upper_layer(&self) -> bool {
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { has_upper_layer(self.sk()) }
    }

    /// Returns the operations of the socket.
    fn ops(&self) -> &bindings::proto_ops {
        // SAFETY: By the type invariant, the socket is valid. Its operations are static, in the kernel or in
        // a module that the file of the socket keeps loaded.
        unsafe { &*(&raw const (*self.socket.as_ptr()).ops).read_volatile() }
    }

    /// Asks the protocol what the socket is ready for (`EPOLL...`), as `poll()` without waiting.
    ///
    /// # Context
    ///
    /// Process context. May sleep to get the socket's lock.
    pub(super) fn poll(&self) -> u32 {
        let Some(poll) = self.ops().poll else {
            return 0;
        };
        let socket = self.socket.as_ptr();
        // SAFETY: By the type invariant, the socket and its file are valid. A null pointer as the last
        // argument means not to wait (`poll_does_not_wait()`).
        in_io_context(|| unsafe { poll((*socket).file, socket, core::ptr::null_mut()) })
    }

    /// Ends the connection: nothing can be sent or received any more. May be called again.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn end(&self, ending: Ending) {
        // Not to start reclaim, which may wait for the commands of this connection.
        in_io_context(|| {
            if ending == Ending::Reset {
                self.reset();
            }
            // SAFETY: By the type invariant, the socket is valid.
            unsafe {
                bindings::kernel_sock_shutdown(
                    self.socket.as_ptr(),
                    bindings::sock_shutdown_cmd_SHUT_RDWR,
                )
            }
        });
    }

    /// Discards what was sent and has not left this machine, if the protocol can do that, and tells the peer.
    fn reset(&self) {
        // The `struct sock` of `kernel::bindings` and ours are the same type in C.
        let sk = self.sk();
        match self.kind {
            Kind::Tcp => {
                // SAFETY: By the type invariant, `sk` is valid, and it is a TCP socket.
                unsafe { bindings::tcp_abort(sk.cast(), bindings::ECONNABORTED as i32) };
            }
            Kind::Mptcp => {
                let _locked = self.lock();
                // As `connect()` with `AF_UNSPEC`, which waiting tasks recognize by the counter. The state of
                // the `struct socket` is left alone, so that the socket cannot be connected again, nor
                // listen.
                // SAFETY: By the type invariant, `sk` is valid, and it is locked. The protocol is a static
                // structure, of which all have this operation.
                unsafe {
                    (*sk).sk_disconnects = (*sk).sk_disconnects.wrapping_add(1);
                    let protocol = (&raw const (*sk).__sk_common.skc_prot).read_volatile();
                    let disconnect = protocol
                        .byte_add(bindings::OFFSET_PROTO_DISCONNECT)
                        .cast::<Disconnect>()
                        .read();
                    disconnect(sk, 0);
                }
            }
            // What was sent is at the peer, or on its way there in the memory of this machine, from where
            // nothing can take it back.
            Kind::Unix | Kind::Vsock => {}
        }
    }

    /// Whether the socket is connected and neither side has shut it down, not even in one direction, as
    /// far as this machine knows.
    ///
    /// # Context
    ///
    /// Process context. May sleep to get the socket's lock.
    pub(crate) fn is_connected(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant, `sk` is valid. `tcp_poll()` reads these fields without a lock, too.
        let (state, shutdown) = unsafe {
            (
                (&raw const (*sk).__sk_common.skc_state).read_volatile(),
                (&raw const (*sk).sk_shutdown).read_volatile(),
            )
        };
        // Vsock keeps what the peer has shut down elsewhere.
        let peer_ended = || self.kind == Kind::Vsock && self.poll() & bindings::EPOLLRDHUP != 0;
        state == bindings::TCP_ESTABLISHED && shutdown == 0 && !peer_ended()
    }

    /// Makes TCP and MPTCP send data at once, without waiting for the acknowledgement of earlier data
    /// (`TCP_NODELAY`). Does nothing on other sockets, which never wait.
    ///
    /// # Context
    ///
    /// Process context, without a lock of the socket. May sleep.
    pub(super) fn set_nodelay(&self) {
        match self.kind {
            // The `struct sock` of `kernel::bindings` and ours are the same type in C.
            // SAFETY: By the type invariant, `sk` is valid, and it is a TCP socket.
            Kind::Tcp => unsafe { bindings::tcp_sock_set_nodelay(self.sk().cast()) },
            Kind::Mptcp => {
                let mut on = 1i32;
                let mut value = bindings::sockptr_t::default();
                value.__bindgen_anon_1.kernel = (&raw mut on).cast();
                value.set_is_kernel(true);
                if let Some(set_option) = self.ops().setsockopt {
                    // SAFETY: By the type invariant, the socket is valid. `value` points to an `int` in kernel
                    // memory, which lives during the call.
                    unsafe {
                        set_option(
                            self.socket.as_ptr(),
                            bindings::SOL_TCP as i32,
                            bindings::TCP_NODELAY as i32,
                            value,
                            size_of::<i32>() as u32,
                        )
                    };
                }
            }
            Kind::Unix | Kind::Vsock => {}
        }
    }

    /// Takes the socket's lock, as system calls do (`lock_sock()`), until the guard is dropped. May sleep.
    pub(super) fn lock(&self) -> Locked<'_> {
        // The `struct sock` of `kernel::bindings` and ours are the same type in C.
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { bindings::lock_sock_nested(self.sk().cast(), 0) };
        Locked(self)
    }

    /// Takes `sk_callback_lock` for writing and disables softirqs, until the guard is dropped. None of our
    /// callbacks runs in the meantime. The caller must not sleep in the meantime.
    pub(super) fn lock_callbacks(&self) -> LockedCallbacks<'_> {
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { bindings::_raw_write_lock_bh(&raw mut (*self.sk()).sk_callback_lock) };
        LockedCallbacks(self)
    }

    /// Whether another user in the kernel has the socket: then the caller must not send on it or end it.
    pub(crate) fn is_hooked(&self) -> bool {
        // SAFETY: By the type invariant, `sk` is valid. The pointer is only compared.
        unsafe {
            !(&raw const (*self.sk()).sk_user_data)
                .read_volatile()
                .is_null()
        }
    }
}

impl Clone for Socket {
    fn clone(&self) -> Self {
        // SAFETY: By the type invariant, this holds a reference to the file.
        unsafe { bindings::get_file((*self.socket.as_ptr()).file) };
        // INVARIANT: The reference to the file was taken above. The socket is the same, so its kind is, too.
        Socket {
            socket: self.socket,
            kind: self.kind,
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // As `sockfd_put()`.
        // SAFETY: By the type invariant, this holds a reference to the file, which is given up here.
        unsafe { bindings::fput((*self.socket.as_ptr()).file) };
    }
}

/// A guard that holds a socket's lock.
pub(super) struct Locked<'a>(&'a Socket);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: `Socket::lock()` has taken the lock.
        unsafe { bindings::release_sock(self.0.sk().cast()) };
    }
}

/// A guard that holds `sk_callback_lock` of a socket for writing.
pub(super) struct LockedCallbacks<'a>(&'a Socket);

impl Drop for LockedCallbacks<'_> {
    fn drop(&mut self) {
        // SAFETY: `Socket::lock_callbacks()` has taken the lock.
        unsafe { bindings::_raw_write_unlock_bh(&raw mut (*self.0.sk()).sk_callback_lock) };
    }
}

/// Runs `f` in the context that I/O needs, as nbd.c's `__sock_xmit()` does: allocations may use the
/// memory reserves and do not start reclaim (`PF_MEMALLOC`), and security modules see the credentials of
/// the kernel instead of those of the task that happens to write.
fn in_io_context<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: Only the current task changes its own flags and `cred`, and both are restored before this
    // returns.
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
