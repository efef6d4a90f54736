// SPDX-License-Identifier: GPL-2.0
//! What a stream of replies means, byte by byte and with nothing of the module's. Numbers are written out
//! once more: a constant that is wrong must not make its own test pass.

use crate::kapi::{
    OLD,
    block::request::{Op, Outcome, Status},
};
use crate::rnbd_table::Structured;
use std::mem::take;

/// A command that a reply may be for.
struct InFlight {
    slot: usize,
    cookie: u64,
    op: Op,
    offset: u64,
    len: usize,
    /// Its memory, and which bytes of it have come.
    data: Vec<u8>,
    got: Vec<bool>,
    error: u32,
    good_end: usize,
}

impl InFlight {
    fn was_answered(&self) -> bool {
        self.error != 0 || self.got.contains(&true)
    }

    /// How many bytes from the start have come.
    fn leading(&self) -> usize {
        self.got.iter().take_while(|got| **got).count()
    }

    /// How many ranges have come.
    fn ranges(&self) -> usize {
        let before = [false].iter().chain(&self.got);
        let starts = before.zip(&self.got).filter(|(a, b)| !**a && **b);
        starts.count()
    }
}

/// A chunk, as far as it has come.
struct Chunk {
    done: bool,
    kind: u16,
    cookie: u64,
    /// What follows the first 16 bytes, up to data.
    body: Vec<u8>,
    /// Data that comes in: its command, where, and how much is missing.
    data: Option<(InFlight, usize, usize)>,
}

/// A client that is as slow as it is simple.
pub(crate) struct Model {
    structured: Structured,
    in_flight: Vec<InFlight>,
    /// A header as far as it has come.
    header: Vec<u8>,
    /// A read whose data comes in, and as much of it as is there.
    receiving: Option<(InFlight, Vec<u8>)>,
    chunk: Option<Chunk>,
    pub(crate) started: usize,
    pub(crate) dead: bool,
    /// How commands ended, in order, and what their memory had in it then.
    pub(crate) decided: Vec<(u32, Outcome, Vec<u8>)>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| (n << 8) | u64::from(*byte))
}

/// A server that shuts down has not executed it, whatever has come of its data.
const SHUTDOWN: u32 = 108;

fn status_of(error: u32, op: Op) -> u8 {
    match error {
        0 => 0,
        1 => 5,
        28 => 3,
        22 | 95 if matches!(op, Op::Discard | Op::WriteZeroes) => 1,
        _ => 10,
    }
}

impl Model {
    pub(crate) fn new(structured: Structured) -> Self {
        Model {
            structured,
            in_flight: Vec::new(),
            header: Vec::new(),
            receiving: None,
            chunk: None,
            started: 0,
            dead: false,
            decided: Vec::new(),
        }
    }

    pub(crate) fn start(&mut self, slot: usize, cookie: u64, op: Op, offset: u64, len: u32) {
        self.started += 1;
        let len = len as usize;
        let moves_data = matches!(op, Op::Read | Op::Write);
        self.in_flight.push(InFlight {
            slot,
            cookie,
            op,
            offset,
            len,
            data: vec![OLD; if moves_data { len } else { 0 }],
            got: vec![false; len],
            error: 0,
            good_end: usize::MAX,
        });
    }

    pub(crate) fn is_receiving(&self, slot: usize) -> bool {
        let simple = self.receiving.as_ref().map(|(command, _)| command.slot);
        let chunk = self.chunk.as_ref().and_then(|chunk| chunk.data.as_ref());
        let chunk = chunk.map(|(command, _, _)| command.slot);
        simple == Some(slot) || chunk == Some(slot)
    }

    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.dead {
                return;
            }
            self.take(*byte);
        }
    }

    fn take(&mut self, byte: u8) {
        if let Some((command, mut data)) = self.receiving.take() {
            data.push(byte);
            if data.len() < command.len {
                self.receiving = Some((command, data));
            } else {
                self.end(command.slot, Outcome::Complete(Status(0)), data);
            }
            return;
        }
        if let Some(chunk) = self.chunk.take() {
            // Whatever cannot be understood kills.
            self.dead = self.take_of_chunk(chunk, byte).is_none();
            return;
        }
        self.header.push(byte);
        if let Ok(header) = <[u8; 16]>::try_from(&self.header[..]) {
            self.header.clear();
            self.answer(header);
        }
    }

    fn answer(&mut self, header: [u8; 16]) {
        let (error, cookie) = (number(&header[4..8]) as u32, number(&header[8..]));
        if header[..4] == [0x66, 0x8e, 0x33, 0xef] && self.structured != Structured::No {
            self.chunk = Some(Chunk {
                done: header[5] & 1 == 1,
                kind: number(&header[6..8]) as u16,
                cookie,
                body: Vec::new(),
                data: None,
            });
            return;
        }
        let found = self.claim(cookie);
        let Some(command) = found.filter(|_| header[..4] == [0x67, 0x44, 0x66, 0x98]) else {
            self.dead = true;
            return;
        };
        let strict = self.structured == Structured::Required && command.op == Op::Read;
        if strict || command.was_answered() {
            self.in_flight.push(command);
            self.dead = true;
            return;
        }
        if error == 0 && command.op == Op::Read && command.len > 0 {
            self.receiving = Some((command, Vec::new()));
            return;
        }
        let outcome = match error {
            SHUTDOWN => Outcome::Requeue,
            error => Outcome::Complete(Status(status_of(error, command.op))),
        };
        self.end(command.slot, outcome, command.data);
    }

    fn claim(&mut self, cookie: u64) -> Option<InFlight> {
        let mut commands = self.in_flight.iter();
        let found = commands.position(|command| command.cookie == cookie)?;
        Some(self.in_flight.remove(found))
    }

    fn take_of_chunk(&mut self, mut chunk: Chunk, byte: u8) -> Option<()> {
        if let Some((mut command, at, left)) = chunk.data.take() {
            command.data[at] = byte;
            if left == 1 {
                return self.end_of_chunk(&chunk, command);
            }
            chunk.data = Some((command, at + 1, left - 1));
            self.chunk = Some(chunk);
            return Some(());
        }
        chunk.body.push(byte);
        let body = take(&mut chunk.body);
        let have = body.len();
        let len = number(body.get(..4).unwrap_or(&[])) as usize;
        let is_error = chunk.kind >= 0x8000;
        let fits = match chunk.kind {
            0 => chunk.done && len == 0,
            1 => len > 8,
            2 => len == 12,
            _ => is_error && (6..=8192).contains(&len),
        };
        match chunk.kind {
            _ if have < 4 => {}
            _ if !fits => return None,
            0 => {
                let command = self.claim(chunk.cookie)?;
                return self.end_of_chunk(&chunk, command);
            }
            1 if have == 12 => {
                let (command, at) = self.content(chunk.cookie, number(&body[4..]), len - 8)?;
                chunk.data = Some((command, at, len - 8));
            }
            2 if have == 16 => {
                let zeroes = number(&body[12..]) as usize;
                let (mut command, at) = self.content(chunk.cookie, number(&body[4..12]), zeroes)?;
                command.data[at..at + zeroes].fill(0);
                return self.end_of_chunk(&chunk, command);
            }
            _ if is_error && have >= 10 => {
                let (error, text) = (number(&body[4..8]) as u32, number(&body[8..10]) as usize);
                if error == 0 || (text > 4096 && text <= len - 6) {
                    return None;
                }
                if have == 4 + len {
                    let place = body.get(10 + text..18 + text);
                    let place = place.filter(|_| chunk.kind == 0x8002).map(number);
                    return self.error(&chunk, error, place);
                }
            }
            _ => {}
        }
        chunk.body = body;
        self.chunk = Some(chunk);
        Some(())
    }

    /// Where in the command's memory content belongs.
    fn content(&mut self, cookie: u64, offset: u64, len: usize) -> Option<(InFlight, usize)> {
        if len == 0 {
            return None;
        }
        let mut command = self.claim(cookie)?;
        let at = offset.wrapping_sub(command.offset);
        let end = at.checked_add(len as u64);
        let is_inside = end.is_some_and(|end| end <= command.len as u64);
        let range = at as usize..(at as usize).wrapping_add(len);
        if command.op != Op::Read || !is_inside || command.got[range.clone()].contains(&true) {
            self.in_flight.push(command);
            return None;
        }
        command.got[range.clone()].fill(true);
        if command.ranges() > 4 {
            command.got[range].fill(false);
            if command.error == 0 {
                self.in_flight.push(command);
                return None;
            }
        }
        Some((command, at as usize))
    }

    fn error(&mut self, chunk: &Chunk, error: u32, place: Option<u64>) -> Option<()> {
        let mut command = self.claim(chunk.cookie)?;
        let place = place.map(|place| place.wrapping_sub(command.offset));
        let place = place.filter(|place| *place < command.len as u64);
        command.good_end = command.good_end.min(place.unwrap_or(0) as usize);
        if command.error == 0 {
            command.error = error;
        }
        self.end_of_chunk(chunk, command)
    }

    fn end_of_chunk(&mut self, chunk: &Chunk, command: InFlight) -> Option<()> {
        let complete = command.op != Op::Read || command.leading() == command.len;
        if !chunk.done || (command.error == 0 && !complete) {
            self.in_flight.push(command);
            return (!chunk.done).then_some(());
        }
        let status = Status(status_of(command.error, command.op));
        let good = match command.error {
            0 => 0,
            _ => command.leading().min(command.good_end) / 512,
        };
        let outcome = match good {
            _ if command.error == SHUTDOWN => Outcome::Requeue,
            0 => Outcome::Complete(status),
            good => Outcome::Partly(status, good as u32),
        };
        if command.error == 0 && command.op == Op::Read {
            assert!(!command.got.contains(&false), "a byte is missing");
        }
        self.end(command.slot, outcome, command.data);
        Some(())
    }

    fn end(&mut self, slot: usize, outcome: Outcome, data: Vec<u8>) {
        self.decided.push((slot as u32, outcome, data));
    }
}
