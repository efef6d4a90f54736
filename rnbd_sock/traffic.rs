// SPDX-License-Identifier: GPL-2.0
//! What has gone over a connection, and when: for administrators, and to tell one that is stuck from one
//! that has nothing to do.

#![forbid(unsafe_code)]

use crate::kapi::task;
use kernel::{
    fmt,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};

/// See the module's documentation. Each number is written by one side only, the sender's or the
/// receiver's, under that side's lock.
pub(crate) struct Traffic {
    requests_sent: Atomic<u64>,
    bytes_sent: Atomic<u64>,
    /// When something was sent last while no reply was awaited, in jiffies.
    awaiting_since: Atomic<usize>,
    replies: Atomic<u64>,
    bytes_received: Atomic<u64>,
    /// When something was received last, in jiffies.
    received_at: Atomic<usize>,
}

fn add(number: &Atomic<u64>, more: u64) {
    number.store(number.load(Relaxed).wrapping_add(more), Relaxed);
}

impl Traffic {
    /// Nothing yet; the times begin now.
    pub(crate) fn new() -> Self {
        Traffic {
            requests_sent: Atomic::new(0),
            bytes_sent: Atomic::new(0),
            awaiting_since: Atomic::new(task::jiffies()),
            replies: Atomic::new(0),
            bytes_received: Atomic::new(0),
            received_at: Atomic::new(task::jiffies()),
        }
    }

    /// Counts what was sent: `bytes`, and how many requests ended within them.
    pub(crate) fn sent(&self, bytes: usize, requests: u64) {
        if self.awaited() == 0 {
            self.awaiting_since.store(task::jiffies(), Relaxed);
        }
        add(&self.bytes_sent, bytes as u64);
        add(&self.requests_sent, requests);
    }

    /// Counts what was received.
    pub(crate) fn received(&self, bytes: usize) {
        add(&self.bytes_received, bytes as u64);
        self.received_at.store(task::jiffies(), Relaxed);
    }

    /// Counts a reply.
    pub(crate) fn replied(&self) {
        add(&self.replies, 1);
    }

    /// How many replies are awaited.
    pub(crate) fn awaited(&self) -> u64 {
        let sent = self.requests_sent.load(Relaxed);
        sent.saturating_sub(self.replies.load(Relaxed))
    }

    /// How long nothing has been received.
    pub(crate) fn idle_jiffies(&self) -> usize {
        task::jiffies().wrapping_sub(self.received_at.load(Relaxed))
    }

    /// For how long replies have been awaited and nothing came, in jiffies.
    pub(crate) fn stuck_jiffies(&self) -> usize {
        if self.awaited() == 0 {
            return 0;
        }
        let awaiting = task::jiffies().wrapping_sub(self.awaiting_since.load(Relaxed));
        awaiting.min(self.idle_jiffies())
    }

    /// Writes it as `name=value` pairs.
    pub(crate) fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "awaited={} requests_sent={} bytes_sent={} replies={} bytes_received={} idle_ms={}",
            self.awaited(),
            self.requests_sent.load(Relaxed),
            self.bytes_sent.load(Relaxed),
            self.replies.load(Relaxed),
            self.bytes_received.load(Relaxed),
            self.idle_jiffies() as u64 * 1000 / u64::from(task::HZ)
        )
    }
}
