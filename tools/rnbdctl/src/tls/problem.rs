// SPDX-License-Identifier: GPL-2.0

//! What goes wrong with TLS, in words for people.

use std::io;

use nix::errno::Errno;
use rustls::{AlertDescription, CertificateError, Error, pki_types::UnixTime};

use crate::failure::Exit;
use crate::text::plain;

const SECONDS_OF_A_DAY: u64 = 86400;

/// Why a connection with TLS has failed.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// What the other side has sent is not accepted, or it has said no.
    #[error("{}", words(.0))]
    Tls(#[from] Error),
    #[error("the server sends something before it is asked")]
    Early,
    #[error("{call}: {}", errno_text(*.errno))]
    Kernel { call: &'static str, errno: Errno },
}

/// For what reads and writes a connection: only such errors can be told there.
impl From<Problem> for io::Error {
    fn from(problem: Problem) -> Self {
        Self::new(io::ErrorKind::InvalidData, problem)
    }
}

impl Problem {
    /// The step to which it belongs, where that is not the one in which it was noticed.
    pub fn step(&self) -> Option<&'static str> {
        matches!(self, Self::Kernel { .. }).then_some("TLS in the kernel")
    }

    pub fn exit(&self) -> Exit {
        match self {
            Self::Tls(Error::AlertReceived(_)) => Exit::Refused,
            Self::Tls(_) | Self::Early => Exit::Unreachable,
            Self::Kernel { .. } => Exit::Failed,
        }
    }

    /// What the reader can do.
    pub fn advice(&self) -> Option<&'static str> {
        match self {
            Self::Tls(Error::AlertReceived(alert)) => advice_on_alert(*alert),
            Self::Tls(Error::InvalidCertificate(error)) => advice_on_certificate(error),
            Self::Tls(Error::PeerIncompatible(_)) => {
                Some("It takes TLS 1.3 or 1.2, with AES-GCM or ChaCha20-Poly1305.")
            }
            Self::Tls(_) | Self::Early => None,
            Self::Kernel { call, errno } => Some(advice_on_kernel(call, *errno)),
        }
    }
}

/// Of its own errors, such as ENOTSUPP, the kernel tells programs a number that has no name for them.
fn errno_text(errno: Errno) -> String {
    match errno {
        Errno::UnknownErrno => "it is not supported".into(),
        errno => io::Error::from(errno).to_string(),
    }
}

fn advice_on_kernel(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        ("TLS_TX" | "TLS_RX", Errno::EINVAL | Errno::ENOENT | Errno::UnknownErrno) => {
            "The kernel does not have this version of TLS, or this cipher. The server can be told to use others."
        }
        (_, Errno::ENOENT | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP) => {
            "Does the kernel have TLS (CONFIG_TLS) and this cipher? \"modprobe tls\" loads the module."
        }
        _ => "The kernel's log (dmesg) may say more.",
    }
}

fn words(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => words_on_certificate(error),
        Error::AlertReceived(alert) => format!("the server refuses it: {}", name(*alert)),
        Error::InvalidMessage(_) => "what answers there does not speak TLS".into(),
        Error::PeerIncompatible(_) => {
            format!("the server has no way of TLS that rnbdctl can use ({error})")
        }
        Error::DecryptError => "what was received was changed on the way".into(),
        _ => error.to_string(),
    }
}

fn words_on_certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired => "the server's certificate has expired".into(),
        CertificateError::ExpiredContext { time, not_after } => format!(
            "the server's certificate has expired, {} days ago",
            days(*not_after, *time)
        ),
        CertificateError::NotValidYet => "the server's certificate is not valid yet".into(),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "the server's certificate is not valid yet, for {} days",
            days(*time, *not_before)
        ),
        CertificateError::Revoked => "the server's certificate has been revoked".into(),
        CertificateError::ExpiredRevocationList
        | CertificateError::ExpiredRevocationListContext { .. } => {
            "the list of revoked certificates has expired".into()
        }
        CertificateError::UnknownIssuer => {
            "the server's certificate was not issued by anybody who is trusted".into()
        }
        CertificateError::NotValidForName => "the server's certificate has another name".into(),
        CertificateError::NotValidForNameContext {
            expected,
            presented,
        } => {
            let expected = expected.to_str();
            if presented.is_empty() {
                return format!(
                    "the server's certificate has no names (subjectAltName), and must have {expected}"
                );
            }
            let names: Vec<&str> = presented.iter().map(|name| bare(name)).collect();
            let names = plain(&names.join(", "));
            format!("the server's certificate is for {names}, not for {expected}")
        }
        _ => format!("the server's certificate is not accepted: {error}"),
    }
}

/// A name that is told as `DnsName("a")`, for example.
fn bare(name: &str) -> &str {
    let inner = name
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.unwrap_or(name).trim_matches('"')
}

fn days(from: UnixTime, to: UnixTime) -> u64 {
    to.as_secs().saturating_sub(from.as_secs()) / SECONDS_OF_A_DAY
}

/// An alert as the specification calls it.
fn name(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::HandshakeFailure => "handshake_failure".into(),
        AlertDescription::BadCertificate => "bad_certificate".into(),
        AlertDescription::CertificateExpired => "certificate_expired".into(),
        AlertDescription::CertificateUnknown => "certificate_unknown".into(),
        AlertDescription::CertificateRequired => "certificate_required".into(),
        AlertDescription::UnknownCA => "unknown_ca".into(),
        AlertDescription::AccessDenied => "access_denied".into(),
        AlertDescription::ProtocolVersion => "protocol_version".into(),
        other => format!("{other:?}"),
    }
}

fn advice_on_alert(alert: AlertDescription) -> Option<&'static str> {
    match alert {
        AlertDescription::CertificateRequired | AlertDescription::HandshakeFailure => Some(
            "The server may demand a certificate of the client: --tls-cert and --tls-key. One with pre-shared \
             keys only cannot be used.",
        ),
        AlertDescription::BadCertificate
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::UnknownCA
        | AlertDescription::AccessDenied => Some(
            "It is the client's certificate that the server does not accept, or that it misses: see --tls-cert \
                 and --tls-certificates.",
        ),
        _ => Some("The server's log may say why."),
    }
}

fn advice_on_certificate(error: &CertificateError) -> Option<&'static str> {
    match error {
        CertificateError::UnknownIssuer => {
            Some("--tls-ca names a file with the certificate of its issuer.")
        }
        CertificateError::NotValidForNameContext { presented, .. } if presented.is_empty() => Some(
            "The server needs a certificate with a subjectAltName. The common name (CN) is no name of it.",
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            Some("--tls-hostname says which name the certificate must have.")
        }
        CertificateError::ExpiredRevocationList
        | CertificateError::ExpiredRevocationListContext { .. } => {
            Some("ca-crl.pem needs to be a new one of the issuer. Is this machine's clock right?")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Some("Is this machine's clock right?")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            Some("The server needs a new one. Is this machine's clock right?")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_lacks() {
        let problem = |call, errno| Problem::Kernel { call, errno };
        for errno in [Errno::EINVAL, Errno::ENOENT, Errno::UnknownErrno] {
            let advice = problem("TLS_RX", errno).advice().unwrap();
            assert!(advice.contains("this version of TLS, or this cipher"));
        }
        let advice = problem("TCP_ULP", Errno::ENOENT).advice().unwrap();
        assert!(advice.contains("modprobe tls"));
        assert_eq!(
            problem("TLS_RX", Errno::UnknownErrno).to_string(),
            "TLS_RX: it is not supported"
        );
    }
}
