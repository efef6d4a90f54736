// SPDX-License-Identifier: GPL-2.0
//! As much of `rnbd_table.rs` as a connection needs to find the commands of replies.

use crate::kapi::block::request::Unanswered;
use crate::pure::{
    cmd::{Cookie, Parking, Slot},
    coverage::Progress,
};
use crate::script::SLOTS;
use std::cell::RefCell;

#[derive(Default)]
pub(crate) struct Parked(RefCell<Option<Unanswered>>);

impl Parking for Parked {
    type Item = Unanswered;

    fn put(&self, item: Unanswered) -> Option<Unanswered> {
        self.0.borrow_mut().replace(item)
    }

    fn take(&self) -> Option<Unanswered> {
        self.0.borrow_mut().take()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Structured {
    No,
    Possible,
    Required,
}

pub(crate) struct Table {
    pub(crate) structured: Structured,
    pub(crate) slots: Vec<Slot<Parked>>,
    progress: Vec<Progress>,
}

impl Table {
    pub(crate) fn new(structured: Structured) -> Self {
        Table {
            structured,
            slots: (0..SLOTS).map(|_| Slot::new(Parked::default())).collect(),
            progress: (0..SLOTS).map(|_| Progress::new()).collect(),
        }
    }

    pub(crate) fn progress_of(&self, cookie: Cookie) -> Option<&Progress> {
        self.progress.get(cookie.slot() as usize)
    }

    pub(crate) fn unclaim(&self, request: Unanswered) {
        let withdrawn = self.slots[request.0.number as usize].unclaim(request);
        assert!(withdrawn.is_none());
    }
}
