// SPDX-License-Identifier: GPL-2.0

//! A connection to a server before it is the kernel's, with a time limit for each step.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::tls::{Client, Session};

/// A connection, which may be encrypted.
#[derive(Debug)]
pub struct Stream {
    wire: Wire,
    tls: Option<Box<Session>>,
}

/// What carries it. A step of the handshake may take `patience`, however slowly the bytes come.
#[derive(Debug)]
struct Wire {
    /// It can be any kind of socket: reading, writing and time limits are the same calls for each.
    socket: UnixStream,
    patience: Duration,
    deadline: Instant,
}

impl Stream {
    pub fn new(socket: OwnedFd, patience: Duration) -> Self {
        Self {
            wire: Wire {
                socket: UnixStream::from(socket),
                patience,
                deadline: Instant::now() + patience,
            },
            tls: None,
        }
    }

    /// Begins a step, which has all the time again.
    pub fn begin_step(&mut self) {
        self.wire.deadline = Instant::now() + self.wire.patience;
    }

    /// Encrypts what follows, in a step of its own.
    ///
    /// # Errors
    ///
    /// Those of [`Session::begin()`].
    pub fn start_tls(&mut self, client: &Client) -> io::Result<()> {
        self.begin_step();
        let session = Session::begin(client, &mut self.wire)?;
        self.tls = Some(Box::new(session));
        Ok(())
    }

    /// Gives the socket away, without time limits. If it is encrypted, the kernel does that now.
    ///
    /// # Errors
    ///
    /// Those of setting a socket option, and of [`Session::into_kernel()`].
    pub fn into_socket(mut self) -> io::Result<OwnedFd> {
        if let Some(session) = self.tls {
            session.into_kernel(&mut self.wire)?;
        }
        let socket = self.wire.socket;
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        Ok(socket.into())
    }

    /// Ends the connection in the way that the other side expects.
    pub fn end(mut self) {
        if let Some(session) = self.tls {
            session.end(&mut self.wire);
        }
    }
}

impl Wire {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }
}

/// A socket whose time is up says that it would block.
fn name_timeout(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        return io::ErrorKind::TimedOut.into();
    }
    error
}

/// Whether the other side has ended the connection.
pub fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(session) => session.read(&mut self.wire, bytes),
            None => self.wire.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(session) => session.write(&mut self.wire, bytes),
            None => self.wire.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Read for Wire {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        self.socket.read(bytes).map_err(name_timeout)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.left()?))?;
        self.socket.write(bytes).map_err(name_timeout)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
