// SPDX-License-Identifier: GPL-2.0
//! The parser of the byte stream, driven as by `make fuzz` (see `tests/fuzz`), but always alike.

use proptest::prelude::*;
use std::fs;

/// Each is there because it goes where no other does.
#[test]
fn the_corpus_is_understood() {
    let corpus = fs::read_dir("../fuzz/corpus").expect("the corpus");
    let scripts = corpus.map(|entry| fs::read(entry.unwrap().path()).expect("a script"));
    let count = scripts.map(|script| rnbd_fuzz::run(&script)).count();
    assert!(count > 10, "{count} scripts");
}

proptest! {
    #[test]
    fn any_script_is_understood(script in prop::collection::vec(any::<u8>(), 0..300)) {
        rnbd_fuzz::run(&script);
    }
}
