// SPDX-License-Identifier: GPL-2.0

//! Reaches a server, and says which step failed where it cannot.

use std::io;
use std::time::Duration;

use crate::dial::{Address, resolve};
use crate::failure::{Exit, Failure};
use crate::negotiate::{Handshake, Problem};
use crate::stream::Stream;
use crate::uri::Place;
use crate::wire::{Opt, Refusal};

const MORE_TIME: &str = "--connect-timeout gives it more time.";

/// Connects to the first address of a server that answers, and has it greet.
///
/// # Errors
///
/// `Unreachable`, with the step that failed for each address.
pub fn reach(place: &Place, patience: Duration) -> Result<(Address, Handshake), Failure> {
    reach_among(place, patience, |_| true)
}

/// As [`reach`], at the addresses that `may` accepts.
///
/// # Errors
///
/// `Unreachable`, also if there is no such address.
pub fn reach_among(
    place: &Place,
    patience: Duration,
    may: impl Fn(&Address) -> bool,
) -> Result<(Address, Handshake), Failure> {
    let addresses = resolve(place, patience).map_err(|error| {
        Failure::new(
            Exit::Unreachable,
            format!("resolving {place}"),
            io_words(&error),
        )
        .advise("Is the host's name right?")
    })?;
    let mut failures: Vec<Failure> = Vec::new();
    for address in addresses.into_iter().filter(may) {
        match reach_at(&address, patience) {
            Ok(handshake) => return Ok((address, handshake)),
            Err(failure) => failures.push(failure),
        }
    }
    let earlier: Vec<String> = failures.iter().map(ToString::to_string).collect();
    match (failures.pop(), earlier.len()) {
        (Some(failure), 1) => Err(failure),
        (None, _) => Err(Failure::new(
            Exit::Unreachable,
            format!("reaching {place}"),
            "it is not the server that the device uses",
        )),
        (_, _) => Err(Failure::new(
            Exit::Unreachable,
            format!("reaching {place}"),
            earlier.join("; "),
        )),
    }
}

/// As [`reach`], where the address is known.
///
/// # Errors
///
/// `Unreachable`.
pub fn reach_at(address: &Address, patience: Duration) -> Result<Handshake, Failure> {
    let socket = address.connect(patience).map_err(|error| {
        Failure::new(
            Exit::Unreachable,
            format!("connecting to {address}"),
            io_words(&error),
        )
        .advise_if_any(advice_on_connecting(&error))
    })?;
    let stream = Stream::new(socket, patience);
    Handshake::begin(stream).map_err(|problem| explain(problem, &format!("greeting of {address}")))
}

fn io_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => "it takes too long".into(),
        _ => error.to_string(),
    }
}

fn advice_on_connecting(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::TimedOut => Some(MORE_TIME),
        io::ErrorKind::ConnectionRefused => Some("Nothing listens there. Is the server running?"),
        io::ErrorKind::NotFound => Some("There is no such socket. Is the server running?"),
        _ => None,
    }
}

/// An option that has failed, for people.
pub fn explain_option(problem: Problem, option: Opt) -> Failure {
    explain(problem, &format!("option {}", option.name()))
}

fn explain(problem: Problem, step: &str) -> Failure {
    let exit = match problem {
        Problem::Refused { .. } | Problem::NoSuchExport => Exit::Refused,
        _ => Exit::Unreachable,
    };
    let advice = match &problem {
        Problem::Io(error) if error.kind() == io::ErrorKind::TimedOut => Some(MORE_TIME),
        Problem::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Some("The server's log may say why. Some servers require TLS, which is not there yet.")
        }
        Problem::NoSuchExport => {
            Some("Is the export's name right? \"rnbdctl exports\" lists them.")
        }
        Problem::Refused { refusal, .. } => advice_on_refusal(*refusal),
        _ => None,
    };
    Failure::new(exit, step, problem).advise_if_any(advice)
}

fn advice_on_refusal(refusal: Refusal) -> Option<&'static str> {
    match refusal {
        Refusal::Unknown => Some("Is the export's name right? \"rnbdctl exports\" lists them."),
        Refusal::TlsRequired => Some("TLS is not there yet: nbd-client has it."),
        Refusal::Policy => Some("The server's configuration decides who may do what."),
        Refusal::Shutdown => Some("Try again when the server is back."),
        _ => None,
    }
}
