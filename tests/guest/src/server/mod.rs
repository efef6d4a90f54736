// SPDX-License-Identifier: GPL-2.0

//! A scriptable NBD server that speaks the transmission phase only: the ioctl interface is handed
//! sockets on which the handshake is already over.
//!
//! Each connection is served by one thread. What it does with a request is a script, a closure
//! that is given the connection and the request's header; [`Conn::serve`] is the honest one. A
//! script reads the data of a write itself, so that it can also decline to.

pub mod chunks;
mod conn;
mod sockets;
mod store;

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::fcntl_dupfd_cloexec;

pub use self::conn::{Conn, ok};
pub use self::sockets::{
    MPTCP, Transport, decrypt_receiving, encrypt, encrypt_sending, listen_on_vsock, mptcp_pair,
    new_socket, tcp_pair, with_subflows_to_join,
};
use self::store::Store;
use crate::debug_kernel::patient;
use crate::proto::{Command, Request};

type Script = dyn Fn(&mut Conn, &Request) -> io::Result<()> + Send + Sync;

pub struct Server {
    state: Arc<State>,
    /// The smallest number that a descriptor of its own may have.
    lowest: RawFd,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct State {
    store: Mutex<Store>,
    /// Every request so far, in order of arrival.
    requests: Mutex<Vec<Request>>,
    arrival: Condvar,
    script: RwLock<Arc<Script>>,
    /// One handle of each connection's socket, to end it from outside.
    sockets: Mutex<Vec<UnixStream>>,
    living: AtomicUsize,
    /// How much has come, for who waits for the client to make progress.
    received: AtomicUsize,
}

/// All servers, for [`kill_all`].
static SERVERS: Mutex<Vec<Weak<State>>> = Mutex::new(Vec::new());

/// Ends every connection of every server: what may set free a test that hangs.
pub fn kill_all() {
    for server in SERVERS.lock().unwrap().iter().filter_map(Weak::upgrade) {
        server.kill();
    }
}

impl State {
    fn kill(&self) {
        for socket in self.sockets.lock().unwrap().iter() {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Server {
    /// An honest server of zeroes.
    pub fn new() -> Self {
        let state = State {
            store: Mutex::default(),
            requests: Mutex::default(),
            arrival: Condvar::new(),
            script: RwLock::new(Arc::new(Conn::serve)),
            sockets: Mutex::default(),
            living: AtomicUsize::new(0),
            received: AtomicUsize::new(0),
        };
        let state = Arc::new(state);
        let mut servers = SERVERS.lock().unwrap();
        servers.retain(|server| server.strong_count() > 0);
        servers.push(Arc::downgrade(&state));
        Self {
            state,
            lowest: 0,
            threads: Mutex::default(),
        }
    }

    /// As [`Self::new`], with descriptors that have large numbers.
    pub fn with_descriptors_from(lowest: RawFd) -> Self {
        let mut server = Self::new();
        server.lowest = lowest;
        server
    }

    /// From the next request on, `script` decides what happens.
    pub fn script(
        &self,
        script: impl Fn(&mut Conn, &Request) -> io::Result<()> + Send + Sync + 'static,
    ) {
        *self.state.script.write().unwrap() = Arc::new(script);
    }

    /// From the next request on, the server is honest.
    pub fn be_honest(&self) {
        self.script(Conn::serve);
    }

    /// From the next request on, reads are answered by chunks that are chosen at random. A connection stays
    /// so.
    pub fn serve_in_chunks(&self, seed: u64) {
        self.script(move |conn, first| {
            let mut random = Rng::with_seed(seed ^ ((conn.index as u64) << 32));
            chunks::serve(conn, first, &mut random)
        });
    }

    /// A new connection; the answer is the client's end.
    pub fn connect(&self, transport: Transport) -> OwnedFd {
        self.try_connect(transport).expect("a connection")
    }

    /// A connection that the server has ended already.
    pub fn connect_and_end(&self) -> OwnedFd {
        let (ours, theirs) = UnixStream::pair().expect("socketpair");
        let _ = theirs.shutdown(std::net::Shutdown::Both);
        self.state.sockets.lock().unwrap().push(theirs);
        ours.into()
    }

    /// As [`Self::connect`], where somebody may meddle with it.
    pub fn try_connect(&self, transport: Transport) -> io::Result<OwnedFd> {
        let (client, served) = transport.try_pair()?;
        self.serve_socket(served);
        Ok(client)
    }

    /// Serves one more socket.
    pub fn serve_socket(&self, socket: UnixStream) {
        let another = || UnixStream::from(fcntl_dupfd_cloexec(&socket, self.lowest).expect("dup"));
        let mut sockets = self.state.sockets.lock().unwrap();
        let index = sockets.len();
        sockets.push(another());
        drop(sockets);
        let socket = another();
        let state = Arc::clone(&self.state);
        state.living.fetch_add(1, Ordering::SeqCst);
        let thread = thread::Builder::new()
            .name(format!("server-{index}"))
            .spawn(move || {
                Conn::new(Arc::clone(&state), socket, index).live();
                state.living.fetch_sub(1, Ordering::SeqCst);
            });
        self.threads.lock().unwrap().push(thread.expect("a thread"));
    }

    /// The requests so far, but for the polite goodbye.
    pub fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().unwrap().clone()
    }

    /// Requests so far of one kind.
    pub fn requests_of(&self, command: Command) -> Vec<Request> {
        self.requests()
            .into_iter()
            .filter(|request| request.command == command)
            .collect()
    }

    pub fn forget_requests(&self) {
        self.state.requests.lock().unwrap().clear();
    }

    /// Waits until `found` is content with the requests so far, 10 s at most on the stock kernel.
    pub fn wait_for(&self, what: &str, found: impl Fn(&[Request]) -> bool) {
        let deadline = Instant::now() + patient(Duration::from_secs(10));
        let mut requests = self.state.requests.lock().unwrap();
        while !found(&requests) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "the server waited in vain for {what}; it saw {requests:?}"
            );
            requests = self.state.arrival.wait_timeout(requests, left).unwrap().0;
        }
    }

    pub fn wait_for_command(&self, command: Command) {
        self.wait_for(&format!("{command:?}"), |requests| {
            requests.iter().any(|request| request.command == command)
        });
    }

    /// Ends every connection, whatever its thread is doing.
    pub fn kill(&self) {
        self.state.kill();
    }

    /// Ends every connection as a machine does that has crashed and is back: TCP sends a reset.
    pub fn abort(&self) {
        for socket in self.state.sockets.lock().unwrap().iter() {
            // Other kinds of sockets know no reset.
            let _ = rustix::net::connect_unspec(socket);
        }
        self.kill();
    }

    /// Ends one connection, if there is such a one.
    pub fn kill_connection(&self, index: usize) {
        if let Some(socket) = self.state.sockets.lock().unwrap().get(index) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Connections whose thread still runs.
    pub fn living(&self) -> usize {
        self.state.living.load(Ordering::SeqCst)
    }

    /// How many bytes have come so far, over all connections.
    pub fn received_bytes(&self) -> usize {
        self.state.received.load(Ordering::Relaxed)
    }

    /// Whether every connection that there was has been ended, from either side.
    pub fn is_deserted(&self) -> bool {
        let sockets = self.state.sockets.lock().unwrap();
        let ended = |socket: &UnixStream| {
            let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP)];
            poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        };
        !sockets.is_empty() && sockets.iter().all(ended)
    }

    /// What is stored there.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.store().read(offset, &mut data);
        data
    }

    /// Stores something behind the client's back.
    pub fn poke(&self, offset: u64, data: &[u8]) {
        self.store().write(offset, data);
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.state.store.lock().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        for thread in self.threads.get_mut().unwrap().drain(..) {
            // A script that panicked has failed its test elsewhere, or did not matter.
            let _ = thread.join();
        }
    }
}
