// SPDX-License-Identifier: GPL-2.0
//! The kinds of sockets that can be used, and what is known about a socket of each kind.
//!
//! C headers: [`include/net/sock.h`](srctree/include/net/sock.h),
//! [`include/uapi/linux/in.h`](srctree/include/uapi/linux/in.h)

use crate::kapi::bindings;

/// The kinds of stream sockets that can be used.
///
/// They have in common what this driver relies on: `sendmsg()` and `recvmsg()` with `MSG_DONTWAIT` do not
/// wait for room or for data, `sk_data_ready` and `sk_state_change` report what `recvmsg()` has to
/// return, and `sk_write_space` reports room after `sendmsg()` or `poll()` has found none. The callbacks run
/// in process or softirq context, without `sk_callback_lock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// TCP over IPv4 or IPv6, with or without an upper layer protocol such as TLS. This includes the sockets
    /// that an MPTCP socket has accepted from peers without MPTCP.
    Tcp,
    /// A UNIX stream socket.
    Unix,
    /// MPTCP over IPv4 or IPv6. It stays this kind if the peer does not speak MPTCP: the MPTCP socket
    /// then uses a single TCP connection, but its operations are still those of MPTCP.
    Mptcp,
    /// A stream socket to a virtual machine, from one, or within one (`AF_VSOCK`).
    Vsock,
}

impl Kind {
    /// Returns the kind of a socket, or `None` if it cannot be used.
    ///
    /// The kind never changes. The only change to the family of a socket is from IPv6 to IPv4
    /// (`IPV6_ADDRFORM`).
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket.
    pub(super) unsafe fn of(sk: *mut bindings::sock) -> Option<Self> {
        // SAFETY: By this function's safety requirements, `sk` is valid. Only the family may change
        // concurrently; it is read with a single access.
        let (family, stream, protocol) = unsafe {
            (
                (&raw const (*sk).__sk_common.skc_family).read_volatile(),
                u32::from((*sk).sk_type) == bindings::SOCK_STREAM,
                u32::from((*sk).sk_protocol),
            )
        };
        // As `sk_is_tcp()` and `sk_is_stream_unix()`. The protocol tells TCP from MPTCP, SMC and SCTP.
        match (u32::from(family), protocol) {
            _ if !stream => None,
            (bindings::AF_INET | bindings::AF_INET6, bindings::IPPROTO_TCP) => Some(Kind::Tcp),
            (bindings::AF_INET | bindings::AF_INET6, bindings::IPPROTO_MPTCP) => Some(Kind::Mptcp),
            (bindings::AF_UNIX, _) => Some(Kind::Unix),
            (bindings::AF_VSOCK, _) => Some(Kind::Vsock),
            _ => None,
        }
    }
}

/// Whether the socket is connected, or was until it was shut down. No other socket may be hooked: a TCP
/// or MPTCP socket that listens, or could start to listen, passes its callbacks on to the connections that it
/// accepts.
///
/// # Safety
///
/// `sk` must be a valid socket, and a file must refer to it during the call.
pub(super) unsafe fn was_connected(sk: *mut bindings::sock) -> bool {
    // SAFETY: By this function's safety requirements, `sk` is valid. C reads the state without a lock, too.
    let state = unsafe { (&raw const (*sk).__sk_common.skc_state).read_volatile() };
    match state {
        bindings::TCP_LISTEN | bindings::TCP_SYN_SENT => false,
        // `sk_shutdown` is no evidence of a connection: `shutdown()` also sets it on a socket that was never
        // connected. The state of the `struct socket` is what `listen()` checks.
        bindings::TCP_CLOSE => {
            // SAFETY: By this function's safety requirements, a file refers to `sk`, so it has its
            // `struct socket`.
            let state = unsafe {
                let socket = (*sk).sk_socket.cast::<bindings::socket>();
                (&raw const (*socket).state).read_volatile()
            };
            state == bindings::socket_state_SS_CONNECTED
        }
        _ => true,
    }
}

/// Whether there is an upper layer protocol on top of TCP. The other kinds have none: MPTCP refuses
/// `TCP_ULP`.
///
/// # Safety
///
/// `sk` must be a valid socket.
pub(super) unsafe fn has_upper_layer(sk: *mut bindings::sock) -> bool {
    // SAFETY: By this function's safety requirements, `sk` is valid.
    if unsafe { Kind::of(sk) } != Some(Kind::Tcp) {
        return false;
    }
    // SAFETY: A TCP socket is a `struct inet_connection_sock`, which has this field. The pointer in it is
    // only compared.
    let ops = unsafe {
        sk.byte_add(bindings::OFFSET_ULP_OPS)
            .cast::<*const u8>()
            .read_volatile()
    };
    !ops.is_null()
}

/// Whether the receive queue of a socket holds anything. A vsock socket does not use this queue.
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
