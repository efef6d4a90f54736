// SPDX-License-Identifier: GPL-2.0
//! A connection's receiving: in the socket's callback, in the task that has sent a reply, or in the work
//! item. All of it with the lock for receiving.

#![forbid(unsafe_code)]

use super::{
    stream::Receive,
    Connection,
    REAPED, //
};
use crate::{
    kapi::{
        block::{
            payload::Payload,
            request::{
                Outcome,
                Side,
                Status,
                Unanswered, //
            },
        },
        net::arrival::{
            Arrival,
            Segment, //
        },
    },
    pure::{
        cmd::{
            ClaimError, //
            Cookie,
        },
        proto::{
            ReplyHeader,
            ServerError,
            REPLY_BYTES, //
        },
    },
    rnbd_translate::{
        status_of,
        RequestDescription, //
    },
};
use kernel::{
    prelude::*,
    sync::atomic::Acquire, //
};

/// Calls after which the work item lets others run.
pub(super) const WORKER_CALLS: u32 = 32;
/// Data of a reply that is received where it arrives, which may be in softirq. To copy more is left to
/// the work item, which another CPU may run.
const INLINE_DATA_BYTES: usize = 32 << 10;
/// Calls after which a task that has sent a reply leaves receiving to the work item: one for the
/// header with what comes along with it, one for the data.
const SENDER_CALLS: u32 = 2;

impl Connection {
    pub(super) fn receive_failed(&self, error: Error) {
        // What breaks the protocol was reported where it was found.
        let reported =
            error == EPROTO || self.table.fate.snapshot().is_end_wanted() || !self.is_alive();
        if reported || !self.table.log.allow() {
            return;
        }
        let (device, index) = (self.table.device, self.index);
        if error == EPIPE {
            pr_warn!("nbd{device}: connection {index}: the server has closed it\n");
        } else {
            pr_err!("nbd{device}: connection {index}: receive failed ({error:?}), closing it\n");
        }
    }

    /// Receives what has arrived. Returns whether something is left to the work item.
    pub(super) fn receive_in_callback(&self, receive: &mut Receive, arrival: Arrival<'_>) -> bool {
        let stayed = arrival.read(|segment| match self.receive_segment(receive, segment) {
            Ok(continues) => continues,
            Err(e) => {
                receive.failed = Some(e);
                false
            }
        });
        stayed || receive.failed.is_some()
    }

    /// Receives a piece of the stream. Returns whether it is to go on here.
    fn receive_segment(&self, receive: &mut Receive, segment: &mut Segment<'_>) -> Result<bool> {
        if receive.failed.is_some() {
            return Ok(false);
        }
        loop {
            self.parse(receive)?;
            if receive.awaited_bytes() > INLINE_DATA_BYTES {
                return Ok(false);
            }
            if segment.left_bytes() == 0 {
                return Ok(true);
            }
            let taken = receive.take_from(segment)?;
            self.traffic.received(taken);
        }
    }

    /// Receives what is there, in a task of somebody else. Returns whether something is left to the
    /// work item.
    pub(super) fn receive_in_sender(&self, receive: &mut Receive) -> bool {
        // The socket is another's once it was cleared away.
        if self.state.load(Acquire) == REAPED {
            return false;
        }
        match self.receive_up_to(receive, SENDER_CALLS, INLINE_DATA_BYTES) {
            Ok(left) => left,
            Err(e) => {
                receive.failed = Some(e);
                true
            }
        }
    }

    /// Receives with at most `calls` calls, until more than `bytes` of data are awaited. Returns whether
    /// something may be left.
    pub(super) fn receive_up_to(
        &self,
        receive: &mut Receive,
        calls: u32,
        bytes: usize,
    ) -> Result<bool> {
        if let Some(error) = receive.failed {
            return Err(error);
        }
        for _ in 0..calls {
            self.parse(receive)?;
            if receive.awaited_bytes() > bytes {
                break;
            }
            let (got, all) = match receive.fill(&self.socket) {
                Ok(filled) => filled,
                Err(e) if e == EAGAIN => return Ok(false),
                Err(e) => return Err(e),
            };
            self.traffic.received(got);
            if !all && !self.socket.has_input() {
                // The next bytes are announced by the callback.
                self.parse(receive)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Works through what was received.
    fn parse(&self, receive: &mut Receive) -> Result {
        receive.parse(
            |header| self.handle_reply(header),
            |payload| self.complete(payload.into_side(), Status::OK),
        )
    }

    /// nbd.c's `nbd_handle_reply()`: finds and claims the command. Returns it where data follows.
    fn handle_reply(&self, header: &[u8; REPLY_BYTES]) -> Result<Option<Payload<Unanswered>>> {
        let reply = ReplyHeader::decode(header).map_err(|magic| {
            self.report_violation(format_args!("wrong magic ({:#010x})", magic.0));
            EPROTO
        })?;
        let cookie = Cookie(reply.cookie);
        let claimed = match self.table.slot_of(cookie) {
            Some(slot) => slot.claim(cookie.generation(), self.index),
            None => Err(ClaimError::Stale),
        };
        let request = claimed.map_err(|why| {
            let why = match why {
                ClaimError::Stale => "no such command is in flight",
                ClaimError::OtherConnection => "its command was sent on another connection",
                ClaimError::Claimed => "its command was answered or given up before",
            };
            self.report_violation(format_args!(
                "unexpected reply (cookie {:#018x}): {why}",
                cookie.0
            ));
            EPROTO
        })?;
        self.traffic.replied();
        if let Some(error) = ServerError::from_wire(reply.error) {
            self.report_server_error(&request, reply.error);
            let op = request.extent().op;
            self.complete(request, status_of(error, op));
            return Ok(None);
        }
        let payload = Payload::new(request);
        if payload.left_bytes() > 0 {
            return Ok(Some(payload));
        }
        self.complete(payload.into_side(), Status::OK);
        Ok(None)
    }

    /// Ends a command that was answered. The receive lock is held, so nobody clears the connection away.
    fn complete(&self, request: Unanswered, status: Status) {
        if request.should_fake_timeout() {
            self.table.forget_reply(request);
        } else {
            request.finish(Outcome::Complete(status));
        }
    }

    fn report_violation(&self, what: core::fmt::Arguments<'_>) {
        if self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {}: {what}, closing it\n",
                self.table.device,
                self.index
            );
        }
    }

    fn report_server_error(&self, request: &Unanswered, error: u32) {
        if !self.table.log.allow() {
            return;
        }
        pr_err!(
            "nbd{}: server returned error {error} for {}\n",
            self.table.device,
            RequestDescription(&request.extent())
        );
    }
}
