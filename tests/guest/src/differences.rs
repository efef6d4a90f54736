// SPDX-License-Identifier: GPL-2.0

//! `differences.toml`: where the two drivers may differ. A test that is given different answers
//! without an entry there fails.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use toml::{Table, Value};

use crate::driver::Driver;

static LIST: LazyLock<Table> = LazyLock::new(|| {
    include_str!("../differences.toml")
        .parse()
        .expect("differences.toml is TOML")
});

/// The guide that has a paragraph for each difference, with the difference's name in brackets.
const GUIDE: &str = include_str!("../../../Documentation/admin-guide.rst");

/// Which driver's behaviour the difference `name` makes the running `test` expect.
pub fn expected(driver: Driver, test: &str, name: &str) -> Driver {
    let entry = entries("difference").find(|entry| text(entry, "name") == Some(name));
    let entry = entry.unwrap_or_else(|| panic!("differences.toml has no difference {name:?}"));
    assert!(
        tests(entry).any(|listed| listed == test),
        "differences.toml does not list {test} under {name:?}"
    );
    driver
}

/// Why the drivers differ in `name`.
pub fn reason(name: &str) -> &'static str {
    let entry = entries("difference").find(|entry| text(entry, "name") == Some(name));
    let reason = entry.and_then(|entry| text(entry, "reason"));
    reason.unwrap_or_else(|| panic!("differences.toml has no difference {name:?}"))
}

/// Why `test` cannot be run with this driver, if it cannot.
pub fn skip(driver: Driver, test: &str) -> Option<&'static str> {
    entries("skip")
        .find(|entry| {
            text(entry, "driver") == Some(driver.name())
                && tests(entry).any(|listed| listed == test)
        })
        .map(|entry| text(entry, "reason").expect("a reason"))
}

/// What is wrong with the list itself, and with the guide's, given the names of all tests.
pub fn mistakes(all: &[String]) -> Vec<String> {
    let mut mistakes = mistakes_of_the_guide();
    for (kind, keys) in [
        ("difference", ["name", "nbd", "rnbd", "reason"].as_slice()),
        ("skip", &["driver", "reason"]),
    ] {
        for entry in entries(kind) {
            for key in keys
                .iter()
                .filter(|key| text(entry, key).is_none_or(str::is_empty))
            {
                mistakes.push(format!("a {kind} without {key}: {entry:?}"));
            }
            for test in tests(entry).filter(|test| !all.iter().any(|name| name == test)) {
                mistakes.push(format!(
                    "a {kind} for the test {test}, which does not exist"
                ));
            }
        }
    }
    mistakes
}

/// Which differences are in one of the two lists only.
fn mistakes_of_the_guide() -> Vec<String> {
    let listed = entries("difference").filter_map(|entry| text(entry, "name"));
    let listed: BTreeSet<&str> = listed.collect();
    let is_name = |word: &&str| {
        let allowed = |c: char| c.is_ascii_lowercase() || c == '-';
        word.contains('-') && word.chars().all(allowed)
    };
    let in_brackets = GUIDE.split('[').skip(1);
    let in_brackets = in_brackets.filter_map(|rest| Some(rest.split_once(']')?.0));
    let described: BTreeSet<&str> = in_brackets.filter(is_name).collect();
    let missing = listed.difference(&described);
    let missing = missing.map(|name| format!("admin-guide.rst does not describe [{name}]"));
    let unknown = described.difference(&listed);
    let unknown =
        unknown.map(|name| format!("admin-guide.rst describes [{name}], which is not listed"));
    missing.chain(unknown).collect()
}

fn entries(kind: &str) -> impl Iterator<Item = &'static Table> + use<> {
    let entries = LIST.get(kind).and_then(Value::as_array);
    entries.into_iter().flatten().filter_map(Value::as_table)
}

fn tests(entry: &'static Table) -> impl Iterator<Item = &'static str> {
    let tests = entry.get("tests").and_then(Value::as_array);
    tests.into_iter().flatten().filter_map(Value::as_str)
}

fn text(entry: &'static Table, key: &str) -> Option<&'static str> {
    entry.get(key).and_then(Value::as_str)
}
