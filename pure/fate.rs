// SPDX-License-Identifier: GPL-2.0
//! Whether a session goes on: one atomic word, so that a request that has found no connection cannot
//! end a session into which one has come back meanwhile.
//!
//! Pure but for its atomics and free of the kernel: the tests compile this very file on the host and
//! check it exhaustively with a model checker.

#![forbid(unsafe_code)]

use super::atomic::AtomicWord;

/// The user has asked for the disconnect (`NBD_RT_DISCONNECT_REQUESTED`).
const REQUESTED: u64 = 1 << 0;
/// The connections are being ended, or were (`NBD_RT_DISCONNECTED`, as `sock_shutdown()` sets it).
const ENDED: u64 = 1 << 1;
/// A request has found no connection, and none is waited for (`NBD_RT_DISCONNECTED`, as
/// `nbd_handle_cmd()` brings it about).
const EXHAUSTED: u64 = 1 << 2;
/// The number of connections that have come back is counted above this.
const ONE_REVIVAL: u64 = 1 << 32;

/// See the module's documentation.
pub(crate) struct Fate(AtomicWord);

/// What a [`Fate`] was when somebody looked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Snapshot(u64);

impl Snapshot {
    /// Whether nothing is to be sent any more.
    pub(crate) fn is_over(self) -> bool {
        self.0 & (ENDED | EXHAUSTED) != 0
    }

    /// Whether requests that are lost fail, rather than being sent again (`nbd_disconnected()`).
    pub(crate) fn is_disconnected(self) -> bool {
        self.0 & (REQUESTED | ENDED | EXHAUSTED) != 0
    }

    /// Whether the user wants the connections to end, so that nobody need be told when they do.
    pub(crate) fn is_end_wanted(self) -> bool {
        self.0 & (REQUESTED | ENDED) != 0
    }
}

/// What came of [`Fate::exhaust()`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exhausted {
    /// The session is over now; nobody has said so before.
    Now,
    /// It was over before.
    Before,
    /// Something has changed since the caller looked: it has to look again.
    Changed,
}

impl Fate {
    /// The session goes on.
    pub(crate) fn new() -> Self {
        Fate(AtomicWord::new(0))
    }

    /// What it is now. Who looks for a connection afterwards finds the one that the last
    /// [`Self::revive()`] has announced.
    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot(self.0.load())
    }

    /// The user wants the session to end.
    pub(crate) fn request_disconnect(&self) {
        self.change(|word| word | REQUESTED);
    }

    /// The connections are to be ended: nothing is sent any more. Returns whether the session was going
    /// on until now.
    pub(crate) fn end(&self) -> bool {
        !Snapshot(self.change(|word| word | ENDED)).is_over()
    }

    /// The last connection has gone. Where the user has asked for that, the request is fulfilled
    /// (`nbd_mark_nsock_dead()`). Returns whether it was.
    pub(crate) fn finish_disconnect(&self) -> bool {
        let fulfil = |word| match word & REQUESTED {
            0 => word,
            _ => word & !REQUESTED | ENDED,
        };
        self.change(fulfil) & REQUESTED != 0
    }

    /// A request has found no connection since the caller saw `seen`, and none is waited for.
    pub(crate) fn exhaust(&self, seen: Snapshot) -> Exhausted {
        if seen.is_over() {
            return Exhausted::Before;
        }
        match self.0.compare_exchange(seen.0, seen.0 | EXHAUSTED) {
            Ok(_) => Exhausted::Now,
            Err(_) => Exhausted::Changed,
        }
    }

    /// A connection has come back and can be found (`nbd_genl_reconnect_sock_cb()`).
    pub(crate) fn revive(&self) {
        self.change(|word| (word & !(ENDED | EXHAUSTED)).wrapping_add(ONE_REVIVAL));
    }

    /// Changes the word; returns what it was.
    fn change(&self, to: impl Fn(u64) -> u64) -> u64 {
        let mut old = self.0.load();
        while let Err(seen) = self.0.compare_exchange(old, to(old)) {
            old = seen;
        }
        old
    }
}
