// SPDX-License-Identifier: GPL-2.0

//! Opens the connections of a device to an export.

use std::os::fd::OwnedFd;
use std::thread;

use crate::cli::ServerArgs;
use crate::dial::Address;
use crate::failure::{Exit, Failure};
use crate::negotiate::Export;
use crate::server::Server;
use crate::structured::Wanted;
use crate::uri::NbdUri;
use crate::wire::{self, Opt};

/// More connections than this have not been seen to help.
const ENOUGH: usize = 4;

/// Connections that are ready for requests, and what the server says of the export.
#[derive(Debug)]
pub struct Opened {
    /// Where all of them lead.
    pub address: Address,
    pub sockets: Vec<OwnedFd>,
    pub export: Export,
}

/// Opens connections to an export, all to one address, since another one could be another store.
///
/// `wanted` is how many; `None`: as many as help, if the server allows several.
///
/// # Errors
///
/// The step that failed, and why.
pub fn open(
    uri: &NbdUri,
    wanted: Option<u32>,
    args: &ServerArgs,
    structured: Wanted,
) -> Result<Opened, Failure> {
    open_among(uri, wanted, Fewer::WillNotDo, args, structured, |_| true)
}

/// Whether fewer connections than wanted are of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fewer {
    WillDo,
    WillNotDo,
}

/// As [`open`], to one of the addresses that `may` accepts. If fewer connections will do, they are those that the server
/// accepts, if it accepts any.
///
/// # Errors
///
/// Those of [`open`], or there is no such address.
pub fn open_among(
    uri: &NbdUri,
    wanted: Option<u32>,
    fewer: Fewer,
    args: &ServerArgs,
    structured: Wanted,
    may: impl Fn(&Address) -> bool,
) -> Result<Opened, Failure> {
    let server = Server::new(uri, args, structured)?;
    let go = |problem| server.explain_option(problem, Opt::Go);
    let (address, handshake) = server.reach_among(may)?;
    let (socket, export) = handshake.go(&uri.export).map_err(go)?;
    let mut sockets = vec![socket];
    for number in 1..connections(wanted, &export)? {
        let handshake = server.reach_at(&address);
        let opened = handshake.and_then(|handshake| handshake.go(&uri.export).map_err(go));
        let (socket, same) = match opened {
            Ok(opened) => opened,
            // Whoever asks for the rest is told why there is no more.
            Err(_) if fewer == Fewer::WillDo => break,
            Err(failure) => return Err(failure),
        };
        compare(number + 1, &export, &same)?;
        sockets.push(socket);
    }
    Ok(Opened {
        address,
        sockets,
        export,
    })
}

/// How many connections to make.
fn connections(wanted: Option<u32>, export: &Export) -> Result<u32, Failure> {
    let allowed = export.flags & wire::CAN_MULTI_CONN != 0;
    match wanted {
        Some(number) if number > 1 && !allowed => Err(Failure::new(
            Exit::Refused,
            "number of connections",
            "the server does not say that several are safe (NBD_FLAG_CAN_MULTI_CONN)",
        )
        .advise("Ask for one connection, or configure the server.")),
        Some(number) => Ok(number),
        None if allowed => {
            let processors = thread::available_parallelism().map_or(1, usize::from);
            Ok(processors.min(ENOUGH) as u32)
        }
        None => Ok(1),
    }
}

/// All connections must lead to the same thing.
fn compare(number: u32, first: &Export, other: &Export) -> Result<(), Failure> {
    let told = |export: &Export| {
        let replies = export.structured_replies;
        (export.size, export.flags, export.block_sizes, replies)
    };
    if told(first) == told(other) {
        return Ok(());
    }
    let what = format!(
        "the server describes another export than by the first one: {} bytes with flags {:#x}, not {} \
         bytes with flags {:#x}",
        other.size, other.flags, first.size, first.flags
    );
    Err(
        Failure::new(Exit::Refused, format!("connection {number}"), what).advise(
            "Is the address shared by servers with different contents? Use --connections 1.",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_connections_take_a_server_that_allows_them() {
        let (one, several) = (Export::of(1, 1), Export::of(1 | wire::CAN_MULTI_CONN, 1));
        assert_eq!(connections(None, &one).unwrap(), 1);
        assert_eq!(connections(Some(1), &one).unwrap(), 1);
        assert_eq!(connections(Some(2), &one).unwrap_err().exit, Exit::Refused);
        assert_eq!(connections(Some(9), &several).unwrap(), 9);
        let number = connections(None, &several).unwrap();
        assert!((1..=4).contains(&number));
    }

    #[test]
    fn another_export_is_noticed() {
        let first = Export::of(1, 1);
        assert!(compare(2, &first, &first.clone()).is_ok());
        let sizes = [Export::of(3, 1), Export::of(1, 512)];
        for other in sizes {
            assert!(compare(2, &first, &other).is_err());
        }
    }
}
