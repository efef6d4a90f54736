// SPDX-License-Identifier: GPL-2.0
//! The fate of a session: whether it continues, was ended, or has run out of connections.
//!
//! It is one atomic word that also counts the connections which have come back. So a request that
//! has found no connection cannot end a session which got one meanwhile.
//!
//! Apart from its atomics, this file does not depend on the kernel. The host tests compile it as it
//! is, and check it exhaustively with a model checker.

#![forbid(unsafe_code)]

use super::atomic::AtomicWord;

/// The user has requested a disconnect (`NBD_RT_DISCONNECT_REQUESTED`).
const REQUESTED: u64 = 1;
/// The session was ended (`NBD_RT_DISCONNECTED`, as set by `sock_shutdown()`).
const ENDED: u64 = 1 << 1;
/// A request has found no connection and may not wait for one (`NBD_RT_DISCONNECTED`, as set
/// through `nbd_handle_cmd()`).
const EXHAUSTED: u64 = 1 << 2;
/// The bits from here on count the connections that have come back.
const ONE_REVIVAL: u64 = 1 << 32;

/// The fate of a session.
pub(crate) struct Fate(AtomicWord);

/// The value of a [`Fate`] at some time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Snapshot(u64);

impl Snapshot {
    /// Returns whether no commands are to be sent.
    pub(crate) fn is_over(self) -> bool {
        self.0 & (ENDED | EXHAUSTED) != 0
    }

    /// Returns whether commands whose connection has died fail instead of being requeued
    /// (`nbd_disconnected()`).
    pub(crate) fn is_disconnected(self) -> bool {
        self.0 & (REQUESTED | ENDED | EXHAUSTED) != 0
    }

    /// Returns whether the user wants the connections to end, so that their deaths are not
    /// reported.
    pub(crate) fn is_end_wanted(self) -> bool {
        self.0 & (REQUESTED | ENDED) != 0
    }
}

/// The result of [`Fate::exhaust()`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exhausted {
    /// The session has run out of connections, and this call was the first to find that.
    Now,
    /// The session was over before.
    Before,
    /// The fate has changed since the snapshot, so the caller must look for a connection again.
    Changed,
}

impl Fate {
    /// Returns the fate of a session that continues.
    pub(crate) fn new() -> Self {
        Fate(AtomicWord::new(0))
    }

    /// Returns the current value.
    ///
    /// A caller that looks for a connection afterwards finds any that an earlier [`Self::revive()`]
    /// has announced.
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(self.0.load())
    }

    /// Records that the user has requested a disconnect.
    pub(crate) fn request_disconnect(&self) {
        self.change(|word| word | REQUESTED);
    }

    /// Ends the session: no commands are sent any more. Returns whether the session continued until
    /// now.
    pub(crate) fn end(&self) -> bool {
        !Snapshot(self.change(|word| word | ENDED)).is_over()
    }

    /// Completes a requested disconnect after the last connection was reaped
    /// (`nbd_mark_nsock_dead()`).
    ///
    /// Returns whether a disconnect was requested.
    pub(crate) fn finish_disconnect(&self) -> bool {
        let fulfil = |word| match word & REQUESTED {
            0 => word,
            _ => word & !REQUESTED | ENDED,
        };
        self.change(fulfil) & REQUESTED != 0
    }

    /// Ends the session because a request has found no connection since the snapshot `seen`, and
    /// may not wait for one.
    pub(crate) fn exhaust(&self, seen: Snapshot) -> Exhausted {
        if seen.is_over() {
            return Exhausted::Before;
        }
        match self.0.compare_exchange(seen.0, seen.0 | EXHAUSTED) {
            Ok(_) => Exhausted::Now,
            Err(_) => Exhausted::Changed,
        }
    }

    /// Continues the session after a connection has come back (`nbd_genl_reconnect_sock_cb()`).
    ///
    /// The connection must be visible to dispatches already.
    pub(crate) fn revive(&self) {
        self.change(|word| (word & !(ENDED | EXHAUSTED)).wrapping_add(ONE_REVIVAL));
    }

    /// Changes the word atomically, and returns its old value.
    fn change(&self, to: impl Fn(u64) -> u64) -> u64 {
        let mut old = self.0.load();
        while let Err(seen) = self.0.compare_exchange(old, to(old)) {
            old = seen;
        }
        old
    }
}
