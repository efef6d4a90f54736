// SPDX-License-Identifier: GPL-2.0
//! The two directions of a connection's byte stream: messages that are being sent, and what was
//! received and not understood yet. As few socket calls as possible.

#![forbid(unsafe_code)]

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
            sock::{
                Next,
                Socket, //
            },
        },
    },
    pure::{
        proto::{
            self as proto,
            REPLY_BYTES,
            REQUEST_BYTES, //
        },
        ring::Ring, //
    },
};
use kernel::prelude::*;

/// Requests that one call may send.
const STAGED: usize = 64;
/// Pieces of memory that one call may send or receive.
const PIECES: usize = 128;
/// Bytes that are received ahead of the data that is being waited for. More would be copied twice when
/// it is data; less would not hold the headers that a busy server answers writes with.
const READ_AHEAD_BYTES: usize = 512;
/// A message that is being sent.
struct Outgoing {
    /// Where the header lies in the page, and how much of it is left.
    header_at: usize,
    header_left: usize,
    /// The request and its data; none for a disconnect.
    payload: Option<Payload<Unsent>>,
}

impl Outgoing {
    /// Counts `bytes` as sent, at most to the end; returns how many are of the next message.
    fn advance(&mut self, bytes: usize) -> usize {
        let header = bytes.min(self.header_left);
        self.header_at += header;
        self.header_left -= header;
        let Some(payload) = &mut self.payload else {
            return bytes - header;
        };
        let data = (bytes - header).min(payload.left_bytes());
        payload.advance(data);
        bytes - header - data
    }

    fn is_sent(&self) -> bool {
        self.header_left == 0 && self.payload.as_ref().is_none_or(|p| p.left_bytes() == 0)
    }
}

/// The transmit side's own.
pub(crate) struct Transmit {
    headers: IoPage,
    pieces: Pieces,
    staged: Ring<Outgoing>,
    /// Where the next header goes.
    next_header: usize,
}

/// The receive side's own.
pub(crate) struct Receive {
    buffer: IoPage,
    pieces: Pieces,
    /// What is received and not understood yet lies between these.
    start: usize,
    end: usize,
    /// The command whose data is being received.
    pub(crate) current: Option<Payload<Unanswered>>,
    /// Why nothing more can be received, where that was found in a callback.
    pub(crate) failed: Option<Error>,
}

/// What one call has sent.
pub(crate) struct Sent {
    pub(crate) bytes: usize,
    /// How many requests ended within them.
    pub(crate) requests: u64,
    /// It was all that the call was given.
    pub(crate) all: bool,
}

impl Transmit {
    /// Nothing to send. May sleep.
    pub(crate) fn new() -> Result<Self> {
        Ok(Transmit {
            headers: IoPage::new()?,
            pieces: Pieces::new(PIECES)?,
            staged: Ring::new(STAGED)?,
            next_header: 0,
        })
    }

    /// Whether another message can be staged.
    pub(crate) fn can_stage(&self) -> bool {
        self.staged.len() < STAGED
    }

    /// Whether there is nothing to send.
    pub(crate) fn is_empty(&self) -> bool {
        self.staged.is_empty()
    }

    /// Has every request that was not wholly sent end with `outcome`.
    pub(crate) fn give_back(&mut self, outcome: Outcome) {
        while let Some(message) = self.staged.pop_front() {
            if let Some(payload) = message.payload {
                payload.into_side().overrule(outcome);
            }
        }
    }

    /// Sends what is staged, as far as one call can. `next`: whether further messages follow at once. May
    /// sleep for the socket's lock.
    ///
    /// # Errors
    ///
    /// Those of [`Socket::send()`].
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
        let bytes = socket.send(iov, if whole { next } else { Next::More })?;
        Ok(Sent {
            bytes,
            requests: self.count(bytes),
            all: bytes == offered,
        })
    }

    /// Counts `bytes` as sent, and lets go of what was sent wholly; returns how many requests.
    fn count(&mut self, mut bytes: usize) -> u64 {
        let mut requests = 0;
        while let Some(first) = self.staged.front_mut() {
            bytes = first.advance(bytes);
            if !first.is_sent() {
                break;
            }
            requests += u64::from(first.payload.is_some());
            // Letting go of the request may end it, when its reply is already in.
            drop(self.staged.pop_front());
        }
        requests
    }

    /// Writes a header, and puts the message at the end of what is sent.
    pub(crate) fn stage(&mut self, wire: &proto::RequestHeader, payload: Option<Payload<Unsent>>) {
        // Headers of messages that are staged lie behind one another, and there are fewer than fit.
        let header_at = self.next_header;
        let message = Outgoing {
            header_at,
            header_left: REQUEST_BYTES,
            payload,
        };
        self.next_header = (header_at + REQUEST_BYTES) % (STAGED * REQUEST_BYTES);
        // Neither can fail: the place is within the page, and the caller has looked for room.
        let _ = self.headers.write(header_at, &wire.encode());
        let _ = self.staged.push_back(message);
    }
}

impl Receive {
    /// Nothing was received. May sleep.
    pub(crate) fn new() -> Result<Self> {
        Ok(Receive {
            buffer: IoPage::new()?,
            pieces: Pieces::new(PIECES)?,
            start: 0,
            end: 0,
            current: None,
            failed: None,
        })
    }

    /// How much data is waited for.
    pub(crate) fn awaited_bytes(&self) -> usize {
        self.current.as_ref().map_or(0, Payload::left_bytes)
    }

    /// Receives into the data that is waited for, and ahead of it. Returns how much it was, and whether
    /// it was everything that there was room for.
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

    /// Takes what is needed next from what has come in: data, or a header. Everything that was taken
    /// before must have been understood.
    pub(crate) fn take_from(&mut self, segment: &mut Segment<'_>) -> Result<usize> {
        let before = segment.left_bytes();
        if let Some(payload) = &mut self.current {
            segment.move_to(payload)?;
        } else {
            let missing = REPLY_BYTES.saturating_sub(self.end);
            self.end += segment.move_to_page(&mut self.buffer, self.end, missing)?;
        }
        Ok(before - segment.left_bytes())
    }

    /// Works through what was received: data goes to the command that waits for it, which is given to
    /// `complete` when all is there, and each header to `handle`, which answers with the command whose
    /// data follows it.
    ///
    /// # Errors
    ///
    /// Those of `handle`. Nothing of the stream can be understood any more.
    pub(crate) fn parse(
        &mut self,
        handle: impl Fn(&[u8; REPLY_BYTES]) -> Result<Option<Payload<Unanswered>>>,
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
            self.current = handle(&header)?;
        }
    }

    /// Copies what was received ahead to where it belongs.
    fn move_to(&mut self, payload: &mut Payload<Unanswered>) -> Result {
        let ahead = self.end - self.start;
        if ahead > 0 && payload.left_bytes() > 0 {
            self.start += self.buffer.copy_to(self.start, ahead, payload)?;
        }
        self.reset_if_empty();
        Ok(())
    }

    /// The next reply's header, if it is all there.
    fn next_header(&mut self) -> Result<Option<[u8; REPLY_BYTES]>> {
        let mut header = [0; REPLY_BYTES];
        let there = (self.end - self.start).min(REPLY_BYTES);
        let (have, _) = header.split_at_mut(there);
        self.buffer.read(self.start, have)?;
        if there == REPLY_BYTES {
            self.start += REPLY_BYTES;
            self.reset_if_empty();
            return Ok(Some(header));
        }
        // What there is of a header goes to the front, so that the rest of it has room.
        let (have, _) = header.split_at(there);
        self.buffer.write(0, have)?;
        self.start = 0;
        self.end = there;
        Ok(None)
    }

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
    socket.send(iov, Next::Nothing).map(|_| ())
}
