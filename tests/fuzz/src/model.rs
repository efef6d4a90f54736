// SPDX-License-Identifier: GPL-2.0
//! What a stream of replies means, byte by byte and with nothing of the module's. Numbers are written out
//! once more: a constant that is wrong must not make its own test pass.

use crate::kapi::block::request::{Op, Outcome, Status};

/// A command that a reply may be for.
struct InFlight {
    slot: usize,
    cookie: u64,
    op: Op,
    len: usize,
}

/// A client that is as slow as it is simple.
#[derive(Default)]
pub(crate) struct Model {
    in_flight: Vec<InFlight>,
    /// A header as far as it has come.
    header: Vec<u8>,
    /// A read whose data comes in, and as much of it as is there.
    receiving: Option<(InFlight, Vec<u8>)>,
    pub(crate) started: usize,
    pub(crate) dead: bool,
    /// How commands ended, in order, and what their memory had in it then.
    pub(crate) decided: Vec<(u32, Outcome, Vec<u8>)>,
}

impl Model {
    pub(crate) fn start(&mut self, slot: usize, cookie: u64, op: Op, len_bytes: u32) {
        self.started += 1;
        let len = len_bytes as usize;
        self.in_flight.push(InFlight {
            slot,
            cookie,
            op,
            len,
        });
    }

    pub(crate) fn is_receiving(&self, slot: usize) -> bool {
        self.receiving
            .as_ref()
            .is_some_and(|(command, _)| command.slot == slot)
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
                self.end(&command, 0, data);
            }
            return;
        }
        self.header.push(byte);
        if let Ok(header) = <[u8; 16]>::try_from(&self.header[..]) {
            self.header.clear();
            self.answer(header);
        }
    }

    fn answer(&mut self, header: [u8; 16]) {
        let number = |bytes: &[u8]| bytes.iter().fold(0, |n, byte| (n << 8) | u64::from(*byte));
        let (error, cookie) = (number(&header[4..8]), number(&header[8..]));
        let found = self
            .in_flight
            .iter()
            .position(|command| command.cookie == cookie);
        let Some(found) = found.filter(|_| header[..4] == [0x67, 0x44, 0x66, 0x98]) else {
            self.dead = true;
            return;
        };
        let command = self.in_flight.remove(found);
        if error == 0 && command.op == Op::Read && command.len > 0 {
            self.receiving = Some((command, Vec::new()));
            return;
        }
        let optional = matches!(command.op, Op::Discard | Op::WriteZeroes);
        let status = match error {
            0 => 0,
            1 => 5,
            28 => 3,
            22 | 95 if optional => 1,
            _ => 10,
        };
        let moves_data = matches!(command.op, Op::Read | Op::Write);
        let data = vec![0; if moves_data { command.len } else { 0 }];
        self.end(&command, status, data);
    }

    fn end(&mut self, command: &InFlight, status: u8, data: Vec<u8>) {
        let outcome = Outcome::Complete(Status(status));
        self.decided.push((command.slot as u32, outcome, data));
    }
}
