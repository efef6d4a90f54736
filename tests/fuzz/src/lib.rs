// SPDX-License-Identifier: GPL-2.0
//! Drives the module's own parser of the byte stream with whatever a server may send.
//!
//! The files that read a reply and find its command are compiled here as they are: `rnbd_sock/receiving.rs`,
//! `rnbd_sock/stream.rs`, `rnbd_sock/chunks.rs`, `pure/`, `rnbd_translate.rs`. [`run()`] takes a script, any bytes, of
//! commands that are started, bytes that a server sends, and the pieces in which they come in, read by the callback, by
//! the task that has sent them, or by the work item. What the module makes of it is compared with what [`model`] does,
//! which takes one byte after the other.
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
#[path = "../../../rnbd_sock/receiving.rs"]
mod receiving;
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../rnbd_translate.rs"]
mod rnbd_translate;

mod connection;
mod model;
mod rnbd_events;
mod rnbd_table;
mod script;
#[cfg(test)]
mod tests;

use connection::{Connection, REAPED};
use kapi::{
    block::{
        payload::Payload,
        request::{Extent, Log, Op, Outcome, Request, Unanswered, Unsent},
    },
    net::{arrival::Arrival, transfer::Next},
};
use prelude::*;
use pure::cmd::Cookie;
use receiving::WORKER_CALLS;
use rnbd_table::Structured;
use script::{Command, Reader, SLOTS, Script, Step};
use std::collections::VecDeque;
use stream::{Mode, Receive, Transmit};

/// What chunks may cost before the work item runs, and in one run of it, in bytes that are filled with zeroes.
const INLINE_COST: usize = 256 << 10;
const WORK_COST: usize = 64 << 20;
/// By how much the last chunk, and those that are received with it, may exceed that.
const LAST_COST: usize = 256 << 10;

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
    session.take(Step::ALL);
    session.finish();
}

/// The module's connection, with all around it that has no part in understanding the stream.
struct Session {
    connection: Connection,
    /// Each slot's last command.
    started: Vec<Option<Command>>,
    receive: Receive,
    transmit: Transmit,
    /// What the server has sent and has not come in.
    on_its_way: VecDeque<u8>,
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
            on_its_way: VecDeque::new(),
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
            Step::Serve(bytes) => self.on_its_way.extend(bytes),
            Step::Arrive { limit, reader } => self.arrive(limit, reader),
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

    /// So much comes in, and is received. Nothing of it may be left where the work item is not queued.
    fn arrive(&mut self, limit: usize, reader: Reader) {
        let bytes: Vec<u8> = self
            .on_its_way
            .drain(..limit.min(self.on_its_way.len()))
            .collect();
        self.model.feed(&bytes);
        if self.dead || bytes.is_empty() {
            return;
        }
        let socket = &self.connection.socket;
        socket.incoming.borrow_mut().extend(bytes);
        socket.limit.set(usize::MAX);
        let received = self.connection.traffic.received.get() + socket.incoming.borrow().len();
        let left = match reader {
            Reader::Callback { segment_bytes } => {
                let arrival = Arrival {
                    socket,
                    segment_bytes,
                };
                let receive = &mut self.receive;
                self.connection.receive_in_callback(receive, arrival)
            }
            Reader::Sender => self.connection.receive_in_sender(&mut self.receive),
            Reader::Work => true,
        };
        assert!(
            self.receive.spent_bytes <= INLINE_COST + LAST_COST,
            "{}",
            self.receive.spent_bytes
        );
        if left {
            self.work();
        }
        if !self.dead {
            let all = self.connection.traffic.received.get();
            assert_eq!(all, received, "something is left in the socket");
        }
    }

    /// As `Connection::receive_or_reap()` of `rnbd_sock.rs`, until the work item is not queued again.
    fn work(&mut self) {
        for run in 0.. {
            assert!(run < 10_000, "it does not come to an end");
            let receive = &mut self.receive;
            let left = self
                .connection
                .receive_up_to(receive, WORKER_CALLS, usize::MAX);
            assert!(receive.spent_bytes <= WORK_COST + LAST_COST);
            match left {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    self.connection.receive_failed(error);
                    self.receive.mode = Mode::Failed(error);
                    self.dead = true;
                    return;
                }
            }
        }
    }

    fn send(&mut self, limit: usize) {
        self.connection.socket.limit.set(limit);
        let was_empty = self.transmit.is_empty();
        match self.transmit.send(&self.connection.socket, Next::Nothing) {
            Ok(sent) => assert!(sent.bytes <= limit && !was_empty),
            Err(e) => assert!(e == EAGAIN && (limit == 0 || was_empty)),
        }
        let outgoing = self.connection.socket.outgoing.borrow();
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
            *self.connection.socket.outgoing.borrow() == self.to_send,
            "not all was sent"
        );
        assert!(
            self.given_back.borrow().is_empty(),
            "what was sent was given back"
        );
    }
}
