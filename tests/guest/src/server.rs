// SPDX-License-Identifier: GPL-2.0

//! A scriptable NBD server that speaks the transmission phase only: the ioctl interface is handed
//! sockets on which the handshake is already over.
//!
//! Each connection is served by one thread. What it does with a request is a script, a closure
//! that is given the connection and the request's header; [`Conn::serve`] is the honest one. A
//! script reads the data of a write itself, so that it can also decline to.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{
    AddressFamily, Protocol, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, accept_with, bind, connect, getsockname, ipproto, listen, socket_with, sockopt,
};

use crate::debug_kernel::patient;
use crate::proto::{self, Command, REQUEST_LEN, REQUEST_MAGIC, Request};
use crate::sys::{bind_vsock, connect_vsock, send_tls_record, set_socket_option};

/// What carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp4,
    Tcp6,
    /// TCP that the kernel encrypts, as TLS 1.2.
    Tls,
    /// As TLS 1.3.
    Tls13,
    Unix,
    /// Multipath TCP at both ends.
    Mptcp,
    /// Multipath TCP over IPv6, to a server that knows only TCP: the client's socket falls back to that.
    MptcpFallback,
    /// vsock within this machine, for which `vsock_loopback` has to be loaded.
    Vsock,
}

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
        let (client, served) = match transport {
            Transport::Tcp4 => try_tcp_pair((Ipv4Addr::LOCALHOST, 0).into())?,
            Transport::Tcp6 => try_tcp_pair((Ipv6Addr::LOCALHOST, 0).into())?,
            Transport::Tls => try_tls_pair(TLS_1_2)?,
            Transport::Tls13 => try_tls_pair(TLS_1_3)?,
            Transport::Unix => {
                let (client, served) = UnixStream::pair()?;
                (client.into(), served)
            }
            Transport::Mptcp => {
                try_mptcp_pair(AddressFamily::INET, (Ipv4Addr::LOCALHOST, 0), MPTCP)?
            }
            Transport::MptcpFallback => {
                try_mptcp_pair(AddressFamily::INET6, (Ipv6Addr::LOCALHOST, 0), None)?
            }
            Transport::Vsock => try_vsock_pair()?,
        };
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
                let mut conn = Conn {
                    state,
                    socket,
                    index,
                    deferred: Vec::new(),
                };
                // However it ends, the client is to see the end.
                let _ = conn.run();
                let _ = conn.socket.shutdown(std::net::Shutdown::Both);
                conn.state.living.fetch_sub(1, Ordering::SeqCst);
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

/// A TCP connection: the client's end, the server's.
pub fn tcp_pair(address: SocketAddr) -> (OwnedFd, UnixStream) {
    try_tcp_pair(address).expect("a TCP connection over the loopback")
}

fn try_tcp_pair(address: SocketAddr) -> io::Result<(OwnedFd, UnixStream)> {
    let listener = TcpListener::bind(address)?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (served, _) = listener.accept()?;
    client.set_nodelay(true)?;
    served.set_nodelay(true)?;
    // Reading, writing and shutting down are the same calls for every kind of socket.
    Ok((client.into(), UnixStream::from(OwnedFd::from(served))))
}

/// A new stream socket.
pub fn new_socket(family: AddressFamily, protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(family, SocketType::STREAM, flags, protocol)?)
}

/// The protocol of a socket of Multipath TCP.
pub const MPTCP: Option<Protocol> = Some(ipproto::MPTCP);

/// A connection whose client speaks Multipath TCP, and whose server speaks `spoken`: the client's end, the
/// server's.
pub fn mptcp_pair(spoken: Option<Protocol>) -> (OwnedFd, UnixStream) {
    let pair = try_mptcp_pair(AddressFamily::INET, (Ipv4Addr::LOCALHOST, 0), spoken);
    pair.expect("an MPTCP connection over the loopback")
}

/// As [`mptcp_pair`], where somebody may meddle with it.
fn try_mptcp_pair(
    family: AddressFamily,
    address: impl Into<SocketAddr>,
    spoken: Option<Protocol>,
) -> io::Result<(OwnedFd, UnixStream)> {
    let listener = new_socket(family, spoken)?;
    bind(&listener, &address.into())?;
    listen(&listener, 1)?;
    let client = new_socket(family, MPTCP)?;
    connect(&client, &getsockname(&listener)?)?;
    let served = accept_with(&listener, SocketFlags::CLOEXEC)?;
    sockopt::set_tcp_nodelay(&served, true)?;
    if let Some(listeners) = &mut *LISTENERS.lock().unwrap() {
        listeners.push(listener);
    }
    Ok((client, UnixStream::from(served)))
}

/// Listeners that stay: another subflow of a connection can only join where one listens.
static LISTENERS: Mutex<Option<Vec<OwnedFd>>> = Mutex::new(None);

/// Calls `run` while connections of MPTCP can be joined by other subflows.
pub fn with_subflows_to_join(run: impl FnOnce()) {
    *LISTENERS.lock().unwrap() = Some(Vec::new());
    run();
    *LISTENERS.lock().unwrap() = None;
}

fn try_vsock_pair() -> io::Result<(OwnedFd, UnixStream)> {
    let (listener, port) = listen_on_vsock()?;
    let client = new_socket(AddressFamily::VSOCK, None)?;
    connect_vsock(&client, port)?;
    let served = accept_with(&listener, SocketFlags::CLOEXEC)?;
    Ok((client, UnixStream::from(served)))
}

/// A socket of vsock that listens, and its port.
pub fn listen_on_vsock() -> io::Result<(OwnedFd, u32)> {
    static NEXT_PORT: AtomicU32 = AtomicU32::new(20000);
    let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
    let listener = new_socket(AddressFamily::VSOCK, None)?;
    bind_vsock(&listener, port)?;
    listen(&listener, 1)?;
    Ok((listener, port))
}

fn try_tls_pair(version: u16) -> io::Result<(OwnedFd, UnixStream)> {
    let (client, served) = try_tcp_pair((Ipv4Addr::LOCALHOST, 0).into())?;
    encrypt_as(version, &client);
    encrypt_as(version, &served);
    Ok((client, served))
}

/// Versions of TLS.
const TLS_1_2: u16 = 0x0303;
const TLS_1_3: u16 = 0x0304;

/// Has the kernel encrypt what goes over a TCP socket, and decrypt what comes: what is left to do after a
/// TLS handshake. (include/uapi/linux/tls.h)
pub fn encrypt(socket: impl AsFd) {
    encrypt_as(TLS_1_2, socket);
}

fn encrypt_as(version: u16, socket: impl AsFd) {
    encrypt_directions(version, socket, &[TLS_TX, TLS_RX]);
}

/// The directions of TLS.
const TLS_TX: i32 = 1;
const TLS_RX: i32 = 2;

/// Has the kernel encrypt what is sent, and nothing else.
pub fn encrypt_sending(socket: impl AsFd) {
    encrypt_directions(TLS_1_3, socket, &[TLS_TX]);
}

fn encrypt_directions(version: u16, socket: impl AsFd, directions: &[i32]) {
    const TCP_ULP: i32 = 31;
    const SOL_TLS: i32 = 282;
    const TLS_CIPHER_AES_GCM_128: u16 = 51;
    // Initialization vector, key, salt, number of the next record: the same for both directions, which
    // is good enough for a test.
    let secrets = [0x5a; 8 + 16 + 4 + 8];
    let info = [version, TLS_CIPHER_AES_GCM_128].map(u16::to_ne_bytes);
    let info = [info.as_flattened(), &secrets].concat();
    set_socket_option(&socket, libc::IPPROTO_TCP, TCP_ULP, b"tls\0").expect("TCP_ULP");
    for direction in directions {
        set_socket_option(&socket, SOL_TLS, *direction, &info).expect("TLS_TX, TLS_RX");
    }
}

/// One connection, in the hands of a script.
pub struct Conn {
    state: Arc<State>,
    socket: UnixStream,
    pub index: usize,
    /// Replies that [`Conn::defer`] keeps back.
    deferred: Vec<Vec<u8>>,
}

impl Conn {
    fn run(&mut self) -> io::Result<()> {
        loop {
            if !self.deferred.is_empty() && !self.readable_within(Duration::from_millis(30))? {
                self.send_deferred()?;
            }
            let request = self.next_request()?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let script = Arc::clone(&self.state.script.read().unwrap());
            script(self, &request)?;
        }
    }

    pub fn next_request(&mut self) -> io::Result<Request> {
        let mut header = [0; REQUEST_LEN];
        self.read_exact(&mut header)?;
        let request = Request::parse(self.index, &header);
        // Part of what every test asserts: nothing but whole requests is ever sent.
        if request.magic != REQUEST_MAGIC {
            crate::harness::complain(format!("the client sent garbage: {header:02x?}"));
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.state.requests.lock().unwrap().push(request.clone());
        self.state.arrival.notify_all();
        Ok(request)
    }

    /// Does what is asked and says so.
    pub fn serve(&mut self, request: &Request) -> io::Result<()> {
        let reply = self.answer(request)?;
        self.send(&reply)
    }

    /// Does what is asked; the whole reply is the caller's to send.
    pub fn answer(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        let mut reply = ok(request).to_vec();
        match request.command {
            Command::Read => reply.extend(self.stored(request)),
            Command::Write => {
                let data = self.read_data(request)?;
                self.state
                    .store
                    .lock()
                    .unwrap()
                    .write(request.offset, &data);
            }
            Command::Trim | Command::WriteZeroes => {
                self.state
                    .store
                    .lock()
                    .unwrap()
                    .zero(request.offset, request.len.into());
            }
            Command::Flush => {}
            Command::Disconnect | Command::Unknown(_) => {
                crate::harness::complain(format!("the client sent {request:?}"));
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(reply)
    }

    /// Refuses, with an error number; a write's data is read and dropped.
    pub fn refuse(&mut self, request: &Request, error: u32) -> io::Result<()> {
        if request.command == Command::Write {
            self.read_data(request)?;
        }
        self.send(&proto::reply(proto::REPLY_MAGIC, error, request.cookie))
    }

    /// The data of a write.
    pub fn read_data(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        self.read_bytes(request.len as usize)
    }

    /// Reads `len` bytes of whatever comes.
    pub fn read_bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.read_exact(&mut data)?;
        Ok(data)
    }

    fn read_exact(&mut self, mut room: &mut [u8]) -> io::Result<()> {
        while !room.is_empty() {
            match self.socket.read(room) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    self.state.received.fetch_add(read, Ordering::Relaxed);
                    room = &mut room[read..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What a read is to be answered with.
    pub fn stored(&self, request: &Request) -> Vec<u8> {
        let mut data = vec![0; request.len as usize];
        self.state
            .store
            .lock()
            .unwrap()
            .read(request.offset, &mut data);
        data
    }

    /// Stores the data of a write.
    pub fn store(&self, request: &Request, data: &[u8]) {
        self.state.store.lock().unwrap().write(request.offset, data);
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends bytes that are no data, in TLS records of this type.
    pub fn send_record(&mut self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let sent = send_tls_record(&self.socket, kind, bytes)?;
        assert_eq!(sent, bytes.len());
        Ok(())
    }

    /// Sends a byte that is not part of the stream.
    pub fn send_urgent(&mut self, byte: u8) -> io::Result<()> {
        rustix::net::send(&self.socket, &[byte], SendFlags::OOB)?;
        Ok(())
    }

    /// Sends, and a descriptor with it. The socket must be a UNIX one.
    pub fn send_with_descriptor(&mut self, bytes: &[u8], descriptor: impl AsFd) -> io::Result<()> {
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let slices = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.socket, &slices, &mut ancillary, SendFlags::empty())?;
        self.send(&bytes[sent..])
    }

    /// Does what is asked, but keeps the reply until no request has come for a while.
    pub fn defer(&mut self, request: &Request) -> io::Result<()> {
        let reply = self.answer(request)?;
        self.deferred.push(reply);
        Ok(())
    }

    pub fn deferred(&self) -> usize {
        self.deferred.len()
    }

    /// Sends what was kept, the last first, in one piece.
    pub fn send_deferred(&mut self) -> io::Result<()> {
        let replies: Vec<u8> = self.deferred.drain(..).rev().flatten().collect();
        self.send(&replies)
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Does nothing more until the connection is ended, by whomever.
    pub fn stall(&mut self) -> io::Result<()> {
        self.wait(PollFlags::RDHUP, None)?;
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Whether the other side, or somebody from outside, has ended it.
    pub fn is_ended(&self) -> bool {
        self.wait(PollFlags::RDHUP, Some(Duration::ZERO))
            .unwrap_or(true)
    }

    /// Tells the other side that nothing is read any more, and goes on sending.
    pub fn stop_reading(&self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Read)
    }

    /// Ends the connection here.
    pub fn close(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Ends the connection as a crashed machine does: TCP sends a reset.
    pub fn reset(&mut self) -> io::Result<()> {
        sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO))?;
        self.close()
    }

    /// Sends nothing more, but goes on to read.
    pub fn half_close(&mut self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write)
    }

    pub fn readable_within(&self, timeout: Duration) -> io::Result<bool> {
        self.wait(PollFlags::IN, Some(timeout))
    }

    fn wait(&self, events: PollFlags, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).expect("a timeout"));
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), events)];
        Ok(poll(&mut fds, timeout.as_ref())? > 0)
    }
}

/// The header of a reply that says yes.
pub fn ok(request: &Request) -> [u8; proto::REPLY_LEN] {
    proto::reply(proto::REPLY_MAGIC, 0, request.cookie)
}

/// Sparse storage of any size.
#[derive(Default)]
struct Store {
    chunks: BTreeMap<u64, Vec<u8>>,
}

const CHUNK: u64 = 64 << 10;

impl Store {
    fn read(&self, offset: u64, mut data: &mut [u8]) {
        let mut at = offset;
        while !data.is_empty() {
            let (skip, len) = within_chunk(at, data.len());
            let (part, rest) = data.split_at_mut(len);
            match self.chunks.get(&(at / CHUNK)) {
                Some(chunk) => part.copy_from_slice(&chunk[skip..skip + len]),
                None => part.fill(0),
            }
            data = rest;
            at += len as u64;
        }
    }

    fn write(&mut self, offset: u64, mut data: &[u8]) {
        let mut at = offset;
        while !data.is_empty() {
            let (skip, len) = within_chunk(at, data.len());
            let chunk = self
                .chunks
                .entry(at / CHUNK)
                .or_insert_with(|| vec![0; CHUNK as usize]);
            chunk[skip..skip + len].copy_from_slice(&data[..len]);
            data = &data[len..];
            at += len as u64;
        }
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        for (index, chunk) in self.chunks.range_mut(offset / CHUNK..end.div_ceil(CHUNK)) {
            let start = index * CHUNK;
            let from = offset.saturating_sub(start);
            let to = (end - start).min(CHUNK);
            chunk[from as usize..to as usize].fill(0);
        }
    }
}

fn within_chunk(at: u64, len: usize) -> (usize, usize) {
    let skip = (at % CHUNK) as usize;
    (skip, len.min(CHUNK as usize - skip))
}
