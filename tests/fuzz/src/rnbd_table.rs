// SPDX-License-Identifier: GPL-2.0
//! As much of `rnbd_table.rs` as a connection needs to find the commands of replies.

use crate::kapi::block::request::{Outcome, Unanswered};
use crate::pure::{
    cmd::{Cookie, Parking, Slot},
    coverage::Progress,
    fate::Fate,
};
use crate::rnbd_events::{News, Origin};
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

/// Everything is logged.
pub(crate) struct Ratelimit;

impl Ratelimit {
    pub(crate) fn allow(&self) -> bool {
        true
    }
}

pub(crate) struct Shared {
    pub(crate) news: News,
}

pub(crate) struct Table {
    pub(crate) device: u32,
    pub(crate) origin: Origin,
    pub(crate) log: Ratelimit,
    pub(crate) fate: Fate,
    pub(crate) shared: Shared,
    pub(crate) structured: Structured,
    pub(crate) slots: Vec<Slot<Parked>>,
    progress: Vec<Progress>,
}

impl Table {
    pub(crate) fn new(structured: Structured) -> Self {
        Table {
            device: 0,
            origin: Origin,
            log: Ratelimit,
            fate: Fate::new(),
            shared: Shared { news: News },
            structured,
            slots: (0..SLOTS).map(|_| Slot::new(Parked::default())).collect(),
            progress: (0..SLOTS).map(|_| Progress::new()).collect(),
        }
    }

    pub(crate) fn slot_of(&self, cookie: Cookie) -> Option<&Slot<Parked>> {
        self.slots.get(cookie.slot() as usize)
    }

    pub(crate) fn lost_command_outcome(&self) -> Outcome {
        Outcome::Requeue
    }

    pub(crate) fn progress_of(&self, cookie: Cookie) -> Option<&Progress> {
        self.progress.get(cookie.slot() as usize)
    }

    pub(crate) fn unclaim(&self, request: Unanswered) {
        let withdrawn = self.slots[request.0.number as usize].unclaim(request);
        assert!(withdrawn.is_none());
    }
}
