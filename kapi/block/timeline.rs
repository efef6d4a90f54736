// SPDX-License-Identifier: GPL-2.0
//! What happens to a request and when, for the trace event `nbd_request_done`.
//!
//! C header: `rnbd_trace.h`

#![cfg_attr(not(CONFIG_TRACEPOINTS), allow(unused_unsafe))]

use crate::kapi::{
    bindings,
    tracepoint::do_trace, //
};
use core::ptr::NonNull;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// What happened to a request since it was started last.
///
/// `sent_ns` and `connection` are written by the holder of `Unsent`, the rest by that of `Unanswered`, and all
/// are read when both are gone.
pub(in crate::kapi) struct Timeline {
    /// When the request was started, by the monotonic clock.
    started_ns: Atomic<i64>,
    /// When its last byte was passed to the socket; 0 if it was not.
    sent_ns: Atomic<i64>,
    /// On which connection it was sent, [`NO_CONNECTION`] if on none.
    connection: Atomic<i32>,
    /// The error in the server's reply (`NBD_E*`); 0 if there was none.
    server_error: Atomic<u32>,
}

const NO_CONNECTION: i32 = -1;

/// Returns the time by the monotonic clock, in nanoseconds.
fn now_ns() -> i64 {
    // SAFETY: No request is started, sent or ended in an NMI, the one context where this must not be called.
    unsafe { bindings::ktime_get() }
}

/// Returns the time between two events in microseconds.
fn between_us(from_ns: i64, to_ns: i64) -> u64 {
    u64::try_from(to_ns.saturating_sub(from_ns)).unwrap_or(0) / 1000
}

impl Timeline {
    pub(super) fn new() -> Self {
        Timeline {
            started_ns: Atomic::new(0),
            sent_ns: Atomic::new(0),
            connection: Atomic::new(NO_CONNECTION),
            server_error: Atomic::new(0),
        }
    }

    /// The request is started.
    #[cold]
    #[inline(never)]
    pub(super) fn start(&self) {
        self.started_ns.store(now_ns(), Relaxed);
        self.sent_ns.store(0, Relaxed);
        self.connection.store(NO_CONNECTION, Relaxed);
        self.server_error.store(0, Relaxed);
    }

    /// The request is about to be sent on the connection with this index.
    pub(in crate::kapi) fn staged(&self, connection: u16) {
        self.connection.store(i32::from(connection), Relaxed);
    }

    /// The last byte of the request was passed to the socket.
    pub(in crate::kapi) fn sent(&self) {
        self.sent_ns.store(now_ns(), Relaxed);
    }

    /// The server has answered with this error (`NBD_E*`).
    pub(in crate::kapi) fn failed(&self, server_error: u32) {
        self.server_error.store(server_error, Relaxed);
    }

    /// Traces that a request ends with the `blk_status_t` `status`. Without its timeline, only the request itself
    /// is known.
    ///
    /// # Safety
    ///
    /// The driver must own the request, which must not have ended, and nothing else may end it meanwhile.
    pub(super) unsafe fn report(
        timeline: Option<&Timeline>,
        rq: NonNull<bindings::request>,
        status: u8,
    ) {
        let connection = timeline.map_or(NO_CONNECTION, |t| t.connection.load(Relaxed));
        let server_error = timeline.map_or(0, |t| t.server_error.load(Relaxed));
        let sent = timeline.filter(|t| t.sent_ns.load(Relaxed) != 0);
        let (queue_us, wire_us) = sent.map_or((0, 0), |t| {
            let sent_ns = t.sent_ns.load(Relaxed);
            (
                between_us(t.started_ns.load(Relaxed), sent_ns),
                between_us(sent_ns, now_ns()),
            )
        });
        // SAFETY: By this function's safety requirements, the request is valid during the call.
        unsafe {
            do_trace!(nbd_request_done(
                rq.as_ptr(),
                connection,
                status,
                server_error,
                queue_us,
                wire_us
            ));
        }
    }
}
