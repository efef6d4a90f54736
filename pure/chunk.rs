// SPDX-License-Identifier: GPL-2.0
//! The wire format of structured replies: a reply in chunks, each with a header of its own.
//!
//! This file does not depend on the kernel. The host tests compile it as it is.
//!
//! Source: the NBD protocol text (`doc/proto.md` of the NBD project), "Structured reply chunk message".

#![forbid(unsafe_code)]

use super::proto::REPLY_BYTES;

/// The first word of each chunk (`NBD_STRUCTURED_REPLY_MAGIC`).
const MAGIC: u32 = 0x668e_33ef;
/// The chunk is the last one of its reply (`NBD_REPLY_FLAG_DONE`).
const FLAG_DONE: u16 = 1;
/// The types of chunks (`NBD_REPLY_TYPE_*`).
const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_ERROR_OFFSET: u16 = TYPE_ERROR_BIT | 2;
/// Each type with this bit is that of an error, also those that are not known.
const TYPE_ERROR_BIT: u16 = 1 << 15;

/// The maximum number of bytes that are parsed at a time.
pub(crate) const PART_BYTES: usize = 64;
/// The sizes of the parts of a chunk.
const LENGTH_BYTES: usize = 4;
const OFFSET_BYTES: u32 = 8;
const HOLE_BYTES: u32 = 12;
const ERROR_BYTES: u32 = 6;
/// The maximum length of a message: that of all strings of the protocol.
const MAX_MESSAGE_BYTES: u32 = 4096;
/// The maximum length of an error chunk, which leaves room for what future types have beside the message.
const MAX_ERROR_BYTES: u32 = 2 * MAX_MESSAGE_BYTES;
/// How much is kept of a message.
pub(crate) const TEXT_BYTES: usize = 120;

/// The beginning of what a server says. It may contain any bytes but 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Text {
    bytes: [u8; TEXT_BYTES],
    len: usize,
    /// Nothing more is kept.
    is_full: bool,
    /// There was more, and that was no end.
    is_cut: bool,
}

impl Text {
    /// No text.
    pub(crate) const EMPTY: Text = Text {
        bytes: [0; TEXT_BYTES],
        len: 0,
        is_full: false,
        is_cut: false,
    };

    /// Returns what was kept.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    /// Returns whether the server has said more than was kept.
    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Keeps the beginning of `bytes`, up to the first one that is 0, which ends a text in C.
    fn append(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.is_full {
                return;
            }
            match self.bytes.get_mut(self.len) {
                Some(place) if byte != 0 => {
                    *place = byte;
                    self.len += 1;
                }
                place => {
                    self.is_full = true;
                    self.is_cut = place.is_none() && byte != 0;
                }
            }
        }
    }
}

/// How a chunk violates the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// The type is not known, and not that of an error. Nobody knows what it means for the command.
    UnknownType(u16),
    /// The length does not fit the type.
    WrongLength(u16, u32),
    /// A chunk without content must be the last one.
    NotDone,
    /// An error chunk without an error.
    NoError,
    /// A hole without bytes.
    EmptyHole,
}

/// What a chunk says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing, except that the reply is complete.
    None,
    /// `len` bytes of data for this offset in the export, which follow.
    Data { offset: u64, len: u32 },
    /// `len` bytes from this offset in the export are zero.
    Hole { offset: u64, len: u32 },
    /// The command has failed, at this offset in the export if that is known.
    Error { error: u32, offset: Option<u64> },
}

/// What of a chunk comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Length,
    Offset,
    Hole,
    Error,
    /// The rest of a message, in bytes.
    Message(u32),
    ErrorOffset,
    /// Bytes that mean nothing to this client.
    Rest,
}

/// A chunk that is being received, up to the data of a read.
pub(crate) struct Chunk {
    /// The cookie of the command that this is a part of the reply to.
    pub(crate) cookie: u64,
    /// The chunk is the last one of its reply.
    pub(crate) is_last: bool,
    /// The chunk has content that was noted as answered, so that the command is a step further when the chunk ends.
    pub(crate) is_progress: bool,
    kind: u16,
    part: Part,
    /// The number of bytes of the chunk that were not parsed, once its length is known.
    left: u32,
    error: u32,
    offset: Option<u64>,
    text: Text,
}

/// A chunk that is being received.
pub(crate) enum Receiving {
    /// Its header, or what follows that before the data.
    Start(Chunk),
    /// Its data.
    Data(Chunk),
    /// A hole that is too large to be filled with zeroes in the context that has received it, with its position in the
    /// export.
    Hole(Chunk, u64, u32),
}

impl Chunk {
    /// Decodes the start of a chunk's header, which is as long as a simple reply's header. Returns `None` if this
    /// is no chunk.
    pub(crate) fn begin(wire: &[u8; REPLY_BYTES]) -> Option<Self> {
        let [m0, m1, m2, m3, f0, f1, t0, t1, cookie @ ..] = *wire;
        if u32::from_be_bytes([m0, m1, m2, m3]) != MAGIC {
            return None;
        }
        Some(Chunk {
            cookie: u64::from_be_bytes(cookie),
            // Flags that are not known mean nothing.
            is_last: u16::from_be_bytes([f0, f1]) & FLAG_DONE != 0,
            is_progress: false,
            kind: u16::from_be_bytes([t0, t1]),
            part: Part::Length,
            left: 0,
            error: 0,
            offset: None,
            text: Text::EMPTY,
        })
    }

    /// Returns the number of bytes that [`Self::take()`] has to be given next: at least 1, at most
    /// [`PART_BYTES`].
    pub(crate) fn wanted_bytes(&self) -> usize {
        let piece = |left: u32| (left as usize).min(PART_BYTES);
        match self.part {
            Part::Length => LENGTH_BYTES,
            Part::Offset | Part::ErrorOffset => OFFSET_BYTES as usize,
            Part::Hole => HOLE_BYTES as usize,
            Part::Error => ERROR_BYTES as usize,
            Part::Message(left) => piece(left),
            Part::Rest => piece(self.left),
        }
    }

    /// Returns what is known of the server's message.
    pub(crate) fn text(&self) -> &Text {
        &self.text
    }

    /// Takes the bytes that come next, which are as many as are [wanted](Self::wanted_bytes). Returns what the chunk
    /// says as soon as that is known, which is when all of it was taken, except for data.
    ///
    /// # Errors
    ///
    /// The chunk violates the protocol. The stream cannot be parsed any further.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<Option<Content>, Violation> {
        if self.part == Part::Length {
            self.left = number(bytes) as u32;
            return self.begin_content();
        }
        let len = bytes.len() as u32;
        self.left -= len.min(self.left);
        match self.part {
            Part::Offset => {
                let (offset, len) = (number(bytes), self.left);
                return Ok(Some(Content::Data { offset, len }));
            }
            Part::Hole => return hole(bytes).map(Some),
            Part::Error => self.take_error(bytes)?,
            Part::Message(left) => {
                self.text.append(bytes);
                self.part = self.after_message(left - len.min(left));
            }
            Part::ErrorOffset => {
                self.offset = Some(number(bytes));
                self.part = Part::Rest;
            }
            Part::Length | Part::Rest => {}
        }
        let is_complete = self.part == Part::Rest && self.left == 0;
        Ok(is_complete.then_some(Content::Error {
            error: self.error,
            offset: self.offset,
        }))
    }

    /// Decides what follows the length.
    fn begin_content(&mut self) -> Result<Option<Content>, Violation> {
        let fits;
        (self.part, fits) = match self.kind {
            TYPE_NONE if !self.is_last => return Err(Violation::NotDone),
            TYPE_NONE if self.left == 0 => return Ok(Some(Content::None)),
            TYPE_NONE => (Part::Rest, false),
            TYPE_OFFSET_DATA => (Part::Offset, self.left > OFFSET_BYTES),
            TYPE_OFFSET_HOLE => (Part::Hole, self.left == HOLE_BYTES),
            kind if kind & TYPE_ERROR_BIT != 0 => (
                Part::Error,
                (ERROR_BYTES..=MAX_ERROR_BYTES).contains(&self.left),
            ),
            kind => return Err(Violation::UnknownType(kind)),
        };
        if !fits {
            return Err(Violation::WrongLength(self.kind, self.left));
        }
        Ok(None)
    }

    /// Takes the error and the length of the message.
    fn take_error(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        let (error, message) = bytes.split_at(bytes.len().min(4));
        self.error = number(error) as u32;
        if self.error == 0 {
            return Err(Violation::NoError);
        }
        // Less than 64 KiB.
        let message = number(message) as u32;
        if message > self.left {
            // nbd-server sends this length in the byte order of its machine. The error is right all the same.
            self.part = Part::Rest;
            return Ok(());
        }
        if message > MAX_MESSAGE_BYTES {
            return Err(Violation::WrongLength(self.kind, self.left + ERROR_BYTES));
        }
        self.part = self.after_message(message);
        Ok(())
    }

    /// Returns what comes next when `left` bytes of the message are missing.
    fn after_message(&self, left: u32) -> Part {
        match self.kind {
            _ if left > 0 => Part::Message(left),
            TYPE_ERROR_OFFSET if self.left >= OFFSET_BYTES => Part::ErrorOffset,
            _ => Part::Rest,
        }
    }
}

/// Decodes the content of a hole.
fn hole(bytes: &[u8]) -> Result<Content, Violation> {
    let (offset, len) = bytes.split_at(bytes.len().min(OFFSET_BYTES as usize));
    let (offset, len) = (number(offset), number(len) as u32);
    match len {
        0 => Err(Violation::EmptyHole),
        _ => Ok(Content::Hole { offset, len }),
    }
}

/// Returns the number that these bytes are, which are at most eight.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}
