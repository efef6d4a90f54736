// SPDX-License-Identifier: GPL-2.0

//! Connections with TLS, against good and bad servers. That the kernel takes the keys is tested in the
//! virtual machine.

mod files;
mod pki;
mod session;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use rustls::{CertificateError, Error, ServerConnection, StreamOwned};

use super::{Client, Problem as TlsProblem};
use crate::failure::Exit;
use crate::negotiate::{Export, Handshake, Problem};
use crate::stream::Stream;
use crate::wire::Refusal;
use pki::{Pki, SERVER, Special};

const PATIENCE: Duration = Duration::from_secs(20);

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
/// The flags that answer the greeting, and the option.
const STARTTLS: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0";
/// INFO for the export "x", with the block sizes and the description.
const INFO: &[u8] = b"IHAVEOPT\0\0\0\x06\0\0\0\x0b\0\0\0\x01x\0\x02\0\x03\0\x02";
/// GO for it, with the block sizes.
const GO: &[u8] = b"IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x01x\0\x01\0\x03";
const INFO_OPTION: u8 = 6;
const GO_OPTION: u8 = 7;
const STARTTLS_OPTION: u8 = 5;

type Encrypted = StreamOwned<ServerConnection, UnixStream>;

/// A reply to an option.
fn reply(option: u8, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, option]);
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The server agrees: an export of 4096 bytes.
fn agreed(option: u8) -> Vec<u8> {
    let about = [&[0, 0], &4096_u64.to_be_bytes()[..], &[0, 1]].concat();
    [reply(option, 3, &about), reply(option, 1, &[])].concat()
}

fn hear(stream: &mut impl Read, expected: &[u8]) {
    let mut heard = vec![0; expected.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(heard, expected);
}

/// A server that runs `talk` in a thread.
fn serve_raw(talk: impl FnOnce(UnixStream) + Send + 'static) -> (Stream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = thread::spawn(move || talk(theirs));
    (Stream::new(ours.into(), PATIENCE), server)
}

/// A server that agrees to STARTTLS, and then runs `talk` over TLS.
fn serve(
    pki: &Pki,
    special: &Special,
    talk: impl FnOnce(Encrypted) + Send + 'static,
) -> (Stream, JoinHandle<()>) {
    let config = Arc::new(pki.server(special));
    serve_raw(move |mut raw| {
        raw.write_all(GREETING).unwrap();
        hear(&mut raw, STARTTLS);
        raw.write_all(&reply(STARTTLS_OPTION, 1, &[])).unwrap();
        talk(StreamOwned::new(
            ServerConnection::new(config).unwrap(),
            raw,
        ));
    })
}

fn begin(stream: Stream, client: &Client) -> Result<Handshake, Problem> {
    let mut handshake = Handshake::begin(stream)?;
    handshake.ask_for_tls()?;
    handshake.start_tls(client)?;
    Ok(handshake)
}

fn ask(stream: Stream, client: &Client) -> Result<Export, Problem> {
    let mut handshake = begin(stream, client)?;
    let export = handshake.info("x")?;
    handshake.abort();
    Ok(export)
}

fn go(stream: Stream, client: &Client) -> Problem {
    let handshake = begin(stream, client).unwrap();
    handshake.go("x").map(|(_, export)| export).unwrap_err()
}

/// Serves INFO, and expects a client that says goodbye.
fn talk_of_info(mut stream: Encrypted) {
    hear(&mut stream, INFO);
    stream.write_all(&agreed(INFO_OPTION)).unwrap();
    // ABORT, and close_notify: without that, this is an error.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"IHAVEOPT\0\0\0\x02\0\0\0\0");
}

#[test]
fn an_export_over_tls() {
    let pki = Pki::new("good");
    for old_tls in [false, true] {
        for host in ["server.test", "127.0.0.1"] {
            let special = Special {
                old_tls,
                ..Special::default()
            };
            let (stream, server) = serve(&pki, &special, talk_of_info);
            let export = ask(stream, &pki.client(host)).unwrap();
            assert_eq!(export.size, 4096);
            server.join().unwrap();
        }
    }
}

#[test]
fn a_unix_socket_has_no_tls_in_the_kernel() {
    let pki = Pki::new("unix");
    let (stream, server) = serve(&pki, &Special::default(), |mut stream| {
        hear(&mut stream, GO);
        stream.write_all(&agreed(GO_OPTION)).unwrap();
    });
    match go(stream, &pki.client("server.test")) {
        Problem::Tls(problem @ TlsProblem::Kernel { call, errno }) => {
            assert_eq!((call, errno), ("TCP_ULP", Errno::EOPNOTSUPP));
            assert_eq!(problem.step(), Some("TLS in the kernel"));
            assert_eq!(problem.exit(), Exit::Failed);
            assert!(problem.advice().unwrap().contains("modprobe tls"));
        }
        other => panic!("{other:?}"),
    }
    server.join().unwrap();
}

#[test]
fn nothing_may_follow_the_last_reply() {
    let pki = Pki::new("early");
    let (stream, server) = serve(&pki, &Special::default(), |mut stream| {
        hear(&mut stream, GO);
        let early = [agreed(GO_OPTION), vec![0; 16]].concat();
        stream.write_all(&early).unwrap();
    });
    let problem = go(stream, &pki.client("server.test"));
    assert!(
        matches!(problem, Problem::Tls(TlsProblem::Early)),
        "{problem:?}"
    );
    server.join().unwrap();
}

/// A server that says this to STARTTLS, and to which nothing else is said.
fn refuse(answer: Vec<u8>) -> Problem {
    let pki = Pki::new("refuse");
    let (stream, server) = serve_raw(move |mut raw| {
        raw.write_all(GREETING).unwrap();
        hear(&mut raw, STARTTLS);
        raw.write_all(&answer).unwrap();
        let mut rest = Vec::new();
        // It is reset if the client goes away before it has read everything.
        let _ = raw.read_to_end(&mut rest);
        assert_eq!(rest, b"", "it goes on without TLS");
    });
    let problem = ask(stream, &pki.client("server.test")).unwrap_err();
    server.join().unwrap();
    problem
}

#[test]
fn a_server_without_tls() {
    for (kind, expected) in [(1, Refusal::Unsupported), (2, Refusal::Policy)] {
        let problem = refuse(reply(STARTTLS_OPTION, (1 << 31) | kind, b"no"));
        let right = matches!(&problem, Problem::Refused { refusal, .. } if *refusal == expected);
        assert!(right, "{problem:?}");
    }
    let problem = refuse(reply(STARTTLS_OPTION, 3, &[0; 12]));
    assert!(matches!(problem, Problem::Broken(_)), "{problem:?}");
    // An answer to what was not asked, in front of the true one.
    let before = [agreed(INFO_OPTION), reply(STARTTLS_OPTION, 1, &[])].concat();
    let problem = refuse(before);
    assert!(matches!(problem, Problem::Broken(_)), "{problem:?}");
}

/// Somebody on the way can take the flag away.
#[test]
fn a_server_that_is_not_fixed() {
    let pki = Pki::new("old");
    let (stream, server) = serve_raw(|mut raw| {
        raw.write_all(b"NBDMAGICIHAVEOPT\0\0").unwrap();
        let mut rest = Vec::new();
        raw.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, [0; 4]);
    });
    let problem = ask(stream, &pki.client("server.test")).unwrap_err();
    assert!(matches!(problem, Problem::NotFixed), "{problem:?}");
    server.join().unwrap();
}

/// What was sent in clear text must not count as if it had come over TLS, however early it came.
#[test]
fn clear_text_is_not_taken_for_tls() {
    let pki = Pki::new("injection");
    let config = Arc::new(pki.server(&Special::default()));
    let injected = [reply(STARTTLS_OPTION, 1, &[]), agreed(INFO_OPTION)].concat();
    let (stream, server) = serve_raw(move |mut raw| {
        raw.write_all(GREETING).unwrap();
        hear(&mut raw, STARTTLS);
        raw.write_all(&injected).unwrap();
        // Whoever injects cannot keep the true server from going on.
        let connection = ServerConnection::new(config).unwrap();
        let mut stream = StreamOwned::new(connection, raw);
        assert!(stream.read(&mut [0; 64]).is_err());
    });
    let problem = ask(stream, &pki.client("server.test")).unwrap_err();
    assert!(
        problem.to_string().contains("does not speak TLS"),
        "{problem:?}"
    );
    server.join().unwrap();
}

/// Neither during the handshake nor afterwards, and not if it looks like a record of TLS.
#[test]
fn records_in_clear_text_are_not_taken() {
    let pki = Pki::new("clear");
    let record = |kind: u8, data: &[u8]| {
        let len = (data.len() as u16).to_be_bytes();
        [&[kind, 3, 3], &len[..], data].concat()
    };
    let data = record(23, &agreed(INFO_OPTION));
    let goodbye = record(21, &[1, 0]);
    let handshake = record(22, &[4, 0, 0, 0]);
    for injected in [data, goodbye, handshake] {
        for old_tls in [false, true] {
            let special = Special {
                old_tls,
                ..Special::default()
            };
            let clear = injected.clone();
            let (stream, server) = serve(&pki, &special, move |mut stream| {
                hear(&mut stream, INFO);
                stream.sock.write_all(&clear).unwrap();
                assert!(stream.read(&mut [0; 64]).is_err(), "it does not go on");
            });
            let problem = ask(stream, &pki.client("server.test")).unwrap_err();
            server.join().unwrap();
            let noticed = matches!(problem, Problem::Tls(TlsProblem::Tls(Error::DecryptError)));
            assert!(noticed, "{injected:?}: {problem:?}");
        }
        let (stream, server) = serve(&pki, &Special::default(), move |mut stream| {
            stream.sock.write_all(&injected).unwrap();
            let _ = stream.read(&mut [0; 64]);
        });
        let problem = ask(stream, &pki.client("server.test")).unwrap_err();
        server.join().unwrap();
        assert!(
            matches!(problem, Problem::Tls(TlsProblem::Tls(_)) | Problem::Io(_)),
            "{problem:?}"
        );
    }
}

/// A handshake that fails, for this client.
fn fail(pki: &Pki, special: &Special, client: &Client) -> TlsProblem {
    let (stream, server) = serve(pki, special, |mut stream| {
        let outcome = stream.read(&mut [0; 64]);
        assert!(outcome.is_err(), "{outcome:?}");
    });
    let problem = ask(stream, client).unwrap_err();
    server.join().unwrap();
    match problem {
        Problem::Tls(problem) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn certificates_that_are_not_accepted() {
    let (pki, other) = (Pki::new("accepted"), Pki::new("unknown"));
    let good = Special::default();
    let problem = fail(&pki, &good, &pki.client("other.test"));
    assert_eq!(
        problem.to_string(),
        "the server's certificate is for server.test, 127.0.0.1, not for other.test"
    );
    assert!(problem.advice().unwrap().contains("--tls-hostname"));
    assert_eq!(problem.exit(), Exit::Unreachable);

    let nameless = Special {
        nameless: true,
        ..Special::default()
    };
    let problem = fail(&pki, &nameless, &pki.client("server.test"));
    assert_eq!(
        problem.to_string(),
        "the server's certificate has no names (subjectAltName), and must have server.test"
    );
    assert!(problem.advice().unwrap().contains("CN"));

    let problem = fail(&pki, &good, &other.client("server.test"));
    let unknown = CertificateError::UnknownIssuer;
    assert!(
        matches!(&problem, TlsProblem::Tls(Error::InvalidCertificate(error)) if *error == unknown),
        "{problem:?}"
    );
    assert!(problem.advice().unwrap().contains("--tls-ca"));

    let expired = Special {
        expired: true,
        ..Special::default()
    };
    let problem = fail(&pki, &expired, &pki.client("server.test"));
    let words = problem.to_string();
    assert!(
        words.contains("has expired") && words.contains("days ago"),
        "{words}"
    );
}

#[test]
fn certificates_that_were_revoked() {
    let pki = Pki::new("revoked");
    let good = Special::default();
    pki.revoke(SERVER + 1, 2500);
    let (stream, server) = serve(&pki, &good, talk_of_info);
    ask(stream, &pki.client("server.test")).unwrap();
    server.join().unwrap();
    for (number, until, expected) in [
        (SERVER, 2500, "the server's certificate has been revoked"),
        (
            SERVER + 1,
            2001,
            "the list of revoked certificates has expired",
        ),
    ] {
        pki.revoke(number, until);
        let problem = fail(&pki, &good, &pki.client("server.test"));
        assert_eq!(problem.to_string(), expected);
    }
}

#[test]
fn a_server_that_asks_for_a_certificate() {
    let pki = Pki::new("mutual");
    for old_tls in [false, true] {
        let special = Special {
            asks_for_certificates: true,
            old_tls,
            ..Special::default()
        };
        let problem = fail(&pki, &special, &pki.client("server.test"));
        assert!(
            matches!(problem, TlsProblem::Tls(Error::AlertReceived(_))),
            "{problem:?}"
        );
        assert_eq!(problem.exit(), Exit::Refused);
        assert!(problem.advice().unwrap().contains("--tls-cert"));
    }
    pki.issue_for_client();
    let special = Special {
        asks_for_certificates: true,
        ..Special::default()
    };
    let (stream, server) = serve(&pki, &special, talk_of_info);
    assert_eq!(ask(stream, &pki.client("server.test")).unwrap().size, 4096);
    server.join().unwrap();
}

/// With close_notify or without it, which somebody on the way can bring about; between two records, or within
/// one.
#[test]
fn a_server_that_goes_away() {
    let pki = Pki::new("gone");
    let goodbye = |stream: &mut Encrypted| {
        stream.conn.send_close_notify();
        stream.flush().unwrap();
    };
    let half_a_reply =
        |stream: &mut Encrypted| stream.write_all(&agreed(INFO_OPTION)[..30]).unwrap();
    let half_a_record = |stream: &mut Encrypted| stream.sock.write_all(&[23, 3, 3, 0, 90]).unwrap();
    let ways: [fn(&mut Encrypted); 4] = [|_| (), goodbye, half_a_reply, half_a_record];
    for last in ways {
        let (stream, server) = serve(&pki, &Special::default(), move |mut stream| {
            hear(&mut stream, INFO);
            last(&mut stream);
        });
        match ask(stream, &pki.client("server.test")).unwrap_err() {
            Problem::Io(error) => assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof),
            other => panic!("{other:?}"),
        }
        server.join().unwrap();
    }
}
