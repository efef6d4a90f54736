// SPDX-License-Identifier: GPL-2.0

//! Reaches a server, and says which step failed where it cannot.

use std::io;
use std::time::Duration;

use crate::cli::ServerArgs;
use crate::dial::{Address, resolve};
use crate::failure::{Exit, Failure};
use crate::negotiate::{Handshake, Problem};
use crate::stream::{Stream, is_end};
use crate::structured::Wanted;
use crate::tls::{self, TlsArgs};
use crate::uri::{NbdUri, Place};
use crate::wire::{Opt, Refusal};

const MORE_TIME: &str = "--connect-timeout gives it more time.";

/// A server, and what it takes to reach it.
#[derive(Debug)]
pub struct Server<'a> {
    place: &'a Place,
    patience: Duration,
    tls: Option<tls::Client>,
    structured: Wanted,
}

impl<'a> Server<'a> {
    /// Reads the files that TLS takes, if the URI asks for TLS. `structured`: what it is asked for.
    ///
    /// # Errors
    ///
    /// `Usage`: there are options for TLS, and no TLS. `Failed`: a file cannot be used.
    pub fn new(uri: &'a NbdUri, args: &ServerArgs, structured: Wanted) -> Result<Self, Failure> {
        Ok(Self {
            place: &uri.place,
            patience: args.connect_timeout,
            tls: tls_client(uri, &args.tls)?,
            structured,
        })
    }

    /// From now on no step may take longer than this.
    pub fn hurry(&mut self, patience: Duration) {
        self.patience = self.patience.min(patience);
    }

    /// Connects to the first of its addresses that answers, has it greet, and starts TLS if that is wanted.
    ///
    /// # Errors
    ///
    /// `Unreachable`, with the step that failed for each address; `Refused`: it refuses TLS, or the client.
    pub fn reach(&self) -> Result<(Address, Handshake), Failure> {
        self.reach_among(|_| true)
    }

    /// As [`Self::reach()`], at the addresses that `may` accepts.
    ///
    /// # Errors
    ///
    /// The same, and `Unreachable` if there is no such address.
    pub fn reach_among(
        &self,
        may: impl Fn(&Address) -> bool,
    ) -> Result<(Address, Handshake), Failure> {
        let place = self.place;
        let addresses = resolve(place, self.patience).map_err(|error| {
            Failure::new(
                Exit::Unreachable,
                format!("resolving {place}"),
                io_words(&error),
            )
            .advise("Is the host's name right?")
        })?;
        let mut failures: Vec<Failure> = Vec::new();
        for address in addresses.into_iter().filter(may) {
            match self.reach_at(&address) {
                Ok(handshake) => return Ok((address, handshake)),
                Err(failure) => failures.push(failure),
            }
        }
        let earlier: Vec<String> = failures.iter().map(ToString::to_string).collect();
        let step = format!("reaching {place}");
        Err(match (failures.pop(), earlier.len()) {
            (Some(failure), 1) => failure,
            (Some(failure), _) => failure.within(step, earlier.join("; ")),
            (None, _) => Failure::new(
                Exit::Unreachable,
                step,
                "it is not the server that the device uses",
            ),
        })
    }

    /// As [`Self::reach()`], where the address is known.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn reach_at(&self, address: &Address) -> Result<Handshake, Failure> {
        let socket = address.connect(self.patience).map_err(|error| {
            Failure::new(
                Exit::Unreachable,
                format!("connecting to {address}"),
                io_words(&error),
            )
            .advise_if_any(advice_on_connecting(&error))
        })?;
        let stream = Stream::new(socket, self.patience);
        let mut handshake = Handshake::begin(stream)
            .map_err(|problem| self.explain(problem, &format!("greeting of {address}")))?;
        if let Some(client) = &self.tls {
            let refused = |problem| self.explain_starttls(problem);
            handshake.ask_for_tls().map_err(refused)?;
            handshake.start_tls(client).map_err(|problem| {
                self.explain(problem, &format!("TLS handshake with {address}"))
            })?;
        }
        self.agree_on_replies(&mut handshake)?;
        Ok(handshake)
    }

    fn agree_on_replies(&self, handshake: &mut Handshake) -> Result<(), Failure> {
        if self.structured == Wanted::No {
            return Ok(());
        }
        let agreed = handshake.ask_for_structured_replies();
        agreed.or_else(|problem| self.without_structured_replies(problem))
    }

    /// A server that refuses them may do all the same.
    fn without_structured_replies(&self, problem: Problem) -> Result<(), Failure> {
        const OPTION: Opt = Opt::StructuredReply;
        let wanted = self.structured == Wanted::Yes;
        match problem {
            Problem::Refused { .. } | Problem::NotFixed if !wanted => Ok(()),
            // Others have them, and do not want them to be used, or not by this client.
            Problem::Refused {
                refusal: Refusal::Unsupported,
                ..
            } => {
                let step = format!("option {}", OPTION.name());
                let what = "the server does not have structured replies";
                Err(Failure::new(Exit::Refused, step, what))
            }
            problem => Err(self.explain_option(problem, OPTION)),
        }
    }

    /// An option that has failed, for people.
    pub fn explain_option(&self, problem: Problem, option: Opt) -> Failure {
        self.explain(problem, &format!("option {}", option.name()))
    }

    fn explain_starttls(&self, problem: Problem) -> Failure {
        let step = "option STARTTLS";
        match problem {
            Problem::Refused { .. } => Failure::new(Exit::Refused, step, problem)
                .advise("Is it configured for TLS? It was asked for nothing else."),
            problem => self.explain(problem, step),
        }
    }

    fn explain(&self, problem: Problem, step: &str) -> Failure {
        let exit = match &problem {
            Problem::Tls(problem) => problem.exit(),
            Problem::Refused { .. } | Problem::NoSuchExport => Exit::Refused,
            _ => Exit::Unreachable,
        };
        let advice = match &problem {
            Problem::Io(error) if error.kind() == io::ErrorKind::TimedOut => Some(MORE_TIME),
            Problem::Io(error) if is_end(error) => Some(self.advice_on_end()),
            Problem::NoSuchExport => {
                Some("Is the export's name right? \"rnbdctl exports\" lists them.")
            }
            Problem::Refused { refusal, .. } => advice_on_refusal(*refusal),
            Problem::Tls(problem) => problem.advice(),
            _ => None,
        };
        let step = match &problem {
            Problem::Tls(problem) => problem.step().unwrap_or(step),
            _ => step,
        };
        Failure::new(exit, step, problem).advise_if_any(advice)
    }

    /// Why a server may have closed the connection without a word.
    fn advice_on_end(&self) -> &'static str {
        match &self.tls {
            None => "The server's log may say why. It may require TLS (nbds).",
            Some(client) if client.has_certificate() => {
                "The server's log may say why. It may not accept the client's certificate."
            }
            Some(_) => {
                "The server's log may say why. It may demand a certificate of the client (--tls-cert)."
            }
        }
    }
}

/// Whoever gives options for TLS must not get a connection without it.
fn tls_client(uri: &NbdUri, args: &TlsArgs) -> Result<Option<tls::Client>, Failure> {
    const STEP: &str = "preparing TLS";
    match (&uri.tls, args.given()) {
        (None, Some(option)) => Err(Failure::new(
            Exit::Usage,
            option,
            "the URI asks for a connection without TLS",
        )
        .advise("One with TLS begins with nbds.")),
        (None, None) => Ok(None),
        (Some(parameters), _) => {
            let client = tls::Client::new(args, parameters, uri.place.host());
            let client = client.map_err(|error| {
                let advice = error.advice();
                Failure::new(Exit::Failed, STEP, error).advise_if_any(advice)
            })?;
            Ok(Some(client))
        }
    }
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

fn advice_on_refusal(refusal: Refusal) -> Option<&'static str> {
    match refusal {
        Refusal::Unknown => Some("Is the export's name right? \"rnbdctl exports\" lists them."),
        Refusal::TlsRequired => Some("The URI must begin with nbds in place of nbd."),
        Refusal::Policy => Some("The server's configuration decides who may do what."),
        Refusal::Shutdown => Some("Try again when the server is back."),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::UriTls;

    /// A server that closes the connection says nothing; the advice must fit what it was offered.
    #[test]
    fn advice_on_a_server_that_goes_away() {
        let place = Place::Tcp("localhost".into(), 10809);
        let advice = |tls: Option<UriTls>| {
            let uri = NbdUri {
                place: place.clone(),
                export: String::new(),
                tls: tls.clone(),
            };
            let ca = std::env::temp_dir().join(format!("rnbdctl-{}-ca", std::process::id()));
            let issuer = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            std::fs::write(&ca, issuer.cert.pem()).unwrap();
            let tls = TlsArgs {
                tls_ca: tls.map(|_| ca.clone()),
                ..TlsArgs::default()
            };
            let server = Server {
                place: &place,
                patience: Duration::ZERO,
                tls: tls_client(&uri, &tls).unwrap(),
                structured: Wanted::No,
            };
            let _ = std::fs::remove_file(&ca);
            let end = Problem::Io(io::ErrorKind::UnexpectedEof.into());
            format!("{:?}", server.explain_option(end, Opt::Go))
        };
        let (without, with) = (advice(None), advice(Some(UriTls::default())));
        assert!(without.contains("nbds") && !without.contains("--tls-cert"));
        assert!(!with.contains("nbds") && with.contains("--tls-cert"));
    }

    /// Only one kind of refusal means that it does not have them.
    #[test]
    fn a_server_that_refuses_structured_replies() {
        let place = Place::Tcp("localhost".into(), 10809);
        let outcome = |structured, refusal| {
            let server = Server {
                place: &place,
                patience: Duration::ZERO,
                tls: None,
                structured,
            };
            server.without_structured_replies(Problem::Refused {
                refusal,
                words: "not today".into(),
            })
        };
        assert!(outcome(Wanted::IfOffered, Refusal::Unsupported).is_ok());
        assert!(outcome(Wanted::IfOffered, Refusal::Policy).is_ok());
        let words = |refusal| outcome(Wanted::Yes, refusal).unwrap_err().to_string();
        let unsupported = words(Refusal::Unsupported);
        assert!(
            unsupported.contains("does not have structured replies"),
            "{unsupported}"
        );
        for refusal in [Refusal::Policy, Refusal::TlsRequired] {
            let told = words(refusal);
            assert!(
                told.contains("not today") && !told.contains("does not have"),
                "{told}"
            );
        }
    }
}
