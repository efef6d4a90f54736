// SPDX-License-Identifier: GPL-2.0
//! Receives structured replies, chunk by chunk.
//!
//! Whoever receives a chunk claims its command, as for a simple reply, and gives the claim back unless the chunk is the
//! last one of its reply. In between, the command is in flight as any other: it can time out, and it is sent again if the
//! connection dies. Then it is another command (`pure/cmd.rs`), and what was kept of the first one's reply no longer
//! counts (`pure/coverage.rs`). All of this is done with the receive lock held, so the connection is not reaped
//! concurrently: the reaper examines each slot only once, and would miss a claim that is given back. The transmit side
//! of a connection that drains may take the command back meanwhile, if it was not sent: then it is sent again instead.
//!
//! Most errors are `EPROTO`: the server has violated the protocol, which was logged.

#![forbid(unsafe_code)]

use super::{
    stream::Receive,
    Connection, //
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
        task,
        trace, //
    },
    pure::{
        chunk::{
            Chunk,
            Content,
            Receiving,
            Violation,
            PART_BYTES, //
        },
        cmd::Cookie,
        coverage::{
            Answer,
            Refusal, //
        },
        proto::{
            ServerError,
            REPLY_BYTES, //
        },
    },
    rnbd_table::Structured, //
};
use kernel::{
    prelude::*,
    sync::ArcBorrow, //
};

/// The size of a sector, by which the block layer counts what is good of a read that has failed.
const SECTOR_BYTES: u32 = 512;

/// What a chunk costs, in bytes that could be filled with zeroes in the same time.
const CHUNK_COST_BYTES: usize = 256;
/// The same for the way to its place in the command's data, as a part of the distance.
const DISTANCE_COST: usize = 64;

/// What is to be done after a part of a chunk was parsed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The chunk is complete.
    Reply,
    /// More must be received.
    Receive,
    /// The receive work has to fill a large hole.
    LeaveToWork,
}

impl Connection {
    /// Handles the header of a reply that may be a structured one. Returns the command if it is a simple reply with data,
    /// and stores the chunk if it is the start of one.
    #[inline(never)]
    pub(super) fn handle_either(
        self: ArcBorrow<'_, Self>,
        header: &[u8; REPLY_BYTES],
        chunk: &mut Option<Receiving>,
    ) -> Result<Option<Payload<Unanswered>>> {
        *chunk = Chunk::begin(header).map(Receiving::Start);
        match chunk {
            Some(_) => Ok(None),
            None => self.handle_reply::<true>(header),
        }
    }

    /// Refuses a simple reply to a command of which chunks have come, and one to a read if the user has said that
    /// those are answered by structured replies.
    pub(super) fn check_simple(&self, cookie: Cookie, request: Unanswered) -> Result<Unanswered> {
        let is_required = self.table.structured == Structured::Required;
        if is_required && request.extent().op == Op::Read {
            self.table.unclaim(request);
            return Err(self.report_violation(format_args!("a simple reply to a read")));
        }
        if self.answer_to(cookie) != Answer::NONE {
            self.table.unclaim(request);
            return Err(self.report_violation(format_args!("a simple reply after chunks")));
        }
        Ok(request)
    }

    /// Parses what was received of a chunk. Holes of more than `limit` bytes are left to the receive work.
    #[inline(never)]
    pub(super) fn parse_chunk(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        limit: usize,
    ) -> Result<Next> {
        match receive.chunk.take() {
            Some(Receiving::Start(chunk)) => self.parse_start(receive, chunk, limit),
            Some(Receiving::Data(chunk)) => self.receive_data(receive, chunk),
            Some(Receiving::Hole(chunk, offset, len)) => {
                self.fill_hole(receive, chunk, (offset, len), limit)
            }
            None => Ok(Next::Reply),
        }
    }

    /// Parses a chunk up to its data.
    fn parse_start(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        mut chunk: Chunk,
        limit: usize,
    ) -> Result<Next> {
        let mut room = [0; PART_BYTES];
        loop {
            let Some(part) = receive.next_part(&mut room, chunk.wanted_bytes())? else {
                receive.chunk = Some(Receiving::Start(chunk));
                return Ok(Next::Receive);
            };
            let taken = chunk.take(part);
            if let Some(content) = taken.map_err(|v| self.report_chunk(v))? {
                return self.handle_content(receive, chunk, content, limit);
            }
        }
    }

    /// Handles what a chunk says.
    fn handle_content(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        mut chunk: Chunk,
        content: Content,
        limit: usize,
    ) -> Result<Next> {
        receive.spent_bytes += CHUNK_COST_BYTES;
        match content {
            Content::Data { offset, len } => {
                receive.current = Some(self.accept(receive, &mut chunk, offset, len)?);
                self.receive_data(receive, chunk)
            }
            Content::Hole { offset, len } => self.fill_hole(receive, chunk, (offset, len), limit),
            Content::Error { error, offset } => {
                self.take_error(&chunk, error, offset)?;
                Ok(Next::Reply)
            }
            Content::None => {
                let request = self.claim(Cookie(chunk.cookie))?;
                self.end_chunk(&chunk, request)?;
                Ok(Next::Reply)
            }
        }
    }

    /// Copies data that was received ahead, and ends the chunk if it has all of its data.
    fn receive_data(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        chunk: Chunk,
    ) -> Result<Next> {
        let Some(mut payload) = receive.current.take() else {
            return Ok(Next::Reply);
        };
        receive.move_to(&mut payload)?;
        if payload.left_bytes() > 0 {
            receive.current = Some(payload);
            receive.chunk = Some(Receiving::Data(chunk));
            return Ok(Next::Receive);
        }
        self.end_chunk(&chunk, payload.into_side())?;
        Ok(Next::Reply)
    }

    /// Fills a hole with zeroes, unless it is left to the receive work.
    fn fill_hole(
        self: ArcBorrow<'_, Self>,
        receive: &mut Receive,
        mut chunk: Chunk,
        (offset, len): (u64, u32),
        limit: usize,
    ) -> Result<Next> {
        if len as usize > limit || receive.is_exhausted(limit) {
            receive.chunk = Some(Receiving::Hole(chunk, offset, len));
            return Ok(Next::LeaveToWork);
        }
        let mut payload = self.accept(receive, &mut chunk, offset, len)?;
        payload.zero();
        receive.spent_bytes += len as usize;
        self.end_chunk(&chunk, payload.into_side())?;
        Ok(Next::Reply)
    }

    /// Claims the command of a chunk, notes that `len` bytes from `offset` in the export are answered, and returns the
    /// memory for them.
    fn accept(
        &self,
        receive: &mut Receive,
        chunk: &mut Chunk,
        offset: u64,
        len: u32,
    ) -> Result<Payload<Unanswered>> {
        let cookie = Cookie(chunk.cookie);
        let request = self.claim(cookie)?;
        let start = offset.wrapping_sub(request.extent().offset_bytes);
        let payload = Payload::within(request, start, len).map_err(|request| {
            self.table.unclaim(request);
            self.report_violation(format_args!(
                "content for {len} bytes at {offset}, which its command does not read"
            ))
        })?;
        let mut answer = self.answer_to(cookie);
        // Within the read, which is shorter than 4 GiB.
        let start = start as u32;
        let before = answer.coverage;
        if let Err(refusal) = answer.add(start, start + len) {
            self.table.unclaim(payload.into_side());
            let why = match refusal {
                Refusal::Overlap => "which were answered before",
                Refusal::TooManyRanges => "and too many gaps before or after them",
            };
            return Err(
                self.report_violation(format_args!("content for {len} bytes at {offset}, {why}"))
            );
        }
        chunk.is_progress = answer.coverage != before;
        self.keep_answer(cookie, &answer);
        receive.spent_bytes += start as usize / DISTANCE_COST;
        Ok(payload)
    }

    /// Handles a chunk that says that the command has failed.
    fn take_error(
        self: ArcBorrow<'_, Self>,
        chunk: &Chunk,
        error: u32,
        offset: Option<u64>,
    ) -> Result {
        let cookie = Cookie(chunk.cookie);
        let request = self.claim(cookie)?;
        let extent = request.extent();
        // An offset that the command does not have says nothing.
        let start = offset.map(|offset| offset.wrapping_sub(extent.offset_bytes));
        let start = start.filter(|start| *start < u64::from(extent.len_bytes));
        let mut answer = self.answer_to(cookie);
        answer.fail(error, start.map(|start| start as u32));
        self.keep_answer(cookie, &answer);
        let is_shutdown = ServerError::from_wire(error) == Some(ServerError::Shutdown);
        if is_shutdown {
            // Also if the command has failed for another reason before.
            self.drain();
        }
        if !is_shutdown || !chunk.text().as_bytes().is_empty() {
            let at = start.and(offset);
            self.report_server_error(&request, error, at, chunk.text());
        }
        if !chunk.is_last {
            // There may be any number of errors, so they do not keep the command from timing out.
            self.table.unclaim(request);
            return Ok(());
        }
        self.end_chunk(chunk, request)
    }

    /// Ends a chunk: gives the claim of its command back, or completes the command if the chunk was the last one.
    fn end_chunk(self: ArcBorrow<'_, Self>, chunk: &Chunk, request: Unanswered) -> Result {
        let cookie = Cookie(chunk.cookie);
        if !chunk.is_last {
            // Content that could not be noted may come again and again, so it does not keep the command from timing out.
            let progress = self.table.progress_of(cookie);
            if let Some(progress) = progress.filter(|_| chunk.is_progress) {
                progress.hear(task::jiffies());
            }
            self.table.unclaim(request);
            return Ok(());
        }
        let answer = self.answer_to(cookie);
        let extent = request.extent();
        let error = ServerError::from_wire(answer.error);
        let answered = answer.coverage.leading_bytes();
        if error.is_none() && extent.op == Op::Read && answered < extent.len_bytes {
            self.table.unclaim(request);
            return Err(self.report_violation(format_args!(
                "a reply to a read without the bytes at {}",
                extent.offset_bytes + u64::from(answered)
            )));
        }
        if let Some(progress) = self.table.progress_of(cookie) {
            progress.clear();
        }
        trace::header_received(&request, chunk.cookie, answer.error);
        self.traffic.replied();
        let outcome = match error {
            None => Outcome::SUCCESS,
            Some(error) => {
                self.traffic.failed();
                self.outcome_of(error, extent.op, answer.good_bytes() / SECTOR_BYTES)
            }
        };
        self.complete(request, outcome);
        Ok(())
    }

    /// Returns what the server has said of a command before. The caller has the claim of the command.
    fn answer_to(&self, cookie: Cookie) -> Answer {
        let progress = self.table.progress_of(cookie);
        progress.map_or(Answer::NONE, |kept| kept.of(cookie.generation()))
    }

    /// Keeps what the server has said of a command. The caller has the claim of the command.
    fn keep_answer(&self, cookie: Cookie, answer: &Answer) {
        if let Some(progress) = self.table.progress_of(cookie) {
            progress.keep(cookie.generation(), answer);
        }
    }

    /// Logs how a chunk violates the protocol. Returns `EPROTO`.
    fn report_chunk(&self, violation: Violation) -> Error {
        match violation {
            Violation::UnknownType(kind) => {
                self.report_violation(format_args!("a chunk of an unknown type ({kind:#x})"))
            }
            Violation::WrongLength(kind, len) => self.report_violation(format_args!(
                "a chunk of type {kind:#x} with a wrong length ({len})"
            )),
            Violation::NotDone => self.report_violation(format_args!(
                "a chunk without content that is not the last one"
            )),
            Violation::NoError => self.report_violation(format_args!("a chunk with an error of 0")),
            Violation::EmptyHole => self.report_violation(format_args!("a hole of 0 bytes")),
        }
    }
}
