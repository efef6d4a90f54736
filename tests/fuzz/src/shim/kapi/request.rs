// SPDX-License-Identifier: GPL-2.0
//! Requests, whose data is plain memory.

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

impl Outcome {
    pub(crate) const SUCCESS: Outcome = Outcome::Complete(Status::OK);
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

    pub(crate) fn should_fake_timeout(&self) -> bool {
        false
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
