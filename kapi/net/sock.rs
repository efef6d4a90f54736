// SPDX-License-Identifier: GPL-2.0
//! Connected stream sockets that user space hands over: what they are, and how they end. They send and receive in
//! `transfer.rs`, their callbacks are in `hook.rs`, and whether there is room to send is determined in `room.rs`.
//!
//! C headers: [`include/linux/net.h`](srctree/include/linux/net.h),
//! [`include/net/sock.h`](srctree/include/net/sock.h)
//!
//! The `kernel` crate (7.3) has no sockets.

use super::{
    bh_lock::{
        write_lock_bh,
        write_unlock_bh, //
    },
    context::outside_bpf,
    kind::{
        has_upper_layer,
        tls_keys,
        was_connected,
        Kind, //
    },
};
use crate::kapi::{
    bindings,
    task, //
};
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
    /// The socket is not of a kind that a connection can use: TCP, MPTCP, a vsock or UNIX stream socket.
    Kind,
    /// The socket is not connected and never was.
    NotConnected,
}

/// How to end a connection: what happens to bytes that were sent and that the peer has not received yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// They are still delivered.
    Polite,
    /// They are discarded, if the protocol can do that: TCP and MPTCP send a reset. On a UNIX or vsock
    /// socket this is the same as [`Self::Polite`].
    Reset,
}

/// A stream socket of a kind that a connection can use, with a reference to its file.
///
/// # Invariants
///
/// - This holds a reference to the file of `socket`. Therefore `socket` and its `sk` are valid, and `sk` does
///   not change.
/// - `kind` is the kind of `socket`.
pub(crate) struct Socket {
    socket: NonNull<bindings::socket>,
    kind: Kind,
    input: Input,
}

/// How to learn whether there is something to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    /// It is in the receive queue of the socket.
    Queue,
    /// The transport of vsock has it. The socket has to be polled.
    Transport,
    /// TLS may have decrypted it already, and keeps that in a queue of its own. A poll does not tell of a key
    /// update there.
    Tls,
}

impl Input {
    /// Returns how it is with a socket of this kind.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket.
    unsafe fn of(kind: Kind, sk: *mut bindings::sock) -> Self {
        match kind {
            Kind::Vsock => Input::Transport,
            // SAFETY: By this function's safety requirements, `sk` is valid.
            Kind::Tcp if unsafe { has_upper_layer(sk) } => Input::Tls,
            Kind::Tcp | Kind::Mptcp | Kind::Unix => Input::Queue,
        }
    }
}

// SAFETY: A socket may be used by any task. The socket calls take the locks that they need.
unsafe impl Send for Socket {}
// SAFETY: A socket may be used by several tasks at a time. The socket calls take the locks that they need.
unsafe impl Sync for Socket {}

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
        // SAFETY: `sockfd_lookup()` has taken a reference to the file of a valid socket.
        let sk = unsafe { (*socket.as_ptr()).sk.cast() };
        // SAFETY: The socket has an `sk`, which is valid as long as the file.
        let Some(kind) = (unsafe { Kind::of(sk) }) else {
            // SAFETY: The reference is given up here. As `sockfd_put()`.
            unsafe { bindings::fput((*socket.as_ptr()).file) };
            return Err(BadSocket::Kind);
        };
        // INVARIANT: `sockfd_lookup()` has taken a reference to the file, and `kind` is that of the socket.
        let socket = Socket {
            socket,
            kind,
            // SAFETY: The socket has an `sk`, which is valid as long as the file.
            input: unsafe { Input::of(kind, sk) },
        };
        // SAFETY: By the type invariant, `sk` is valid and this refers to its file.
        if !unsafe { was_connected(socket.sk()) } {
            return Err(BadSocket::NotConnected);
        }
        Ok(socket)
    }

    /// Returns the `struct socket`, which is valid for as long as `self` is.
    pub(super) fn as_ptr(&self) -> *mut bindings::socket {
        self.socket.as_ptr()
    }

    /// Returns the `struct sock`, which is valid for as long as `self` is.
    pub(super) fn sk(&self) -> *mut bindings::sock {
        // `kernel::bindings` does not know the fields of `struct sock`, our bindings do. It is the same
        // type in C.
        // SAFETY: By the type invariant, the socket is valid.
        unsafe { (*self.socket.as_ptr()).sk.cast() }
    }

    /// Returns the kind of the socket.
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the events for which the socket is ready, as a program that polls it learns them, and has it
    /// report the others with its callbacks.
    ///
    /// # Context
    ///
    /// Process context. May sleep to get the socket's lock.
    pub(super) fn poll(&self) -> u32 {
        let socket = self.as_ptr();
        // SAFETY: By the type invariant, the socket is valid and has its file and operations. Without a
        // `poll_table` (`poll_does_not_wait()`) nothing is kept.
        unsafe {
            let ops = (&raw const (*socket).ops).read_volatile();
            let poll = (*ops).poll;
            poll.map_or(!0, |poll| {
                poll((*socket).file, socket, core::ptr::null_mut())
            })
        }
    }

    /// Takes notice of TLS that was set up since the socket was passed.
    pub(crate) fn update_input(&mut self) {
        // SAFETY: By the type invariant, `sk` is valid.
        self.input = unsafe { Input::of(self.kind, self.sk()) };
    }

    /// Whether there may be something to receive: data, the end of the stream, or an error. With TLS, only an
    /// attempt can tell. The answer may miss what arrives at the same time, which
    /// [`Events::input_ready()`](super::hook::Events::input_ready) then announces.
    ///
    /// # Context
    ///
    /// Process context. May sleep to get the socket's lock.
    pub(crate) fn has_input(&self) -> bool {
        match self.input {
            Input::Queue => {}
            Input::Tls => return true,
            Input::Transport => {
                let input = bindings::EPOLLIN
                    | bindings::EPOLLRDHUP
                    | bindings::EPOLLHUP
                    | bindings::EPOLLERR;
                return self.poll() & input != 0;
            }
        }
        let sk = self.sk();
        // SAFETY: By the type invariant, `sk` is valid. `tcp_poll()` reads these fields without a lock, too.
        unsafe {
            let shutdown = (&raw const (*sk).sk_shutdown).read_volatile();
            let err = (&raw const (*sk).sk_err).read_volatile();
            // The connection was undone, as by `connect()` with `AF_UNSPEC`, or MPTCP has given up its
            // last subflow. Neither shuts the socket down.
            let state = (&raw const (*sk).__sk_common.skc_state).read_volatile();
            has_data(sk)
                || u32::from(shutdown) & bindings::RCV_SHUTDOWN != 0
                || err != 0
                || state == bindings::TCP_CLOSE
        }
    }

    /// Returns the number of the protocol (`IPPROTO_*`), 0 for a UNIX or vsock socket.
    pub(crate) fn protocol(&self) -> u32 {
        match self.kind {
            Kind::Tcp => bindings::IPPROTO_TCP,
            Kind::Mptcp => bindings::IPPROTO_MPTCP,
            Kind::Unix | Kind::Vsock => 0,
        }
    }

    /// Whether there is an upper layer protocol on top of TCP, such as TLS. One can be added at any time, and
    /// stays until the socket is closed.
    pub(crate) fn has_upper_layer(&self) -> bool {
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { has_upper_layer(self.sk()) }
    }

    /// Whether TLS encrypts what is sent, and decrypts what is received. It stays so.
    pub(crate) fn is_encrypted(&self) -> bool {
        // SAFETY: By the type invariant, `sk` is valid.
        let keys = unsafe { tls_keys(self.sk()) };
        keys.sends && keys.receives
    }

    /// Whether TLS decrypts what is received. It stays so.
    pub(crate) fn is_decrypted(&self) -> bool {
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { tls_keys(self.sk()) }.receives
    }

    /// Ends the connection: nothing can be sent or received any more. May be called again.
    ///
    /// # Context
    ///
    /// Process context. May sleep to get the socket's lock. MPTCP and vsock allocate memory here. That does
    /// not start reclaim, which would wait for requests that may be those of this connection. If even the
    /// reserves are empty, a vsock server is not told of the end before the file is closed.
    pub(crate) fn end(&self, ending: Ending) {
        task::memalloc_noreclaim(|| {
            if ending == Ending::Reset {
                self.reset();
            }
            // SAFETY: By the type invariant, the socket is valid.
            unsafe {
                bindings::kernel_sock_shutdown(
                    self.socket.as_ptr(),
                    bindings::sock_shutdown_cmd_SHUT_RDWR,
                );
            }
        });
    }

    /// Discards what was sent and has not left this machine, and tells the peer, if the protocol can do that.
    fn reset(&self) {
        match self.kind {
            // The `struct sock` of `kernel::bindings` and ours are the same type in C.
            // SAFETY: By the type invariant, `sk` is valid, and it is a TCP socket. The function takes the
            // lock of the socket, since the task is in no BPF program.
            Kind::Tcp => outside_bpf(|| unsafe {
                bindings::tcp_abort(self.sk().cast(), bindings::ECONNABORTED as i32);
            }),
            Kind::Mptcp => self.disconnect(),
            Kind::Unix | Kind::Vsock => {}
        }
    }

    /// Makes an MPTCP socket forget its connection, as `connect()` with `AF_UNSPEC` does: `mptcp_disconnect()`
    /// discards what was sent, and resets all subflows.
    fn disconnect(&self) {
        // SAFETY: A `struct sockaddr` consists of integers, for which all zeroes is a valid value. It stands
        // for `AF_UNSPEC`.
        let mut address: bindings::sockaddr = unsafe { MaybeUninit::zeroed().assume_init() };
        // It does not fail. If it did, the shutdown that follows would still end the connection.
        // SAFETY: By the type invariant, the socket is valid. `address` has that size.
        let _ = outside_bpf(|| unsafe {
            bindings::kernel_connect(
                self.as_ptr(),
                (&raw mut address).cast(),
                size_of::<bindings::sockaddr>() as i32,
                0,
            )
        });
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
        let peer_has_shut_down = match self.kind {
            Kind::Tcp | Kind::Mptcp | Kind::Unix => false,
            // `sk_shutdown` is only about this side.
            Kind::Vsock => self.poll() & bindings::EPOLLRDHUP != 0,
        };
        state == bindings::TCP_ESTABLISHED && shutdown == 0 && !peer_has_shut_down
    }

    /// Makes TCP and MPTCP send data at once, without waiting for the acknowledgement of earlier data
    /// (`TCP_NODELAY`). Does nothing on a UNIX or vsock socket, which never waits.
    ///
    /// # Context
    ///
    /// Process context, without a lock of the socket. May sleep.
    pub(super) fn set_nodelay(&self) {
        match self.kind {
            // The `struct sock` of `kernel::bindings` and ours are the same type in C.
            // SAFETY: By the type invariant, `sk` is valid, and it is a TCP socket.
            Kind::Tcp => unsafe { bindings::tcp_sock_set_nodelay(self.sk().cast()) },
            Kind::Mptcp => self.set_nodelay_of_subflows(),
            Kind::Unix | Kind::Vsock => {}
        }
    }

    /// Sets `TCP_NODELAY` for all subflows of an MPTCP socket, and for those to come.
    fn set_nodelay_of_subflows(&self) {
        let one: i32 = 1;
        // SAFETY: A `sockptr_t` consists of a pointer and a flag, for which all zeroes is a valid value.
        let mut value: bindings::sockptr_t = unsafe { MaybeUninit::zeroed().assume_init() };
        value.set_is_kernel(true);
        value.__bindgen_anon_1.kernel = (&raw const one).cast_mut().cast();
        let socket = self.as_ptr();
        // It does not fail. If it did, requests would only be slower.
        // SAFETY: By the type invariant, the socket is valid and has its operations. `value` points to a
        // number, which is only read.
        let _ = outside_bpf(|| unsafe {
            let ops = (&raw const (*socket).ops).read_volatile();
            let set = (*ops).setsockopt;
            set.map(|set| {
                set(
                    socket,
                    bindings::SOL_TCP as i32,
                    bindings::TCP_NODELAY as i32,
                    value,
                    size_of::<i32>() as u32,
                )
            })
        });
    }

    /// Takes the socket's lock, as system calls do (`lock_sock()`), until the guard is dropped. May sleep.
    pub(super) fn lock(&self) -> Locked<'_> {
        // The `struct sock` of `kernel::bindings` and ours are the same type in C.
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { bindings::lock_sock_nested(self.sk().cast(), 0) };
        Locked(self)
    }

    /// Takes `sk_callback_lock` for writing and disables softirqs, until the guard is dropped. None of our
    /// callbacks runs in the meantime. The caller must not sleep in the meantime, other than for spin locks on
    /// PREEMPT_RT.
    pub(super) fn lock_callbacks(&self) -> LockedCallbacks<'_> {
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { write_lock_bh(&raw mut (*self.sk()).sk_callback_lock) };
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
            input: self.input,
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
        unsafe { write_unlock_bh(&raw mut (*self.0.sk()).sk_callback_lock) };
    }
}

/// Whether the receive queue of a socket holds anything.
///
/// # Safety
///
/// `sk` must be a valid socket.
pub(super) unsafe fn has_data(sk: *mut bindings::sock) -> bool {
    // As `skb_queue_empty_lockless()`.
    // SAFETY: By this function's safety requirements, `sk` is valid. The pointer read is only compared.
    unsafe {
        let queue = &raw const (*sk).sk_receive_queue;
        let first = (&raw const (*queue).__bindgen_anon_1.list.next).read_volatile();
        !core::ptr::eq(first.cast::<u8>(), queue.cast::<u8>())
    }
}
