// SPDX-License-Identifier: GPL-2.0
//! The byte stream of a connection: the messages that are being sent, and the bytes that were
//! received and not parsed yet. It makes as few socket calls as possible.

#![forbid(unsafe_code)]

use super::outgoing::Outgoing;
use crate::{
    kapi::{
        block::{
            payload::Payload,
            request::{
                Outcome,
                Unanswered,
                Unsent, //
            },
        },
        net::{
            arrival::Segment,
            iov::{
                IoPage,
                Pieces,
                RecvIov,
                SendIov, //
            },
            page_frag::FragPool,
            sock::Socket,
            transfer::Next, //
        },
        trace, //
    },
    pure::{
        chunk::{
            Receiving,
            PART_BYTES, //
        },
        proto::{
            self as proto,
            REPLY_BYTES,
            REQUEST_BYTES, //
        },
        ring::Ring,
        tls::{
            Meaning,
            Records, //
        }, //
    },
};
use kernel::prelude::*;

/// The maximum number of messages that are staged, and so the maximum that one call sends.
const STAGED: usize = 64;
/// The maximum number of memory segments that one call sends or receives.
const PIECES: usize = 128;
/// The maximum number of page fragments, of 64 KiB, that are kept until the network has let go of them. Together
/// they are as large as TCP's send buffer can grow, unless `tcp_wmem` was changed.
const FRAGS: usize = 64;
/// The number of bytes that are received beyond the awaited data. If these are data, they are copied twice, so it should
/// not be more. It should not be less either, or it would not hold the headers of a busy server's replies to writes.
const READ_AHEAD_BYTES: usize = 512;
/// What chunks may cost outside of the receive work, and in one run of that, in bytes that are filled with zeroes. A
/// server could keep a processor busy with a few bytes otherwise.
const INLINE_CHUNKS_BYTES: usize = 256 << 10;
const WORK_CHUNKS_BYTES: usize = 64 << 20;
/// How much is received at a time of a TLS record that is no data. A session ticket has some hundred bytes.
const RECORD_BYTES: usize = 256;

/// The state of the transmit side. The lock of the outbox protects it.
pub(crate) struct Transmit {
    headers: IoPage,
    pieces: Pieces,
    /// The memory into which TCP copies what is sent.
    pub(crate) frags: FragPool,
    staged: Ring<Outgoing>,
    /// The offset of the next header in the page.
    next_header: usize,
    /// What the socket was told to expect after the last call.
    next: Next,
}

/// The state of the receive side. The receive lock protects it.
///
/// # Invariants
///
/// If the range in the buffer is empty, it is at the start of the buffer.
pub(crate) struct Receive {
    buffer: IoPage,
    pieces: Pieces,
    /// The range of the bytes in the buffer that were received and not parsed yet.
    start: usize,
    end: usize,
    /// What was received of TLS records that are no data.
    records: Records,
    /// The command whose data is being received.
    pub(crate) current: Option<Payload<Unanswered>>,
    /// The chunk that is being received, up to the end of its data.
    pub(super) chunk: Option<Receiving>,
    /// What chunks have cost since the receive work has run last: how many bytes were filled with zeroes, or could have
    /// been in the same time.
    pub(super) spent_bytes: usize,
    pub(super) mode: Mode,
}

/// The result of handling a header: the command whose data follows.
pub(super) type Handled = Result<Option<Payload<Unanswered>>>;

/// What a connection may receive.
pub(crate) enum Mode {
    /// Simple replies only.
    Simple,
    /// Structured replies, too.
    Structured,
    /// Nothing more can be received, for this reason.
    Failed(Error),
}

/// The result of sending.
pub(crate) struct Sent {
    pub(crate) bytes: usize,
    /// The number of requests whose last byte is among these.
    pub(crate) requests: u64,
    /// The socket has taken everything.
    pub(crate) all: bool,
}

impl Transmit {
    /// Returns a transmit side with nothing to send.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new() -> Result<Self> {
        Ok(Transmit {
            headers: IoPage::new()?,
            pieces: Pieces::new(PIECES)?,
            frags: FragPool::new(FRAGS)?,
            staged: Ring::new(STAGED)?,
            next_header: 0,
            next: Next::Nothing,
        })
    }

    /// Returns whether there is room for another message.
    pub(crate) fn can_stage(&self) -> bool {
        self.staged.len() < STAGED
    }

    /// Returns whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.staged.is_empty()
    }

    /// Returns whether all was sent, and the socket was told that more follows (`MSG_MORE`). Until it is
    /// given more, it may hold back what it has: TLS keeps an incomplete record.
    pub(crate) fn announced_more(&self) -> bool {
        self.is_empty() && self.next == Next::More
    }

    /// Returns whether a request was staged that was not sent completely.
    pub(crate) fn has_requests(&self) -> bool {
        self.staged.iter().any(|message| message.payload.is_some())
    }

    /// Ends all requests that were not sent completely with `outcome`, even if their reply has
    /// arrived.
    pub(crate) fn give_back(&mut self, outcome: Outcome) {
        while let Some(message) = self.staged.pop_front() {
            if let Some(payload) = message.payload {
                payload.into_side().overrule(outcome);
            }
        }
    }

    /// Sends staged messages. `next` tells whether others will follow at once.
    ///
    /// # Errors
    ///
    /// Those of [`Socket::send()`].
    ///
    /// # Context
    ///
    /// May sleep for the socket's lock.
    pub(crate) fn send(&mut self, socket: &Socket, next: Next) -> Result<Sent> {
        let mut iov = SendIov::new(&mut self.pieces);
        let mut whole = true;
        for message in self.staged.iter() {
            let header = message.header_left == 0
                || iov.push_bytes(&self.headers, message.header_at, message.header_left);
            let payload = message.payload.as_ref();
            if !(header && payload.is_none_or(|p| iov.push_payload(p))) {
                whole = false;
                break;
            }
        }
        let offered = iov.bytes();
        let next = if whole { next } else { Next::More };
        let bytes = socket.send(iov, &mut self.frags, next)?;
        self.next = next;
        Ok(Sent {
            bytes,
            requests: self.count(bytes),
            all: bytes == offered,
        })
    }

    /// Advances by `bytes`, and drops the messages that were sent completely. Returns the number of
    /// requests among them.
    fn count(&mut self, mut bytes: usize) -> u64 {
        let mut requests = 0;
        while let Some(first) = self.staged.front_mut() {
            if trace::is_sending_traced() {
                first.trace(bytes, &self.headers);
            }
            bytes = first.advance(bytes);
            if !first.is_sent() {
                break;
            }
            requests += u64::from(first.payload.is_some());
            // Dropping the handle ends the request if its reply has arrived already.
            drop(self.staged.pop_front());
        }
        requests
    }

    /// Writes a header and stages the message. The caller has checked [`Self::can_stage()`].
    pub(crate) fn stage(&mut self, wire: &proto::RequestHeader, payload: Option<Payload<Unsent>>) {
        // The headers of staged messages follow one another in the page, which has room for more of
        // them.
        let header_at = self.next_header;
        let message = Outgoing {
            header_at,
            header_left: REQUEST_BYTES,
            payload,
        };
        self.next_header = (header_at + REQUEST_BYTES) % (STAGED * REQUEST_BYTES);
        // Neither can fail: the offset is within the page, and the caller has checked for room.
        let _ = self.headers.write(header_at, &wire.encode());
        let _ = self.staged.push_back(message);
    }
}

impl Receive {
    /// Returns a receive side that has received nothing.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(mode: Mode) -> Result<Self> {
        Ok(Receive {
            buffer: IoPage::new()?,
            pieces: Pieces::new(PIECES)?,
            start: 0,
            end: 0,
            records: Records::new(),
            current: None,
            chunk: None,
            spent_bytes: 0,
            mode,
        })
    }

    /// Returns the number of bytes that are missing of the current command's data.
    pub(crate) fn awaited_bytes(&self) -> usize {
        self.current.as_ref().map_or(0, Payload::left_bytes)
    }

    /// Returns whether there is nothing to parse. `CHUNKS` tells whether the server may send structured replies.
    pub(crate) fn is_parsed<const CHUNKS: bool>(&self) -> bool {
        self.start == self.end
            && self.current.as_ref().is_none_or(|p| p.left_bytes() > 0)
            && !(CHUNKS && self.has_hole())
    }

    /// Returns whether a hole is left to the receive work.
    fn has_hole(&self) -> bool {
        matches!(self.chunk, Some(Receiving::Hole(..)))
    }

    /// Returns whether chunks have cost as much as they may until the receive work runs, or runs again. `limit` is the
    /// size up to which holes are filled, and not limited in the receive work.
    pub(super) fn is_exhausted(&self, limit: usize) -> bool {
        let budget = match limit {
            usize::MAX => WORK_CHUNKS_BYTES,
            _ => INLINE_CHUNKS_BYTES,
        };
        self.spent_bytes > budget
    }

    /// Returns whether the receive work has something to do although nothing is left to receive.
    pub(super) fn wants_work(&self) -> bool {
        match self.mode {
            Mode::Simple => false,
            Mode::Structured => self.has_hole() || self.is_exhausted(0),
            Mode::Failed(_) => true,
        }
    }

    /// Receives the awaited data and some bytes beyond it, with one call. Returns the number of
    /// bytes, and whether there was room for more.
    ///
    /// # Errors
    ///
    /// Those of [`Socket::receive()`].
    ///
    /// # Context
    ///
    /// May sleep for the socket's lock.
    pub(crate) fn fill(&mut self, socket: &Socket) -> Result<(usize, bool)> {
        let mut iov = RecvIov::new(&mut self.pieces);
        let whole = self.current.as_mut().is_none_or(|p| iov.push_payload(p));
        if whole {
            let room = READ_AHEAD_BYTES - self.end;
            iov.push_room(&mut self.buffer, self.end, room);
        }
        let offered = iov.bytes();
        let got = socket.receive(iov)?;
        let mut ahead = got;
        if let Some(payload) = &mut self.current {
            let data = got.min(payload.left_bytes());
            payload.advance(data);
            ahead -= data;
        }
        self.end += ahead;
        Ok((got, got == offered))
    }

    /// Receives a TLS record that is no data, or the next part of one, and returns what it means.
    ///
    /// # Errors
    ///
    /// Those of [`Socket::receive_record()`].
    ///
    /// # Context
    ///
    /// May sleep for the socket's lock.
    #[inline(never)]
    pub(crate) fn take_record(&mut self, socket: &Socket) -> Result<Meaning> {
        let mut iov = RecvIov::new(&mut self.pieces);
        // Behind what was received ahead.
        iov.push_room(&mut self.buffer, READ_AHEAD_BYTES, RECORD_BYTES);
        let record = socket.receive_record(iov)?;
        let mut bytes = [0; RECORD_BYTES];
        let (bytes, _) = bytes.split_at_mut(record.bytes.min(RECORD_BYTES));
        self.buffer.read(READ_AHEAD_BYTES, bytes)?;
        Ok(self.records.take(record.kind, bytes))
    }

    /// Takes from `segment` what is needed next, which is data or a header. Returns the number of
    /// bytes.
    ///
    /// Everything that was received before must have been parsed.
    ///
    /// # Errors
    ///
    /// Those of copying from the segment.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(crate) fn take_from<const CHUNKS: bool>(
        &mut self,
        segment: &mut Segment<'_>,
    ) -> Result<usize> {
        let before = segment.left_bytes();
        if let Some(payload) = &mut self.current {
            segment.move_to(payload)?;
        } else {
            let wanted = match &self.chunk {
                Some(Receiving::Start(chunk)) if CHUNKS => chunk.wanted_bytes(),
                _ => REPLY_BYTES,
            };
            let missing = wanted.saturating_sub(self.end);
            self.end += segment.move_to_page(&mut self.buffer, self.end, missing)?;
        }
        Ok(before - segment.left_bytes())
    }

    /// Parses what was received, up to the first chunk.
    ///
    /// Passes each header to `handle`, which returns the command if data follows, or stores the chunk that the header
    /// begins. Copies data to its command, and passes that to `complete` once it has all of its data.
    ///
    /// # Errors
    ///
    /// Those of `handle`. The stream cannot be parsed any further.
    pub(crate) fn parse<const CHUNKS: bool>(
        &mut self,
        handle: impl Fn(&[u8; REPLY_BYTES], &mut Option<Receiving>) -> Handled,
        complete: impl Fn(Payload<Unanswered>),
    ) -> Result {
        loop {
            if let Some(mut payload) = self.current.take() {
                self.move_to(&mut payload)?;
                if payload.left_bytes() > 0 {
                    self.current = Some(payload);
                    return Ok(());
                }
                complete(payload);
            }
            let Some(header) = self.next_header()? else {
                return Ok(());
            };
            self.current = handle(&header, &mut self.chunk)?;
            if CHUNKS && self.chunk.is_some() {
                return Ok(());
            }
        }
    }

    /// Copies bytes that were received ahead to the command that they belong to.
    pub(super) fn move_to(&mut self, payload: &mut Payload<Unanswered>) -> Result {
        let ahead = self.end - self.start;
        if ahead > 0 && payload.left_bytes() > 0 {
            self.start += self.buffer.copy_to(self.start, ahead, payload)?;
        }
        self.reset_if_empty();
        Ok(())
    }

    /// Returns the next reply's header if all of it was received.
    fn next_header(&mut self) -> Result<Option<[u8; REPLY_BYTES]>> {
        let mut header = [0; REPLY_BYTES];
        Ok(self.next(&mut header)?.then_some(header))
    }

    /// Returns the next `len` bytes of a chunk, at most [`PART_BYTES`], if all of them were received.
    pub(super) fn next_part<'a>(
        &mut self,
        room: &'a mut [u8; PART_BYTES],
        len: usize,
    ) -> Result<Option<&'a [u8]>> {
        let (part, _) = room.split_at_mut(len);
        Ok(self.next(part)?.then_some(part))
    }

    /// Takes as many bytes as `part` has room for, if all of them were received. Returns whether they were.
    #[inline(always)]
    fn next(&mut self, part: &mut [u8]) -> Result<bool> {
        let there = self.end - self.start;
        if there < part.len() {
            if self.start > 0 {
                self.move_to_front(there)?;
            }
            return Ok(false);
        }
        self.buffer.read(self.start, part)?;
        self.start += part.len();
        self.reset_if_empty();
        Ok(true)
    }

    /// Moves `len` bytes of a header or chunk to the front of the buffer, so that there is room for the rest of it.
    #[cold]
    fn move_to_front(&mut self, len: usize) -> Result {
        let mut header = [0; PART_BYTES];
        let (have, _) = header.split_at_mut(len);
        self.buffer.read(self.start, have)?;
        self.buffer.write(0, have)?;
        self.start = 0;
        self.end = len;
        Ok(())
    }

    /// Moves an empty range to the start of the buffer.
    fn reset_if_empty(&mut self) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }
}

/// Sends a disconnect on a socket that no connection has taken over. May sleep.
pub(crate) fn send_disconnect_on(socket: &Socket) -> Result {
    let mut page = IoPage::new()?;
    page.write(0, &proto::RequestHeader::DISCONNECT.encode())?;
    let mut pieces = Pieces::new(1)?;
    let mut iov = SendIov::new(&mut pieces);
    iov.push_bytes(&page, 0, REQUEST_BYTES);
    socket.send(iov, &mut FragPool::new(0)?, Next::Nothing)?;
    Ok(())
}
