// SPDX-License-Identifier: GPL-2.0
//! Who ends a command: `pure/cmd.rs` in all interleavings, with each contender in a thread of its own.
//!
//! The models are written against [`Parts`], so that the same ones run over `pure/cmd.rs` and over
//! its spoilt variants (`mutants`).

use crate::{
    blk_mq::{Parked, Tag, Unanswered, Unsent, Verdict},
    parts::{Commands, Parts, models},
    pure::cmd::{ClaimError, Slot},
};
use loom::thread::{self, JoinHandle};
use std::sync::Arc;

/// A tag and its slot: what the contenders share.
struct Shared<S> {
    tag: Arc<Tag>,
    slot: Arc<S>,
}

impl<S: Commands> Shared<S> {
    fn new() -> Self {
        Shared {
            tag: Tag::new(),
            slot: Arc::new(S::new()),
        }
    }

    /// Puts a command in flight; returns the transmit side's handle and the generation.
    fn start(&self, connection: u16) -> (Unsent, u32) {
        let (transmit, other) = self.tag.start();
        (transmit, self.slot.start(connection, other))
    }

    fn spawn<T: 'static>(&self, run: impl FnOnce(&S) -> T + 'static) -> JoinHandle<T> {
        let slot = self.slot.clone();
        thread::spawn(move || run(&slot))
    }

    /// A reply comes in; returns whether it was accepted.
    fn reply(&self, generation: u32, connection: u16) -> JoinHandle<bool> {
        self.spawn(move |slot| complete(slot.claim(generation, connection)))
    }

    /// The connection is cleared away; returns whether the command was on it.
    fn reap(&self, connection: u16) -> JoinHandle<bool> {
        self.spawn(move |slot| {
            let claimed = slot.reclaim(connection);
            claimed.map(|r| r.finish(Verdict::Requeue)).is_some()
        })
    }
}

/// Completes what a reply has claimed; returns whether it has claimed anything.
fn complete(claimed: Option<Unanswered>) -> bool {
    claimed.map(|r| r.finish(Verdict::Complete)).is_some()
}

/// Sends a write: its data is read until the transmit side lets go.
fn send(transmit: Unsent) {
    transmit.0.read_pages();
}

/// A server that answers a write before it has read it cannot make pages go that are being sent.
fn write_is_answered_while_it_is_sent<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let reply = shared.reply(generation, 0);
    send(transmit);
    assert!(reply.join().unwrap(), "a good reply was refused");
    assert_eq!(shared.tag.history(), [Verdict::Complete]);
}

/// A read's data comes in before the transmit side has let go, which does not touch it.
fn read_is_answered_while_it_is_sent<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let reply = shared.spawn(move |slot| {
        let request = slot.claim(generation, 0).expect("a good reply was refused");
        request.0.write_pages();
        request.finish(Verdict::Complete);
    });
    drop(transmit);
    reply.join().unwrap();
    assert_eq!(shared.tag.history(), [Verdict::Complete]);
}

/// A reply and the death of the connection: one of the two decides, and the command ends as it says.
fn reply_or_death<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let reply = shared.reply(generation, 0);
    let death = shared.reap(0);
    send(transmit);
    let verdict = match (reply.join().unwrap(), death.join().unwrap()) {
        (true, false) => Verdict::Complete,
        (false, true) => Verdict::Requeue,
        (true, true) => panic!("claimed twice"),
        (false, false) => panic!("claimed by nobody"),
    };
    assert_eq!(shared.tag.history(), [verdict]);
}

/// A reply that fault injection has the receiver forget leaves the command where it was: nobody else
/// gets it, and it goes with its connection, which the receiver itself clears away.
fn forgotten_reply<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let receiver = shared.spawn(move |slot| {
        let request = slot.claim(generation, 0).expect("a good reply was refused");
        assert!(slot.unclaim(request).is_none(), "nobody has taken it back");
        let reclaimed = slot.reclaim(0).expect("a forgotten command is lost");
        reclaimed.finish(Verdict::Requeue);
    });
    let other_death = shared.reap(1);
    send(transmit);
    receiver.join().unwrap();
    assert!(!other_death.join().unwrap(), "another connection's command");
    assert_eq!(shared.tag.history(), [Verdict::Requeue]);
}

/// A reply in chunks: each claims the command and gives it back, but for the last one. Nobody else gets it in between, and
/// nothing is left when it has ended.
fn reply_in_chunks<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let receiver = shared.spawn(move |slot| {
        for _ in 0..2 {
            let request = slot.claim(generation, 0).expect("a chunk was refused");
            request.0.write_pages();
            assert!(slot.unclaim(request).is_none(), "nobody has taken it back");
        }
        assert!(
            complete(slot.claim(generation, 0)),
            "the last chunk was refused"
        );
        assert!(
            slot.claim(generation, 0).is_none(),
            "a chunk after the last one"
        );
    });
    let other_death = shared.reap(1);
    drop(transmit);
    receiver.join().unwrap();
    assert!(!other_death.join().unwrap(), "another connection's command");
    assert_eq!(shared.tag.history(), [Verdict::Complete]);
}

/// The connection dies between two chunks. Both the chunk and the death need the receive lock, so the receiver clears the
/// connection away itself. The command is sent again elsewhere, and chunks for its first use are refused.
fn death_between_chunks<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let receiver = shared.spawn(move |slot| {
        let request = slot.claim(generation, 0).expect("a chunk was refused");
        request.0.write_pages();
        assert!(slot.unclaim(request).is_none(), "nobody has taken it back");
        let lost = slot
            .reclaim(0)
            .expect("a command of which a chunk has come is lost");
        lost.finish(Verdict::Requeue);
        assert!(
            slot.claim(generation, 0).is_none(),
            "a chunk for a lost command"
        );
    });
    drop(transmit);
    assert_eq!(shared.tag.wait_ended(), Verdict::Requeue);
    let (transmit, again) = shared.start(1);
    drop(transmit);
    assert!(
        complete(shared.slot.claim(again, 1)),
        "a good reply was refused"
    );
    receiver.join().unwrap();
    assert_eq!(shared.tag.history(), [Verdict::Requeue, Verdict::Complete]);
}

/// Of two equal replies, even at once, one is accepted; a third one is not.
fn repeated_reply<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let first = shared.reply(generation, 0);
    let second = shared.reply(generation, 0);
    send(transmit);
    assert!(
        first.join().unwrap() != second.join().unwrap(),
        "claimed twice, or by nobody"
    );
    assert!(shared.slot.claim(generation, 0).is_none());
    assert_eq!(shared.tag.history(), [Verdict::Complete]);
}

/// A server may guess the cookie of a command that is just being started. Its reply is accepted or
/// not, but the command is not lost.
pub(crate) fn reply_to_a_command_that_is_being_started<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let guess = shared.reply(1, 0);
    let (transmit, generation) = shared.start(0);
    assert_eq!(generation, 1, "the guess was meant to be a good one");
    send(transmit);
    let reply = complete(shared.slot.claim(generation, 0));
    let guess = guess.join().unwrap();
    assert!(reply || guess, "claimed by nobody");
    assert!(!(reply && guess), "claimed twice");
    assert_eq!(shared.tag.history(), [Verdict::Complete]);
}

/// What is in flight on one connection is out of reach for the others: for their servers, which may
/// know its cookie, and for their deaths.
pub(crate) fn reply_and_death_of_another_connection<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let reply = shared.reply(generation, 1);
    let death = shared.reap(1);
    send(transmit);
    let own = complete(shared.slot.claim(generation, 0));
    assert!(
        !reply.join().unwrap() && !death.join().unwrap(),
        "another connection's command was claimed"
    );
    assert!(own, "a good reply was refused");
    assert_eq!(shared.tag.history(), [Verdict::Complete]);
}

/// The tag goes to its next command, on the same connection, while the first one's reply is
/// repeated.
pub(crate) fn old_reply_after_reuse_of_the_tag<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let replies = shared.spawn(move |slot| {
        let first = complete(slot.claim(generation, 0));
        assert!(first, "a good reply was refused");
        complete(slot.claim(generation, 0))
    });
    send(transmit);
    shared.tag.wait_ended();

    let (transmit, generation) = shared.start(0);
    send(transmit);
    let reply = complete(shared.slot.claim(generation, 0));
    assert!(!replies.join().unwrap(), "an old reply was accepted");
    assert!(reply, "a good reply was refused");
    assert_eq!(shared.tag.history(), [Verdict::Complete; 2]);
}

/// A command is lost with its connection and sent on another one, while the lost connection still
/// gets the reply to it.
fn reply_after_requeue_to_another_connection<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let late = shared.reply(generation, 0);
    let death = shared.reap(0);
    send(transmit);
    let mut expected = vec![shared.tag.wait_ended()];

    if expected == [Verdict::Requeue] {
        let (transmit, generation) = shared.start(1);
        send(transmit);
        let reply = complete(shared.slot.claim(generation, 1));
        assert!(reply, "a good reply was refused");
        expected.push(Verdict::Complete);
    }
    let late = late.join().unwrap();
    let death = death.join().unwrap();
    assert_eq!((late, death), (expected.len() == 1, expected.len() == 2));
    assert_eq!(shared.tag.history(), expected);
}

/// The transmit side of a connection that drains takes back what it has not sent, while a server that has guessed the
/// cookie sends a chunk. It is sent again at once: no other chunk would have to come.
pub(crate) fn taken_back_while_a_chunk_comes<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let receiver = shared.spawn(move |slot| {
        if let Some(request) = slot.claim(generation, 0) {
            request.0.write_pages();
            // As `Table::unclaim()`.
            if let Some(withdrawn) = slot.unclaim(request) {
                withdrawn.finish(Verdict::Requeue);
            }
        }
    });
    let ours = shared.slot.withdraw(0);
    transmit.overrule(Verdict::Requeue);
    if let Some(ours) = ours {
        ours.finish(Verdict::Requeue);
    }
    receiver.join().unwrap();
    let history = shared.tag.history();
    assert_eq!(history, [Verdict::Requeue], "it waits for a reply");
    assert!(!shared.slot.status().1, "it is still in flight");
}

/// The same with a reply that says that it was executed. It was not, and the reply does not count for its next use either.
pub(crate) fn taken_back_while_it_is_answered<P: Parts>() {
    let shared = Shared::<P::Slot>::new();
    let (transmit, generation) = shared.start(0);
    let receiver = shared.spawn(move |slot| {
        let first = complete(slot.claim(generation, 0));
        let second = complete(slot.claim(generation, 0));
        assert!(!(first && second), "claimed twice");
    });
    let ours = shared.slot.withdraw(0);
    transmit.overrule(Verdict::Requeue);
    if let Some(ours) = ours {
        ours.finish(Verdict::Requeue);
    }
    assert_eq!(shared.tag.wait_ended(), Verdict::Requeue);
    let (transmit, again) = shared.start(0);
    drop(transmit);
    assert!(
        complete(shared.slot.claim(again, 0)),
        "a good reply was refused"
    );
    receiver.join().unwrap();
    assert_eq!(shared.tag.history(), [Verdict::Requeue, Verdict::Complete]);
}

models! {
    write_is_answered_while_it_is_sent,
    read_is_answered_while_it_is_sent,
    reply_in_chunks,
    death_between_chunks,
    taken_back_while_a_chunk_comes,
    taken_back_while_it_is_answered,
    reply_or_death,
    forgotten_reply,
    repeated_reply,
    reply_to_a_command_that_is_being_started,
    reply_and_death_of_another_connection,
    old_reply_after_reuse_of_the_tag,
    reply_after_requeue_to_another_connection,
}

/// A refused reply is explained; no concurrency here, but the atomics want a model around them.
#[test]
fn refusals_say_why() {
    loom::model(|| {
        let tag = Tag::new();
        let slot = Slot::new(Parked::empty());
        let why = |generation, connection| slot.claim(generation, connection).err();
        assert_eq!(why(0, 0), Some(ClaimError::Claimed), "it was never used");
        assert_eq!(why(1, 0), Some(ClaimError::Stale));

        let (transmit, other) = tag.start();
        let generation = slot.start(3, other);
        drop(transmit);
        assert_eq!(slot.status(), (3, true));
        assert_eq!(why(generation, 2), Some(ClaimError::OtherConnection));
        assert_eq!(why(generation - 1, 3), Some(ClaimError::Stale));
        assert_eq!(why(generation + 1, 3), Some(ClaimError::Stale));
        assert!(slot.reclaim(2).is_none());

        complete(slot.claim(generation, 3).ok());
        assert_eq!(slot.status(), (3, false));
        assert_eq!(why(generation, 3), Some(ClaimError::Claimed));
        assert!(slot.reclaim(3).is_none());
        assert_eq!(tag.history(), [Verdict::Complete]);
    });
}
