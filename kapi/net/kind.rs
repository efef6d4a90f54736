// SPDX-License-Identifier: GPL-2.0
//! The kinds of sockets that a connection can use.
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)

use crate::kapi::bindings;
use core::ptr::NonNull;

/// A kind of socket that a connection can use: a connected, reliable stream.
///
/// A connected socket keeps its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// TCP over IPv4 or IPv6, possibly with an upper layer protocol such as TLS (`sk_is_tcp()`).
    Tcp,
    /// Multipath TCP, possibly with a peer that only speaks TCP. The socket is a `struct mptcp_sock`. It sends and
    /// receives over TCP sockets of its own, the *subflows*, and is itself no `struct tcp_sock`.
    Mptcp,
    /// A UNIX stream socket (`sk_is_stream_unix()`).
    Unix,
    /// A vsock stream socket (`sk_is_vsock()`), with any transport. The socket is a `struct vsock_sock`.
    Vsock,
}

impl Kind {
    /// Returns the kind of a socket, or `None` if a connection cannot use it.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket.
    pub(super) unsafe fn of(sk: *mut bindings::sock) -> Option<Self> {
        // SAFETY: By this function's safety requirements, `sk` is valid. The only change to these fields of a
        // connected socket is that of the family from IPv6 to IPv4 (`IPV6_ADDRFORM`), which makes no
        // difference here.
        let (family, kind, protocol) = unsafe {
            (
                (*sk).__sk_common.skc_family,
                (*sk).sk_type,
                (*sk).sk_protocol,
            )
        };
        if u32::from(kind) != bindings::SOCK_STREAM {
            return None;
        }
        match (u32::from(family), u32::from(protocol)) {
            (bindings::AF_INET | bindings::AF_INET6, bindings::IPPROTO_TCP) => Some(Kind::Tcp),
            (bindings::AF_INET | bindings::AF_INET6, bindings::IPPROTO_MPTCP) => Some(Kind::Mptcp),
            (bindings::AF_UNIX, _) => Some(Kind::Unix),
            (bindings::AF_VSOCK, _) => Some(Kind::Vsock),
            _ => None,
        }
    }
}

/// Whether there is an upper layer protocol on top of TCP. MPTCP refuses such protocols (`TCP_ULP`).
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

/// Returns the `struct tls_context` of a socket, if TLS is on top of it (`tls_get_ctx()`). It stays until the
/// socket is closed.
///
/// # Safety
///
/// `sk` must be a valid socket.
pub(super) unsafe fn tls_context(sk: *mut bindings::sock) -> Option<NonNull<u8>> {
    // SAFETY: By this function's safety requirements, `sk` is valid.
    if unsafe { Kind::of(sk) } != Some(Kind::Tcp) {
        return None;
    }
    // SAFETY: A TCP socket is a `struct inet_connection_sock`, which has pointers at both offsets used below.
    let field = |offset| unsafe { sk.byte_add(offset).cast::<*mut u8>().read_volatile() };
    let ops = field(bindings::OFFSET_ULP_OPS);
    if ops.is_null() {
        return None;
    }
    // The protocol sets its data before its operations, and both stay until the socket is closed.
    let context = field(bindings::OFFSET_ULP_DATA);
    // SAFETY: `ops` points to a static `struct tcp_ulp_ops`, whose name is longer than four bytes.
    let name = unsafe { *ops.add(bindings::OFFSET_ULP_NAME).cast::<[u8; 4]>() };
    NonNull::new(context).filter(|_| name == *b"tls\0")
}

/// The directions for which TLS has keys. They stay until the socket is closed, or are replaced by others.
#[derive(Clone, Copy, Default)]
pub(super) struct Keys {
    pub(super) sends: bool,
    pub(super) receives: bool,
}

/// Returns for which directions TLS has keys.
///
/// # Safety
///
/// `sk` must be a valid socket.
pub(super) unsafe fn tls_keys(sk: *mut bindings::sock) -> Keys {
    // SAFETY: By this function's safety requirements, `sk` is valid.
    let Some(context) = (unsafe { tls_context(sk) }) else {
        return Keys::default();
    };
    // SAFETY: The pointer is that of a `struct tls_context`, which has a byte there.
    let configured = unsafe { context.add(bindings::OFFSET_TLS_CONF).read_volatile() };
    // `tx_conf` and `rx_conf` have three bits each, the first one in the lowest bits on machines that are little
    // endian, as all are for which this driver is built.
    const { assert!(cfg!(target_endian = "little")) };
    let has_keys = |direction| matches!(direction & 7, bindings::TLS_SW | bindings::TLS_HW);
    Keys {
        sends: has_keys(configured),
        receives: has_keys(configured >> 3),
    }
}

/// Whether the socket is connected, or was until it was shut down. No other socket may be hooked: a TCP
/// socket that listens, or could start to listen, passes its callbacks on to the connections that it
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
