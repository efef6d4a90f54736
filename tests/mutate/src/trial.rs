// SPDX-License-Identifier: GPL-2.0

//! One fault in the copy of the tree.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::list::Mutation;

/// What the tests said of a fault.
pub enum Verdict {
    /// They found it: which, and what they said.
    Found(Vec<String>),
    /// They passed.
    NotFound,
    /// The compiler found it, so it is none.
    DoesNotBuild,
    /// None was run, or they could not be.
    NoTest(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Found(by) => write!(f, "found: {}", by.join("\n          ")),
            Self::NotFound => f.write_str("NOT FOUND"),
            Self::DoesNotBuild => f.write_str("does not build"),
            Self::NoTest(log) => write!(f, "no test failed, and yet they did not pass: see {log}"),
        }
    }
}

/// A fault that can be put in.
pub struct Trial<'a> {
    pub mutation: &'a Mutation,
    tree: &'a Path,
    right: String,
    wrong: String,
}

impl<'a> Trial<'a> {
    /// Looks whether the fault can be put in.
    pub fn prepare(tree: &'a Path, mutation: &'a Mutation) -> Result<Self, String> {
        let (name, file) = (&mutation.name, &mutation.file);
        let right = fs::read_to_string(tree.join(file))
            .map_err(|error| format!("{name}: does not apply: {file}: {error}"))?;
        let times = right.matches(&mutation.find).count();
        if times != 1 {
            return Err(format!(
                "{name}: does not apply: what is to be replaced stands {times} times in {file}"
            ));
        }
        let wrong = right.replace(&mutation.find, &mutation.replace);
        Ok(Self {
            mutation,
            tree,
            right,
            wrong,
        })
    }

    /// Puts the fault in, runs the tests, and takes it out again.
    pub fn run(&self) -> Verdict {
        let file = self.tree.join(&self.mutation.file);
        fs::write(&file, &self.wrong).expect("to write to the copy");
        let verdict = self.verdict();
        fs::write(&file, &self.right).expect("to write to the copy");
        verdict
    }

    fn verdict(&self) -> Verdict {
        if !self.passes("build", &["make", "--no-print-directory", "modules"]) {
            return Verdict::DoesNotBuild;
        }
        if self.passes("check", &["tools/check"]) {
            return Verdict::NotFound;
        }
        let log = self.log("check");
        let said = fs::read(&log).unwrap_or_default();
        match complaints(&String::from_utf8_lossy(&said)) {
            complaints if complaints.is_empty() => Verdict::NoTest(log.display().to_string()),
            complaints => Verdict::Found(complaints),
        }
    }

    /// What `step` says goes here.
    fn log(&self, step: &str) -> PathBuf {
        let name = &self.mutation.name;
        self.tree.join("..").join(format!("{name}-{step}.txt"))
    }

    fn passes(&self, step: &str, command: &[&str]) -> bool {
        let output = File::create(self.log(step)).expect("a file for the output");
        let status = Command::new(command[0])
            .args(&command[1..])
            .current_dir(self.tree)
            .env("T", &self.mutation.tests)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("dup"))
            .stderr(output)
            .status();
        status.expect("to run it").success()
    }
}

/// Which tests failed in the output of `tools/check`, and why; or how the guest came to its end.
fn complaints(said: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut lines = said.lines();
    while let Some(line) = lines.next() {
        // "---- name ----", then the reason, at the end of all tests.
        let test = line
            .strip_prefix("---- ")
            .and_then(|line| line.strip_suffix(" ----"));
        if let Some(test) = test {
            let mut reason = lines.next().unwrap_or_default();
            if reason.starts_with("panicked at") {
                reason = lines.next().unwrap_or_default();
            }
            complaints.push(format!("{test}: {reason}"));
        }
        for end in [
            "tools/vm: the guest died",
            "tools/vm: the guest did not finish",
            "tools/vm: the kernel complained",
        ] {
            if line.starts_with(end) {
                complaints.push(line.to_owned());
            }
        }
    }
    complaints
}
