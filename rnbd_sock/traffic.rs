// SPDX-License-Identifier: GPL-2.0
//! Counters of a connection's traffic, for administrators, and to tell a stuck connection from an
//! idle one.

#![forbid(unsafe_code)]

use crate::{
    kapi::task,
    pure::time::elapsed, //
};
use kernel::{
    fmt,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// The counters of a connection.
///
/// Each is written by one side only, the sender or the receiver, under the lock of that side.
pub(crate) struct Traffic {
    requests_sent: Atomic<u64>,
    bytes_sent: Atomic<u64>,
    /// The time of the last send while no reply was awaited, in jiffies.
    awaiting_since: Atomic<usize>,
    replies: Atomic<u64>,
    /// Replies with an error.
    errors: Atomic<u64>,
    bytes_received: Atomic<u64>,
    /// The time of the last receive, in jiffies.
    received_at: Atomic<usize>,
}

/// The counters of a connection at one time. They are not of the very same moment.
pub(crate) struct Totals {
    /// Requests that were sent and not answered.
    pub(crate) in_flight: u64,
    pub(crate) requests: u64,
    pub(crate) replies: u64,
    /// Replies with an error.
    pub(crate) errors: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    /// The time since anything was received, in milliseconds.
    pub(crate) idle_ms: u64,
}

/// Adds to a counter that has only one writer at a time.
fn add(number: &Atomic<u64>, more: u64) {
    number.store(number.load(Relaxed).wrapping_add(more), Relaxed);
}

impl Traffic {
    /// Returns counters that start now.
    pub(crate) fn new() -> Self {
        Traffic {
            requests_sent: Atomic::new(0),
            bytes_sent: Atomic::new(0),
            awaiting_since: Atomic::new(task::jiffies()),
            replies: Atomic::new(0),
            errors: Atomic::new(0),
            bytes_received: Atomic::new(0),
            received_at: Atomic::new(task::jiffies()),
        }
    }

    /// Counts `bytes` that were sent, and the requests whose last byte is among them.
    pub(crate) fn sent(&self, bytes: usize, requests: u64) {
        if self.awaited() == 0 {
            self.awaiting_since.store(task::jiffies(), Relaxed);
        }
        add(&self.bytes_sent, bytes as u64);
        add(&self.requests_sent, requests);
    }

    /// Counts bytes that were received.
    pub(crate) fn received(&self, bytes: usize) {
        add(&self.bytes_received, bytes as u64);
        self.received_at.store(task::jiffies(), Relaxed);
    }

    /// Counts a reply.
    pub(crate) fn replied(&self) {
        add(&self.replies, 1);
    }

    /// Counts a reply with an error, which was counted as a reply.
    pub(crate) fn failed(&self) {
        add(&self.errors, 1);
    }

    /// Returns the number of bytes that were sent.
    pub(super) fn bytes_sent(&self) -> u64 {
        self.bytes_sent.load(Relaxed)
    }

    /// Returns the counters as they are now.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            in_flight: self.awaited(),
            requests: self.requests_sent.load(Relaxed),
            replies: self.replies.load(Relaxed),
            errors: self.errors.load(Relaxed),
            bytes_sent: self.bytes_sent.load(Relaxed),
            bytes_received: self.bytes_received.load(Relaxed),
            idle_ms: task::jiffies_to_ms(self.idle_jiffies()),
        }
    }

    /// Returns the number of replies that are awaited.
    pub(crate) fn awaited(&self) -> u64 {
        let sent = self.requests_sent.load(Relaxed);
        sent.saturating_sub(self.replies.load(Relaxed))
    }

    /// Returns the time since the last receive, in jiffies.
    pub(crate) fn idle_jiffies(&self) -> usize {
        elapsed(task::jiffies(), self.received_at.load(Relaxed))
    }

    /// Returns the time for which nothing was received, in jiffies, counted from the last send after
    /// which no reply was awaited.
    pub(super) fn silent_jiffies(&self) -> usize {
        let awaiting = elapsed(task::jiffies(), self.awaiting_since.load(Relaxed));
        awaiting.min(self.idle_jiffies())
    }

    /// Writes the counters as `name=value` pairs.
    pub(crate) fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "awaited={} requests_sent={} bytes_sent={} replies={} bytes_received={} idle_ms={}",
            self.awaited(),
            self.requests_sent.load(Relaxed),
            self.bytes_sent.load(Relaxed),
            self.replies.load(Relaxed),
            self.bytes_received.load(Relaxed),
            task::jiffies_to_ms(self.idle_jiffies())
        )
    }
}
