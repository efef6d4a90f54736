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
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;

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
    negotiate(connect(address)?)
}

/// As [`dial`], and agrees on structured replies.
///
/// # Errors
///
/// Those of [`dial`], or the server does not have them.
pub fn dial_for_structured_replies(address: &str) -> io::Result<Export> {
    let mut stream = connect(address)?;
    greet(&mut stream)?;
    send_option(&mut stream, OPT_STRUCTURED_REPLY)?;
    let mut reply = [0; 20];
    stream.read_exact(&mut reply)?;
    // Behind a magic number and the option; nothing follows.
    if reply[12..] != [REP_ACK, 0].map(u32::to_be_bytes).concat() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    choose_export(stream)
}

fn connect(address: &str) -> io::Result<UnixStream> {
    match address.parse::<SocketAddr>() {
        Ok(address) => {
            let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_nodelay(true)?;
            // Reading and writing are the same calls for every kind of socket.
            Ok(UnixStream::from(OwnedFd::from(stream)))
        }
        Err(_) => UnixStream::connect(address),
    }
}

/// As [`dial`], over a connection that was made.
///
/// # Errors
///
/// Those of [`dial`].
pub fn negotiate(mut stream: UnixStream) -> io::Result<Export> {
    greet(&mut stream)?;
    choose_export(stream)
}

fn greet(stream: &mut UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if !greeting.starts_with(GREETING) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.write_all(&NO_ZEROES_AND_FIXED_NEWSTYLE.to_be_bytes())
}

/// An option without anything behind it: for an export's name, the default one.
fn send_option(stream: &mut UnixStream, option: u32) -> io::Result<()> {
    let mut message = b"IHAVEOPT".to_vec();
    message.extend(option.to_be_bytes());
    message.extend(0_u32.to_be_bytes());
    stream.write_all(&message)
}

fn choose_export(mut stream: UnixStream) -> io::Result<Export> {
    send_option(&mut stream, OPT_EXPORT_NAME)?;
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
