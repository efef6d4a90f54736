// SPDX-License-Identifier: GPL-2.0
//! The outbox of a connection: stages commands, and sends what is staged.

#![forbid(unsafe_code)]

use super::{
    stream::Transmit,
    Connection, //
};
use crate::{
    kapi::{
        block::{
            payload::Payload,
            request::{
                Outcome,
                Side,
                Status,
                Unsent, //
            },
        },
        llist::Batch,
        net::transfer::Next, //
    },
    pure::proto,
    rnbd_translate::wire_of, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Full, //
        },
        ArcBorrow, //
    }, //
};

/// The commands that senders have taken from the backlog.
pub(super) struct Outbox {
    /// Commands that were not staged yet, for lack of room in `transmit`.
    pub(super) waiting: Batch<Unsent>,
    pub(super) transmit: Transmit,
    /// A disconnect was staged. No other follows.
    pub(super) said_goodbye: bool,
    /// The connection drains, and no command is in flight on it.
    pub(super) drained: bool,
    /// The trim work is queued, or has run and nothing was trimmed since.
    pub(super) trim_queued: bool,
    /// The number of bytes that had been sent when the pages were trimmed last.
    pub(super) sent_before: u64,
}

impl Outbox {
    /// Returns an outbox with nothing to send.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new() -> Result<Self> {
        Ok(Outbox {
            waiting: Batch::empty(),
            transmit: Transmit::new()?,
            said_goodbye: false,
            drained: false,
            trim_queued: false,
            sent_before: 0,
        })
    }
}

/// The reason why a sender has stopped.
pub(super) enum StopReason {
    /// Everything was sent that was found. More may have been queued since.
    Idle,
    /// A signal is pending, in which case TLS does not wait for its lock. Workers get no signals.
    Signal,
    /// The budget is used up. There may be more to send.
    Budget,
    /// The socket is full.
    Full { sent_some: bool },
}

impl Connection {
    /// Sends until nothing is found to send, the budget is used up, or the socket takes no more.
    ///
    /// # Errors
    ///
    /// Those of the socket. The connection cannot be used any more.
    pub(super) fn transmit_all(
        self: ArcBorrow<'_, Self>,
        outbox: &mut Outbox,
        budget: &mut u32,
    ) -> Result<StopReason> {
        loop {
            let next = self.stage(outbox);
            if outbox.transmit.is_empty() {
                return Ok(StopReason::Idle);
            }
            let Some(left) = budget.checked_sub(1) else {
                return Ok(StopReason::Budget);
            };
            *budget = left;
            let sent = match outbox.transmit.send(&self.socket, next) {
                Ok(sent) => sent,
                Err(e) if e == EAGAIN => return Ok(StopReason::Full { sent_some: false }),
                Err(e) if e == EINTR || e == ERESTARTSYS => return Ok(StopReason::Signal),
                Err(e) => return Err(e),
            };
            self.traffic.sent(sent.bytes, sent.requests);
            if !sent.all {
                return Ok(StopReason::Full { sent_some: true });
            }
            // The caller looks for what was queued meanwhile after it has released the lock, as it must anyway.
            if next == Next::Nothing && outbox.transmit.is_empty() {
                return Ok(StopReason::Idle);
            }
        }
    }

    /// Stages the disconnect and as many commands as there is room for. Returns whether any are
    /// left.
    fn stage(self: ArcBorrow<'_, Self>, outbox: &mut Outbox) -> Next {
        if self.is_draining() {
            if outbox.transmit.announced_more() {
                self.stage_next(outbox);
            }
            self.stop_staging(outbox);
        }
        if outbox.transmit.can_stage()
            && self.sending.send_disconnect.load(Acquire)
            && self.sending.send_disconnect.xchg(false, Full)
            && !core::mem::replace(&mut outbox.said_goodbye, true)
        {
            outbox
                .transmit
                .stage(&proto::RequestHeader::DISCONNECT, None);
        }
        while outbox.transmit.can_stage() {
            if !self.stage_next(outbox) {
                return Next::Nothing;
            }
        }
        let is_all = outbox.waiting.is_empty()
            && self.sending.backlog.is_empty()
            && !self.sending.send_disconnect.load(Acquire);
        if is_all {
            Next::Nothing
        } else {
            Next::More
        }
    }

    /// Stages a command, for which there must be room. Returns whether there was one.
    fn stage_next(&self, outbox: &mut Outbox) -> bool {
        if outbox.waiting.is_empty() {
            outbox.waiting = self.sending.backlog.take();
        }
        let Some(request) = outbox.waiting.pop() else {
            return false;
        };
        match self.wire_of(&request) {
            Some(wire) => {
                self.trace_staged(&request, &wire);
                outbox.transmit.stage(&wire, Some(Payload::new(request)));
            }
            // This cannot happen: `queue_rq` fails requests that NBD has no command for, and each tag
            // has a slot.
            None => request.overrule(Outcome::Complete(Status::IOERR)),
        }
        true
    }

    /// Returns the header of a request, or `None` if NBD has no command for it.
    fn wire_of(&self, request: &Unsent) -> Option<proto::RequestHeader> {
        let (hw_queue, tag) = request.tag();
        wire_of(&request.extent(), self.table.cookie(hw_queue, tag)?)
    }

    /// Gives back all commands that were not sent completely, and closes the backlog.
    ///
    /// This overrules a reply that has arrived: a server that answers a write before it has
    /// received the data has not written it.
    pub(super) fn give_back_unsent(&self) {
        let outcome = self.table.lost_command_outcome();
        let mut outbox = self.sending.outbox.lock();
        outbox.transmit.give_back(outcome);
        let waiting = core::mem::replace(&mut outbox.waiting, Batch::empty());
        // The backlog is closed, so nothing is queued after this.
        for mut batch in [waiting, self.sending.backlog.close()] {
            while let Some(request) = batch.pop() {
                request.overrule(outcome);
            }
        }
    }
}
