// SPDX-License-Identifier: GPL-2.0
//! Which bytes of a read the server has answered, when it answers by chunks (`pure/chunk.rs`).
//!
//! Chunks come in any order, and those of several reads may be mixed. That they cover a read cannot be told from
//! the number of their bytes: a byte that came twice would hide one that never came, and the reader would be given
//! memory that nobody has written to.
//!
//! This file does not depend on the kernel. The host tests compile it as it is.

#![forbid(unsafe_code)]

use super::atomic::AtomicWord;

/// The number of separate ranges that are remembered of a read. Content in ascending order has one range.
pub(crate) const RANGES: usize = 4;

/// Why content is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Some of it was answered before.
    Overlap,
    /// It would be the start of one more range than are remembered.
    TooManyRanges,
}

/// The ranges of a read that were answered, ascending. Between each two of them there is a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Coverage {
    /// The start and the end of each, relative to the start of the read. Those that are not used are empty.
    ranges: [(u32, u32); RANGES],
    used: usize,
}

impl Coverage {
    /// Nothing was answered.
    pub(crate) const NONE: Coverage = Coverage {
        ranges: [(0, 0); RANGES],
        used: 0,
    };

    /// Adds the bytes from `start` to `end`, which must be at least one.
    ///
    /// # Errors
    ///
    /// Returns why they are not accepted. Nothing changes then.
    pub(crate) fn add(&mut self, start: u32, end: u32) -> Result<(), Refusal> {
        let mut next = Coverage::NONE;
        let (mut start, mut end) = (start, end);
        let mut later = None;
        for (at, &(from, to)) in self.ranges.iter().take(self.used).enumerate() {
            if from < end && start < to {
                return Err(Refusal::Overlap);
            }
            if to == start {
                start = from;
            } else if from == end {
                end = to;
            } else if to < start {
                next.push(from, to)?;
            } else {
                later = Some(at);
                break;
            }
        }
        next.push(start, end)?;
        if let Some(at) = later {
            for &(from, to) in self.ranges.iter().take(self.used).skip(at) {
                next.push(from, to)?;
            }
        }
        *self = next;
        Ok(())
    }

    /// Appends a range that begins behind the others.
    fn push(&mut self, start: u32, end: u32) -> Result<(), Refusal> {
        let place = self.ranges.get_mut(self.used);
        *place.ok_or(Refusal::TooManyRanges)? = (start, end);
        self.used += 1;
        Ok(())
    }

    /// Returns the number of bytes from the start of the read up to the first one that is missing.
    pub(crate) fn leading_bytes(&self) -> u32 {
        match self.ranges.first() {
            Some(&(0, end)) => end,
            _ => 0,
        }
    }
}

/// What the server has said of a command so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) coverage: Coverage,
    /// The first error, as a number of the protocol, or 0.
    pub(crate) error: u32,
    /// No byte from here on is good, relative to the start of the command, if the error has an offset.
    pub(crate) good_end: u32,
}

impl Answer {
    /// The server has said nothing.
    pub(crate) const NONE: Answer = Answer {
        coverage: Coverage::NONE,
        error: 0,
        good_end: u32::MAX,
    };

    /// Notes an error. `at` is its place, relative to the start of the command, if the server has told one that the
    /// command has. Otherwise nothing can be said of what is good, as the protocol has it.
    pub(crate) fn fail(&mut self, error: u32, at: Option<u32>) {
        if self.error == 0 {
            self.error = error;
        }
        self.good_end = self.good_end.min(at.unwrap_or(0));
    }

    /// Notes content from `start` to `end`, relative to the start of the read.
    ///
    /// # Errors
    ///
    /// Returns why it is not accepted.
    pub(crate) fn add(&mut self, start: u32, end: u32) -> Result<(), Refusal> {
        match self.coverage.add(start, end) {
            // The read has failed anyway. What is not remembered is not reported as good.
            Err(Refusal::TooManyRanges) if self.error != 0 => Ok(()),
            added => added,
        }
    }

    /// Returns the number of bytes from the start of a read that are good although the read has failed.
    pub(crate) fn good_bytes(&self) -> u32 {
        self.coverage.leading_bytes().min(self.good_end)
    }
}

/// Where the [`Answer`] of the command in a slot is kept from one chunk to the next.
///
/// Only the holder of the command's claim uses it (`pure/cmd.rs`). What is kept is that of one use of the slot: a
/// command that is sent again is another one. It is cleared when the command ends, so that it does not count when the
/// generation comes again after 2^32 commands.
pub(crate) struct Progress {
    /// The generation of the slot (32 bits), and the error (32 bits).
    head: AtomicWord,
    /// The number of used ranges (32 bits), and the end of what is good (32 bits).
    good: AtomicWord,
    /// The start and the end of each range (32 bits each).
    ranges: [AtomicWord; RANGES],
    /// The time of the last chunk in jiffies. The handler of timeouts reads it, too.
    heard_at: AtomicWord,
}

impl Progress {
    /// Returns a place in which nothing is kept.
    pub(crate) fn new() -> Self {
        Progress {
            head: AtomicWord::new(0),
            good: AtomicWord::new(0),
            ranges: core::array::from_fn(|_| AtomicWord::new(0)),
            heard_at: AtomicWord::new(0),
        }
    }

    /// Returns when the last chunk of the reply to a command has come, in jiffies, if any has. `generation` is that with
    /// which the slot was started for the command.
    ///
    /// This may be called without the command's claim. Then a chunk that comes now may not be known yet.
    pub(crate) fn heard_at(&self, generation: u32) -> Option<usize> {
        let heard_at = self.heard_at.load();
        (self.of(generation) != Answer::NONE).then_some(heard_at as usize)
    }

    /// Notes the time, in jiffies, of a chunk that was not the last one.
    pub(crate) fn hear(&self, now: usize) {
        self.heard_at.store(now as u64);
    }

    /// Returns what is kept of the command for which the slot was started with `generation`.
    pub(crate) fn of(&self, generation: u32) -> Answer {
        let (kept_for, error) = halves(self.head.load());
        let (used, good_end) = halves(self.good.load());
        // Whatever was kept has at least one range or an error. A slot that was never used has neither.
        if kept_for != generation || (used == 0 && error == 0) {
            return Answer::NONE;
        }
        let mut coverage = Coverage::NONE;
        for (range, kept) in coverage
            .ranges
            .iter_mut()
            .zip(&self.ranges)
            .take(used as usize)
        {
            *range = halves(kept.load());
            coverage.used += 1;
        }
        Answer {
            coverage,
            error,
            good_end,
        }
    }

    /// Forgets what is kept: the command has ended.
    pub(crate) fn clear(&self) {
        self.head.store(0);
        self.good.store(0);
    }

    /// Keeps what was said of the command for which the slot was started with `generation`.
    pub(crate) fn keep(&self, generation: u32, answer: &Answer) {
        let Coverage { ranges, used } = answer.coverage;
        for (kept, (start, end)) in self.ranges.iter().zip(ranges).take(used) {
            kept.store(joined(start, end));
        }
        self.good.store(joined(used as u32, answer.good_end));
        self.head.store(joined(generation, answer.error));
    }
}

fn halves(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

fn joined(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}
