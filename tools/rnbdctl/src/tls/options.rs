// SPDX-License-Identifier: GPL-2.0

//! What the command line and the URI say of TLS.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;

/// How a server with TLS is checked, and how it checks the client.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Options for nbds")]
pub struct TlsArgs {
    /// The certificates of those who may issue the server's, in PEM [default: those of the system]
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// The client's certificate, and those between it and its issuer, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The client's private key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Where ca-cert.pem, ca-crl.pem, client-cert.pem and client-key.pem are; each may be missing
    #[arg(long, value_name = "DIRECTORY")]
    pub tls_certificates: Option<PathBuf>,
    /// The name that the server's certificate must have [default: the URI's host]
    #[arg(long, value_name = "NAME")]
    pub tls_hostname: Option<String>,
}

impl TlsArgs {
    /// The first option that was given.
    pub fn given(&self) -> Option<&'static str> {
        [
            (self.tls_ca.is_some(), "--tls-ca"),
            (self.tls_cert.is_some(), "--tls-cert"),
            (self.tls_key.is_some(), "--tls-key"),
            (self.tls_certificates.is_some(), "--tls-certificates"),
            (self.tls_hostname.is_some(), "--tls-hostname"),
        ]
        .into_iter()
        .find_map(|(given, name)| given.then_some(name))
    }
}

/// What a URI says of TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UriTls {
    pub hostname: Option<String>,
    pub certificates: Option<PathBuf>,
}

impl UriTls {
    /// Takes a parameter whose name begins with "tls-".
    ///
    /// # Errors
    ///
    /// Why it cannot be taken.
    pub fn take(&mut self, name: &str, value: &[u8]) -> Result<(), &'static str> {
        match (name, value) {
            ("tls-hostname", value) => {
                let name = std::str::from_utf8(value).map_err(|_| "it is not UTF-8")?;
                self.hostname = Some(name.to_owned());
            }
            ("tls-certificates", value) => {
                self.certificates = Some(Path::new(OsStr::from_bytes(value)).to_owned());
            }
            ("tls-type", b"x509") | ("tls-verify-peer", b"1" | b"true") => (),
            ("tls-type", b"anon") | ("tls-verify-peer", _) => {
                return Err("a server that is not verified could be anybody");
            }
            ("tls-type", b"psk") | ("tls-psk-file" | "tls-username", _) => {
                return Err("there are no pre-shared keys: the library for TLS does not have them");
            }
            _ => return Err("nothing is known of it"),
        }
        Ok(())
    }
}

/// The files that are used.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Files {
    pub ca: Option<PathBuf>,
    pub crl: Option<PathBuf>,
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl Files {
    /// The command line's come first. Of the directory, those count that are there.
    pub fn choose(args: &TlsArgs, uri: &UriTls) -> Self {
        let directory = args.tls_certificates.as_ref().or(uri.certificates.as_ref());
        let file = |name| {
            let path = directory?.join(name);
            path.exists().then_some(path)
        };
        let given = args.tls_cert.clone().zip(args.tls_key.clone());
        let found = || {
            // A certificate whose key is missing is a mistake, which is told when the key is read.
            let key = directory?.join("client-key.pem");
            Some((file("client-cert.pem")?, key))
        };
        Self {
            ca: args.tls_ca.clone().or_else(|| file("ca-cert.pem")),
            crl: file("ca-crl.pem"),
            identity: given.or_else(found),
        }
    }
}
