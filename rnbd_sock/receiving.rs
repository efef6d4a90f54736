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
    chunks::Next,
    stream::{
        Mode,
        Receive, //
    },
    Connection,
    REAPED, //
};
use crate::{
    kapi::{
        block::{
            payload::Payload,
            request::{
                Op,
                Outcome,
                Side,
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
        chunk::Text,
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
    rnbd_events::ServerFailure,
    rnbd_translate::{
        command_of,
        status_of,
        RequestDescription,
        ServersWords, //
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
        let stayed = arrival.read(|segment| {
            let received = match receive.mode {
                Mode::Simple => self.receive_segment::<false>(receive, segment),
                Mode::Structured => self.receive_segment::<true>(receive, segment),
                Mode::Failed(_) => Ok(false),
            };
            received.unwrap_or_else(|e| {
                receive.mode = Mode::Failed(e);
                false
            })
        });
        stayed || receive.wants_work()
    }

    /// Receives a segment of the stream. Returns whether the callback should continue with the next
    /// one.
    ///
    /// # Errors
    ///
    /// `EPROTO`: the server has violated the protocol.
    fn receive_segment<const CHUNKS: bool>(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        segment: &mut Segment<'_>,
    ) -> Result<bool> {
        loop {
            let left = self.parse::<CHUNKS>(receive, INLINE_DATA_BYTES)?;
            if left || receive.awaited_bytes() > INLINE_DATA_BYTES {
                return Ok(false);
            }
            if CHUNKS && receive.is_exhausted(INLINE_DATA_BYTES) {
                return Ok(false);
            }
            if segment.left_bytes() == 0 {
                return Ok(true);
            }
            let taken = receive.take_from::<CHUNKS>(segment)?;
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
                receive.mode = Mode::Failed(e);
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
        match receive.mode {
            Mode::Simple => self.receive_replies::<false>(receive, calls, bytes),
            Mode::Structured => self.receive_replies::<true>(receive, calls, bytes),
            Mode::Failed(error) => Err(error),
        }
    }

    /// As [`Self::receive_up_to()`]. `CHUNKS` tells whether the server may send structured replies.
    fn receive_replies<const CHUNKS: bool>(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        calls: u32,
        bytes: usize,
    ) -> Result<bool> {
        if CHUNKS && bytes == usize::MAX {
            receive.spent_bytes = 0;
        }
        for _ in 0..calls {
            if CHUNKS && receive.is_exhausted(bytes) {
                break;
            }
            if !receive.is_parsed::<CHUNKS>() && self.parse::<CHUNKS>(receive, bytes)? {
                break;
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
                return self.parse::<CHUNKS>(receive, bytes);
            }
        }
        Ok(true)
    }

    /// Handles the replies that were received. Returns whether there is a hole that is left to the receive work, as those
    /// of more than `limit` bytes are.
    ///
    /// # Errors
    ///
    /// `EPROTO`: the server has violated the protocol.
    fn parse<const CHUNKS: bool>(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        limit: usize,
    ) -> Result<bool> {
        loop {
            if CHUNKS && receive.chunk.is_some() {
                match self.parse_chunk(receive, limit)? {
                    Next::Reply => {}
                    Next::Receive => return Ok(false),
                    Next::LeaveToWork => return Ok(true),
                }
            }
            receive.parse::<CHUNKS>(
                |header, chunk| match CHUNKS {
                    true => self.handle_either(header, chunk),
                    false => self.handle_reply::<false>(header),
                },
                |payload| self.complete(payload.into_side(), Outcome::SUCCESS),
            )?;
            if !(CHUNKS && receive.chunk.is_some()) {
                return Ok(false);
            }
        }
    }

    /// Finds and claims the command that a simple reply belongs to, and completes it unless data follows
    /// (`nbd_handle_reply()`).
    ///
    /// Returns the command if data follows. `CHUNKS` tells whether the server may send structured replies.
    ///
    /// # Errors
    ///
    /// `EPROTO`: this is not a reply to a command in flight on this connection.
    // Inlined, it would have the loop in `parse()` prepare for it also where no header has come.
    #[inline(never)]
    pub(super) fn handle_reply<const CHUNKS: bool>(
        self: ArcBorrow<'_, Self>,
        header: &[u8; REPLY_BYTES],
    ) -> Result<Option<Payload<Unanswered>>> {
        let reply = ReplyHeader::decode(header).map_err(|magic| {
            self.report_violation(format_args!("wrong magic ({:#010x})", magic.0))
        })?;
        let cookie = Cookie(reply.cookie);
        let request = self.claim(cookie)?;
        let request = match CHUNKS {
            true => self.check_simple(cookie, request)?,
            false => request,
        };
        trace::header_received(&request, reply.cookie, reply.error);
        self.traffic.replied();
        if let Some(error) = ServerError::from_wire(reply.error) {
            self.traffic.failed();
            if error != ServerError::Shutdown {
                self.report_server_error(&request, reply.error, None, &Text::EMPTY);
            }
            let outcome = self.outcome_of(error, request.extent().op, 0);
            self.complete(request, outcome);
            return Ok(None);
        }
        let payload = Payload::new(request);
        if payload.left_bytes() > 0 {
            return Ok(Some(payload));
        }
        self.complete(payload.into_side(), Outcome::SUCCESS);
        Ok(None)
    }

    /// Returns the outcome of a command for which the server has returned an error. `good_sectors` from its start are
    /// good all the same.
    pub(super) fn outcome_of(
        self: ArcBorrow<'_, Self>,
        error: ServerError,
        op: Op,
        good_sectors: u32,
    ) -> Outcome {
        if error == ServerError::Shutdown {
            // The command may be sent again at once, but not here.
            self.drain();
            return self.table.lost_command_outcome();
        }
        match (status_of(error, op), good_sectors) {
            (status, 0) => Outcome::Complete(status),
            (status, good) => Outcome::Partly(status, good),
        }
    }

    /// Claims the command that a reply belongs to.
    ///
    /// # Errors
    ///
    /// `EPROTO`: this is not a reply to a command in flight on this connection.
    #[inline]
    pub(super) fn claim(&self, cookie: Cookie) -> Result<Unanswered> {
        let claimed = match self.table.slot_of(cookie) {
            Some(slot) => slot.claim(cookie.generation(), self.id()),
            None => Err(ClaimError::Stale),
        };
        claimed.map_err(|why| {
            let why = match why {
                ClaimError::Stale => "no such command is in flight",
                ClaimError::OtherConnection => "its command was sent on another connection",
                ClaimError::Claimed => "its command was answered or given up before",
            };
            self.report_violation(format_args!(
                "unexpected reply (cookie {:#018x}): {why}",
                cookie.0
            ))
        })
    }

    /// Ends a command that was answered.
    ///
    /// The caller holds the receive lock, so the connection is not reaped concurrently.
    #[inline]
    pub(super) fn complete(&self, request: Unanswered, outcome: Outcome) {
        self.trace_received(&request);
        if request.should_fake_timeout() {
            self.table.unclaim(request);
        } else {
            request.finish(outcome);
        }
    }

    /// Logs a violation of the protocol, for which the connection is closed. Returns `EPROTO`.
    pub(super) fn report_violation(&self, what: core::fmt::Arguments<'_>) -> Error {
        if self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {}: {what}, closing it\n",
                self.table.device,
                self.index()
            );
        }
        EPROTO.into()
    }

    /// Logs an error that the server has returned, and tells listeners of it. `at` is the offset in the export that the
    /// server has told with it, and `text` what it has said.
    pub(super) fn report_server_error(
        &self,
        request: &Unanswered,
        error: u32,
        at: Option<u64>,
        text: &Text,
    ) {
        if !self.table.log.allow() {
            return;
        }
        let (device, extent) = (self.table.device, request.extent());
        pr_err!(
            "nbd{device}: server returned error {error} for {}{}\n",
            RequestDescription(&extent),
            ServersWords { at, text }
        );
        let news = &self.table.shared.news;
        news.post_server_error(&self.table.origin, || ServerFailure {
            incarnation: self.incarnation(),
            error,
            command: command_of(extent.op).map_or(0, |command| command as u16),
            offset_bytes: extent.offset_bytes,
            len_bytes: extent.len_bytes,
            at,
            text: *text,
        });
    }
}
