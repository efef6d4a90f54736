// SPDX-License-Identifier: GPL-2.0

//! Finds the addresses of a server, and connects to one of them.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vsock::VsockStream;

use crate::uri::Place;

/// What a server can be reached at, without looking up names any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(Vec<u8>),
    Vsock(u32, u32),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => Place::Unix(path.clone()).fmt(f),
            Self::Vsock(cid, port) => Place::Vsock(*cid, *port).fmt(f),
        }
    }
}

/// The addresses of a server, in the order in which they are to be tried.
///
/// # Errors
///
/// The host's name is not known, or looking it up takes longer than `patience`.
pub fn resolve(place: &Place, patience: Duration) -> io::Result<Vec<Address>> {
    match place {
        Place::Tcp(host, port) => look_up(host.clone(), *port, patience),
        Place::Unix(path) => Ok(vec![Address::Unix(path.clone())]),
        Place::Vsock(cid, port) => Ok(vec![Address::Vsock(*cid, *port)]),
    }
}

/// The C library's resolver has time limits of its own, so a thread waits for it.
fn look_up(host: String, port: u16, patience: Duration) -> io::Result<Vec<Address>> {
    let (tell, told) = mpsc::channel();
    thread::Builder::new().spawn(move || {
        let found = (host.as_str(), port).to_socket_addrs();
        let _ = tell.send(found.map(|list| list.map(Address::Tcp).collect::<Vec<_>>()));
    })?;
    let found = told
        .recv_timeout(patience)
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if found.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the name has no address",
        ));
    }
    Ok(found)
}

impl Address {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Those of connecting a socket, and of setting its options. `TimedOut`: it took longer than
    /// `patience`, or for vsock longer than the kernel's own limit.
    pub fn connect(&self, patience: Duration) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(address) => connect_tcp(address, patience),
            Self::Unix(path) => connect_unix(path, patience),
            Self::Vsock(cid, port) => {
                VsockStream::connect_with_cid_port(*cid, *port).map(Into::into)
            }
        }
    }
}

/// An idle connection to a peer that is gone ends within two minutes.
fn connect_tcp(address: &SocketAddr, patience: Duration) -> io::Result<OwnedFd> {
    let socket = OwnedFd::from(TcpStream::connect_timeout(address, patience)?);
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(&socket, 6)?;
    Ok(socket)
}

/// A server that accepts nothing lets connecting wait, too.
fn connect_unix(path: &[u8], patience: Duration) -> io::Result<OwnedFd> {
    let address = match path.split_first() {
        Some((0, name)) => SocketAddrUnix::new_abstract_name(name)?,
        _ => SocketAddrUnix::new(OsStr::from_bytes(path))?,
    };
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    connect(&socket, &address).map_err(|errno| match errno {
        rustix::io::Errno::AGAIN => io::ErrorKind::TimedOut.into(),
        errno => io::Error::from(errno),
    })?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr as UnixAddress, UnixListener};

    const PATIENCE: Duration = Duration::from_secs(5);

    #[test]
    fn numbers_need_no_look_up() {
        for (host, shown) in [("127.0.0.1", "127.0.0.1:7"), ("::1", "[::1]:7")] {
            let found = resolve(&Place::Tcp(host.into(), 7), PATIENCE).unwrap();
            let shown_found: Vec<String> = found.iter().map(ToString::to_string).collect();
            assert_eq!(shown_found, [shown]);
        }
    }

    #[test]
    fn tcp() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap());
        let socket = address.connect(PATIENCE).unwrap();
        assert!(sockopt::tcp_nodelay(&socket).unwrap());
        drop(listener);
        let error = address.connect(PATIENCE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn abstract_names() {
        let name = format!("rnbdctl-test-{}", std::process::id());
        let address = UnixAddress::from_abstract_name(&name).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        let address = Address::Unix([b"\0", name.as_bytes()].concat());
        address.connect(PATIENCE).unwrap();
        assert_eq!(address.to_string(), format!("@{name}"));
    }

    #[test]
    fn a_server_that_accepts_nothing_is_given_up() {
        let name = format!("rnbdctl-full-{}", std::process::id());
        let address = UnixAddress::from_abstract_name(&name).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        let address = Address::Unix([b"\0", name.as_bytes()].concat());
        let mut waiting = Vec::new();
        let error = loop {
            match address.connect(Duration::from_millis(50)) {
                Ok(socket) => waiting.push(socket),
                Err(error) => break error,
            }
            assert!(waiting.len() < 100_000);
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
