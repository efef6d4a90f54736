// SPDX-License-Identifier: GPL-2.0

//! The benchmark of rnbd: nbd.ko and rnbd.ko, one after the other in the same virtual machine,
//! against the same servers.
//!
//! ```text
//! rnbd-bench run MODE ROUNDS      in the guest: measures; samples go to standard output
//! rnbd-bench scale ROUNDS         in the guest: the same for many devices
//! rnbd-bench connect ROUNDS       in the guest: how long it takes to connect and disconnect
//! rnbd-bench remote ROUNDS CARD   in the guest: with the server on the other side of a network card
//! rnbd-bench serve PLACE          the server, at a path or an address and port
//! rnbd-bench report DIRECTORY     on the host: DIRECTORY/*.jsonl to table, JSON and chart
//! ```
//!
//! - `matrix` says what is measured, `run` does it, `programs` starts what it needs
//! - `scale` is many devices with little to do, `latency` connecting and disconnecting
//! - `remote` is a client's machine alone
//! - `server` is a server whose answers cost next to nothing, `raw` the same bytes without a driver
//! - `sample` is what a measurement yields, `report` and `chart` show it

mod chart;
mod latency;
mod matrix;
mod programs;
mod raw;
mod remote;
mod report;
mod run;
mod sample;
mod scale;
mod server;

use std::error::Error;
use std::process::ExitCode;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["run", mode, rounds, cells] => run::run(mode, rounds, false, cells),
        ["run", mode, rounds, cells, "quick"] => run::run(mode, rounds, true, cells),
        ["scale", rounds] => scale::run(rounds),
        ["connect", rounds] => latency::run(rounds),
        ["remote", rounds, variant, cells] => remote::run(rounds, variant, cells, false),
        ["remote", rounds, variant, cells, "quick"] => {
            remote::run(rounds, variant, cells, true)
        }
        ["serve", path] => server::serve(path),
        ["report", directory] => report::report(directory.as_ref()),
        _ => Err(
            "usage: rnbd-bench run cost|wall ROUNDS CELLS [quick] | scale ROUNDS | connect ROUNDS | \
             remote ROUNDS card|plain|lossy CELLS [quick] | serve PLACE | report DIRECTORY"
                .into(),
        ),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rnbd-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
