// SPDX-License-Identifier: GPL-2.0
//! The ownership of a command in flight.
//!
//! A command has two sides, and each holds one reference to the request. The *transmit side* holds
//! its reference until the last byte was passed to the socket, or until the connection was reaped.
//! The reference of the *other side* is taken by whoever *claims* the command: the receiver when a
//! reply arrives, or the reaper when the connection has died. Once both references are gone, the
//! request ends as the claimer has decided, unless it was not sent completely, in which case the
//! transmit side decides.
//!
//! This file implements the claim: one atomic word, so that exactly one of several contenders wins,
//! and a place where the other side's reference is parked for the winner. The word contains a
//! generation, which is also half of the cookie on the wire, so that an old, repeated or invented
//! reply never matches.
//!
//! Apart from its atomics, this file does not depend on the kernel. The host tests compile it as it
//! is, and check it exhaustively with a model checker.

#![forbid(unsafe_code)]

use super::atomic::AtomicWord;

/// A place where the other side's reference is parked until the command is claimed.
///
/// `put` and `take` must each be atomic. [`Slot`] ensures that they alternate.
pub(crate) trait Parking {
    /// The type of the reference.
    type Item;
    /// Parks `item`. Returns the item that was parked before.
    fn put(&self, item: Self::Item) -> Option<Self::Item>;
    /// Takes the parked item.
    fn take(&self) -> Option<Self::Item>;
}

/// The identifier of a command on the wire: the upper half is its generation, the lower half its
/// slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cookie(pub(crate) u64);

impl Cookie {
    /// Returns the cookie of a generation and a slot.
    pub(crate) fn new(generation: u32, slot: u32) -> Cookie {
        Cookie(u64::from(generation) << 32 | u64::from(slot))
    }

    /// Returns the index of the command's slot in the session's table.
    pub(crate) fn slot(self) -> u32 {
        self.0 as u32
    }

    /// Returns the command's generation, which counts the uses of the slot.
    pub(crate) fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The ownership word of a command: generation (32 bits), connection (16 bits), state (16 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word(u64);

/// The command is in flight and unclaimed.
const OPEN: u16 = 1;
/// The command was claimed, or the slot was never used.
const CLAIMED: u16 = 0;
/// As [`CLAIMED`], and the transmit side has taken the command back: it was not sent, so it must not be in flight again.
const WITHDRAWN: u16 = 2;

impl Word {
    fn new(generation: u32, connection: u16, state: u16) -> Word {
        Word(u64::from(generation) << 32 | u64::from(connection) << 16 | u64::from(state))
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    fn connection(self) -> u16 {
        (self.0 >> 16) as u16
    }

    fn state(self) -> u16 {
        self.0 as u16
    }
}

/// The reason why a claim has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClaimError {
    /// The generation does not match: the reply is to a command that has ended, or to none at all.
    Stale,
    /// The command is in flight on another connection.
    OtherConnection,
    /// The command was claimed before: this is a second reply, or another contender was faster.
    Claimed,
}

/// A slot of a session's table, which holds at most one command at a time.
pub(crate) struct Slot<P: Parking> {
    word: AtomicWord,
    parked: P,
}

impl<P: Parking> Slot<P> {
    /// Returns a slot that was never used.
    pub(crate) fn new(parked: P) -> Self {
        Slot {
            word: AtomicWord::new(Word::new(0, 0, CLAIMED).0),
            parked,
        }
    }

    /// Puts a command in flight on `connection`, and returns its generation.
    ///
    /// The command can be claimed from now on, which is before its first byte is sent.
    ///
    /// The caller must own the slot. It does, because the block layer has given it the tag that the
    /// slot belongs to, and does not reuse the tag before both sides have dropped their references.
    pub(crate) fn start(&self, connection: u16, other_side: P::Item) -> u32 {
        let generation = Word(self.word.load()).generation().wrapping_add(1);
        // Nothing is parked here, because whoever claimed the last command took it out. Otherwise
        // it would be right to drop it, since its claim can no longer be won.
        drop(self.parked.put(other_side));
        self.word.store(Word::new(generation, connection, OPEN).0);
        generation
    }

    /// Claims the command that a reply on `connection` names. The winner gets the other side's
    /// reference.
    ///
    /// # Errors
    ///
    /// The reason why this is not a reply to a command in flight on this connection.
    pub(crate) fn claim(&self, generation: u32, connection: u16) -> Result<P::Item, ClaimError> {
        let open = Word::new(generation, connection, OPEN);
        let claimed = Word::new(generation, connection, CLAIMED);
        match self.word.compare_exchange(open.0, claimed.0) {
            Ok(_) => self.parked.take().ok_or(ClaimError::Claimed),
            Err(seen) => Err(Self::claim_error(Word(seen), generation, connection)),
        }
    }

    /// Undoes a claim: the command is in flight again. Returns the other side's reference if the transmit side has
    /// [withdrawn](Self::withdraw) the command since. The caller must end it then.
    ///
    /// To be called by the winner of the claim. The connection must not be reaped concurrently,
    /// since the reaper examines each slot only once.
    pub(crate) fn unclaim(&self, other_side: P::Item) -> Option<P::Item> {
        let seen = Word(self.word.load());
        let claimed = Word::new(seen.generation(), seen.connection(), CLAIMED);
        let open = Word::new(seen.generation(), seen.connection(), OPEN);
        drop(self.parked.put(other_side));
        match self.word.compare_exchange(claimed.0, open.0) {
            Ok(_) => None,
            Err(_) => self.parked.take(),
        }
    }

    /// Takes a command back of which nothing was sent on `connection`. The caller has the transmit side's reference.
    ///
    /// Returns the other side's reference. If somebody has claimed the command, it is theirs: a reaper, or the receiver
    /// of what a server has sent that has guessed the command's cookie. Then the command is not in flight again when
    /// they [undo](Self::unclaim) the claim: no reply to it will ever come.
    pub(crate) fn withdraw(&self, connection: u16) -> Option<P::Item> {
        loop {
            let seen = Word(self.word.load());
            if seen.connection() != connection {
                return None;
            }
            let withdrawn = Word::new(seen.generation(), connection, WITHDRAWN);
            match seen.state() {
                OPEN => {
                    if let Ok(other_side) = self.claim(seen.generation(), connection) {
                        return Some(other_side);
                    }
                }
                CLAIMED => {
                    if self.word.compare_exchange(seen.0, withdrawn.0).is_ok() {
                        return None;
                    }
                }
                _ => return None,
            }
        }
    }

    /// Claims the command in the slot if it is in flight on `connection`.
    pub(crate) fn reclaim(&self, connection: u16) -> Option<P::Item> {
        let seen = Word(self.word.load());
        if seen.state() != OPEN || seen.connection() != connection {
            return None;
        }
        self.claim(seen.generation(), connection).ok()
    }

    /// Returns the slot's generation, which does not change as long as a side of the command
    /// exists.
    pub(crate) fn generation(&self) -> u32 {
        Word(self.word.load()).generation()
    }

    /// Returns the connection that the command is in flight on, and whether it is unclaimed.
    pub(crate) fn status(&self) -> (u16, bool) {
        let seen = Word(self.word.load());
        (seen.connection(), seen.state() == OPEN)
    }

    /// Returns the reason why a claim has failed that found `seen`.
    fn claim_error(seen: Word, generation: u32, connection: u16) -> ClaimError {
        if seen.generation() != generation {
            ClaimError::Stale
        } else if seen.connection() != connection {
            ClaimError::OtherConnection
        } else {
            ClaimError::Claimed
        }
    }
}
