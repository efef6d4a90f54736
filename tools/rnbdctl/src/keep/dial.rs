// SPDX-License-Identifier: GPL-2.0

//! Dials in a thread of its own, so that a server that does not answer holds up nothing else.

use std::sync::mpsc::Sender;
use std::thread;

use super::Message;
use crate::cli::ServerArgs;
use crate::failure::{Exit, Failure};
use crate::opening::{Opened, open_among};
use crate::uri::NbdUri;

/// What is to be opened.
#[derive(Debug)]
pub struct Order {
    /// The URIs to be tried, in this order, each with its place in the configuration.
    pub uris: Vec<(usize, NbdUri)>,
    /// How many connections; `None`: as many as help.
    pub wanted: Option<u32>,
    /// How they are reached.
    pub server: ServerArgs,
    /// Addresses that the device is connected to. Others could be other stores. Empty: any will do.
    pub peers: Vec<String>,
}

/// What has come of an order.
#[derive(Debug)]
pub struct Dialled {
    /// Whose order it was, and which of its.
    pub keeper: usize,
    pub number: u64,
    /// The place of the URI, and what was opened.
    pub outcome: Result<(usize, Opened), Failure>,
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
            let outcome = dial(&order);
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

fn dial(order: &Order) -> Result<(usize, Opened), Failure> {
    let may = |address: &crate::dial::Address| {
        order.peers.is_empty() || order.peers.contains(&address.to_string())
    };
    let mut failures: Vec<Failure> = Vec::new();
    for (place, uri) in &order.uris {
        match open_among(uri, order.wanted, &order.server, may) {
            Ok(opened) => return Ok((*place, opened)),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::TlsArgs;
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
            uris: uris.into_iter().enumerate().collect(),
            wanted: Some(1),
            server: ServerArgs {
                connect_timeout: Duration::from_secs(5),
                tls: TlsArgs::default(),
            },
            peers: peers.iter().map(ToString::to_string).collect(),
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
}
