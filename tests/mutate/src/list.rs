// SPDX-License-Identifier: GPL-2.0

//! `mutations.toml`.

use toml::{Table, Value};

/// A fault, and who has to find it.
pub struct Mutation {
    pub name: String,
    /// The file, from the top of the tree.
    pub file: String,
    /// Stands exactly once in the file.
    pub find: String,
    pub replace: String,
    /// What comes of it.
    pub harm: String,
    /// For `make check T=`.
    pub tests: String,
}

/// The keys of an entry; the last one says which test was written because no other had found it.
const KEYS: [&str; 7] = ["name", "file", "find", "replace", "harm", "tests", "missed"];

fn entries() -> Vec<Table> {
    let list: Table = include_str!("../mutations.toml")
        .parse()
        .expect("mutations.toml is TOML");
    let entries = list.get("mutation").and_then(Value::as_array);
    let entries = entries.into_iter().flatten().filter_map(Value::as_table);
    entries.cloned().collect()
}

fn text(entry: &Table, key: &str) -> String {
    let value = entry.get(key).and_then(Value::as_str);
    value.unwrap_or_default().to_owned()
}

/// All, in the list's order.
pub fn all() -> Vec<Mutation> {
    let mutation = |entry: Table| Mutation {
        name: text(&entry, "name"),
        file: text(&entry, "file"),
        find: text(&entry, "find"),
        replace: text(&entry, "replace"),
        harm: text(&entry, "harm"),
        tests: text(&entry, "tests"),
    };
    entries().into_iter().map(mutation).collect()
}

/// What is wrong with the list itself.
pub fn mistakes(all: &[Mutation]) -> Vec<String> {
    let mut mistakes = Vec::new();
    for entry in entries() {
        let name = text(&entry, "name");
        for key in entry.keys().filter(|key| !KEYS.contains(&key.as_str())) {
            mistakes.push(format!("{name}: what is {key:?}?"));
        }
        // Taking something out leaves nothing.
        for key in ["name", "file", "find", "harm", "tests"] {
            if text(&entry, key).is_empty() {
                mistakes.push(format!("{name}: has no {key}"));
            }
        }
    }
    for (index, mutation) in all.iter().enumerate() {
        if all[..index].iter().any(|other| other.name == mutation.name) {
            mistakes.push(format!("{}: there are two of it", mutation.name));
        }
    }
    mistakes
}
