// SPDX-License-Identifier: GPL-2.0

//! rnbdctl connects, lists and watches network block devices, with rnbd and with nbd.ko.
//!
//! - `cli` has the command line, `pages` makes the manual page and the completion of it
//! - `failure` says why a command has failed, and has the exit statuses
//! - `uri`, `dial`, `stream`, `wire` and `negotiate` are the way to a server: its name, its addresses, a
//!   socket with time limits, the protocol's numbers, and the handshake; `tls` encrypts it; `server` walks it,
//!   and `opening` as often as a device has connections
//! - `connect`, `exports`, `control`, `handover`, `show`, `stats`, `watch`, `events` and `keep` are the commands;
//!   `same` compares an export with a device
//! - `kernel` knows the devices: from `family_rnbd` where the driver has that family, else from `sysfs`;
//!   `device` is what is known of one; `family_nbd` changes them; `listen` hears what the drivers tell;
//!   `netlink` carries both families
//! - `text` makes tables, `log` writes messages of a program that must not wait

#![forbid(unsafe_code)]

mod cli;
mod connect;
mod control;
mod device;
mod dial;
mod events;
mod exports;
mod failure;
mod family_nbd;
mod family_rnbd;
mod handover;
mod keep;
mod kernel;
mod listen;
mod log;
mod negotiate;
mod netlink;
mod opening;
mod pages;
mod same;
mod server;
mod show;
mod sockaddr;
mod stats;
mod stream;
mod structured;
mod sysfs;
mod text;
mod tls;
mod uri;
mod watch;
mod wire;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let code = match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            ExitCode::from(failure.exit as u8)
        }
    };
    log::finish();
    code
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Connect(args) => connect::run(&args),
        Command::Exports(args) => exports::run(&args),
        Command::List(args) => show::list(&args),
        Command::Show(args) => show::show(&args),
        Command::Disconnect(args) => control::disconnect(&args),
        Command::Resize(args) => control::resize(&args),
        Command::Reconnect(args) => handover::reconnect(&args),
        Command::Handover(args) => handover::run(&args),
        Command::Keep(args) => keep::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Stats => stats::run(),
        Command::Watch(args) => watch::run(&args),
        Command::Completion { shell } => pages::completion(shell),
        Command::Man { command } => pages::man(command.as_deref()),
    }
}
