// SPDX-License-Identifier: GPL-2.0

//! What the command line and the URI say of TLS.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::client_error::ClientError;

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
    /// Where ca-cert.pem is, and perhaps ca-crl.pem, and client-cert.pem with client-key.pem
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The command line's come first. Of the directory, those count that are there; the issuers must be.
    ///
    /// # Errors
    ///
    /// The directory cannot be used, or has no issuers: that must not lead to others being trusted.
    pub fn choose(args: &TlsArgs, uri: &UriTls) -> Result<Self, ClientError> {
        let given = args.tls_cert.clone().zip(args.tls_key.clone());
        let mut files = Self {
            ca: args.tls_ca.clone(),
            crl: None,
            identity: given,
        };
        let directory = args.tls_certificates.as_ref().or(uri.certificates.as_ref());
        if let Some(directory) = directory {
            files.complete(directory)?;
        }
        Ok(files)
    }

    /// Adds what the directory has and the command line has not.
    fn complete(&mut self, directory: &Path) -> Result<(), ClientError> {
        if !directory.is_dir() {
            return Err(ClientError::Directory(directory.to_owned()));
        }
        if self.ca.is_none() {
            let ca = directory.join("ca-cert.pem");
            if !is_there(&ca)? {
                return Err(ClientError::NoIssuers(directory.to_owned()));
            }
            self.ca = Some(ca);
        }
        let crl = directory.join("ca-crl.pem");
        self.crl = is_there(&crl)?.then_some(crl);
        if self.identity.is_none() {
            let cert = directory.join("client-cert.pem");
            let key = directory.join("client-key.pem");
            // One without the other is a mistake, which is told when the other is read.
            let any = is_there(&cert)? || is_there(&key)?;
            self.identity = any.then_some((cert, key));
        }
        Ok(())
    }
}

/// Whether a directory has an entry. One that leads nowhere is there, and is told when it is read.
fn is_there(path: &Path) -> Result<bool, ClientError> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(ClientError::File(path.to_owned(), error.to_string())),
    }
}
