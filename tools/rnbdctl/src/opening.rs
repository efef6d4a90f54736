// SPDX-License-Identifier: GPL-2.0

//! Opens the connections of a device to an export.

use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use crate::cli::ServerArgs;
use crate::dial::Address;
use crate::failure::{Exit, Failure};
use crate::negotiate::Export;
use crate::same::differences;
use crate::server::Server;
use crate::structured::Wanted;
use crate::uri::NbdUri;
use crate::wire::{self, Opt};

/// More connections than this have not been seen to help.
const ENOUGH: usize = 4;

/// Once a connection is ready, and fewer than wanted will do, the others may take at least so long, for each step and
/// for all of them: requests are waiting.
const OTHERS: Duration = Duration::from_secs(1);

/// Connections that are ready for requests, and what the server says of the export.
#[derive(Debug)]
pub struct Opened {
    /// Where all of them lead.
    pub address: Address,
    pub sockets: Vec<OwnedFd>,
    pub export: Export,
    /// How many were wanted and could not be had.
    pub missing: u32,
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
/// accepts, if it accepts any, and that are ready soon after the first one.
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
    let mut server = Server::new(uri, args, structured)?;
    let explain = |server: &Server, problem| server.explain_option(problem, Opt::Go);
    let begun = Instant::now();
    let (address, handshake) = server.reach_among(may)?;
    let opened = handshake.go(&uri.export);
    let (socket, export) = opened.map_err(|problem| explain(&server, problem))?;
    let mut sockets = vec![socket];
    let wanted = connections(wanted, &export)?;
    let ready = Instant::now();
    // A server may be slow, or its addresses before this one may have been.
    let soon = OTHERS.max(ready.saturating_duration_since(begun) * 2);
    if fewer == Fewer::WillDo {
        server.hurry(soon);
    }
    for number in 1..wanted {
        if fewer == Fewer::WillDo && ready.elapsed() > soon {
            break;
        }
        let handshake = server.reach_at(&address);
        let opened = handshake.and_then(|handshake| {
            let opened = handshake.go(&uri.export);
            opened.map_err(|problem| explain(&server, problem))
        });
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
        missing: wanted.saturating_sub(sockets.len() as u32),
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
    let Some(differences) = differences(first, other) else {
        return Ok(());
    };
    let what = format!("the server describes another export than by the first one: {differences}");
    Err(
        Failure::new(Exit::Refused, format!("connection {number}"), what).advise(
            "Is the address shared by servers with different contents? Use --connections 1.",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

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

    /// A server that greets one client, and not the next one.
    #[test]
    fn one_that_is_ready_waits_for_no_other() {
        let path = format!("rnbdctl-greets-once-{}", std::process::id());
        let path = std::env::temp_dir().join(path);
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            client.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
            // The client's flags, and the option GO for an export without a name.
            client.read_exact(&mut [0; 4 + 16 + 8]).unwrap();
            let mut reply = |kind: u32, data: &[u8]| {
                let mut bytes = wire::REPLY_MAGIC.to_be_bytes().to_vec();
                for field in [7, kind, data.len() as u32] {
                    bytes.extend(field.to_be_bytes());
                }
                bytes.extend(data);
                client.write_all(&bytes).unwrap();
            };
            let flags = 1 | wire::CAN_MULTI_CONN;
            let size = (1_u64 << 20).to_be_bytes();
            reply(3, &[&[0, 0], &size[..], &flags.to_be_bytes()].concat());
            reply(1, &[]);
            (listener, client)
        });
        let uri = NbdUri::parse(&format!("nbd+unix:///?socket={}", path.display())).unwrap();
        let mut args = ServerArgs {
            connect_timeout: Duration::from_secs(60),
            tls: crate::tls::TlsArgs::default(),
        };
        let begun = Instant::now();
        let any = |_: &Address| true;
        let opened = open_among(&uri, Some(3), Fewer::WillDo, &args, Wanted::No, any).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30), "it has waited");
        assert_eq!((opened.sockets.len(), opened.missing), (1, 2));
        let _listens = server.join().unwrap();
        // A first one is given all its time.
        args.connect_timeout = Duration::from_millis(1500);
        let begun = Instant::now();
        let failure = open_among(&uri, Some(1), Fewer::WillDo, &args, Wanted::No, any).unwrap_err();
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(begun.elapsed() >= args.connect_timeout);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn another_export_is_noticed() {
        let first = Export::of(1, 1);
        assert!(compare(2, &first, &first.clone()).is_ok());
        let sizes = [Export::of(3, 1), Export::of(1, 512)];
        for other in sizes {
            assert!(compare(2, &first, &other).is_err());
        }
        let words = |other: &Export| compare(2, &first, other).unwrap_err().to_string();
        let said = |other: &Export| words(other).split_once("first one: ").unwrap().1.to_owned();
        let mut other = first.clone();
        other.structured_replies = true;
        assert_eq!(said(&other), "replies structured, not simple");
        other = first.clone();
        other.block_sizes.as_mut().unwrap().preferred = 512;
        assert_eq!(said(&other), "preferred block 512 bytes, not 4096 bytes");
        other.block_sizes = None;
        assert!(said(&other).contains("smallest block not told, not 1 bytes"));
        other = first.clone();
        (other.size, other.flags) = (1 << 21, 3);
        assert_eq!(
            said(&other),
            "size 2097152 bytes, not 1048576 bytes; flags read-only (0x3), not none (0x1)"
        );
    }
}
