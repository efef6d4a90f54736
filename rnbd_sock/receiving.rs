// SPDX-License-Identifier: GPL-2.0
//! Receives replies and completes their commands (nbd.c's `recv_work()`).
//!
//! These are the contexts in which a connection receives, with the receive lock held, and sends, with
//! the lock of the outbox held (`rnbd_sock/sending.rs`):
//!
//! | Function                                | Context                    | Budget                  |
//! |-----------------------------------------|----------------------------|-------------------------|
//! | [`Connection::receive_in_callback()`]   | `sk_data_ready` of TCP     | 32 KiB of a reply       |
//! | [`Connection::receive_in_sender()`]     | the sender of a reply      | 2 calls, 32 KiB         |
//! | [`Connection::receive_or_reap()`]       | the receive work           | 32 calls, then requeued |
//! | [`Connection::kick()`]                  | the submitter of a request | 32 calls                |
//! | [`Connection::send_disconnect()`]       | the task that disconnects  | 32 calls                |
//! | [`Connection::transmit_work()`]         | the transmit or retry work | 32 calls, then requeued |
//!
//! - `receive_in_callback()` reads from TCP sockets without TLS, by `tcp_read_sock()`. No worker has to
//!   be woken up. It leaves replies with more data than [`INLINE_DATA_BYTES`] to the receive work,
//!   because copying them would delay other softirqs.
//! - `receive_in_sender()` reads from UNIX sockets, by `recvmsg()`, in the task that has sent the reply,
//!   on its way out of `sendmsg()`. It does so if at most one reply is awaited, for which a worker would
//!   have to be woken up. It makes [`SENDER_CALLS`] calls at most, because the task is not the driver's.
//! - `receive_or_reap()` handles everything else: what the other two leave, TCP sockets with TLS, several
//!   replies on a UNIX socket, the end of the stream, errors, and the death of the connection. After
//!   [`WORKER_CALLS`] calls of `recvmsg()`, the work is queued again, so that other work runs.
//! - `kick()` sends in the submitter, so that a single request does not wait for a worker. If more
//!   requests are in flight or likely to follow, or if the socket has TLS, it queues the transmit work
//!   instead. After 32 calls of `sendmsg()`, it leaves the rest to the transmit work.
//! - `send_disconnect()` sends in the calling task, because the socket is shut down soon.
//! - `transmit_work()` sends several requests at a time. It also continues when the socket has room
//!   again, and retries after 10 ms if the socket has room but no memory.
//!
//! The callbacks [`Events::input_ready()`](crate::kapi::net::hook::Events::input_ready) and
//! [`Events::write_space()`](crate::kapi::net::hook::Events::write_space) neither receive nor send. They
//! queue the receive work or the transmit work.

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
        errno::{
            EKEYEXPIRED,
            EPROTO,
            EREMOTEIO, //
        },
        net::arrival::{
            Arrival,
            Segment, //
        },
        trace, //
    },
    pure::{
        cmd::{
            ClaimError,
            Cookie, //
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
    sync::{
        atomic::Acquire,
        ArcBorrow, //
    },
};

/// The number of `recvmsg()` calls after which the receive work queues itself again.
pub(super) const WORKER_CALLS: u32 = 32;
/// The size of a reply's data up to which it is received outside of the receive work.
const INLINE_DATA_BYTES: usize = 32 << 10;
/// The number of `recvmsg()` calls that a task makes which has sent a reply: one for the header and
/// the data that comes along with it, one for the rest of the data.
const SENDER_CALLS: u32 = 2;
/// The outcome of a command that the server has executed.
const SUCCESS: Outcome = Outcome::Complete(Status::OK);

impl Connection {
    /// Logs why nothing more can be received, unless the reason was logged already or the end was
    /// expected.
    pub(super) fn receive_failed(&self, error: Error) {
        // Violations of the protocol, and alerts of TLS, were logged where they were found.
        let logged = error == EPROTO || error == EREMOTEIO;
        let expected = self.table.fate.snapshot().is_end_wanted() || !self.is_alive();
        if logged || expected || !self.table.log.allow() {
            return;
        }
        let (device, index) = (self.table.device, self.index());
        if error == EPIPE {
            pr_warn!("nbd{device}: connection {index}: the server has closed it\n");
        } else if error == EKEYEXPIRED {
            pr_warn!(
                "nbd{device}: connection {index}: the server has changed its TLS key, closing it\n"
            );
        } else {
            pr_err!("nbd{device}: connection {index}: receive failed ({error:?}), closing it\n");
        }
    }

    /// Receives data in the socket's callback. Returns whether anything is left for the receive
    /// work.
    ///
    /// # Context
    ///
    /// Any context, including softirq. The socket is locked.
    pub(super) fn receive_in_callback(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        arrival: Arrival<'_>,
    ) -> bool {
        let stayed = arrival.read(|segment| match self.receive_segment(receive, segment) {
            Ok(continues) => continues,
            Err(e) => {
                receive.failed = Some(e);
                false
            }
        });
        stayed || receive.failed.is_some()
    }

    /// Receives a segment of the stream. Returns whether the callback should continue with the next
    /// one.
    ///
    /// # Errors
    ///
    /// `EPROTO`: the server has violated the protocol.
    fn receive_segment(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        segment: &mut Segment<'_>,
    ) -> Result<bool> {
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

    /// Receives in the task that has sent a reply over a UNIX socket. Returns whether anything is
    /// left for the receive work.
    ///
    /// # Context
    ///
    /// May sleep, but not for long: the task belongs to somebody else.
    pub(super) fn receive_in_sender(self: ArcBorrow<'_, Self>, receive: &mut Receive) -> bool {
        // The socket may have another user once the connection was reaped.
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

    /// Receives with at most `calls` calls of `recvmsg()`, and stops when more than `bytes` of a
    /// reply's data are missing. Returns whether anything may be left.
    ///
    /// # Errors
    ///
    /// - `EPROTO`: the server has violated the protocol.
    /// - `EPIPE`: the server has closed the connection.
    /// - Those of [`Self::receive_record()`], over TLS.
    /// - Those of the socket. In each case, nothing more can be received.
    ///
    /// # Context
    ///
    /// May sleep for the socket's lock. It does not wait for data.
    pub(super) fn receive_up_to(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        calls: u32,
        bytes: usize,
    ) -> Result<bool> {
        if let Some(error) = receive.failed {
            return Err(error);
        }
        for _ in 0..calls {
            if !receive.is_parsed() {
                self.parse(receive)?;
            }
            if receive.awaited_bytes() > bytes {
                break;
            }
            let (got, all) = match receive.fill(&self.socket) {
                Ok(filled) => filled,
                Err(e) if e == EAGAIN => return Ok(false),
                Err(e) if e == EIO && self.socket.has_upper_layer() => {
                    self.receive_record(receive)?;
                    continue;
                }
                Err(e) => return Err(e),
            };
            if got == 0 {
                continue;
            }
            self.traffic.received(got);
            if !all && !self.socket.has_input() {
                // The callback reports the next bytes.
                self.parse(receive)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Handles the replies that were received.
    fn parse(self: ArcBorrow<'_, Self>, receive: &mut Receive) -> Result {
        receive.parse(
            |header| self.handle_reply(header),
            |payload| self.complete(payload.into_side(), SUCCESS),
        )
    }

    /// Finds and claims the command that a reply belongs to, and completes it unless data follows
    /// (`nbd_handle_reply()`).
    ///
    /// Returns the command if data follows.
    ///
    /// # Errors
    ///
    /// `EPROTO`: this is not a reply to a command in flight on this connection.
    // Inlined, it would have the loop in `parse()` prepare for it also where no header has come.
    #[inline(never)]
    fn handle_reply(
        self: ArcBorrow<'_, Self>,
        header: &[u8; REPLY_BYTES],
    ) -> Result<Option<Payload<Unanswered>>> {
        let reply = ReplyHeader::decode(header).map_err(|magic| {
            self.report_violation(format_args!("wrong magic ({:#010x})", magic.0));
            EPROTO
        })?;
        let cookie = Cookie(reply.cookie);
        let claimed = match self.table.slot_of(cookie) {
            Some(slot) => slot.claim(cookie.generation(), self.id()),
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
        trace::header_received(&request, reply.cookie, reply.error);
        self.traffic.replied();
        if let Some(error) = ServerError::from_wire(reply.error) {
            self.traffic.failed();
            let outcome = if error == ServerError::Shutdown {
                // The command may be sent again at once, but not here.
                self.drain();
                self.table.lost_command_outcome()
            } else {
                self.report_server_error(&request, reply.error);
                Outcome::Complete(status_of(error, request.extent().op))
            };
            self.complete(request, outcome);
            return Ok(None);
        }
        let payload = Payload::new(request);
        if payload.left_bytes() > 0 {
            return Ok(Some(payload));
        }
        self.complete(payload.into_side(), SUCCESS);
        Ok(None)
    }

    /// Ends a command that was answered.
    ///
    /// The caller holds the receive lock, so the connection is not reaped concurrently.
    fn complete(&self, request: Unanswered, outcome: Outcome) {
        self.trace_received(&request);
        if request.should_fake_timeout() {
            self.table.forget_reply(request);
        } else {
            request.finish(outcome);
        }
    }

    /// Logs a violation of the protocol, for which the connection is closed.
    pub(super) fn report_violation(&self, what: core::fmt::Arguments<'_>) {
        if self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {}: {what}, closing it\n",
                self.table.device,
                self.index()
            );
        }
    }

    /// Logs an error that the server has returned.
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
