// SPDX-License-Identifier: GPL-2.0

//! A connection to a server before it is the kernel's, with a time limit for each step.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connection. A step of the handshake may take `patience`, however slowly the bytes come.
#[derive(Debug)]
pub struct Stream {
    /// It can be any kind of socket: reading, writing and time limits are the same calls for each.
    socket: UnixStream,
    patience: Duration,
    deadline: Instant,
}

impl Stream {
    pub fn new(socket: OwnedFd, patience: Duration) -> Self {
        Self {
            socket: UnixStream::from(socket),
            patience,
            deadline: Instant::now() + patience,
        }
    }

    /// Begins a step, which has all the time again.
    pub fn begin_step(&mut self) {
        self.deadline = Instant::now() + self.patience;
    }

    /// Gives the socket away, without time limits.
    ///
    /// # Errors
    ///
    /// Those of setting a socket option.
    pub fn into_socket(self) -> io::Result<OwnedFd> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)?;
        Ok(self.socket.into())
    }

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

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        self.socket.read(bytes).map_err(name_timeout)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.left()?))?;
        self.socket.write(bytes).map_err(name_timeout)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
