// SPDX-License-Identifier: GPL-2.0

//! The manual pages and the completion scripts, made of the command line.

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::Cli;
use crate::failure::{Exit, Failure};
use crate::text::say;

/// # Errors
///
/// None that was seen: they are made in memory.
pub fn completion(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "rnbdctl", &mut script);
    say(&String::from_utf8_lossy(&script));
    Ok(())
}

/// # Errors
///
/// `Usage`: there is no such command.
pub fn man(command: Option<&str>) -> Result<(), Failure> {
    let mut page = Vec::new();
    Man::new(find(command)?)
        .section("8")
        .source(concat!("rnbdctl ", env!("CARGO_PKG_VERSION")))
        .manual("System administration")
        .render(&mut page)
        .map_err(|error| Failure::new(Exit::Failed, "making the page", error))?;
    say(&String::from_utf8_lossy(&page));
    Ok(())
}

/// The program, or one of its commands under the name that its page has.
fn find(command: Option<&str>) -> Result<clap::Command, Failure> {
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let Some(name) = command else {
        return Ok(program);
    };
    let found = program.find_subcommand(name).cloned();
    found.ok_or_else(|| {
        let what = format!("there is no command \"{name}\"");
        Failure::new(Exit::Usage, "man", what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages() {
        assert!(find(None).is_ok());
        assert!(find(Some("connect")).is_ok());
        assert_eq!(find(Some("nonsense")).unwrap_err().exit, Exit::Usage);
    }
}
