// SPDX-License-Identifier: GPL-2.0

//! Dials a real server, and goes through the handshake that a kernel leaves to user space.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const NO_ZEROES_AND_FIXED_NEWSTYLE: u32 = 3;
const OPT_EXPORT_NAME: u32 = 1;

/// How long a server may take for each step.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection on which the transmission phase has begun, and what the server said of its export.
pub struct Export {
    pub socket: OwnedFd,
    pub size: u64,
    pub flags: u64,
}

/// Connects to the default export of the server at `address`: a path, or an IP address and port.
///
/// # Errors
///
/// Nobody is there, or does not speak as expected, or is gone in the middle.
pub fn dial(address: &str) -> io::Result<Export> {
    let stream = match address.parse::<SocketAddr>() {
        Ok(address) => {
            let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_nodelay(true)?;
            // Reading and writing are the same calls for every kind of socket.
            UnixStream::from(OwnedFd::from(stream))
        }
        Err(_) => UnixStream::connect(address)?,
    };
    negotiate(stream)
}

/// As [`dial`], over a connection that was made.
///
/// # Errors
///
/// Those of [`dial`].
pub fn negotiate(mut stream: UnixStream) -> io::Result<Export> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if !greeting.starts_with(GREETING) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut answer = NO_ZEROES_AND_FIXED_NEWSTYLE.to_be_bytes().to_vec();
    answer.extend(b"IHAVEOPT");
    answer.extend(OPT_EXPORT_NAME.to_be_bytes());
    // The length of its name.
    answer.extend(0_u32.to_be_bytes());
    stream.write_all(&answer)?;
    let mut export = [0; 10];
    stream.read_exact(&mut export)?;
    stream.set_read_timeout(None)?;
    let (size, flags) = export.split_at(8);
    Ok(Export {
        socket: stream.into(),
        size: u64::from_be_bytes(size.try_into().unwrap()),
        flags: u16::from_be_bytes(flags.try_into().unwrap()).into(),
    })
}
