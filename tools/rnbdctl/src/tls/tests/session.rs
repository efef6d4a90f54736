// SPDX-License-Identifier: GPL-2.0

//! The connection while this process encrypts, and what the kernel gets of it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use nix::sys::socket::sockopt::TlsCryptoInfo;
use rustls::crypto::{cipher::Iv, ring};
use rustls::{
    CipherSuite, ConnectionTrafficSecrets, ProtocolVersion, ServerConnection, StreamOwned,
};

use super::pki::{Pki, Special};
use super::{Encrypted, PATIENCE, hear};
use crate::tls::Session;
use crate::tls::kernel::crypto_info;

/// A connection whose server runs `talk` in a thread after the handshake.
fn begin<T: Send + 'static>(
    pki: &Pki,
    special: &Special,
    talk: impl FnOnce(Encrypted) -> T + Send + 'static,
) -> (Session, UnixStream, JoinHandle<T>) {
    let config = Arc::new(pki.server(special));
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = thread::spawn(move || {
        let connection = ServerConnection::new(config).unwrap();
        let mut stream = StreamOwned::new(connection, theirs);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).unwrap();
        }
        talk(stream)
    });
    let session = Session::begin(&pki.client("server.test"), &mut ours).unwrap();
    (session, ours, server)
}

/// What `work` gives; a failure if it takes for ever.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    outcome.recv_timeout(PATIENCE).expect("it hangs")
}

/// All ciphers that go with the server's kind of key, with their versions of TLS.
fn ciphers() -> impl Iterator<Item = (CipherSuite, ProtocolVersion)> {
    let suites = ring::default_provider().cipher_suites.into_iter();
    suites
        .filter(|suite| !format!("{suite:?}").contains("_RSA_"))
        .map(|suite| (suite.suite(), suite.version().version))
}

/// What the kernel is told, against what the library says of the same key.
fn check_for_kernel(version: ProtocolVersion, secrets: &ConnectionTrafficSecrets) {
    let old = version == ProtocolVersion::TLSv1_2;
    let (number, kernels) = match old {
        false => (0x0304, 0),
        true => (0x0303, 0x80),
    };
    let nonce = |iv: &Iv| {
        let mut nonce = iv.as_ref().to_vec();
        nonce[4] ^= kernels;
        nonce
    };
    match (crypto_info(Some(version), secrets, 258).unwrap(), secrets) {
        (TlsCryptoInfo::Aes128Gcm(info), ConnectionTrafficSecrets::Aes128Gcm { key, iv }) => {
            assert_eq!((info.info.version, info.info.cipher_type), (number, 51));
            assert_eq!([&info.salt[..], &info.iv].concat(), nonce(iv));
            assert_eq!(info.key, key.as_ref());
            assert_eq!(info.rec_seq, [0, 0, 0, 0, 0, 0, 1, 2]);
        }
        (TlsCryptoInfo::Aes256Gcm(info), ConnectionTrafficSecrets::Aes256Gcm { key, iv }) => {
            assert_eq!((info.info.version, info.info.cipher_type), (number, 52));
            assert_eq!([&info.salt[..], &info.iv].concat(), nonce(iv));
            assert_eq!(info.key, key.as_ref());
            assert_eq!(info.rec_seq, [0, 0, 0, 0, 0, 0, 1, 2]);
        }
        (
            TlsCryptoInfo::Chacha20Poly1305(info),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv },
        ) => {
            assert_eq!((info.info.version, info.info.cipher_type), (number, 54));
            assert_eq!(info.iv, iv.as_ref());
            assert_eq!(info.key, key.as_ref());
            assert_eq!(info.rec_seq, [0, 0, 0, 0, 0, 0, 1, 2]);
        }
        (other, _) => panic!("{other:?}"),
    }
}

#[test]
fn both_sides_have_the_same_keys_and_numbers() {
    let pki = Pki::new("keys");
    assert_eq!(ciphers().count(), 6);
    for (cipher, version) in ciphers() {
        let special = Special {
            old_tls: version == ProtocolVersion::TLSv1_2,
            cipher: Some(cipher),
            ..Special::default()
        };
        let (mut session, mut ours, server) = begin(&pki, &special, |mut stream| {
            hear(&mut stream, b"question");
            stream.write_all(b"answer").unwrap();
            // This one belongs to whoever has the keys by then.
            stream.write_all(b"request").unwrap();
            stream.conn.dangerous_extract_secrets().unwrap()
        });
        assert_eq!(session.connection.protocol_version(), Some(version));
        session.write(&mut ours, b"question").unwrap();
        let mut answer = [0; 64];
        assert_eq!(session.read(&mut ours, &mut answer).unwrap(), 6);
        let (client, server) = (
            session.connection.dangerous_extract_secrets().unwrap(),
            server.join().unwrap(),
        );
        let same = |one: (u64, ConnectionTrafficSecrets), other: (u64, _)| {
            check_for_kernel(version, &one.1);
            let text = |secrets| format!("{:?}", crypto_info(Some(version), secrets, 0).unwrap());
            assert_eq!(text(&one.1), text(&other.1));
            other.0 - one.0
        };
        assert_eq!(same(client.tx, server.rx), 0);
        assert_eq!(same(client.rx, server.tx), 1, "one record is not read");
        let mut record = Vec::new();
        ours.read_to_end(&mut record).unwrap();
        let len = u16::from_be_bytes([record[3], record[4]]);
        assert_eq!(record.len(), 5 + usize::from(len), "it is still there");
    }
}

/// The library takes nothing behind `close_notify`; whoever waits for that waits for ever.
#[test]
fn nothing_counts_behind_a_goodbye() {
    let pki = Pki::new("behind");
    for old_tls in [false, true] {
        let special = Special {
            old_tls,
            ..Special::default()
        };
        let talk = |mut stream: Encrypted| {
            stream.conn.send_close_notify();
            stream.conn.complete_io(&mut stream.sock).unwrap();
            stream.sock.write_all(&[23, 3, 3, 0, 1, 0]).unwrap();
        };
        let (mut session, mut ours, server) = begin(&pki, &special, talk);
        server.join().unwrap();
        let error = in_time(move || session.write(&mut ours, b"question")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);

        let (mut session, mut ours, server) = begin(&pki, &special, talk);
        server.join().unwrap();
        let read = in_time(move || session.read(&mut ours, &mut [0; 8]));
        assert_eq!(read.unwrap(), 0, "it is the end");
    }
}

/// The server has asked for new keys before its last reply. Whoever has the keys afterwards is understood.
#[test]
fn new_keys_that_the_server_asks_for() {
    let pki = Pki::new("update");
    let (mut session, mut ours, server) = begin(&pki, &Special::default(), |mut stream| {
        stream.conn.refresh_traffic_keys().unwrap();
        stream.write_all(b"answer").unwrap();
        // The client's answer to that, and nothing else.
        let mut rest = Vec::new();
        let error = stream.read_to_end(&mut rest).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(rest, b"");
        stream.conn.dangerous_extract_secrets().unwrap()
    });
    let mut answer = [0; 64];
    assert_eq!(session.read(&mut ours, &mut answer).unwrap(), 6);
    let (version, client) = session.into_secrets(&mut ours).unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let server = server.join().unwrap();
    let text = |secrets| format!("{:?}", crypto_info(version, secrets, 0).unwrap());
    assert_eq!((client.tx.0, client.rx.0), (0, 1));
    assert_eq!((server.rx.0, server.tx.0), (0, 1));
    assert_eq!(text(&client.tx.1), text(&server.rx.1));
    assert_eq!(text(&client.rx.1), text(&server.tx.1));
}

/// A socket whose first writing fails, and from which nothing must be read.
struct Hindered<'a>(&'a UnixStream, Option<io::ErrorKind>);

impl Read for Hindered<'_> {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        panic!("it reads")
    }
}

impl Write for Hindered<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.1.take() {
            Some(kind) => Err(kind.into()),
            None => self.0.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Nothing is sent twice, and nothing is awaited from a server that is only slow.
#[test]
fn writing_that_is_hindered() {
    let pki = Pki::new("hindered");
    let (mut session, ours, server) = begin(&pki, &Special::default(), |mut stream| {
        let mut heard = Vec::new();
        let _ = stream.read_to_end(&mut heard);
        heard
    });
    let mut interrupted = Hindered(&ours, Some(io::ErrorKind::Interrupted));
    assert_eq!(session.write(&mut interrupted, b"question").unwrap(), 8);
    let mut slow = Hindered(&ours, Some(io::ErrorKind::TimedOut));
    let error = session.write(&mut slow, b"next").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    // Not closed: the server may still send session tickets.
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.join().unwrap(), b"question");
}
