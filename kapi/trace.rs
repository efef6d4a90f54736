// SPDX-License-Identifier: GPL-2.0
//! Trace events: those of nbd.ko, and those of connections.
//!
//! As long as an event is switched off, tracing it costs a `nop`. A request's end is traced where it ends
//! (`kapi/block/pdu.rs`).
//!
//! C headers: [`include/trace/events/nbd.h`](srctree/include/trace/events/nbd.h), `rnbd_trace.h`

#![cfg_attr(not(CONFIG_TRACEPOINTS), allow(unused_unsafe))]

use super::{
    bindings,
    block::request::{
        timeline,
        HasHandle,
        Unanswered,
        Unsent, //
    },
    tracepoint::{
        do_trace,
        is_on, //
    },
};
use kernel::prelude::*;

/// `struct nbd_request`, which no binding names where there are no tracepoints.
#[cfg(CONFIG_TRACEPOINTS)]
type NbdRequest = bindings::nbd_request;
#[cfg(not(CONFIG_TRACEPOINTS))]
type NbdRequest = u8;

/// Returns whether [`request_staged()`] has anything to do.
#[inline(always)]
pub(crate) fn is_staging_traced() -> bool {
    is_on!(nbd_send_request) || is_on!(nbd_request_done)
}

/// Traces that a request is about to be sent on a connection (`nbd_send_request`). `header` is that of its
/// message; what a BPF program writes there is not sent.
#[cold]
pub(crate) fn request_staged(
    request: &Unsent,
    device: u32,
    connection: u16,
    mut header: [u8; bindings::NBD_REQUEST_BYTES],
) {
    if let Some(timeline) = timeline(request) {
        timeline.staged(connection);
    }
    if is_on!(nbd_send_request) {
        // SAFETY: The header has the size of `struct nbd_request`, which is packed, so it is valid as one. By the
        // invariant of `Handle`, the request is in flight as long as `request` exists.
        unsafe {
            do_trace!(nbd_send_request(
                header.as_mut_ptr().cast::<NbdRequest>(),
                device as c_int,
                request.rq().as_ptr()
            ));
        }
    }
}

/// Returns whether [`header_sent()`] and [`payload_sent()`] have anything to do.
#[inline(always)]
pub(crate) fn is_sending_traced() -> bool {
    is_on!(nbd_header_sent) || is_on!(nbd_payload_sent) || is_on!(nbd_request_done)
}

/// Traces that the header of a request was passed to the socket (`nbd_header_sent`).
#[cold]
pub(crate) fn header_sent(request: &Unsent, cookie: u64) {
    if is_on!(nbd_header_sent) {
        // SAFETY: By the invariant of `Handle`, the request is in flight as long as `request` exists.
        unsafe { do_trace!(nbd_header_sent(request.rq().as_ptr(), cookie)) };
    }
}

/// Traces that the last byte of a request was passed to the socket (`nbd_payload_sent`).
#[cold]
pub(crate) fn payload_sent(request: &Unsent, cookie: u64) {
    if let Some(timeline) = timeline(request) {
        timeline.sent();
    }
    if is_on!(nbd_payload_sent) {
        // SAFETY: By the invariant of `Handle`, the request is in flight as long as `request` exists.
        unsafe { do_trace!(nbd_payload_sent(request.rq().as_ptr(), cookie)) };
    }
}

/// Traces that the header of a reply was received (`nbd_header_received`), with the server's error (`NBD_E*`), or 0.
#[inline(always)]
pub(crate) fn header_received(request: &Unanswered, cookie: u64, server_error: u32) {
    if is_on!(nbd_header_received) || is_on!(nbd_request_done) {
        header_received_now(request, cookie, server_error);
    }
}

#[cold]
#[inline(never)]
fn header_received_now(request: &Unanswered, cookie: u64, server_error: u32) {
    if let Some(timeline) = timeline(request) {
        timeline.failed(server_error);
    }
    if is_on!(nbd_header_received) {
        // SAFETY: By the invariant of `Handle`, the request is in flight as long as `request` exists.
        unsafe { do_trace!(nbd_header_received(request.rq().as_ptr(), cookie)) };
    }
}

/// Traces that all of a reply was received (`nbd_payload_received`). `cookie` is only called for if the event is
/// switched on.
#[inline(always)]
pub(crate) fn payload_received(request: &Unanswered, cookie: impl FnOnce() -> u64) {
    if is_on!(nbd_payload_received) {
        let cookie = cookie();
        // SAFETY: By the invariant of `Handle`, the request is in flight as long as `request` exists.
        unsafe { do_trace!(nbd_payload_received(request.rq().as_ptr(), cookie)) };
    }
}

/// A connection, as trace events name it.
#[derive(Clone, Copy)]
pub(crate) struct Link {
    /// The index of the device.
    pub(crate) device: u32,
    /// The index of the connection.
    pub(crate) connection: u16,
    /// How often the connection with this index had been replaced before.
    pub(crate) reconnects: u32,
}

/// Traces that a connection has taken over its socket (`nbd_connection_born`).
pub(crate) fn connection_born(link: Link) {
    let Link {
        device,
        connection,
        reconnects,
    } = link;
    if is_on!(nbd_connection_born) {
        // SAFETY: No pointer is passed.
        unsafe {
            do_trace!(nbd_connection_born(
                device as c_int,
                c_int::from(connection),
                reconnects
            ));
        }
    }
}

/// Traces that a connection was marked as dead (`nbd_connection_dead`), with a positive error number, or 0.
pub(crate) fn connection_dead(link: Link, reason: &CStr, errno: u16) {
    let Link {
        device,
        connection,
        reconnects,
    } = link;
    if is_on!(nbd_connection_dead) {
        // SAFETY: The string is valid, and ends with a null byte.
        unsafe {
            do_trace!(nbd_connection_dead(
                device as c_int,
                c_int::from(connection),
                reconnects,
                reason.as_char_ptr(),
                c_int::from(errno)
            ));
        }
    }
}

/// Traces that a connection has taken the place of another one (`nbd_connection_replaced`). `by` names what has
/// brought it.
pub(crate) fn connection_replaced(link: Link, by: &CStr) {
    let Link {
        device,
        connection,
        reconnects,
    } = link;
    if is_on!(nbd_connection_replaced) {
        // SAFETY: The string is valid, and ends with a null byte.
        unsafe {
            do_trace!(nbd_connection_replaced(
                device as c_int,
                c_int::from(connection),
                reconnects,
                by.as_char_ptr()
            ));
        }
    }
}
