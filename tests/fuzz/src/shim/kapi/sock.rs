// SPDX-License-Identifier: GPL-2.0
//! Sockets, and what in the module has files of its own: pages, and the pieces of what is sent and received.

use super::{
    Memory,
    page_frag::FragPool,
    payload::Payload,
    request::{Side, Unanswered},
    transfer::{Next, Record},
};
use crate::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::marker::PhantomData;

pub(crate) struct IoPage(Memory);

impl IoPage {
    const BYTES: usize = 4096;

    pub(crate) fn new() -> Result<Self> {
        Ok(IoPage(super::memory(Self::BYTES)))
    }

    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) -> Result {
        let mut page = self.0.borrow_mut();
        let place = page.get_mut(offset..offset + bytes.len());
        place.ok_or(EINVAL)?.copy_from_slice(bytes);
        Ok(())
    }

    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result {
        let page = self.0.borrow();
        let place = page.get(offset..offset + bytes.len());
        bytes.copy_from_slice(place.ok_or(EINVAL)?);
        Ok(())
    }

    pub(crate) fn copy_to(
        &self,
        offset: usize,
        bytes: usize,
        payload: &mut Payload<Unanswered>,
    ) -> Result<usize> {
        let page = self.0.borrow();
        Ok(payload.fill(page.get(offset..offset + bytes).ok_or(EINVAL)?))
    }
}

/// A part of some memory: where it begins and ends.
struct Piece(Memory, usize, usize);

pub(crate) struct Pieces(Vec<Piece>);

impl Pieces {
    pub(crate) fn new(count: usize) -> Result<Self> {
        Ok(Pieces(Vec::with_capacity(count)))
    }
}

/// `SendIov` and `RecvIov`.
pub(crate) struct Iov<'a> {
    pieces: &'a mut Vec<Piece>,
    room: usize,
    _data: PhantomData<&'a mut IoPage>,
}

impl<'a> Iov<'a> {
    pub(crate) fn new(pieces: &'a mut Pieces) -> Self {
        pieces.0.clear();
        let room = pieces.0.capacity();
        Iov {
            pieces: &mut pieces.0,
            room,
            _data: PhantomData,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pieces.iter().map(|Piece(_, at, end)| end - at).sum()
    }

    fn push(&mut self, memory: &Memory, at: usize, end: usize) -> bool {
        let fits = self.pieces.len() < self.room;
        if fits {
            self.pieces.push(Piece(memory.clone(), at, end));
        }
        fits
    }

    pub(crate) fn push_payload<S: Side>(&mut self, payload: &Payload<S>) -> bool {
        let request = payload.side.request();
        let size = request.piece_bytes;
        let mut at = payload.at;
        while at < payload.end {
            let end = (at / size * size + size).min(payload.end);
            if !self.push(&request.data, at, end) {
                return false;
            }
            at = end;
        }
        true
    }

    pub(crate) fn push_bytes(&mut self, page: &'a IoPage, at: usize, len: usize) -> bool {
        at + len <= IoPage::BYTES && self.push(&page.0, at, at + len)
    }

    pub(crate) fn push_room(&mut self, page: &'a mut IoPage, at: usize, len: usize) -> bool {
        self.push_bytes(page, at, len)
    }
}

/// A socket that takes and gives as much as it is told to.
#[derive(Default)]
pub(crate) struct Socket {
    /// What has come in from the server.
    pub(crate) incoming: RefCell<VecDeque<u8>>,
    /// What was sent to it.
    pub(crate) outgoing: RefCell<Vec<u8>>,
    /// At most so much goes over with one call.
    pub(crate) limit: Cell<usize>,
    /// TLS records that are no data: their type, and what is left of them.
    pub(crate) records: RefCell<VecDeque<(u8, Vec<u8>)>>,
    /// It was told last that more follows.
    pub(crate) more: Cell<bool>,
}

impl Socket {
    pub(crate) fn has_input(&self) -> bool {
        !self.incoming.borrow().is_empty()
    }

    pub(crate) fn has_upper_layer(&self) -> bool {
        false
    }

    pub(crate) fn send(&self, data: Iov<'_>, _frags: &mut FragPool, next: Next) -> Result<usize> {
        self.more.set(next == Next::More);
        let mut room = self.limit.get();
        let mut outgoing = self.outgoing.borrow_mut();
        let before = outgoing.len();
        for Piece(memory, at, end) in data.pieces {
            let len = room.min(*end - *at);
            outgoing.extend(&memory.borrow()[*at..*at + len]);
            room -= len;
        }
        match outgoing.len() - before {
            0 => Err(EAGAIN),
            sent => Ok(sent),
        }
    }

    pub(crate) fn receive(&self, data: Iov<'_>) -> Result<usize> {
        let mut incoming = self.incoming.borrow_mut();
        let all = incoming.len().min(self.limit.get());
        let mut left = all;
        for Piece(memory, at, end) in data.pieces {
            let len = left.min(*end - *at);
            let bytes: Vec<u8> = incoming.drain(..len).collect();
            memory.borrow_mut()[*at..*at + len].copy_from_slice(&bytes);
            left -= len;
        }
        match all - left {
            0 => Err(EAGAIN),
            got => Ok(got),
        }
    }
}

impl Socket {
    pub(crate) fn receive_record(&self, data: Iov<'_>) -> Result<Record> {
        let mut records = self.records.borrow_mut();
        let Some((kind, bytes)) = records.front_mut() else {
            return Err(EIO);
        };
        let kind = *kind;
        let got = bytes.len().min(data.bytes());
        let mut taken = bytes.drain(..got);
        for Piece(memory, at, end) in data.pieces.iter() {
            let piece = taken.by_ref().take(end - at);
            for (place, byte) in memory.borrow_mut()[*at..*end].iter_mut().zip(piece) {
                *place = byte;
            }
        }
        drop(taken);
        if bytes.is_empty() {
            records.pop_front();
        }
        Ok(Record { kind, bytes: got })
    }
}

pub(crate) struct Segment<'a>(pub(crate) &'a [u8]);

impl Segment<'_> {
    pub(crate) fn left_bytes(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn move_to_page(
        &mut self,
        page: &mut IoPage,
        offset: usize,
        bytes: usize,
    ) -> Result<usize> {
        let bytes = bytes.min(self.0.len()).min(64);
        let (moved, rest) = self.0.split_at(bytes);
        page.write(offset, moved)?;
        self.0 = rest;
        Ok(bytes)
    }

    pub(crate) fn move_to(&mut self, payload: &mut Payload<Unanswered>) -> Result {
        let moved = payload.fill(self.0);
        self.0 = &self.0[moved..];
        Ok(())
    }
}
