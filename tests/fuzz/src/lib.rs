// SPDX-License-Identifier: GPL-2.0
//! Drives the module's own parser of the byte stream with whatever a server may send.
//!
//! The files that read a reply and find its command are compiled here as they are: `rnbd_sock/stream.rs`,
//! `rnbd_sock/chunks.rs`, `pure/chunk.rs`, `pure/coverage.rs`, `pure/proto.rs`, `pure/cmd.rs`, `pure/ring.rs`, `rnbd_translate.rs`. [`run()`] takes a script, any
//! bytes, of commands that are started, bytes that a server sends, and the pieces in which they arrive,
//! in the callback or in the work item. What the module makes of it is compared with what [`model`]
//! does, which takes one byte after the other.
//!
//! `make fuzz` looks for scripts that go where none has been; `cargo test` runs those that are kept in
//! `corpus/`, and [`tests`] of the sending side.

// What the module calls `kernel::` is the shim's here.
extern crate self as kernel;
#[path = "../../host/src/memory.rs"]
mod memory;
mod shim;
use shim::{alloc, fmt, kapi, prelude, sync};

// The module's files, which are formatted and linted with the module.
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../pure/mod.rs"]
mod pure;
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../rnbd_sock/outgoing.rs"]
mod outgoing;
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../rnbd_sock/stream.rs"]
mod stream;
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../rnbd_sock/chunks.rs"]
mod chunks;
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../rnbd_translate.rs"]
mod rnbd_translate;

mod model;
mod receiving;
mod rnbd_table;
mod script;
#[cfg(test)]
mod tests;

use kapi::{
    block::{
        payload::Payload,
        request::{Extent, Log, Op, Outcome, Request, Unanswered, Unsent},
    },
    net::{arrival::Segment, sock::Socket, transfer::Next},
};
use prelude::*;
use pure::cmd::Cookie;
use receiving::Connection;
use rnbd_table::Structured;
use script::{Command, SLOTS, Script, Step};
use stream::{Mode, Receive, Transmit};

/// As `rnbd_sock/receiving.rs`: more data than this is left to the work item.
const INLINE_DATA_BYTES: usize = 32 << 10;

/// The connection that is fuzzed, and one that has commands in flight too.
const OURS: u16 = 0;
const OTHER: u16 = 1;

/// Carries out a script.
///
/// # Panics
///
/// Where the module does not do what the model does.
pub fn run(script: &[u8]) {
    let mut session = Session::new(Script::structured(script));
    let mut script = Script::new(script);
    while let Some(step) = script.next_step(&session.commands()) {
        session.take(step);
    }
    session.take(Step::Fill { limit: usize::MAX });
    session.finish();
}

/// The module's connection, with all around it that has no part in understanding the stream.
struct Session {
    connection: Connection,
    /// Each slot's last command.
    started: Vec<Option<Command>>,
    receive: Receive,
    transmit: Transmit,
    socket: Socket,
    dead: bool,
    decided: Log,
    model: model::Model,
    /// What must have been sent when everything has.
    to_send: Vec<u8>,
    given_back: Log,
}

impl Session {
    fn new(structured: Structured) -> Self {
        let mode = match structured {
            Structured::No => Mode::Simple,
            _ => Mode::Structured,
        };
        Session {
            connection: Connection::new(structured),
            started: vec![None; SLOTS],
            receive: Receive::new(mode).unwrap(),
            transmit: Transmit::new().unwrap(),
            socket: Socket::default(),
            dead: false,
            decided: Log::default(),
            model: model::Model::new(structured),
            to_send: Vec::new(),
            given_back: Log::default(),
        }
    }

    /// Those that a script may refer to: commands in flight, and the last ones.
    fn commands(&self) -> Vec<Command> {
        self.started.iter().flatten().copied().collect()
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Start {
                slot,
                op,
                len_bytes,
                piece_bytes,
                ours,
            } => self.start(slot, op, len_bytes, piece_bytes, ours),
            Step::Serve(bytes) => self.socket.incoming.borrow_mut().extend(bytes),
            Step::Arrive { limit } => self.arrive(limit),
            Step::Fill { limit } => self.fill(limit),
            Step::Send { limit } => self.send(limit),
        }
        assert_eq!(*self.decided.borrow(), self.model.decided);
        assert_eq!(self.dead, self.model.dead);
    }

    /// A tag is used again only when its command is over.
    fn start(&mut self, slot: usize, op: Op, len_bytes: u32, piece_bytes: usize, ours: bool) {
        let busy = self.connection.table.slots[slot].status().1 || self.model.is_receiving(slot);
        if busy || !self.transmit.can_stage() {
            return;
        }
        let connection = if ours { OURS } else { OTHER };
        let offset_bytes = u64::from(len_bytes) << 9;
        let extent = Extent {
            op,
            offset_bytes,
            len_bytes,
            fua: false,
            nounmap: false,
        };
        let number = slot as u32;
        let request = Request::new(number, extent, piece_bytes, &self.decided);
        let generation = self.connection.table.slots[slot].start(connection, Unanswered(request));
        let cookie = Cookie::new(generation, number);
        self.started[slot] = Some(Command {
            cookie: cookie.0,
            offset_bytes,
            len_bytes,
        });
        if ours {
            self.model
                .start(slot, cookie.0, op, offset_bytes, len_bytes);
            self.stage(number, extent, piece_bytes, cookie);
        }
    }

    fn stage(&mut self, number: u32, extent: Extent, piece_bytes: usize, cookie: Cookie) {
        let request = Request::new(number, extent, piece_bytes, &self.given_back);
        request.data.borrow_mut().fill(number as u8 + 1);
        let wire = rnbd_translate::wire_of(&extent, cookie).expect("a command");
        self.to_send.extend(wire.encode());
        if extent.op == Op::Write {
            self.to_send.extend(&*request.data.borrow());
        }
        self.transmit
            .stage(&wire, Some(Payload::new(Unsent(request))));
    }

    /// As `Connection::receive_in_callback()` of `rnbd_sock/receiving.rs`.
    fn arrive(&mut self, limit: usize) {
        let mut piece: Vec<u8> = self
            .socket
            .incoming
            .borrow()
            .iter()
            .copied()
            .take(limit)
            .collect();
        let mut segment = Segment(&piece);
        if !self.dead && self.receive_segment(&mut segment).is_err() {
            self.dead = true;
        }
        piece.truncate(piece.len() - segment.left_bytes());
        self.socket.incoming.borrow_mut().drain(..piece.len());
        self.model.feed(&piece);
    }

    fn receive_segment(&mut self, segment: &mut Segment<'_>) -> Result {
        loop {
            if self.parse(INLINE_DATA_BYTES)? {
                // The receive work is queued.
                self.parse(usize::MAX)?;
                return Ok(());
            }
            let data = self.receive.awaited_bytes();
            if data > INLINE_DATA_BYTES || segment.left_bytes() == 0 {
                return Ok(());
            }
            let before = segment.left_bytes();
            let taken = match self.receive.mode {
                Mode::Simple => self.receive.take_from::<false>(segment)?,
                _ => self.receive.take_from::<true>(segment)?,
            };
            assert_eq!(taken, before - segment.left_bytes());
            assert!(taken > 0, "nothing is wanted");
        }
    }

    /// As `Connection::receive_up_to()`.
    fn fill(&mut self, limit: usize) {
        self.socket.limit.set(limit);
        while !self.dead {
            let before: Vec<u8> = self.socket.incoming.borrow().iter().copied().collect();
            let is_parsed = match self.receive.mode {
                Mode::Simple => self.receive.is_parsed::<false>(),
                _ => self.receive.is_parsed::<true>(),
            };
            let parsed = match is_parsed {
                true => Ok(false),
                false => self.parse(usize::MAX),
            };
            let got = parsed.and_then(|_| self.receive.fill(&self.socket));
            match got {
                Ok((got, _)) => self.model.feed(&before[..got]),
                Err(e) if e == EAGAIN => return,
                Err(_) => self.dead = true,
            }
            if self.parse(usize::MAX).is_err() {
                self.dead = true;
            }
            if limit != usize::MAX {
                return;
            }
        }
    }

    fn parse(&mut self, limit: usize) -> Result<bool> {
        if limit == usize::MAX {
            self.receive.spent_bytes = 0;
        }
        match self.receive.mode {
            Mode::Simple => self.connection.parse::<false>(&mut self.receive, limit),
            _ => self.connection.parse::<true>(&mut self.receive, limit),
        }
    }

    fn send(&mut self, limit: usize) {
        self.socket.limit.set(limit);
        let was_empty = self.transmit.is_empty();
        match self.transmit.send(&self.socket, Next::Nothing) {
            Ok(sent) => assert!(sent.bytes <= limit && !was_empty),
            Err(e) => assert!(e == EAGAIN && (limit == 0 || was_empty)),
        }
        let outgoing = self.socket.outgoing.borrow();
        assert!(self.to_send.starts_with(&outgoing), "wrong bytes were sent");
    }

    /// What is still in flight is given back, and nothing is lost.
    fn finish(mut self) {
        if let Some(payload) = self.receive.current.take() {
            payload.into_side().finish(Outcome::Requeue);
        }
        for slot in &self.connection.table.slots {
            if let Some(request) = slot.reclaim(OURS) {
                request.finish(Outcome::Requeue);
            }
        }
        let ended = self.decided.borrow().len();
        assert_eq!(
            ended, self.model.started,
            "a command was lost, or ended twice"
        );
        while !self.transmit.is_empty() {
            self.send(usize::MAX);
        }
        assert!(
            *self.socket.outgoing.borrow() == self.to_send,
            "not all was sent"
        );
        assert!(
            self.given_back.borrow().is_empty(),
            "what was sent was given back"
        );
    }
}
