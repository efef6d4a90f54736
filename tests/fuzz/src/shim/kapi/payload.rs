// SPDX-License-Identifier: GPL-2.0
//! The data of a request.

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
