// SPDX-License-Identifier: GPL-2.0

//! `differences.toml`: where the two drivers may differ. A test that is given different answers
//! without an entry there fails.

use std::sync::LazyLock;

use toml::{Table, Value};

use crate::driver::Driver;

static LIST: LazyLock<Table> = LazyLock::new(|| {
    include_str!("../differences.toml")
        .parse()
        .expect("differences.toml is TOML")
});

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

/// What is wrong with the list itself, given the names of all tests.
pub fn mistakes(all: &[String]) -> Vec<String> {
    let mut mistakes = Vec::new();
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
