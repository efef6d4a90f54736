// SPDX-License-Identifier: GPL-2.0

//! Certificates for tests, in a directory of their own.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, RevokedCertParams, date_time_ymd,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{CipherSuite, RootCertStore, ServerConfig};

use crate::tls::options::{TlsArgs, UriTls};
use crate::tls::{Client, client_error::ClientError};

pub struct Pki {
    pub dir: PathBuf,
    ca: CertifiedIssuer<'static, KeyPair>,
}

/// The number of a server's certificate.
pub const SERVER: u64 = 1000;

/// What is special about a server.
#[derive(Default)]
pub struct Special {
    pub expired: bool,
    pub old_tls: bool,
    pub asks_for_certificates: bool,
    pub nameless: bool,
    /// The only cipher that it has.
    pub cipher: Option<CipherSuite>,
}

impl Pki {
    /// An authority whose certificate is in ca-cert.pem of a new directory.
    pub fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("rnbdctl-{}-{test}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, test);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(dir.join("ca-cert.pem"), ca.pem()).unwrap();
        Self { dir, ca }
    }

    fn issue(&self, mut params: CertificateParams, expired: bool) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        if expired {
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// Writes client-cert.pem and client-key.pem.
    pub fn issue_for_client(&self) {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let (certificate, key) = self.issue(params, false);
        fs::write(self.dir.join("client-cert.pem"), certificate).unwrap();
        fs::write(self.dir.join("client-key.pem"), key).unwrap();
    }

    /// Writes ca-crl.pem, which revokes the certificate with this number, until a year.
    pub fn revoke(&self, number: u64, until: i32) {
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2000, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: number.into(),
                revocation_time: date_time_ymd(2000, 1, 1),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.ca).unwrap().pem().unwrap();
        fs::write(self.dir.join("ca-crl.pem"), list).unwrap();
    }

    /// A client that trusts this authority.
    pub fn client(&self, host: &str) -> Client {
        self.try_client(&TlsArgs::default(), Some(host)).unwrap()
    }

    pub fn try_client(&self, args: &TlsArgs, host: Option<&str>) -> Result<Client, ClientError> {
        let uri = UriTls {
            certificates: Some(self.dir.clone()),
            ..UriTls::default()
        };
        Client::new(args, &uri, host)
    }

    /// A server whose certificate is for "server.test" and 127.0.0.1.
    pub fn server(&self, special: &Special) -> ServerConfig {
        let names = match special.nameless {
            true => vec![],
            false => vec!["server.test".to_owned(), "127.0.0.1".to_owned()],
        };
        let mut params = CertificateParams::new(names).unwrap();
        params.serial_number = Some(SERVER.into());
        let (certificate, key) = self.issue(params, special.expired);
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let mut provider = ring::default_provider();
        if let Some(cipher) = special.cipher {
            provider
                .cipher_suites
                .retain(|suite| suite.suite() == cipher);
        }
        let provider = Arc::new(provider);
        let versions = if special.old_tls { [&TLS12] } else { [&TLS13] };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .unwrap();
        let mut trusted = RootCertStore::empty();
        trusted.add(self.ca.der().clone()).unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(trusted), provider).build();
        let mut config = match special.asks_for_certificates {
            true => builder.with_client_cert_verifier(verifier.unwrap()),
            false => builder.with_no_client_auth(),
        }
        .with_single_cert(chain, key)
        .unwrap();
        config.enable_secret_extraction = true;
        config
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}
