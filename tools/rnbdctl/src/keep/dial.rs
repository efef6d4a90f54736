// SPDX-License-Identifier: GPL-2.0

//! Dials in a thread of its own, so that a server that does not answer holds up nothing else.

use std::sync::mpsc::Sender;
use std::thread;

use super::Message;
use super::find::Goal;
use super::kept::Kept;
use super::peers::leads_to;
use super::served::{Served, choose};
use crate::cli::ServerArgs;
use crate::dial::{Address, resolve};
use crate::failure::{Exit, Failure};
use crate::opening::{Fewer, Opened, open_among};
use crate::structured::Wanted;
use crate::tls::TlsArgs;
use crate::uri::NbdUri;

/// What is to be opened.
#[derive(Debug)]
pub struct Order {
    /// The URIs to be tried, in this order.
    pub uris: Vec<NbdUri>,
    /// How many connections; `None`: as many as help.
    pub wanted: Option<u32>,
    pub fewer: Fewer,
    /// How they are reached.
    pub server: ServerArgs,
    /// Whether replies are to be structured.
    pub structured: Wanted,
    /// Addresses that the device is connected to. Others could be other stores. Empty: any will do.
    pub peers: Vec<String>,
    /// Nothing is opened: only whether a URI leads to one of these addresses is asked.
    pub asks_only: bool,
}

impl Order {
    /// What is to be dialled for a goal. `structured` is what new connections of the device have to be like.
    ///
    /// # Errors
    ///
    /// Those of [`Choice::wanted`](crate::structured::Choice::wanted).
    pub fn new(kept: &Kept, goal: &Goal, structured: Wanted) -> Result<Self, Failure> {
        let (wanted, peers) = match goal {
            Goal::Connect => (kept.config.connections(), Vec::new()),
            Goal::Adopt { peers, .. } => (None, peers.clone()),
            Goal::Replace { dead, all, peers } => {
                let served = kept.served.as_ref();
                let served = served.filter(|_| !all && peers.is_empty());
                let peers = served.map_or_else(|| peers.clone(), Served::peers);
                (dead.or(kept.config.connections()), peers)
            }
            Goal::HandOver { connections } => (Some(*connections), Vec::new()),
        };
        let structured = match goal {
            Goal::Connect => kept.config.structured_replies.wanted()?,
            _ => structured,
        };
        Ok(Self {
            uris: choose(&kept.config.uris, kept.served.as_ref(), goal),
            wanted,
            // A server that has restarted may take some of its clients back before it has room for the others.
            fewer: match goal {
                Goal::Replace { .. } => Fewer::WillDo,
                _ => Fewer::WillNotDo,
            },
            server: ServerArgs {
                connect_timeout: kept.config.connect_timeout,
                // The URI says what is needed for TLS.
                tls: TlsArgs::default(),
            },
            peers,
            structured,
            asks_only: matches!(goal, Goal::Adopt { .. }),
        })
    }
}

/// What was found.
#[derive(Debug)]
pub enum Reached {
    /// With the URI.
    Opened(NbdUri, Opened),
    /// Where the device is connected to.
    Same(Served),
}

/// What has come of an order.
#[derive(Debug)]
pub struct Dialled {
    /// Whose order it was, and which of its.
    pub keeper: usize,
    pub number: u64,
    pub outcome: Result<Reached, Failure>,
}

/// Where the main thread's messages come from.
pub struct Dialler(pub Sender<Message>);

impl Dialler {
    /// Dials. A message tells when that is over.
    ///
    /// # Errors
    ///
    /// There can be no other thread.
    pub fn dial(&self, keeper: usize, number: u64, order: Order) -> Result<(), Failure> {
        let tell = self.0.clone();
        let spawned = thread::Builder::new().spawn(move || {
            let outcome = match order.asks_only {
                true => compare(&order),
                false => dial(&order),
            };
            // Nobody listens at the end of the program.
            let _ = tell.send(Message::Dialled(Dialled {
                keeper,
                number,
                outcome,
            }));
        });
        spawned
            .map(drop)
            .map_err(|error| Failure::new(Exit::Failed, "starting a thread", error))
    }
}

fn dial(order: &Order) -> Result<Reached, Failure> {
    let may = |address: &Address| leads_to(address, &order.peers);
    let mut failures: Vec<Failure> = Vec::new();
    for uri in &order.uris {
        match open_among(
            uri,
            order.wanted,
            order.fewer,
            &order.server,
            order.structured,
            may,
        ) {
            Ok(opened) => return Ok(Reached::Opened(uri.clone(), opened)),
            Err(failure) => failures.push(failure),
        }
    }
    let all: Vec<String> = failures.iter().map(ToString::to_string).collect();
    match (failures.pop(), all.len()) {
        (Some(failure), 1) => Err(failure),
        _ => Err(Failure::new(
            Exit::Unreachable,
            "reaching a server",
            all.join("; "),
        )),
    }
}

/// Whether one of the URIs leads to where the device is connected to.
fn compare(order: &Order) -> Result<Reached, Failure> {
    let mut unknown = Vec::new();
    for uri in &order.uris {
        match resolve(&uri.place, order.server.connect_timeout) {
            Ok(addresses) => {
                let is_peer = |address: &&Address| leads_to(address, &order.peers);
                if let Some(address) = addresses.iter().find(is_peer) {
                    return Ok(Reached::Same(Served {
                        uri: uri.clone(),
                        address: address.to_string(),
                        connections: None,
                    }));
                }
            }
            Err(error) => unknown.push(format!("resolving {}: {error}", uri.place)),
        }
    }
    if !unknown.is_empty() {
        let step = "comparing the servers with those of the device";
        return Err(Failure::new(Exit::Unreachable, step, unknown.join("; ")));
    }
    Err(Failure::new(
        Exit::Busy,
        "device",
        format!(
            "with this identifier, it is connected to {}, and none of the URIs leads there",
            order.peers.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::time::Duration;

    /// An address at which nobody listens.
    fn refused() -> NbdUri {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        NbdUri::parse(&format!("nbd://127.0.0.1:{port}")).unwrap()
    }

    fn order(uris: Vec<NbdUri>, peers: &[&str]) -> Order {
        Order {
            uris,
            wanted: Some(1),
            fewer: Fewer::WillNotDo,
            server: ServerArgs {
                connect_timeout: Duration::from_secs(5),
                tls: TlsArgs::default(),
            },
            structured: Wanted::No,
            peers: peers.iter().map(ToString::to_string).collect(),
            asks_only: false,
        }
    }

    #[test]
    fn all_that_failed_is_told() {
        let failure = dial(&order(vec![refused(), refused()], &[])).unwrap_err();
        let words = failure.to_string();
        assert_eq!(words.matches("refused").count(), 2, "{words}");
    }

    #[test]
    fn other_servers_are_left_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let uri = NbdUri::parse(&format!("nbd://{address}")).unwrap();
        let failure = dial(&order(vec![uri], &["127.0.0.1:1"])).unwrap_err();
        assert!(failure.to_string().contains("not the server"), "{failure}");
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "it was dialled");
    }

    /// Another one could have connected a device with the same identifier.
    #[test]
    fn a_device_of_another_server() {
        let uris = || vec![refused(), NbdUri::parse("nbd://127.0.0.1:7").unwrap()];
        let compared = compare(&order(uris(), &["127.0.0.1:7"]));
        assert!(matches!(compared, Ok(Reached::Same(_))), "{compared:?}");
        let failure = compare(&order(uris(), &["127.0.0.2:7"])).unwrap_err();
        assert_eq!(failure.exit, Exit::Busy);
        assert!(failure.to_string().contains("127.0.0.2:7"), "{failure}");
        let nobody = NbdUri::parse("nbd://host.invalid").unwrap();
        let failure = compare(&order(vec![nobody], &["127.0.0.2:7"])).unwrap_err();
        assert_eq!(failure.exit, Exit::Unreachable, "{failure}");
    }
}
