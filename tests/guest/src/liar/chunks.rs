// SPDX-License-Identifier: GPL-2.0

//! Structured replies, right ones and lies. The data in them is always right for where it claims to belong,
//! except behind the cookie of nobody: whatever else a read brings, the driver has made up.

use std::io;
use std::thread;
use std::time::Duration;

use super::{Act, Liar, MARK};
use crate::proto::{Command, Request};
use crate::server::chunks::{
    self, DONE, ERROR, ERROR_OFFSET, NONE, OFFSET_DATA, OFFSET_HOLE, data, error, error_at, hole,
    none,
};

/// What a server may do that has agreed on structured replies.
pub(super) const HONEST: &[Act] = &[
    (40, "chunks", |liar| liar.chunks()),
    (20, "chunks of several, mixed", |liar| liar.mixed_chunks()),
    (6, "chunks with pauses", |liar| liar.chunks_with_pauses()),
    (6, "error chunk", |liar| liar.error_chunk()),
    (4, "error chunk, then data", |liar| liar.error_and_chunks()),
    (2, "error chunk of an unknown type", |liar| {
        liar.unknown_error()
    }),
    (4, "simple reply", |liar| liar.reply_rightly()),
];

pub(super) const LIES: &[Act] = &[
    (6, "overlap", |liar| liar.overlap()),
    (6, "outside", |liar| liar.outside()),
    (6, "gap", |liar| liar.gap()),
    (3, "nothing but the last chunk", |liar| liar.nothing()),
    (4, "unknown type", |liar| liar.unknown_type()),
    (3, "none, but not the last", |liar| liar.none_not_done()),
    (6, "wrong length", |liar| liar.wrong_length()),
    (3, "error without a number", |liar| liar.error_of_zero()),
    (4, "too many pieces", |liar| liar.too_many_pieces()),
    (4, "after the last chunk", |liar| liar.after_the_last()),
    (4, "cookie of nobody", |liar| liar.cookie_of_nobody()),
    (6, "bits of a chunk's header flipped", |liar| {
        liar.flip_chunk_bits()
    }),
    (4, "simple reply among chunks", |liar| liar.simple_among()),
    (6, "cut", |liar| liar.cut_short()),
    (3, "garbage", |liar| liar.garbage()),
    (2, "silence", |liar| liar.be_silent()),
    (2, "half closed", |liar| liar.half_close()),
    (2, "closed", |liar| liar.close()),
    (2, "reset", |liar| liar.reset()),
];

impl Liar<'_> {
    /// The whole reply, in chunks.
    fn in_chunks(&mut self, request: &Request) -> Vec<Vec<u8>> {
        if request.command != Command::Read {
            return vec![none(DONE, request.cookie)];
        }
        let data = self.data(request);
        chunks::cut(&mut self.random, request, &data)
    }

    /// A piece of what is stored, as a chunk.
    fn piece(&self, request: &Request, flags: u16, offset: u64, len: u32) -> Vec<u8> {
        let mut piece = vec![0; len as usize];
        self.stored_at(offset, &mut piece);
        data(flags, request.cookie, offset, &piece)
    }

    /// What is stored anywhere, in whole sectors or not.
    fn stored_at(&self, offset: u64, piece: &mut [u8]) {
        let first = offset & !511;
        let skip = (offset - first) as usize;
        let mut whole = vec![0; (skip + piece.len()).next_multiple_of(512)];
        self.shared.stored(first, &mut whole);
        piece.copy_from_slice(&whole[skip..skip + piece.len()]);
    }

    fn words(&mut self) -> Vec<u8> {
        const WORDS: [&[u8]; 5] = [
            b"",
            b"no",
            b"out of\norder \x1b[31m",
            b"\xff\xfe\0",
            b"%s%n",
        ];
        match self.random.u8(..8) {
            0 => (0..self.random.usize(..4096))
                .map(|_| self.random.u8(..))
                .collect(),
            _ => WORDS[self.random.usize(..WORDS.len())].to_vec(),
        }
    }

    /// A request that reads, or one that was never sent.
    fn any_read(&mut self) -> Request {
        let at = self
            .pending
            .iter()
            .position(|request| request.command == Command::Read);
        match at {
            Some(at) => self.pending.remove(at),
            None => self.no_request(),
        }
    }

    /// An offset and a length within a read, both below what there is.
    fn part(&mut self, request: &Request) -> (u64, u32) {
        let skip = self.random.u32(..request.len);
        let len = self.random.u32(1..=request.len - skip);
        (request.offset + u64::from(skip), len)
    }

    // The truth.

    fn chunks(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        let chunks = self.in_chunks(&request).concat();
        self.send(&chunks)
    }

    fn mixed_chunks(&mut self) -> io::Result<()> {
        let mut replies = Vec::new();
        while let Some(request) = self.take() {
            self.done(&request);
            let mut chunks = self.in_chunks(&request);
            chunks.reverse();
            replies.push(chunks);
        }
        let mut mixed = Vec::new();
        while !replies.is_empty() {
            let at = self.random.usize(..replies.len());
            mixed.extend(replies[at].pop().unwrap_or_default());
            replies.retain(|chunks| !chunks.is_empty());
        }
        self.send(&mixed)
    }

    fn chunks_with_pauses(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        for chunk in self.in_chunks(&request) {
            self.send(&chunk)?;
            thread::sleep(Duration::from_millis(self.random.u64(..4)));
        }
        Ok(())
    }

    fn error_chunk(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        let (number, words) = (self.error(), self.words());
        let mut reply = match request.command == Command::Read && self.random.bool() {
            true => error_at(0, request.cookie, number, &words, request.offset),
            false => error(0, request.cookie, number, &words),
        };
        match self.random.bool() {
            true => reply[5] |= DONE as u8,
            false => reply.extend(none(DONE, request.cookie)),
        }
        self.send(&reply)
    }

    fn error_and_chunks(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        let (number, words) = (self.error(), self.words());
        let mut reply = error(0, request.cookie, number, &words);
        reply.extend(self.in_chunks(&request).concat());
        self.send(&reply)
    }

    fn unknown_error(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        let mut reply = error(DONE, request.cookie, self.error(), b"of a new type");
        reply[7] = 0x77;
        self.send(&reply)
    }

    // Lies.

    fn overlap(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let (offset, len) = self.part(&request);
        let mut reply = self.piece(&request, 0, offset, len);
        reply.extend(match self.random.bool() {
            true => self.piece(&request, 0, offset + u64::from(len - 1), 1),
            false => self.piece(&request, 0, offset, len),
        });
        reply.extend(self.in_chunks(&request).concat());
        self.send(&reply)
    }

    fn outside(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let end = request.offset + u64::from(request.len);
        let reply = match self.random.u8(..6) {
            0 => self.piece(&request, DONE, end, 512),
            1 => self.piece(&request, 0, end - 1, 2),
            2 => data(DONE, request.cookie, request.offset.wrapping_sub(1), &MARK),
            3 => hole(DONE, request.cookie, request.offset, request.len + 1),
            4 => hole(0, request.cookie, request.offset, u32::MAX),
            _ => hole(DONE, request.cookie, u64::MAX, request.len),
        };
        self.send(&reply)
    }

    fn gap(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let mut reply = self.in_chunks(&request);
        let content = |chunk: &Vec<u8>| chunk[7] != NONE as u8;
        reply.retain(content);
        reply.remove(self.random.usize(..reply.len()));
        reply.push(none(DONE, request.cookie));
        // None of the others may say that it is the last.
        let last = reply.len() - 1;
        reply[..last].iter_mut().for_each(|chunk| chunk[5] = 0);
        self.send(&reply.concat())
    }

    fn nothing(&mut self) -> io::Result<()> {
        let request = self.any_read();
        self.send(&none(DONE, request.cookie))
    }

    fn unknown_type(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let kind = self.random.u16(OFFSET_HOLE + 1..0x8000);
        let reply = chunks::chunk(DONE, kind, request.cookie, &MARK);
        self.send(&reply)
    }

    fn none_not_done(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let mut reply = none(0, request.cookie);
        reply.extend(self.in_chunks(&request).concat());
        self.send(&reply)
    }

    fn wrong_length(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let kinds = [NONE, OFFSET_DATA, OFFSET_HOLE, ERROR, ERROR_OFFSET];
        let kind = kinds[self.random.usize(..kinds.len())];
        let len = match (kind, self.random.u8(..3)) {
            (NONE, 0) => 1,
            (OFFSET_DATA, 0) => self.random.u32(..=8),
            (OFFSET_HOLE, 0) => self.random.u32(..12),
            (ERROR, 0) => self.random.u32(..6),
            (ERROR_OFFSET, 0) => self.random.u32(..14),
            (_, 1) => self.random.u32(1 << 26..),
            _ => u32::MAX,
        };
        let mut reply = chunks::header(DONE, kind, request.cookie, len);
        reply.extend(MARK.repeat(64));
        self.send(&reply)
    }

    fn error_of_zero(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let words = self.words();
        self.send(&error(DONE, request.cookie, 0, &words))
    }

    /// Every other byte, until nobody can remember them.
    fn too_many_pieces(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let pieces = (0..self.random.u64(16..200)).map(|number| request.offset + number * 2);
        let pieces: Vec<Vec<u8>> = pieces
            .map(|offset| self.piece(&request, 0, offset, 1))
            .collect();
        self.send(&pieces.concat())
    }

    fn after_the_last(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let mut reply = self.in_chunks(&request);
        let last = match self.random.bool() {
            true => reply.last().cloned().unwrap_or_default(),
            false => none(DONE, request.cookie),
        };
        reply.push(last);
        self.send(&reply.concat())
    }

    fn cookie_of_nobody(&mut self) -> io::Result<()> {
        let answered = self.shared.answered.lock().unwrap().clone();
        let cookie = self.random.choice(&answered).copied().unwrap_or(u64::MAX);
        let request = self.no_request();
        let (offset, _) = self.part(&request);
        self.send(&data(DONE, cookie, offset, &MARK.repeat(32)))
    }

    /// Of the first chunk. With its length, the rest is read as something else.
    fn flip_chunk_bits(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let mut reply = self.in_chunks(&request).concat();
        let at = self.random.usize(..20);
        reply[at] ^= 1 << self.random.u8(..8);
        self.send(&reply)?;
        match self.random.u8(..3) {
            0 => self.be_silent(),
            1 => self.reset(),
            _ => self.close(),
        }
    }

    fn simple_among(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let mut reply = self.piece(&request, 0, request.offset, 1);
        reply.extend(self.right(&request));
        self.send(&reply)
    }

    fn cut_short(&mut self) -> io::Result<()> {
        let request = self.any_read();
        let reply = self.in_chunks(&request).concat();
        let len = self.random.usize(..reply.len());
        self.send(&reply[..len])?;
        match self.random.u8(..4) {
            0 => self.close(),
            1 => self.half_close(),
            2 => self.be_silent(),
            _ => self.reset(),
        }
    }
}
