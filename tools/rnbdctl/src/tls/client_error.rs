// SPDX-License-Identifier: GPL-2.0

//! What is wrong before a connection is made.

use std::path::PathBuf;

use rustls::pki_types::pem::Error as PemError;

/// Why nothing can be begun.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{}: {}", .0.display(), pem_text(.1))]
    Pem(PathBuf, PemError),
    #[error("{}: {}", .0.display(), .1)]
    File(PathBuf, String),
    #[error("{}: it is no directory", .0.display())]
    Directory(PathBuf),
    #[error("{}: there is no ca-cert.pem", .0.display())]
    NoIssuers(PathBuf),
    #[error("the system has no certificates of issuers{0}")]
    NobodyTrusted(String),
    #[error("the server's certificate must have a name, which is not known")]
    NoName,
    #[error("{0:?} is no name of a server")]
    Name(String),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

impl ClientError {
    /// What the reader can do.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::NobodyTrusted(_) | Self::NoIssuers(_) => {
                Some("--tls-ca names a file with the certificate of the issuer.")
            }
            Self::NoName => Some("--tls-hostname says which name it must have."),
            _ => None,
        }
    }
}

fn pem_text(error: &PemError) -> String {
    match error {
        PemError::Io(error) => error.to_string(),
        PemError::NoItemsFound => "nothing in it is what is looked for, in PEM".into(),
        error => format!("it is no PEM: {error}"),
    }
}
