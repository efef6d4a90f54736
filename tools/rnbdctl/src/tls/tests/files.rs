// SPDX-License-Identifier: GPL-2.0

//! Which files are used, and what is said of those that cannot be.

use std::fs;
use std::os::unix::fs::symlink;

use super::pki::Pki;
use crate::tls::client_error::ClientError;
use crate::tls::options::{Files, TlsArgs, UriTls};

#[test]
fn files_that_cannot_be_used() {
    let pki = Pki::new("files");
    let none = TlsArgs::default();
    assert!(matches!(
        pki.try_client(&none, None),
        Err(ClientError::NoName)
    ));
    assert!(matches!(
        pki.try_client(&none, Some("a b")),
        Err(ClientError::Name(_))
    ));
    let with = |ca: &str| TlsArgs {
        tls_ca: Some(pki.dir.join(ca)),
        ..TlsArgs::default()
    };
    let text = |args| {
        let outcome = pki.try_client(&args, Some("server.test"));
        outcome.map(|_| ()).unwrap_err().to_string()
    };
    assert!(text(with("missing")).contains("No such file"));
    fs::write(pki.dir.join("text"), "this is no certificate").unwrap();
    assert!(text(with("text")).contains("nothing in it"));
    // A certificate without its key.
    fs::copy(pki.dir.join("ca-cert.pem"), pki.dir.join("client-cert.pem")).unwrap();
    assert!(text(none).contains("client-key.pem: No such file"));
    let directory = TlsArgs {
        tls_certificates: Some(pki.dir.join("missing")),
        ..TlsArgs::default()
    };
    assert!(text(directory).contains("it is no directory"));
}

/// What is wrong with the directory, as it is now.
fn wrong(pki: &Pki) -> String {
    let outcome = pki.try_client(&TlsArgs::default(), Some("server.test"));
    outcome.map(|_| ()).unwrap_err().to_string()
}

/// Otherwise those are trusted whom the system trusts.
#[test]
fn a_directory_has_the_issuers() {
    let pki = Pki::new("issuers");
    let (ca, elsewhere) = (pki.dir.join("ca-cert.pem"), pki.dir.join("elsewhere"));
    fs::rename(&ca, &elsewhere).unwrap();
    assert!(wrong(&pki).contains("there is no ca-cert.pem"));
    symlink(pki.dir.join("nowhere"), &ca).unwrap();
    assert!(wrong(&pki).contains("ca-cert.pem: No such file"));
    fs::remove_file(&ca).unwrap();
    let args = TlsArgs {
        tls_ca: Some(elsewhere),
        ..TlsArgs::default()
    };
    assert!(pki.try_client(&args, Some("server.test")).is_ok());
}

#[test]
fn what_is_there_and_cannot_be_read_is_an_error() {
    let pki = Pki::new("unreadable");
    let list = pki.dir.join("ca-crl.pem");
    symlink(pki.dir.join("nowhere"), &list).unwrap();
    assert!(wrong(&pki).contains("ca-crl.pem: No such file"));
    fs::remove_file(&list).unwrap();
    // A key without its certificate.
    pki.issue_for_client();
    fs::remove_file(pki.dir.join("client-cert.pem")).unwrap();
    assert!(wrong(&pki).contains("client-cert.pem: No such file"));
}

#[test]
fn the_command_line_comes_first() {
    let pki = Pki::new("choice");
    pki.issue_for_client();
    let uri = UriTls {
        certificates: Some(pki.dir.clone()),
        ..UriTls::default()
    };
    let found = Files::choose(&TlsArgs::default(), &uri).unwrap();
    assert_eq!(found.ca, Some(pki.dir.join("ca-cert.pem")));
    assert_eq!(found.crl, None);
    let cert = pki.dir.join("client-cert.pem");
    assert_eq!(found.identity, Some((cert, pki.dir.join("client-key.pem"))));
    let args = TlsArgs {
        tls_ca: Some("ca".into()),
        tls_cert: Some("cert".into()),
        tls_key: Some("key".into()),
        ..TlsArgs::default()
    };
    let given = Files::choose(&args, &uri).unwrap();
    assert_eq!(given.ca, Some("ca".into()));
    assert_eq!(given.identity, Some(("cert".into(), "key".into())));
    assert_eq!(Files::choose(&args, &UriTls::default()).unwrap(), given);
    assert_eq!(args.given(), Some("--tls-ca"));
    assert_eq!(TlsArgs::default().given(), None);
}
