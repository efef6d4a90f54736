// SPDX-License-Identifier: GPL-2.0

//! The connections that servers are reached by: both ends of each.

use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, SocketFlags, SocketType, accept_with, bind, connect, getsockname,
    ipproto, listen, socket_with, sockopt,
};

use crate::sys::{bind_vsock, connect_vsock, set_socket_option};

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

impl Transport {
    /// A new connection: the client's end, the server's.
    pub(super) fn try_pair(self) -> io::Result<(OwnedFd, UnixStream)> {
        match self {
            Self::Tcp4 => try_tcp_pair((Ipv4Addr::LOCALHOST, 0).into()),
            Self::Tcp6 => try_tcp_pair((Ipv6Addr::LOCALHOST, 0).into()),
            Self::Tls => try_tls_pair(TLS_1_2),
            Self::Tls13 => try_tls_pair(TLS_1_3),
            Self::Unix => {
                let (client, served) = UnixStream::pair()?;
                Ok((client.into(), served))
            }
            Self::Mptcp => try_mptcp_pair(AddressFamily::INET, (Ipv4Addr::LOCALHOST, 0), MPTCP),
            Self::MptcpFallback => {
                try_mptcp_pair(AddressFamily::INET6, (Ipv6Addr::LOCALHOST, 0), None)
            }
            Self::Vsock => try_vsock_pair(),
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

/// Has the kernel decrypt what is received, and nothing else.
pub fn decrypt_receiving(socket: impl AsFd) {
    encrypt_directions(TLS_1_3, socket, &[TLS_RX]);
}

/// Sends an empty record of data, which the kernel itself never sends, as the first one that is encrypted, and has the
/// kernel encrypt what is sent from then on.
pub fn send_empty_record(socket: &UnixStream) -> io::Result<()> {
    // What the secrets below make of it with TLS 1.3.
    const RECORD: [u8; 22] = [
        0x17, 0x03, 0x03, 0x00, 0x11, 0x12, 0xa0, 0x9e, 0x28, 0x1e, 0xf1, 0xda, 0xee, 0x6a, 0x3b,
        0x35, 0xda, 0x91, 0xf4, 0x2d, 0x65, 0x1d,
    ];
    let mut to = socket;
    to.write_all(&RECORD)?;
    set_keys(TLS_1_3, socket, &[TLS_TX], SECRET + 1);
    Ok(())
}

fn encrypt_directions(version: u16, socket: impl AsFd, directions: &[i32]) {
    set_keys(version, socket, directions, SECRET);
}

/// What each byte of the secrets is.
const SECRET: u8 = 0x5a;

/// `next_record` is the last byte of the number of the next record.
fn set_keys(version: u16, socket: impl AsFd, directions: &[i32], next_record: u8) {
    const TCP_ULP: i32 = 31;
    const SOL_TLS: i32 = 282;
    const TLS_CIPHER_AES_GCM_128: u16 = 51;
    // Initialization vector, key, salt, number of the next record: the same for both directions, which
    // is good enough for a test.
    let mut secrets = [SECRET; 8 + 16 + 4 + 8];
    secrets[8 + 16 + 4 + 7] = next_record;
    let info = [version, TLS_CIPHER_AES_GCM_128].map(u16::to_ne_bytes);
    let info = [info.as_flattened(), &secrets].concat();
    match set_socket_option(&socket, libc::IPPROTO_TCP, TCP_ULP, b"tls\0") {
        // It has keys for the other direction.
        Ok(_) | Err(Errno::EXIST) => {}
        Err(errno) => panic!("TCP_ULP: {errno}"),
    }
    for direction in directions {
        set_socket_option(&socket, SOL_TLS, *direction, &info).expect("TLS_TX, TLS_RX");
    }
}
