// SPDX-License-Identifier: GPL-2.0
//! Drives the module's own parser of the byte stream with whatever a server may send.
//!
//! The files that read a reply and find its command are compiled here as they are: `rnbd_sock/stream.rs`,
//! `pure/proto.rs`, `pure/cmd.rs`, `pure/ring.rs`, `rnbd_translate.rs`. [`run()`] takes a script, any
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
#[path = "../../../rnbd_sock/stream.rs"]
mod stream;
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../rnbd_translate.rs"]
mod rnbd_translate;

mod model;
mod script;
#[cfg(test)]
mod tests;

use kapi::{
    block::{
        payload::Payload,
        request::{Extent, Log, Op, Outcome, Request, Side, Status, Unanswered, Unsent},
    },
    net::{arrival::Segment, sock::Socket, transfer::Next},
};
use prelude::*;
use pure::cmd::{Cookie, Parking, Slot};
use pure::proto::{ReplyHeader, ServerError};
use script::{SLOTS, Script, Step};
use std::cell::RefCell;
use stream::{Receive, Transmit};

/// As `rnbd_sock/receiving.rs`: more data than this is left to the work item.
const INLINE_DATA_BYTES: usize = 32 << 10;

/// The connection that is fuzzed, and one that has commands in flight too.
const OURS: u16 = 0;
const OTHER: u16 = 1;

#[derive(Default)]
struct Parked(RefCell<Option<Unanswered>>);

impl Parking for Parked {
    type Item = Unanswered;

    fn put(&self, item: Unanswered) -> Option<Unanswered> {
        self.0.borrow_mut().replace(item)
    }

    fn take(&self) -> Option<Unanswered> {
        self.0.borrow_mut().take()
    }
}

/// Carries out a script.
///
/// # Panics
///
/// Where the module does not do what the model does.
pub fn run(script: &[u8]) {
    let mut connection = Connection::new();
    let mut script = Script::new(script);
    while let Some(step) = script.next_step(&connection.cookies()) {
        connection.take(step);
    }
    connection.take(Step::Fill { limit: usize::MAX });
    connection.finish();
}

/// The module's connection, with all around it that has no part in understanding the stream.
struct Connection {
    slots: Vec<Slot<Parked>>,
    /// The cookie of each slot's last command, and whether it was for us.
    started: Vec<Option<Cookie>>,
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

impl Connection {
    fn new() -> Self {
        Connection {
            slots: (0..SLOTS).map(|_| Slot::new(Parked::default())).collect(),
            started: vec![None; SLOTS],
            receive: Receive::new().unwrap(),
            transmit: Transmit::new().unwrap(),
            socket: Socket::default(),
            dead: false,
            decided: Log::default(),
            model: model::Model::default(),
            to_send: Vec::new(),
            given_back: Log::default(),
        }
    }

    /// Those that a script may refer to: of commands in flight, and of the last ones.
    fn cookies(&self) -> Vec<u64> {
        self.started
            .iter()
            .flatten()
            .map(|cookie| cookie.0)
            .collect()
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
        let busy = self.slots[slot].status().1 || self.model.is_receiving(slot);
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
        let generation = self.slots[slot].start(connection, Unanswered(request));
        let cookie = Cookie::new(generation, number);
        self.started[slot] = Some(cookie);
        if ours {
            self.model.start(slot, cookie.0, op, len_bytes);
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
            self.parse()?;
            let data = self.receive.current.as_ref().map_or(0, Payload::left_bytes);
            if data > INLINE_DATA_BYTES || segment.left_bytes() == 0 {
                return Ok(());
            }
            let before = segment.left_bytes();
            let taken = self.receive.take_from(segment)?;
            assert_eq!(taken, before - segment.left_bytes());
        }
    }

    /// As `Connection::receive_up_to()`.
    fn fill(&mut self, limit: usize) {
        self.socket.limit.set(limit);
        while !self.dead {
            let before: Vec<u8> = self.socket.incoming.borrow().iter().copied().collect();
            let parsed = match self.receive.is_parsed() {
                true => Ok(()),
                false => self.parse(),
            };
            let got = parsed.and_then(|()| self.receive.fill(&self.socket));
            match got {
                Ok((got, _)) => self.model.feed(&before[..got]),
                Err(e) if e == EAGAIN => return,
                Err(_) => self.dead = true,
            }
            if self.parse().is_err() {
                self.dead = true;
            }
            if limit != usize::MAX {
                return;
            }
        }
    }

    fn parse(&mut self) -> Result {
        let slots = &self.slots;
        self.receive.parse(
            |header| handle_reply(slots, header),
            |payload| payload.into_side().finish(Outcome::Complete(Status::OK)),
        )
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
        for slot in &self.slots {
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

/// As `Connection::handle_reply()`, but for counting and complaining.
fn handle_reply(
    slots: &[Slot<Parked>],
    header: &[u8; pure::proto::REPLY_BYTES],
) -> Result<Option<Payload<Unanswered>>> {
    let reply = ReplyHeader::decode(header).map_err(|_| EPROTO)?;
    let cookie = Cookie(reply.cookie);
    let slot = slots.get(cookie.slot() as usize).ok_or(EPROTO)?;
    let request = slot.claim(cookie.generation(), OURS).map_err(|_| EPROTO)?;
    if let Some(error) = ServerError::from_wire(reply.error) {
        let op = request.extent().op;
        request.finish(Outcome::Complete(rnbd_translate::status_of(error, op)));
        return Ok(None);
    }
    let payload = Payload::new(request);
    if payload.left_bytes() > 0 {
        return Ok(Some(payload));
    }
    payload.into_side().finish(Outcome::Complete(Status::OK));
    Ok(None)
}
