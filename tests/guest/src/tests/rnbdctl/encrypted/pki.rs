// SPDX-License-Identifier: GPL-2.0

//! Certificates, with the names of files that nbdkit and qemu-nbd look for.

use std::fs;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};

/// An authority, and the directory of what it has issued.
pub struct Pki {
    dir: String,
    ca: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate.
pub struct Issued {
    names: Vec<String>,
    purpose: ExtendedKeyUsagePurpose,
    expired: bool,
}

impl Issued {
    pub fn server() -> Self {
        Self {
            names: vec!["localhost".into(), "127.0.0.1".into()],
            purpose: ExtendedKeyUsagePurpose::ServerAuth,
            expired: false,
        }
    }

    pub fn expired(self) -> Self {
        Self {
            expired: true,
            ..self
        }
    }

    pub fn client() -> Self {
        Self {
            names: vec![],
            purpose: ExtendedKeyUsagePurpose::ClientAuth,
            expired: false,
        }
    }
}

impl Pki {
    /// A new authority, which has issued a certificate of a server.
    pub fn new(dir: &str) -> Self {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir(dir).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, dir);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(format!("{dir}/ca-cert.pem"), ca.pem()).unwrap();
        let pki = Self {
            dir: dir.to_owned(),
            ca,
        };
        pki.issue(Issued::server(), "server");
        pki
    }

    /// Writes a certificate and its key, as NAME-cert.pem and NAME-key.pem.
    pub fn issue(&self, issued: Issued, name: &str) {
        let mut params = CertificateParams::new(issued.names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![issued.purpose];
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        if issued.expired {
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        let path = |what| format!("{}/{name}-{what}.pem", self.dir);
        fs::write(path("cert"), certificate.pem()).unwrap();
        fs::write(path("key"), key.serialize_pem()).unwrap();
    }
}
