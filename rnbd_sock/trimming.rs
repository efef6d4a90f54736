// SPDX-License-Identifier: GPL-2.0
//! Gives up memory that a connection does not need for sending any more.
//!
//! A connection keeps the pages into which TCP has copied what it sends, so that it need not allocate, and
//! clear, others for each request (`kapi/net/page_frag.rs`). While it sends much, these are as many as the
//! socket's send buffer holds.

#![forbid(unsafe_code)]

use super::{
    staging::Outbox,
    Connection, //
};
use crate::kapi::wq;
use kernel::{
    sync::{
        atomic::{
            Acquire,
            Full,
            Relaxed, //
        },
        ArcBorrow, //
    },
    time::msecs_to_jiffies, //
};

/// How often pages are given up that are not needed.
const TRIM_MS: u32 = 1000;

impl Connection {
    /// Has the pages trimmed in a while. The caller holds the lock of the outbox, and has found since that the
    /// connection is not dead.
    pub(super) fn trim_later(self: ArcBorrow<'_, Self>, outbox: &mut Outbox) {
        if outbox.transmit.frags.has_pages() && !core::mem::replace(&mut outbox.trim_queued, true) {
            let _ = wq::enqueue_delayed::<Self, 5>(self.into(), msecs_to_jiffies(TRIM_MS));
        }
    }

    /// Has the next sender trim the pages, which is this task, unless another one is sending; that one then looks
    /// again.
    pub(super) fn trim_work(self: ArcBorrow<'_, Self>) {
        self.sending.trim_due.xchg(true, Full);
        self.transmit_backlog();
    }

    /// Trims the pages, if that is due: gives up half of those that are not in use, or all if nothing was sent
    /// since the last time. The caller holds the lock of the outbox, and has sent what it could.
    pub(super) fn trim_if_due(&self, outbox: &mut Outbox) {
        if !self.is_trim_due() || !self.sending.trim_due.xchg(false, Full) {
            return;
        }
        outbox.trim_queued = false;
        let bytes_sent = self.traffic.bytes_sent();
        if core::mem::replace(&mut outbox.sent_before, bytes_sent) == bytes_sent {
            outbox.transmit.frags.clear();
        } else {
            outbox.transmit.frags.trim();
        }
        self.note_pages(outbox);
    }

    /// Returns whether the next sender is to trim the pages.
    pub(super) fn is_trim_due(&self) -> bool {
        self.sending.trim_due.load(Acquire)
    }

    /// Gives the pages of a connection up that is being reaped.
    pub(super) fn end_trimming(self: ArcBorrow<'_, Self>) {
        let mut outbox = self.sending.outbox.lock();
        outbox.transmit.frags.clear();
        self.note_pages(&outbox);
        drop(outbox);
        // It would keep the socket open. No sender queues it again, since the connection is dead.
        wq::cancel_delayed::<Self, 5>(self.into());
    }

    /// Returns the memory of the pages in KiB, as it was when they were trimmed last.
    pub(super) fn pages_kib(&self) -> usize {
        self.sending.pages_kib.load(Relaxed)
    }

    fn note_pages(&self, outbox: &Outbox) {
        let bytes = outbox.transmit.frags.size_bytes();
        self.sending.pages_kib.store(bytes >> 10, Relaxed);
    }
}
