// SPDX-License-Identifier: GPL-2.0
//! Drains a connection whose server is shutting down, and then disconnects from it.
//!
//! A server that shuts down in an orderly way replies `NBD_ESHUTDOWN` to commands that it does not
//! execute any more, and still executes others. The protocol requires the client to send a
//! disconnect then, which the client should do only when nothing is in flight
//! ("Terminating the transmission phase" in `doc/proto.md` of the NBD project). nbd.c completes such
//! commands with an I/O error, and continues to use the connection.
//!
//! Here, the first such reply makes the connection *drain*. So does a planned handover, by which another
//! connection has taken its place. Then:
//!
//! - Dispatch selects other connections. The transmit side gives back all commands of which nothing
//!   was sent ([`Connection::stop_staging()`]), and closes the backlog.
//! - A message that was staged is sent completely, since the stream must stay whole.
//! - The receive side continues. It gives back the commands that the server does not execute, and
//!   determines when no command is in flight any more ([`Connection::check_drained()`]).
//! - The transmit side then sends a disconnect, and shuts the socket down without a reset.
//!
//! A connection that does not finish can be marked as dead at any time, as one that is alive can: by
//! the timeout of a request, by its replacement, or by the end of the session.

#![forbid(unsafe_code)]

use super::{
    staging::Outbox,
    stream::Receive,
    Connection,
    ALIVE,
    DRAINING,
    ENDING, //
};
use crate::{
    kapi::{
        block::request::{
            Outcome,
            Side,
            Unsent, //
        },
        llist::Batch,
        net::sock::Ending, //
    },
    rnbd_events::{
        Death,
        Reason, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Full,
            Release, //
        },
        ArcBorrow,
        MutexGuard, //
    },
};

impl Connection {
    /// Returns whether the connection drains and was not marked as dead yet.
    pub(crate) fn is_draining(&self) -> bool {
        self.state.load(Acquire) == DRAINING
    }

    /// Begins to drain the connection, if it is alive. This is reported to user space as the death of
    /// the connection, unless the user wanted the session to end.
    ///
    /// A command that is given back after this is not sent on this connection again.
    ///
    /// # Context
    ///
    /// Any context, including softirq. The receive lock is held.
    pub(super) fn drain(self: ArcBorrow<'_, Self>) {
        self.set_death(Death::of(Reason::ShuttingDown));
        if self.state.cmpxchg(ALIVE, DRAINING, Full).is_err() {
            return;
        }
        if !self.is_end_expected() {
            self.queue_link_dead();
            self.report_death();
            if self.table.log.allow() {
                pr_warn!(
                    "nbd{}: connection {}: the server is shutting down, disconnecting from it\n",
                    self.table.device,
                    self.index()
                );
            }
        }
        self.queue_transmit();
    }

    /// Begins to drain the connection, if it is alive, because another one has taken its place. That it is dead
    /// is told to listeners of the family "rnbd" when it is reaped, and not by `NBD_CMD_LINK_DEAD`: the user has
    /// asked for it.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(crate) fn retire(self: ArcBorrow<'_, Self>) {
        // It may be reaped as soon as the state is changed.
        self.set_death(Death::of(Reason::Replaced));
        self.retired.store(true, Release);
        if self.state.cmpxchg(ALIVE, DRAINING, Full).is_ok() {
            self.queue_transmit();
        }
    }

    /// Returns whether a command waits for its reply on the connection. One whose reply has begun does not count.
    pub(crate) fn has_open(&self) -> bool {
        self.table.has_open(self.id())
    }

    /// Has the transmit side send the disconnect if the connection drains and nothing is in flight on
    /// it.
    ///
    /// # Context
    ///
    /// Any context. The caller holds the receive lock, so nothing is received concurrently.
    pub(super) fn check_drained(self: ArcBorrow<'_, Self>, receive: &Receive) {
        // Once the backlog is closed, a command that a dispatch puts in flight cannot be staged. Until
        // then, one may be which is not in flight yet.
        if !self.is_draining() || !self.sending.stopped.load(Acquire) {
            return;
        }
        if receive.current.is_some() || self.table.has_open(self.id()) {
            return;
        }
        self.sending.drained.store(true, Release);
        self.sending.newly_drained.xchg(true, Full);
        self.queue_transmit();
    }

    /// Returns whether the receive side has found that the server owes nothing, so that it is about to be sent a
    /// disconnect, or was.
    pub(crate) fn is_drained(&self) -> bool {
        self.sending.drained.load(Acquire)
    }

    /// To be called after a command was withdrawn that [`Self::push()`] has returned.
    pub(crate) fn command_taken_back(self: ArcBorrow<'_, Self>) {
        // It may have been the last command in flight.
        if self.is_draining() {
            self.queue_receive();
        }
    }

    /// Returns whether the next step of draining is up to [`Self::stop_staging()`].
    pub(super) fn drain_wants_sender(&self) -> bool {
        let is_wanted =
            || !self.sending.stopped.load(Acquire) || self.sending.newly_drained.load(Acquire);
        self.is_draining() && is_wanted()
    }

    /// Closes the backlog of a connection that drains and gives back the commands that were not
    /// staged yet. Stages the disconnect once the connection is drained.
    pub(super) fn stop_staging(self: ArcBorrow<'_, Self>, outbox: &mut Outbox) {
        if self.sending.newly_drained.load(Acquire) && self.sending.newly_drained.xchg(false, Full)
        {
            outbox.drained = true;
            self.sending.send_disconnect.store(true, Release);
        }
        if self.sending.stopped.load(Acquire) {
            return;
        }
        let outcome = self.table.lost_command_outcome();
        let waiting = core::mem::replace(&mut outbox.waiting, Batch::empty());
        for mut batch in [waiting, self.sending.backlog.close()] {
            while let Some(request) = batch.pop() {
                self.give_back(request, outcome);
            }
        }
        self.sending.stopped.store(true, Release);
        // The connection could not be found to be drained before, and may be now.
        self.queue_receive();
    }

    /// Ends a command of which nothing was sent, even if its reply has arrived.
    ///
    /// A server that has guessed its cookie may be sending that reply right now. The command then ends when the receive
    /// side lets go of it: after the chunk, after the data, or when the connection is reaped.
    fn give_back(&self, request: Unsent, outcome: Outcome) {
        let (hw_queue, tag) = request.tag();
        // The other handle is taken back first: without any handle, the slot could belong to another
        // command.
        let slot = self.table.slot(hw_queue, tag);
        let unanswered = slot.and_then(|slot| slot.withdraw(self.id()));
        request.overrule(outcome);
        if let Some(unanswered) = unanswered {
            unanswered.finish(outcome);
        }
    }

    /// Ends the connection if it is drained and the socket has been given the disconnect. Returns the
    /// guard otherwise.
    ///
    /// A socket that does not accept the disconnect belongs to a server that does not read. The
    /// connection does not wait for it.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn end_if_drained<'a>(
        self: ArcBorrow<'_, Self>,
        outbox: MutexGuard<'a, Outbox>,
    ) -> Option<MutexGuard<'a, Outbox>> {
        if !outbox.drained || !outbox.said_goodbye || outbox.transmit.has_requests() {
            return Some(outbox);
        }
        // No sender starts after this, since the lock is held. What the socket contains was answered,
        // so it needs no reset.
        let ended = self.state.cmpxchg(DRAINING, ENDING, Full).is_ok();
        drop(outbox);
        if ended {
            self.end_socket(Ending::Polite);
        }
        None
    }
}
