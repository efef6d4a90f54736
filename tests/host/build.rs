// SPDX-License-Identifier: GPL-2.0
//! Writes wrong variants of `rnbd_cmd.rs`, each with the model that must fail on it
//! (see `src/mutants.rs`).

use std::{env, fs, path::Path};

struct Mutant {
    name: &'static str,
    /// Stands exactly once in the source.
    right: &'static str,
    wrong: &'static str,
    /// The model that must fail, and what it then says.
    model: &'static str,
    complaint: &'static str,
}

const CLAIM: &str =
    "pub(crate) fn claim(&self, generation: u32, connection: u16) -> Result<P::Item, Refused> {\n";

const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "claim_ignores_the_generation",
        right: CLAIM,
        wrong: "pub(crate) fn claim(&self, _: u32, connection: u16) -> Result<P::Item, Refused> {
            let generation = Word(self.word.load()).generation();",
        model: "ownership::old_reply_after_reuse_of_the_tag",
        complaint: "an old reply was accepted",
    },
    Mutant {
        name: "claim_ignores_the_connection",
        right: CLAIM,
        wrong: "pub(crate) fn claim(&self, generation: u32, _: u16) -> Result<P::Item, Refused> {
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
        model: "session::the_other_connection_takes_over",
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
];

fn main() {
    let source = "../../rnbd_cmd.rs";
    println!("cargo::rerun-if-changed={source}");
    println!("cargo::rerun-if-changed=build.rs");
    let right = fs::read_to_string(source).expect("cannot read rnbd_cmd.rs");
    let out = env::var("OUT_DIR").expect("cargo sets it");
    let mut tests = String::new();
    for mutant in MUTANTS {
        let name = mutant.name;
        assert_eq!(
            right.matches(mutant.right).count(),
            1,
            "mutant {name}: rnbd_cmd.rs has changed, adapt what is to be replaced"
        );
        let wrong = right.replace(mutant.right, mutant.wrong);
        fs::write(Path::new(&out).join(format!("{name}.rs")), wrong).expect("cannot write");
        let (model, complaint) = (mutant.model, mutant.complaint);
        tests += &format!(
            "#[allow(dead_code, clippy::all)]
            #[path = \"{name}.rs\"]
            mod {name};
            mutant!({name}, {model}, {complaint:?});\n"
        );
    }
    fs::write(Path::new(&out).join("mutants.rs"), tests).expect("cannot write");
}
