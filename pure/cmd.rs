// SPDX-License-Identifier: GPL-2.0
//! One command in flight: who may end it.
//!
//! A command has two sides. The *transmit side* holds its request until the last byte was handed to
//! the socket, or until the connection is dead. The *other side* is whoever *claims* the command: the
//! receiver when a reply comes in, or the reclaimer when the connection dies. Each side holds one
//! reference to the request, and when both have let go the request ends as the claimer decided.
//!
//! This file is the claim: one atomic word, so that of any number of contenders exactly one wins, and
//! a place where the other side's reference waits for the winner. The word holds a generation, half of
//! the cookie on the wire, so that an old, repeated or invented reply never matches.
//!
//! Pure but for its atomics and free of the kernel: the tests compile this very file on the host and
//! check it exhaustively with a model checker.

#![forbid(unsafe_code)]

use super::atomic::AtomicWord;

/// Where the other side's reference waits while nobody has claimed the command.
///
/// `put` and `take` must each be atomic. That one `take` follows each `put` is [`Slot`]'s business.
pub(crate) trait Parking {
    /// What is parked.
    type Item;
    /// Parks `item`; gives back what was there before.
    fn put(&self, item: Self::Item) -> Option<Self::Item>;
    /// Takes what is parked.
    fn take(&self) -> Option<Self::Item>;
}

/// A command's name on the wire: the high half is its generation, the low half its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cookie(pub(crate) u64);

impl Cookie {
    /// Puts a cookie together.
    pub(crate) fn new(generation: u32, slot: u32) -> Cookie {
        Cookie(u64::from(generation) << 32 | u64::from(slot))
    }

    /// Which slot of the session's table the command uses.
    pub(crate) fn slot(self) -> u32 {
        self.0 as u32
    }

    /// Which use of that slot it is.
    pub(crate) fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The ownership word of a command: generation (32 bits), connection (16 bits), state (16 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word(u64);

/// In flight, and nobody has claimed it.
const OPEN: u16 = 1;
/// Somebody has claimed it, or it was never used.
const CLAIMED: u16 = 0;

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

/// Why a claim was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClaimError {
    /// The generation is not the slot's: a reply to a command that is long over, or to none.
    Stale,
    /// The command is in flight on another connection.
    OtherConnection,
    /// The command was claimed before: a second reply, or a race that was lost.
    Claimed,
}

/// One place of a session's table: at most one command at a time.
pub(crate) struct Slot<P: Parking> {
    word: AtomicWord,
    parked: P,
}

impl<P: Parking> Slot<P> {
    /// A slot that no command uses.
    pub(crate) fn new(parked: P) -> Self {
        Slot {
            word: AtomicWord::new(Word::new(0, 0, CLAIMED).0),
            parked,
        }
    }

    /// Puts a command in flight on `connection`; returns its generation. It can be claimed from here
    /// on, which is before its first byte is sent.
    ///
    /// The caller owns the slot: the tag that names it was given to it by the block layer, and is
    /// given to nobody else before both sides have let go of the request.
    pub(crate) fn start(&self, connection: u16, other_side: P::Item) -> u32 {
        let generation = Word(self.word.load()).generation().wrapping_add(1);
        // Nothing can be parked here: whoever claimed the command before took it out. Were it
        // otherwise, dropping it would be right, for its claim can no longer be won.
        drop(self.parked.put(other_side));
        self.word.store(Word::new(generation, connection, OPEN).0);
        generation
    }

    /// Claims the command that a reply on `connection` names. The winner ends the command's other
    /// side.
    ///
    /// # Errors
    ///
    /// Why the reply is not an answer to a command in flight on this connection.
    pub(crate) fn claim(&self, generation: u32, connection: u16) -> Result<P::Item, ClaimError> {
        let open = Word::new(generation, connection, OPEN);
        let claimed = Word::new(generation, connection, CLAIMED);
        match self.word.compare_exchange(open.0, claimed.0) {
            Ok(_) => self.parked.take().ok_or(ClaimError::Claimed),
            Err(seen) => Err(Self::claim_error(Word(seen), generation, connection)),
        }
    }

    /// Undoes a claim: the command is in flight as before. For whoever has won the claim, while nobody
    /// clears the command's connection away, who would look for it only once.
    pub(crate) fn unclaim(&self, other_side: P::Item) {
        let seen = Word(self.word.load());
        drop(self.parked.put(other_side));
        self.word
            .store(Word::new(seen.generation(), seen.connection(), OPEN).0);
    }

    /// Claims whatever command is in flight on `connection`, if one is.
    pub(crate) fn reclaim(&self, connection: u16) -> Option<P::Item> {
        let seen = Word(self.word.load());
        if seen.state() != OPEN || seen.connection() != connection {
            return None;
        }
        self.claim(seen.generation(), connection).ok()
    }

    /// Which use of the slot this is. Stays while a side of the command exists.
    pub(crate) fn generation(&self) -> u32 {
        Word(self.word.load()).generation()
    }

    /// Which connection the command is in flight on, and whether it is still unclaimed.
    pub(crate) fn status(&self) -> (u16, bool) {
        let seen = Word(self.word.load());
        (seen.connection(), seen.state() == OPEN)
    }

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
