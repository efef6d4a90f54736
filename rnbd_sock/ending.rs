// SPDX-License-Identifier: GPL-2.0
//! The end of a connection: it is marked as dead, its socket is ended, and user space is told.
//!
//! `receive_work()` then reaps it.

#![forbid(unsafe_code)]

use super::{
    Connection,
    ALIVE,
    DRAINING,
    ENDED,
    ENDING, //
};
use crate::{
    kapi::{
        errno::{
            EKEYEXPIRED,
            EPROTO, //
        },
        net::sock::Ending,
        try_lock::TryLock, //
    },
    rnbd_events::{
        Death,
        Event,
        Notice,
        Reason, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        Arc,
        ArcBorrow, //
    },
};

/// What is told of a connection's death to listeners of the family "rnbd", at most once.
///
/// They are not told before they have heard of the connection itself, so two conditions have to come together, in
/// any order: [`Connection::report_death()`] and [`Connection::announce()`].
pub(super) struct DeathReport {
    /// The death that was set first ([`pack()`]), 0 as long as there is none.
    death: Atomic<u32>,
    wanted: Atomic<bool>,
    announced: Atomic<bool>,
    /// `NBD_CMD_LINK_DEAD` is to be sent as well.
    link_dead: Atomic<bool>,
    notice: TryLock<Option<Notice>>,
}

/// Returns a death in one word, which is not 0.
fn pack(death: Death) -> u32 {
    (death.reason as u32 + 1) << 16 | u32::from(death.errno)
}

impl DeathReport {
    /// Returns a report of a connection that is alive.
    pub(super) fn new(notice: Notice) -> Self {
        DeathReport {
            death: Atomic::new(0),
            wanted: Atomic::new(false),
            announced: Atomic::new(false),
            link_dead: Atomic::new(false),
            notice: TryLock::new(Some(notice)),
        }
    }

    fn death(&self) -> Death {
        let word = self.death.load(Acquire);
        let all = [
            Reason::Closed,
            Reason::ReceiveFailed,
            Reason::SendFailed,
            Reason::ProtocolViolated,
            Reason::TimedOut,
            Reason::ShuttingDown,
            Reason::Replaced,
            Reason::ReplacementFailed,
            Reason::WantsRekeying,
        ];
        let reason = all.into_iter().find(|r| *r as u32 + 1 == word >> 16);
        Death {
            reason: reason.unwrap_or(Reason::Ended),
            errno: word as u16,
        }
    }
}

/// Returns the death of a connection of whose stream nothing more can be received because of `error`.
pub(super) fn death_of_stream(error: Error) -> Death {
    if error == EPROTO {
        Death::of(Reason::ProtocolViolated)
    } else if error == EPIPE {
        Death::of(Reason::Closed)
    } else if error == EKEYEXPIRED {
        Death::of(Reason::WantsRekeying)
    } else {
        Death::by(Reason::ReceiveFailed, error)
    }
}

impl Connection {
    /// Marks the connection as dead and shuts its socket down (`nbd_mark_nsock_dead()`).
    ///
    /// If requests are outstanding, the socket is reset, because data that it still contains must
    /// not reach the server after the requests were sent again or have failed. Otherwise the socket
    /// may still deliver a disconnect.
    ///
    /// The receive work then reaps the connection. Does nothing if the connection was marked already.
    ///
    /// `death` is told to user space, unless the user wants the connection to end, or was told before that the
    /// connection drains.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn mark_dead(self: ArcBorrow<'_, Self>, death: Death) {
        self.set_death(death);
        let Some(before) = self.begin_end() else {
            return;
        };
        if before == ALIVE && !self.is_end_expected() {
            self.queue_link_dead();
            self.report_death();
        }
        self.end_socket(self.suitable_ending());
    }

    /// Like [`Self::mark_dead()`], but does not report the death to user space, which is replacing
    /// the connection. Returns whether it would have been reported.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn mark_dead_for_replacement(self: ArcBorrow<'_, Self>) -> bool {
        let Some(before) = self.begin_end() else {
            return false;
        };
        if before == ALIVE {
            // Another task may have set a reason and come too late. Only the caller tells of this death.
            self.change_death(Death::of(Reason::Replaced));
        }
        self.end_socket(self.suitable_ending());
        before == ALIVE
    }

    /// Returns whether a user wants the session to end, or has another connection in the place of this one, so that
    /// its death is not reported as a loss.
    pub(super) fn is_end_expected(&self) -> bool {
        self.table.fate.snapshot().is_end_wanted() || self.retired.load(Acquire)
    }

    /// Changes the state to [`ENDING`]. Returns the state before, unless it was that or a later one.
    fn begin_end(&self) -> Option<u32> {
        // A connection does not become alive again, so these two cover all interleavings.
        let from = |state| self.state.cmpxchg(state, ENDING, Full).ok();
        from(ALIVE).or_else(|| from(DRAINING))
    }

    /// Returns how to end the socket of a connection that was marked as dead.
    ///
    /// # Context
    ///
    /// May sleep.
    fn suitable_ending(&self) -> Ending {
        // If nothing is outstanding, a disconnect may be on its way, which must still be delivered.
        if self.nothing_outstanding() {
            Ending::Polite
        } else {
            Ending::Reset
        }
    }

    /// Shuts the socket down and queues the work that reaps the connection. To be called once, by
    /// the task that has marked the connection as dead.
    pub(super) fn end_socket(self: ArcBorrow<'_, Self>, ending: Ending) {
        self.trace_death(self.death.death());
        self.socket.end(ending);
        self.state.store(ENDED, Release);
        self.queue_receive();
    }

    /// Schedules the multicast `NBD_CMD_LINK_DEAD`, as soon as listeners of the family "rnbd" were told of the
    /// connection. If that never happens, nobody uses the connection, and nobody need dial.
    pub(crate) fn queue_link_dead(self: ArcBorrow<'_, Self>) {
        // As in `report_death()`.
        self.death.link_dead.xchg(true, Full);
        if self.death.announced.load(Acquire) {
            self.send_link_dead();
        }
    }

    /// Queues the work that sends `NBD_CMD_LINK_DEAD`, if it is to be sent and was not.
    fn send_link_dead(self: ArcBorrow<'_, Self>) {
        if self.death.link_dead.xchg(false, Full) {
            let _ = self.table.shared.slow.enqueue::<Arc<Self>, 3>(self.into());
        }
    }

    /// Sets why the connection dies, if that is not known yet. Whoever changes its state calls this before.
    pub(super) fn set_death(&self, death: Death) {
        let _ = self.death.death.cmpxchg(0, pack(death), Full);
    }

    /// Sets another reason of a death that is not reported yet.
    pub(crate) fn change_death(&self, death: Death) {
        self.death.death.store(pack(death), Release);
    }

    /// Has listeners of the family "rnbd" told that the connection is dead, as
    /// soon as they were told of the connection itself.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(crate) fn report_death(&self) {
        // Either this sees the other flag, or `announce()` sees this one.
        self.death.wanted.xchg(true, Full);
        if self.death.announced.load(Acquire) {
            self.post_death();
        }
    }

    /// Notes that listeners were told of the connection: what is to be told of its death follows.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(crate) fn announce(self: ArcBorrow<'_, Self>) {
        self.death.announced.xchg(true, Full);
        self.send_link_dead();
        if self.death.wanted.load(Acquire) {
            self.post_death();
        }
    }

    /// Posts the event, once.
    fn post_death(&self) {
        // Whoever finds the lock taken leaves the event to the holder, who takes the notice.
        let Some((Some(notice), _)) = self.death.notice.try_with(Option::take) else {
            return;
        };
        let event = Event::ConnectionDead(self.incarnation(), self.death.death());
        self.table.shared.news.post(notice, event);
    }
}
