// SPDX-License-Identifier: GPL-2.0

//! Puts each fault of `mutations.toml` into a copy of the driver, one at a time, and runs the tests
//! there that have to find it. `tools/mutate` makes the copy and calls this in the build root:
//!
//! ```text
//! rnbd-mutate TREE [PATTERN,...]
//! ```

mod list;
mod trial;

use std::path::PathBuf;
use std::process::ExitCode;

use list::Mutation;
use trial::{Trial, Verdict};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(tree) = arguments.next().map(PathBuf::from) else {
        eprintln!("Usage: rnbd-mutate TREE [PATTERN,...]");
        return ExitCode::from(2);
    };
    let pattern = arguments.next().unwrap_or_default();
    let all = list::all();
    let mut mistakes = list::mistakes(&all);
    let trials: Vec<Trial> = all
        .iter()
        .filter(|mutation| selected(mutation, &pattern))
        .filter_map(|mutation| {
            Trial::prepare(&tree, mutation)
                .map_err(|mistake| mistakes.push(mistake))
                .ok()
        })
        .collect();
    let mut failures = mistakes;
    let mut found = 0;
    for trial in &trials {
        let name = &trial.mutation.name;
        println!("== {name}: {}", trial.mutation.harm);
        let verdict = trial.run();
        println!("   {verdict}");
        match verdict {
            Verdict::Found(_) => found += 1,
            other => failures.push(format!("{name}: {other}")),
        }
    }
    println!("{found} found, {} not", failures.len());
    for failure in &failures {
        println!("  {failure}");
    }
    if failures.is_empty() && found > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn selected(mutation: &Mutation, pattern: &str) -> bool {
    pattern.is_empty() || pattern.split(',').any(|part| mutation.name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever changes the driver learns at once which entries have to change with it.
    #[test]
    fn mutations_apply() {
        let tree = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
        let all = list::all();
        let does_not_apply = |mutation| Trial::prepare(&tree, mutation).err();
        let mut mistakes = list::mistakes(&all);
        mistakes.extend(all.iter().filter_map(does_not_apply));
        assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
    }
}
