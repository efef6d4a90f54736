// SPDX-License-Identifier: GPL-2.0

//! What is known before a connection is made: whom to trust, who this is, and which ciphers are offered.

use std::path::Path;
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{Error as PemError, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{CipherSuite, ClientConfig, ClientConnection, RootCertStore};

use super::client_error::ClientError;
use super::options::{Files, TlsArgs, UriTls};

/// What all connections to a server begin with.
#[derive(Debug)]
pub struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Client {
    /// Reads certificates and keys. `host` is the server's name, where its address has one.
    ///
    /// # Errors
    ///
    /// A file cannot be used, or there is no name or nobody to trust.
    pub fn new(args: &TlsArgs, uri: &UriTls, host: Option<&str>) -> Result<Self, ClientError> {
        let named = args.tls_hostname.as_deref().or(uri.hostname.as_deref());
        let name = named.or(host).ok_or(ClientError::NoName)?;
        let name = ServerName::try_from(name)
            .map_err(|_| ClientError::Name(name.to_owned()))?
            .to_owned();
        Ok(Self {
            config: Arc::new(config(&Files::choose(args, uri)?)?),
            name,
        })
    }

    /// Whether there is a certificate for a server that asks for one.
    pub fn has_certificate(&self) -> bool {
        self.config.client_auth_cert_resolver.has_certs()
    }

    /// A connection that has not begun.
    ///
    /// # Errors
    ///
    /// The configuration cannot be used.
    pub fn connection(&self) -> Result<ClientConnection, rustls::Error> {
        ClientConnection::new(Arc::clone(&self.config), self.name.clone())
    }
}

fn config(files: &Files) -> Result<ClientConfig, ClientError> {
    let provider = Arc::new(provider(has_aes()));
    let trusted = Arc::new(trusted(files.ca.as_deref())?);
    let mut verifier = WebPkiServerVerifier::builder_with_provider(trusted, Arc::clone(&provider));
    if let Some(path) = &files.crl {
        let lists: Vec<CertificateRevocationListDer<'static>> = read_all(path)?;
        // There is no list for each issuer on the way. One that is too old misses what was revoked since.
        verifier = verifier
            .with_crls(lists)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration();
    }
    let verifier = verifier
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_webpki_verifier(verifier);
    let mut config = match &files.identity {
        Some((cert, key)) => {
            let chain = read_all(cert)?;
            builder
                .with_client_auth_cert(chain, read_key(key)?)
                .map_err(|error| ClientError::File(key.clone(), error.to_string()))?
        }
        None => builder.with_no_client_auth(),
    };
    config.enable_secret_extraction = true;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The ciphers, all of which the kernel has, in the order of their speed there. A server usually takes the
/// first one that it has.
fn provider(has_aes: bool) -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| rank(suite.suite(), has_aes));
    provider
}

/// Less is better. Of the instructions for AES those that processors have serve both sizes of keys.
fn rank(suite: CipherSuite, has_aes: bool) -> u8 {
    use CipherSuite::*;
    let (old, suite) = match suite {
        TLS13_AES_128_GCM_SHA256 => (0, 0),
        TLS13_AES_256_GCM_SHA384 => (0, 1),
        TLS13_CHACHA20_POLY1305_SHA256 => (0, 2),
        TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 | TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => (10, 0),
        TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 | TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => (10, 1),
        _ => (10, 2),
    };
    match has_aes {
        true => old + suite,
        false => old + (suite + 1) % 3,
    }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    true
}

/// Who may issue the server's certificate.
fn trusted(ca: Option<&Path>) -> Result<RootCertStore, ClientError> {
    let mut store = RootCertStore::empty();
    let Some(path) = ca else {
        let system = rustls_native_certs::load_native_certs();
        store.add_parsable_certificates(system.certs);
        if store.is_empty() {
            let why = system.errors.first();
            let why = why.map_or_else(String::new, |error| format!(": {error}"));
            return Err(ClientError::NobodyTrusted(why));
        }
        return Ok(store);
    };
    for certificate in read_all::<CertificateDer<'static>>(path)? {
        store
            .add(certificate)
            .map_err(|error| ClientError::File(path.to_owned(), error.to_string()))?;
    }
    Ok(store)
}

/// Everything of a kind that is in a file; at least one.
fn read_all<T: PemObject>(path: &Path) -> Result<Vec<T>, ClientError> {
    let all = T::pem_file_iter(path).and_then(Iterator::collect);
    let all: Vec<T> = all.map_err(|error| ClientError::Pem(path.to_owned(), error))?;
    if all.is_empty() {
        return Err(ClientError::Pem(path.to_owned(), PemError::NoItemsFound));
    }
    Ok(all)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, ClientError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        PemError::NoItemsFound => ClientError::File(
            path.to_owned(),
            "it has no private key in PEM, or one with a passphrase, which cannot be used".into(),
        ),
        error => ClientError::Pem(path.to_owned(), error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ciphers_are_those_of_the_kernel_in_its_order() {
        let order = |has_aes| {
            let suites = provider(has_aes).cipher_suites;
            let names = suites.iter().map(|suite| format!("{:?}", suite.suite()));
            names.collect::<Vec<_>>()
        };
        let (with, without) = (order(true), order(false));
        assert_eq!(with[0], "TLS13_AES_128_GCM_SHA256");
        assert_eq!(with[1], "TLS13_AES_256_GCM_SHA384");
        assert_eq!(with[2], "TLS13_CHACHA20_POLY1305_SHA256");
        assert_eq!(without[0], "TLS13_CHACHA20_POLY1305_SHA256");
        assert_eq!(with.len(), without.len());
        for name in with {
            assert!(name.contains("GCM") || name.contains("CHACHA20"), "{name}");
        }
    }
}
