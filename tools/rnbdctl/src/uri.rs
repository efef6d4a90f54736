// SPDX-License-Identifier: GPL-2.0

//! NBD URIs, as `doc/uri.md` of the NBD project specifies them.

use std::fmt;

use fluent_uri::component::{Authority, Host};
use serde::{Deserialize, Serialize};

use crate::text::plain;
use crate::tls::UriTls;

/// The port that IANA has assigned to NBD.
const DEFAULT_PORT: u16 = 10809;

/// The context identifier of the host of a virtual machine.
const VSOCK_HOST: u32 = 2;

/// What a string may have at most in the NBD protocol, in bytes.
const MAX_STRING: usize = 4096;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// A host's name or address, and a port.
    Tcp(String, u16),
    /// The path of a UNIX socket. One that begins with NUL is an abstract name.
    Unix(Vec<u8>),
    /// A context identifier and a port.
    Vsock(u32, u32),
}

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdUri {
    pub place: Place,
    pub export: String,
    /// `None`: without TLS.
    pub tls: Option<UriTls>,
}

/// Why a text is no URI of an export.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    #[error("it is not a URI: {0}")]
    Syntax(String),
    #[error(
        "the scheme is {0:?}, but must be nbd, nbd+unix or nbd+vsock, or one of these with nbds"
    )]
    Scheme(String),
    #[error("the socket's path is missing: nbd+unix:///EXPORT?socket=PATH")]
    NoSocket,
    #[error("a UNIX socket has no host; the path goes behind \"?socket=\"")]
    HostOfUnix,
    #[error("{0:?} is not a port")]
    Port(String),
    #[error("{0:?} is not a context identifier of vsock")]
    Cid(String),
    #[error("nothing is known of the parameter {0:?}")]
    Parameter(String),
    #[error("the parameter {0:?} is given twice")]
    Twice(String),
    #[error("{0:?}: {1}")]
    TlsParameter(String, &'static str),
    #[error("the export's name {0}")]
    Name(&'static str),
}

impl NbdUri {
    /// Parses a URI.
    ///
    /// # Errors
    ///
    /// The text is no URI, or not one of NBD, or asks for what is not there.
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let uri = fluent_uri::Uri::parse(text).map_err(|e| UriError::Syntax(e.to_string()))?;
        let scheme = uri.scheme().as_str().to_ascii_lowercase();
        let (base, transport) = match scheme.split_once('+') {
            Some((base, transport)) => (base, Some(transport)),
            None => (scheme.as_str(), None),
        };
        let mut tls = match base {
            "nbd" => None,
            "nbds" => Some(UriTls::default()),
            _ => return Err(UriError::Scheme(scheme)),
        };
        let query = uri.query().map(|query| query.as_str()).unwrap_or_default();
        let socket = parameters(query, tls.as_mut())?;
        let place = match transport {
            None => tcp(uri.authority(), socket)?,
            Some("unix") => unix(uri.authority(), socket)?,
            Some("vsock") => vsock(uri.authority(), socket)?,
            _ => return Err(UriError::Scheme(scheme)),
        };
        let path = uri.path().decode().to_string();
        let path = path.map_err(|_| UriError::Name("is not UTF-8"))?;
        Ok(Self {
            place,
            export: export_of(&path)?,
            tls,
        })
    }
}

/// The path without the slash in front of it.
fn export_of(path: &str) -> Result<String, UriError> {
    let name = path.strip_prefix('/').unwrap_or(path);
    if name.contains('\0') {
        return Err(UriError::Name("contains a NUL"));
    }
    if name.len() > MAX_STRING {
        return Err(UriError::Name("has more than 4096 bytes"));
    }
    Ok(name.to_owned())
}

/// Takes the parameters, and answers the value of "socket".
fn parameters(query: &str, mut tls: Option<&mut UriTls>) -> Result<Option<Vec<u8>>, UriError> {
    let mut socket = None;
    let mut names = Vec::new();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if names.contains(&name) {
            return Err(UriError::Twice(name.to_owned()));
        }
        names.push(name);
        match name {
            "socket" => socket = Some(decode(value)),
            _ if name.starts_with("tls-") => tls
                .as_mut()
                .ok_or("it is for nbds, which encrypts")
                .and_then(|tls| tls.take(name, &decode(value)))
                .map_err(|why| UriError::TlsParameter(name.to_owned(), why))?,
            _ => return Err(UriError::Parameter(name.to_owned())),
        }
    }
    Ok(socket.filter(|path| !path.is_empty()))
}

/// Replaces each %XX of a part of a query. The URI's parser has checked that these are well-formed.
fn decode(value: &str) -> Vec<u8> {
    use fluent_uri::pct_enc::{EStr, encoder::Query};
    match EStr::<Query>::new(value) {
        Some(value) => value.decode().to_bytes().into_owned(),
        None => value.as_bytes().to_vec(),
    }
}

fn tcp(authority: Option<Authority<'_>>, socket: Option<Vec<u8>>) -> Result<Place, UriError> {
    refuse_socket(socket)?;
    let Some(authority) = authority else {
        return Ok(Place::Tcp("localhost".into(), DEFAULT_PORT));
    };
    let host = match authority.host_parsed() {
        Host::Ipv4(address) => address.to_string(),
        Host::Ipv6(address) => address.to_string(),
        Host::RegName(name) => name.decode().to_string_lossy().into_owned(),
        _ => {
            return Err(UriError::Syntax(
                "nothing is known of such addresses".into(),
            ));
        }
    };
    let host = if host.is_empty() {
        "localhost".into()
    } else {
        host
    };
    Ok(Place::Tcp(host, port(authority, DEFAULT_PORT)?))
}

/// The port of an authority, or `default` if it has none.
fn port<T: std::str::FromStr>(authority: Authority<'_>, default: T) -> Result<T, UriError> {
    match authority.port().map(|port| port.as_str()) {
        None | Some("") => Ok(default),
        Some(port) => port.parse().map_err(|_| UriError::Port(port.to_owned())),
    }
}

fn unix(authority: Option<Authority<'_>>, socket: Option<Vec<u8>>) -> Result<Place, UriError> {
    if authority.is_some_and(|authority| !authority.as_str().is_empty()) {
        return Err(UriError::HostOfUnix);
    }
    socket.map(Place::Unix).ok_or(UriError::NoSocket)
}

fn vsock(authority: Option<Authority<'_>>, socket: Option<Vec<u8>>) -> Result<Place, UriError> {
    refuse_socket(socket)?;
    let Some(authority) = authority else {
        return Ok(Place::Vsock(VSOCK_HOST, DEFAULT_PORT.into()));
    };
    let cid = match authority.host() {
        "" => VSOCK_HOST,
        host => host.parse().map_err(|_| UriError::Cid(host.to_owned()))?,
    };
    Ok(Place::Vsock(cid, port(authority, DEFAULT_PORT.into())?))
}

fn refuse_socket(socket: Option<Vec<u8>>) -> Result<(), UriError> {
    match socket {
        Some(_) => Err(UriError::Parameter("socket".into())),
        None => Ok(()),
    }
}

impl Place {
    /// The host, where there is one that a certificate can be for.
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Tcp(host, _) => Some(host),
            Self::Unix(_) | Self::Vsock(..) => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "{}:{port}", plain(host)),
            Self::Unix(path) => match path.split_first() {
                Some((0, name)) => write!(f, "@{}", plain(&String::from_utf8_lossy(name))),
                _ => write!(f, "{}", plain(&String::from_utf8_lossy(path))),
            },
            Self::Vsock(cid, port) => write!(f, "vsock {cid}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<(Place, String), UriError> {
        NbdUri::parse(text).map(|uri| (uri.place, uri.export))
    }

    fn tcp(host: &str, port: u16, export: &str) -> Result<(Place, String), UriError> {
        Ok((Place::Tcp(host.into(), port), export.into()))
    }

    fn unix(path: &[u8], export: &str) -> Result<(Place, String), UriError> {
        Ok((Place::Unix(path.to_vec()), export.into()))
    }

    #[test]
    fn examples_of_the_specification() {
        let host = "example.com";
        for (text, name) in [
            ("nbd://example.com/disk", "disk"),
            ("nbd://example.com/", ""),
            ("nbd://example.com", ""),
            ("nbd://example.com//disk", "/disk"),
            ("nbd://example.com/hello%20world", "hello world"),
        ] {
            assert_eq!(parse(text), tcp(host, 10809, name), "{text}");
        }
        let text = "nbd+unix:///disk?socket=sock";
        assert_eq!(parse(text), unix(b"sock", "disk"));
        let text = "nbd+unix:///?socket=%00/abstract";
        assert_eq!(parse(text), unix(b"\0/abstract", ""));
    }

    #[test]
    fn hosts_and_ports() {
        assert_eq!(parse("nbd://10.1.2.3:1/x"), tcp("10.1.2.3", 1, "x"));
        assert_eq!(parse("nbd://[::1]:10810"), tcp("::1", 10810, ""));
        assert_eq!(
            parse("nbd://[2001:db8::7]/a"),
            tcp("2001:db8::7", 10809, "a")
        );
        assert_eq!(parse("NBD://h/x"), tcp("h", 10809, "x"));
        assert_eq!(parse("nbd://h:/x"), tcp("h", 10809, "x"));
        assert_eq!(parse("nbd:///x"), tcp("localhost", 10809, "x"));
        assert_eq!(parse("nbd://h:65536"), Err(UriError::Port("65536".into())));
        assert_eq!(parse("nbd://user@h/x"), tcp("h", 10809, "x"));
    }

    #[test]
    fn vsock() {
        let is = |cid, port| Ok((Place::Vsock(cid, port), "x".into()));
        assert_eq!(parse("nbd+vsock://3:10810/x"), is(3, 10810));
        assert_eq!(parse("nbd+vsock://3/x"), is(3, 10809));
        assert_eq!(parse("nbd+vsock:///x"), is(2, 10809));
        assert_eq!(parse("nbd+vsock://1:4294967295/x"), is(1, u32::MAX));
        assert_eq!(
            parse("nbd+vsock://host/x"),
            Err(UriError::Cid("host".into()))
        );
    }

    #[test]
    fn names_stay_as_they_are() {
        assert_eq!(parse("nbd://h/a/../b"), tcp("h", 10809, "a/../b"));
        assert_eq!(parse("nbd://h/a+b"), tcp("h", 10809, "a+b"));
        assert_eq!(parse("nbd://h/%C3%BC"), tcp("h", 10809, "ü"));
        let long = format!("nbd://h/{}", "x".repeat(4097));
        assert_eq!(
            parse(&long),
            Err(UriError::Name("has more than 4096 bytes"))
        );
        assert_eq!(
            parse("nbd://h/a%00b"),
            Err(UriError::Name("contains a NUL"))
        );
        assert_eq!(parse("nbd://h/%ff"), Err(UriError::Name("is not UTF-8")));
    }

    #[test]
    fn tls() {
        let tls = |text: &str| NbdUri::parse(text).map(|uri| uri.tls);
        let is = |hostname: Option<&str>, certificates: Option<&str>| {
            Ok(Some(UriTls {
                hostname: hostname.map(str::to_owned),
                certificates: certificates.map(Into::into),
            }))
        };
        assert_eq!(tls("nbd://h/x"), Ok(None));
        for text in ["nbds://h/x", "NBDS+unix:///x?socket=s", "nbds+vsock://2/x"] {
            assert_eq!(tls(text), is(None, None), "{text}");
        }
        assert_eq!(parse("nbds://h/x"), tcp("h", 10809, "x"));
        assert_eq!(
            tls("nbds://h/?tls-type=x509&tls-verify-peer=1&tls-hostname=a.b"),
            is(Some("a.b"), None)
        );
        assert_eq!(
            tls("nbds+unix:///?socket=s&tls-certificates=/etc/p%20ki"),
            is(None, Some("/etc/p ki"))
        );
        for parameter in [
            "tls-verify-peer=0",
            "tls-type=anon",
            "tls-type=psk",
            "tls-psk-file=f",
            "tls-username=u",
            "tls-else=x",
            "tls-hostname=%ff",
        ] {
            for scheme in ["nbd", "nbds"] {
                let outcome = tls(&format!("{scheme}://h/?{parameter}"));
                let refused = matches!(outcome, Err(UriError::TlsParameter(..)));
                assert!(refused, "{scheme} {parameter}: {outcome:?}");
            }
        }
        // Somebody else may have added the second one.
        assert_eq!(
            tls("nbds://h/?tls-hostname=a&tls-certificates=/x&tls-hostname=b"),
            Err(UriError::Twice("tls-hostname".into()))
        );
        let outcome = tls("nbd://h/?tls-hostname=h");
        assert!(matches!(outcome, Err(UriError::TlsParameter(..))));
    }

    #[test]
    fn what_is_refused() {
        let scheme = |scheme: &str| Err(UriError::Scheme(scheme.into()));
        assert_eq!(parse("http://h/x"), scheme("http"));
        assert_eq!(parse("nbd+ssh://h/x"), scheme("nbd+ssh"));
        assert_eq!(parse("nbd+tcp://h/x"), scheme("nbd+tcp"));
        assert_eq!(parse("nbd+unix:///x"), Err(UriError::NoSocket));
        assert_eq!(parse("nbd+unix:///x?socket="), Err(UriError::NoSocket));
        assert_eq!(
            parse("nbd+unix://tmp/s?socket=s"),
            Err(UriError::HostOfUnix)
        );
        assert_eq!(
            parse("nbd+unix:///x?socket=s&socket=t"),
            Err(UriError::Twice("socket".into()))
        );
        let parameter = |name: &str| Err(UriError::Parameter(name.into()));
        assert_eq!(parse("nbd://h/x?socket=s"), parameter("socket"));
        assert_eq!(
            parse("nbd+unix:///x?socket=s&exportname=y"),
            parameter("exportname")
        );
        for text in [
            "",
            "localhost",
            "10.0.0.1:10809",
            "nbd://h/a b",
            "nbd://h/%zz",
        ] {
            assert!(
                matches!(parse(text), Err(UriError::Syntax(_) | UriError::Scheme(_))),
                "{text}"
            );
        }
    }
}
