// SPDX-License-Identifier: GPL-2.0
//! Writes wrong variants of `pure/cmd.rs`, `pure/fate.rs` and `kapi/llist.rs`, each with the model that
//! must fail on it (see `src/mutants.rs`).

use std::{env, fs, path::Path};

struct Mutant {
    name: &'static str,
    /// Stands exactly once in the source.
    right: &'static str,
    wrong: &'static str,
    /// The model that must fail, with the bound that it has, and what it then says.
    model: &'static str,
    complaint: &'static str,
}

/// A file of the module's, and how the models are run over a variant of it.
struct Source {
    path: &'static str,
    /// The macro of `src/parts.rs` that fits it to the models.
    fit: &'static str,
    /// What the models are then run over.
    parts: &'static str,
    mutants: &'static [Mutant],
}

const SOURCES: &[Source] = &[
    Source {
        path: "../../pure/cmd.rs",
        fit: "commands",
        parts: "wrong, fate, llist",
        mutants: COMMANDS,
    },
    Source {
        path: "../../pure/fate.rs",
        fit: "fates",
        parts: "cmd, wrong, llist",
        mutants: FATES,
    },
    Source {
        path: "../../kapi/llist.rs",
        fit: "lists",
        parts: "cmd, fate, wrong",
        mutants: LISTS,
    },
];

const CLAIM: &str = "pub(crate) fn claim(&self, generation: u32, connection: u16) -> Result<P::Item, ClaimError> {\n";

const COMMANDS: &[Mutant] = &[
    Mutant {
        name: "claim_ignores_the_generation",
        right: CLAIM,
        wrong:
            "pub(crate) fn claim(&self, _: u32, connection: u16) -> Result<P::Item, ClaimError> {
            let generation = Word(self.word.load()).generation();",
        model: "ownership::old_reply_after_reuse_of_the_tag",
        complaint: "an old reply was accepted",
    },
    Mutant {
        name: "claim_ignores_the_connection",
        right: CLAIM,
        wrong:
            "pub(crate) fn claim(&self, generation: u32, _: u16) -> Result<P::Item, ClaimError> {
            let connection = Word(self.word.load()).connection();",
        model: "ownership::reply_and_death_of_another_connection",
        complaint: "another connection's command was claimed",
    },
    // Two winners would not both find a parked handle. It takes the next command of the slot to see
    // the harm: the late store closes it, and the late winner takes its handle.
    Mutant {
        name: "claim_is_not_atomic",
        right: "match self.word.compare_exchange(open.0, claimed.0) {",
        wrong: "let seen = self.word.load();
            if seen == open.0 {
                self.word.store(claimed.0);
            }
            match if seen == open.0 { Ok(seen) } else { Err(seen) } {",
        model: "session::the_other_connection_takes_over within 3 preemptions",
        complaint: "a good reply was refused",
    },
    Mutant {
        name: "reclaim_ignores_the_connection",
        right: "if seen.state() != OPEN || seen.connection() != connection {
            return None;
        }
        self.claim(seen.generation(), connection).ok()",
        wrong: "let _ = connection;
        if seen.state() != OPEN {
            return None;
        }
        self.claim(seen.generation(), seen.connection()).ok()",
        model: "ownership::reply_and_death_of_another_connection",
        complaint: "another connection's command was claimed",
    },
    Mutant {
        name: "start_keeps_the_generation",
        right: "generation().wrapping_add(1)",
        wrong: "generation()",
        model: "ownership::old_reply_after_reuse_of_the_tag",
        complaint: "an old reply was accepted",
    },
    Mutant {
        name: "start_opens_before_it_parks",
        right: "drop(self.parked.put(other_side));
        self.word.store(Word::new(generation, connection, OPEN).0);",
        wrong: "self.word.store(Word::new(generation, connection, OPEN).0);
        drop(self.parked.put(other_side));",
        model: "ownership::reply_to_a_command_that_is_being_started",
        complaint: "claimed by nobody",
    },
    Mutant {
        name: "withdraw_leaves_a_claim_as_it_is",
        right: "if self.word.compare_exchange(seen.0, withdrawn.0).is_ok() {",
        wrong: "let _ = withdrawn; if true {",
        model: "ownership::taken_back_while_a_chunk_comes",
        complaint: "it waits for a reply",
    },
    Mutant {
        name: "unclaim_forgets_who_has_withdrawn",
        right: "match self.word.compare_exchange(claimed.0, open.0) {",
        wrong: "let _ = claimed;
        self.word.store(open.0);
        match Ok::<u64, u64>(open.0) {",
        model: "ownership::taken_back_while_a_chunk_comes",
        complaint: "it waits for a reply",
    },
];

const FATES: &[Mutant] = &[
    Mutant {
        name: "exhaust_ignores_what_was_seen",
        right: "if seen.is_over() {
            return Exhausted::Before;
        }
        match self.0.compare_exchange(seen.0, seen.0 | EXHAUSTED) {",
        wrong: "match Ok::<_, u64>(self.change(|word| word | EXHAUSTED)) {",
        model: "session::nobody_waits_for_the_connection within 3 preemptions",
        complaint: "I/O fails although a connection lives",
    },
    // In a session the two that follow do no harm: who reconnects waits for the dispatches.
    Mutant {
        name: "exhaust_overwrites_what_has_changed",
        right: "match self.0.compare_exchange(seen.0, seen.0 | EXHAUSTED) {",
        wrong: "match Ok::<_, u64>(self.change(|word| word | EXHAUSTED)) {",
        model: "fate::a_connection_comes_back",
        complaint: "it is over although a connection lives",
    },
    Mutant {
        name: "revive_does_not_count",
        right: "(word & !(ENDED | EXHAUSTED)).wrapping_add(ONE_REVIVAL)",
        wrong: "word & !(ENDED | EXHAUSTED)",
        model: "fate::a_connection_comes_back",
        complaint: "it is over although a connection lives",
    },
    Mutant {
        name: "revive_leaves_it_exhausted",
        right: "!(ENDED | EXHAUSTED)",
        wrong: "!ENDED",
        model: "session::nobody_waits_for_the_connection within 3 preemptions",
        complaint: "I/O fails although a connection lives",
    },
    Mutant {
        name: "revive_leaves_it_ended",
        right: "!(ENDED | EXHAUSTED)",
        wrong: "!EXHAUSTED",
        model: "session::connected_anew within 2 preemptions",
        complaint: "it does not know that it goes on",
    },
    Mutant {
        name: "end_does_not_stick",
        right: "|word| word | ENDED)",
        wrong: "|word| word)",
        model: "session::the_session_ends within 3 preemptions",
        complaint: "deadlock",
    },
    Mutant {
        name: "a_request_to_disconnect_is_forgotten",
        right: "_ => word & !REQUESTED | ENDED,",
        wrong: "_ => word & !REQUESTED,",
        model: "session::the_user_disconnects within 3 preemptions",
        complaint: "deadlock",
    },
    Mutant {
        name: "a_request_to_disconnect_is_fulfilled_for_ever",
        right: "_ => word & !REQUESTED | ENDED,",
        wrong: "_ => word | ENDED,",
        model: "session::connected_anew within 2 preemptions",
        complaint: "it does not know that it goes on",
    },
    Mutant {
        name: "nobody_waits_when_all_have_gone",
        right: "0 => word,",
        wrong: "0 => word | ENDED,",
        model: "session::the_connection_comes_back within 3 preemptions",
        complaint: "it was to wait",
    },
    Mutant {
        name: "exhausted_is_wanted",
        right: "self.0 & (REQUESTED | ENDED) != 0",
        wrong: "self.0 & (REQUESTED | ENDED | EXHAUSTED) != 0",
        model: "session::both_connections_die within 2 preemptions",
        complaint: "nobody was told of a death",
    },
    Mutant {
        name: "a_change_is_not_atomic",
        right: "while let Err(seen) = self.0.compare_exchange(old, to(old)) {
            old = seen;
        }
        old",
        wrong: "self.0.store(to(old));
        old",
        model: "fate::nothing_is_overwritten",
        complaint: "a change is lost",
    },
];

const LISTS: &[Mutant] = &[
    Mutant {
        name: "push_does_not_publish",
        right: "match self.newest.cmpxchg(newest, raw, Full) {",
        wrong: "match self.newest.cmpxchg(newest, raw, Relaxed) {",
        model: "list::all_comes_out",
        complaint: "Causality violation",
    },
    // It publishes, and its caller then finds the lock taken by who does not see it.
    Mutant {
        name: "push_orders_nothing_after_it",
        right: "match self.newest.cmpxchg(newest, raw, Full) {",
        wrong: "match self.newest.cmpxchg(newest, raw, kernel::sync::atomic::Release) {",
        model: "sending::the_last_command_is_sent",
        complaint: "a command was not sent",
    },
    Mutant {
        name: "push_overwrites_what_came_in_between",
        right: "Ok(_) => return Ok(()),
                Err(now) => newest = now,",
        wrong: "Ok(_) => return Ok(()),
                Err(now) if now == Self::CLOSED => newest = now,
                Err(_) => {
                    // SAFETY: It is a mutant.
                    unsafe { T::next(raw) }.store(ptr::null_mut(), Relaxed);
                    self.newest.xchg(raw, Full);
                    return Ok(());
                }",
        model: "list::all_comes_out",
        complaint: "one is lost",
    },
    Mutant {
        name: "push_opens_a_closed_list",
        right: "if newest == Self::CLOSED {
                // SAFETY",
        wrong: "if newest == Self::CLOSED {
                if self.newest.cmpxchg(newest, raw, Full).is_ok() {
                    // SAFETY: It is a mutant.
                    unsafe { T::next(raw) }.store(ptr::null_mut(), Relaxed);
                    return Ok(());
                }
                // SAFETY",
        model: "list::nothing_gets_in_when_it_is_closed",
        complaint: "it got into a closed list",
    },
    Mutant {
        name: "take_opens_a_closed_list",
        right: "if newest == Self::CLOSED || newest == new {
                return",
        wrong: "if newest == Self::CLOSED || newest == new {
                let _ = self.newest.cmpxchg(Self::CLOSED, new, Full);
                return",
        model: "list::nothing_gets_in_when_it_is_closed",
        complaint: "it got into a closed list",
    },
    Mutant {
        name: "take_does_not_see_what_was_published",
        right: "match self.newest.cmpxchg(newest, new, Full) {",
        wrong: "match self.newest.cmpxchg(newest, new, Relaxed) {",
        model: "list::all_comes_out",
        complaint: "Causality violation",
    },
    Mutant {
        name: "take_keeps_what_it_takes",
        right: "Ok(_) => return Batch::of_newest(newest),",
        wrong: "Ok(_) if newest == new => return Batch::of_newest(newest),
                Ok(_) => return Batch::of_newest(ptr::null_mut()),",
        model: "list::all_comes_out",
        complaint: "one is lost",
    },
    Mutant {
        name: "close_loses_what_was_in_it",
        right: "self.replace(Self::CLOSED)",
        wrong: "{
            self.newest.xchg(Self::CLOSED, Full);
            Batch::empty()
        }",
        model: "session::the_other_connection_takes_over within 3 preemptions",
        complaint: "deadlock",
    },
    Mutant {
        name: "close_leaves_it_open",
        right: "self.replace(Self::CLOSED)",
        wrong: "self.replace(ptr::null_mut())",
        model: "session::the_other_connection_takes_over within 3 preemptions",
        complaint: "deadlock",
    },
    Mutant {
        name: "a_batch_begins_with_the_newest",
        right: "let mut oldest = ptr::null_mut();
        while !newest.is_null() {",
        wrong: "let mut oldest = newest;
        while newest.is_null() && !oldest.is_null() {",
        model: "list::all_comes_out",
        complaint: "in another order",
    },
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let out = env::var("OUT_DIR").expect("cargo sets it");
    let mut tests = String::new();
    for source in SOURCES {
        let Source {
            path,
            fit,
            parts,
            mutants,
        } = source;
        println!("cargo::rerun-if-changed={path}");
        let right = fs::read_to_string(path).expect("cannot read a source");
        for mutant in *mutants {
            let Mutant {
                name,
                model,
                complaint,
                ..
            } = mutant;
            assert_eq!(
                right.matches(mutant.right).count(),
                1,
                "mutant {name}: {path} has changed, adapt what is to be replaced"
            );
            let wrong = right.replace(mutant.right, mutant.wrong);
            let file = Path::new(&out).join(format!("{name}.rs"));
            fs::write(&file, wrong).expect("cannot write");
            tests += &format!(
                "mod {name} {{
                    use super::*;
                    #[allow(dead_code, unused, clippy::all)]
                    #[path = {file:?}]
                    mod wrong;
                    {fit}!(wrong);
                    parts!(Wrong, {parts});
                    fails!(Wrong, {model}, {complaint:?});
                }}\n"
            );
        }
    }
    fs::write(Path::new(&out).join("mutants.rs"), tests).expect("cannot write");
}
