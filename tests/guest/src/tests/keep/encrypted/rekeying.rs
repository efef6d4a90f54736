// SPDX-License-Identifier: GPL-2.0

//! A server with TLS 1.3 that changes its key after few records, as GnuTLS does after 2^24. The rest of its work does
//! another server, without TLS.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use rustls::{ServerConfig, ServerConnection};

const ADDRESS: &str = "127.0.0.1:10809";

/// How many records a key encrypts.
const RECORDS: usize = 300;

/// No key is changed earlier: `keep` takes a connection that lives for less than a second for a failed attempt.
const LIFE: Duration = Duration::from_millis(1100);

/// Words of the protocol.
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const STARTTLS: u32 = 5;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const ACK: u32 = 1;

pub struct Rekeying {
    state: Arc<State>,
    accepter: Option<JoinHandle<()>>,
}

struct State {
    config: Arc<ServerConfig>,
    /// Where the other server listens.
    behind: String,
    updates: AtomicUsize,
    done: AtomicBool,
}

impl Rekeying {
    /// With the server's certificate in the directory `pki`, in front of the server at the path `behind`.
    pub fn start(pki: &str, behind: &str) -> Self {
        let listener = TcpListener::bind(ADDRESS).expect("to listen");
        let state = Arc::new(State {
            config: Arc::new(config(pki)),
            behind: behind.to_owned(),
            updates: AtomicUsize::new(0),
            done: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&state);
        let accepter = thread::spawn(move || accept(&listener, &accepting));
        Self {
            state,
            accepter: Some(accepter),
        }
    }

    /// How often it has changed a key.
    pub fn updates(&self) -> usize {
        self.state.updates.load(Ordering::Relaxed)
    }
}

impl Drop for Rekeying {
    fn drop(&mut self) {
        self.state.done.store(true, Ordering::Relaxed);
        // It looks after each connection.
        let _ = TcpStream::connect(ADDRESS);
        if let Some(accepter) = self.accepter.take() {
            let _ = accepter.join();
        }
    }
}

fn config(pki: &str) -> ServerConfig {
    let certificate = CertificateDer::from_pem_file(format!("{pki}/server-cert.pem"));
    let key = PrivateKeyDer::from_pem_file(format!("{pki}/server-key.pem"));
    ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.expect("a certificate")],
            key.expect("a key"),
        )
        .expect("a configuration")
}

/// Until the client has closed the last connection.
fn accept(listener: &TcpListener, state: &Arc<State>) {
    let mut connections = Vec::new();
    for client in listener.incoming() {
        if state.done.load(Ordering::Relaxed) {
            break;
        }
        let (client, state) = (client.expect("a connection"), Arc::clone(state));
        connections.push(thread::spawn(move || {
            // The client ends it, mostly by a reset.
            let _ = Connection::begin(client, &state).and_then(|mut begun| begun.run(&state));
        }));
    }
    for connection in connections {
        let _ = connection.join();
    }
}

struct Connection {
    client: TcpStream,
    tls: ServerConnection,
    behind: UnixStream,
    begun: Instant,
    /// Since the key was changed.
    records: usize,
}

impl Connection {
    /// Up to STARTTLS it is itself the server. What comes then are options, for the other one.
    fn begin(mut client: TcpStream, state: &State) -> io::Result<Self> {
        client.set_nodelay(true)?;
        client.write_all(GREETING)?;
        let mut flags = [0; 4];
        client.read_exact(&mut flags)?;
        let mut option = [0; 16];
        client.read_exact(&mut option)?;
        assert_eq!(option[8..12], STARTTLS.to_be_bytes());
        client.write_all(&REPLY_MAGIC.to_be_bytes())?;
        client.write_all(&STARTTLS.to_be_bytes())?;
        client.write_all(&ACK.to_be_bytes())?;
        client.write_all(&[0; 4])?;
        let mut behind = UnixStream::connect(&state.behind)?;
        behind.read_exact(&mut [0; GREETING.len()])?;
        behind.write_all(&flags)?;
        let tls = ServerConnection::new(Arc::clone(&state.config)).map_err(io::Error::other)?;
        Ok(Self {
            client,
            tls,
            behind,
            begun: Instant::now(),
            records: 0,
        })
    }

    fn run(&mut self, state: &State) -> io::Result<()> {
        let mut bytes = vec![0; 16 << 10];
        loop {
            let mut sources = [
                PollFd::new(&self.client, PollFlags::IN),
                PollFd::new(&self.behind, PollFlags::IN),
            ];
            poll(&mut sources, None)?;
            let [from_client, from_behind] = sources.map(|source| !source.revents().is_empty());
            if from_client {
                if self.tls.read_tls(&mut self.client)? == 0 {
                    return Ok(());
                }
                let read = self.tls.process_new_packets().map_err(io::Error::other)?;
                let mut plain = vec![0; read.plaintext_bytes_to_read()];
                self.tls.reader().read_exact(&mut plain)?;
                self.behind.write_all(&plain)?;
            }
            if from_behind {
                let len = self.behind.read(&mut bytes)?;
                if len == 0 {
                    return Ok(());
                }
                self.tls.writer().write_all(&bytes[..len])?;
                self.count_record(state)?;
            }
            while self.tls.wants_write() {
                self.tls.write_tls(&mut self.client)?;
            }
        }
    }

    fn count_record(&mut self, state: &State) -> io::Result<()> {
        self.records += 1;
        if self.records >= RECORDS && self.begun.elapsed() >= LIFE {
            self.records = 0;
            self.tls.refresh_traffic_keys().map_err(io::Error::other)?;
            state.updates.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}
