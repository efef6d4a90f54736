// SPDX-License-Identifier: GPL-2.0
//! As much of the `kernel` crate, and of the driver's `kapi`, as the files that are fuzzed use.
//! Requests, pages and sockets are plain memory here.

/// `kernel::alloc`
pub(crate) mod alloc {
    pub(crate) use crate::memory::AllocError;
}

/// `kernel::fmt`
pub(crate) mod fmt {
    pub(crate) use std::fmt::{Display, Formatter, Result};
}

/// `kernel::prelude`
pub(crate) mod prelude {
    use super::alloc::AllocError;

    pub(crate) use crate::memory::{GFP_KERNEL, KVVec};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Error(i32);
    pub(crate) const EIO: Error = Error(5);
    pub(crate) const EAGAIN: Error = Error(11);
    pub(crate) const EINVAL: Error = Error(22);
    pub(crate) const EPROTO: Error = Error(71);

    impl From<AllocError> for Error {
        fn from(_: AllocError) -> Self {
            Error(12)
        }
    }

    pub(crate) type Result<T = (), E = Error> = core::result::Result<T, E>;
}

/// `kernel::sync`
pub(crate) mod sync {
    pub(crate) type ArcBorrow<'a, T> = &'a T;

    pub(crate) mod atomic {
        use std::marker::PhantomData;
        use std::sync::atomic::{AtomicU64, Ordering};

        pub(crate) struct Acquire;
        pub(crate) struct Release;
        pub(crate) struct Full;

        pub(crate) struct Atomic<T>(AtomicU64, PhantomData<T>);

        impl Atomic<u64> {
            pub(crate) fn new(value: u64) -> Self {
                Atomic(AtomicU64::new(value), PhantomData)
            }

            pub(crate) fn load(&self, _: Acquire) -> u64 {
                self.0.load(Ordering::Acquire)
            }

            pub(crate) fn store(&self, value: u64, _: Release) {
                self.0.store(value, Ordering::Release);
            }

            pub(crate) fn cmpxchg(&self, old: u64, new: u64, _: Full) -> Result<u64, u64> {
                self.0
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed)
            }
        }
    }
}

/// `kapi`
pub(crate) mod kapi {
    pub(crate) mod task {
        pub(crate) fn jiffies() -> usize {
            7
        }
    }

    pub(crate) mod block {
        pub(crate) use super::{payload, request};
    }

    pub(crate) mod net {
        pub(crate) use super::{arrival, iov, page_frag, sock, transfer};
    }

    pub(crate) mod trace {
        use super::request::{Unanswered, Unsent};

        pub(crate) fn is_sending_traced() -> bool {
            false
        }

        pub(crate) fn header_sent(_request: &Unsent, _cookie: u64) {}

        pub(crate) fn payload_sent(_request: &Unsent, _cookie: u64) {}

        pub(crate) fn header_received(_request: &Unanswered, _cookie: u64, _error: u32) {}
    }

    /// Memory that several may write to: a request's, a page.
    type Memory = std::rc::Rc<std::cell::RefCell<Vec<u8>>>;

    fn memory(len: usize) -> Memory {
        std::rc::Rc::new(std::cell::RefCell::new(vec![0; len]))
    }

    /// What a request's memory has in it before anything is written there.
    pub(crate) const OLD: u8 = 0xee;

    pub(crate) mod request {
        use super::Memory;
        use std::cell::RefCell;
        use std::rc::Rc;

        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) struct Status(pub(crate) u8);

        impl Status {
            pub(crate) const OK: Status = Status(0);
            pub(crate) const NOTSUPP: Status = Status(1);
            pub(crate) const NOSPC: Status = Status(3);
            pub(crate) const TARGET: Status = Status(5);
            pub(crate) const IOERR: Status = Status(10);
        }

        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Op {
            Read,
            Write,
            Flush,
            Discard,
            WriteZeroes,
            #[allow(dead_code)]
            Other,
        }

        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Outcome {
            Complete(Status),
            Partly(Status, u32),
            Requeue,
        }

        #[derive(Clone, Copy, Debug)]
        pub(crate) struct Extent {
            pub(crate) op: Op,
            pub(crate) offset_bytes: u64,
            pub(crate) len_bytes: u32,
            pub(crate) fua: bool,
            pub(crate) nounmap: bool,
        }

        /// What was decided about a command, and its data then.
        pub(crate) type Log = Rc<RefCell<Vec<(u32, Outcome, Vec<u8>)>>>;

        /// A handle of a command.
        pub(crate) struct Request {
            pub(crate) number: u32,
            pub(crate) extent: Extent,
            pub(crate) data: Memory,
            /// Sizes of the pieces that the data is in.
            pub(crate) piece_bytes: usize,
            pub(crate) log: Log,
        }

        impl Request {
            /// A command with this data, which the log tells of.
            pub(crate) fn new(number: u32, extent: Extent, piece_bytes: usize, log: &Log) -> Self {
                let moves_data = matches!(extent.op, Op::Read | Op::Write);
                let len = if moves_data { extent.len_bytes } else { 0 };
                let data = super::memory(len as usize);
                data.borrow_mut().fill(super::OLD);
                Request {
                    number,
                    extent,
                    data,
                    piece_bytes,
                    log: log.clone(),
                }
            }

            fn end(self, outcome: Outcome) {
                let data = self.data.borrow().clone();
                self.log.borrow_mut().push((self.number, outcome, data));
            }
        }

        pub(crate) struct Unsent(pub(crate) Request);
        pub(crate) struct Unanswered(pub(crate) Request);

        impl Unsent {
            pub(crate) fn overrule(self, outcome: Outcome) {
                self.0.end(outcome);
            }
        }

        impl Unanswered {
            pub(crate) fn finish(self, outcome: Outcome) {
                self.0.end(outcome);
            }
        }

        pub(crate) trait Side {
            const MOVES: Op;

            fn request(&self) -> &Request;

            fn extent(&self) -> Extent {
                self.request().extent
            }
        }

        impl Side for Unsent {
            const MOVES: Op = Op::Write;

            fn request(&self) -> &Request {
                &self.0
            }
        }

        impl Side for Unanswered {
            const MOVES: Op = Op::Read;

            fn request(&self) -> &Request {
                &self.0
            }
        }
    }

    pub(crate) mod payload {
        use super::request::{Op, Side, Unanswered};

        pub(crate) struct Payload<S> {
            pub(super) side: S,
            pub(super) at: usize,
            pub(super) end: usize,
        }

        impl<S: Side> Payload<S> {
            pub(crate) fn new(side: S) -> Self {
                let extent = side.extent();
                let end = if extent.op == S::MOVES {
                    extent.len_bytes as usize
                } else {
                    0
                };
                let at = 0;
                Payload { side, at, end }
            }

            pub(crate) fn left_bytes(&self) -> usize {
                self.end - self.at
            }

            pub(crate) fn side(&self) -> &S {
                &self.side
            }

            pub(crate) fn into_side(self) -> S {
                self.side
            }

            pub(crate) fn advance(&mut self, bytes: usize) {
                self.at += bytes.min(self.left_bytes());
            }
        }

        impl Payload<Unanswered> {
            pub(crate) fn within(side: Unanswered, at: u64, len: u32) -> Result<Self, Unanswered> {
                let extent = side.extent();
                let end = at.checked_add(u64::from(len));
                match end.filter(|end| *end <= u64::from(extent.len_bytes)) {
                    Some(end) if extent.op == Op::Read => Ok(Payload {
                        side,
                        at: at as usize,
                        end: end as usize,
                    }),
                    _ => Err(side),
                }
            }

            pub(crate) fn zero(&mut self) {
                let zeroes = vec![0; self.left_bytes()];
                self.fill(&zeroes);
            }

            pub(super) fn fill(&mut self, bytes: &[u8]) -> usize {
                let bytes = &bytes[..bytes.len().min(self.left_bytes())];
                let end = self.at + bytes.len();
                self.side.request().data.borrow_mut()[self.at..end].copy_from_slice(bytes);
                self.at = end;
                bytes.len()
            }
        }
    }

    pub(crate) mod arrival {
        pub(crate) use super::sock::Segment;
    }

    pub(crate) mod iov {
        pub(crate) use super::sock::{IoPage, Iov as RecvIov, Iov as SendIov, Pieces};
    }

    pub(crate) mod page_frag {
        pub(crate) struct FragPool;

        impl FragPool {
            pub(crate) fn new(_capacity: usize) -> crate::prelude::Result<Self> {
                Ok(FragPool)
            }
        }
    }

    pub(crate) mod transfer {
        pub(crate) struct Record {
            pub(crate) kind: u8,
            pub(crate) bytes: usize,
        }

        #[derive(Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Next {
            More,
            Nothing,
        }
    }

    /// Sockets, and what in the module has files of its own.
    pub(crate) mod sock {
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

            pub(crate) fn push_room(
                &mut self,
                page: &'a mut IoPage,
                at: usize,
                len: usize,
            ) -> bool {
                self.push_bytes(page, at, len)
            }
        }

        /// A socket that takes and gives as much as it is told to.
        #[derive(Default)]
        pub(crate) struct Socket {
            /// What the server has sent.
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
            pub(crate) fn send(
                &self,
                data: Iov<'_>,
                _frags: &mut FragPool,
                next: Next,
            ) -> Result<usize> {
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
    }
}
