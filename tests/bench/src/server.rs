// SPDX-License-Identifier: GPL-2.0

//! A server whose answers cost next to nothing, so that the client's share shows: reads are
//! answered with whatever is in a buffer, writes go nowhere.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use crate::Outcome;
use crate::matrix::REGION_MIB;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REQUEST_BYTES: usize = 28;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;

/// What one system call receives, or sends of replies, at most.
const BUFFER_BYTES: usize = 256 << 10;
/// Data of a read up to which it is sent together with other replies.
const COPY_BYTES: usize = 64 << 10;
const LARGEST_READ: usize = 32 << 20;

/// Serves every connection to a path, or to an address and a port, for ever.
pub fn serve(place: &str) -> Outcome<()> {
    if let Ok(address) = place.parse::<SocketAddr>() {
        let listener = TcpListener::bind(address)?;
        for stream in listener.incoming() {
            let stream = stream?;
            stream.set_nodelay(true)?;
            // Reading and writing are the same calls for every kind of socket.
            start(UnixStream::from(OwnedFd::from(stream)));
        }
    } else {
        for stream in UnixListener::bind(place)?.incoming() {
            start(stream?);
        }
    }
    Ok(())
}

fn start(socket: UnixStream) {
    thread::spawn(move || {
        // However it ends, the client sees the end.
        let _ = negotiate(&socket).and_then(|()| transmit(&socket));
    });
}

fn number<const N: usize>(mut socket: impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Fixed newstyle negotiation, as far as clients need it (`doc/proto.md` of NBD).
fn negotiate(mut socket: &UnixStream) -> io::Result<()> {
    const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
    const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
    const EXPORT_NAME: u32 = 1;
    const ABORT: u32 = 2;
    const GO: u32 = 7;
    const ACK: u32 = 1;
    const INFO: u32 = 3;
    const UNSUPPORTED: u32 = (1 << 31) | 1;
    // HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN
    const EXPORT_FLAGS: u16 = 1 | (1 << 2) | (1 << 3) | (1 << 8);
    let size = REGION_MIB << 20;
    socket.write_all(b"NBDMAGIC")?;
    socket.write_all(OPTION_MAGIC)?;
    socket.write_all(&3u16.to_be_bytes())?;
    let client_flags = u32::from_be_bytes(number(socket)?);
    loop {
        if &number::<8>(socket)? != OPTION_MAGIC {
            return Err(ErrorKind::InvalidData.into());
        }
        let option = u32::from_be_bytes(number(socket)?);
        let len = u32::from_be_bytes(number(socket)?);
        let mut data = vec![0; len as usize];
        socket.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut message = REPLY_MAGIC.to_be_bytes().to_vec();
            message.extend(option.to_be_bytes());
            message.extend(kind.to_be_bytes());
            message.extend((data.len() as u32).to_be_bytes());
            message.extend(data);
            socket.write_all(&message)
        };
        let mut export = size.to_be_bytes().to_vec();
        export.extend(EXPORT_FLAGS.to_be_bytes());
        match option {
            EXPORT_NAME => {
                if client_flags & 2 == 0 {
                    export.extend([0; 124]);
                }
                return socket.write_all(&export);
            }
            GO => {
                reply(INFO, &[&[0, 0], export.as_slice()].concat())?;
                return reply(ACK, &[]);
            }
            ABORT => return reply(ACK, &[]),
            _ => reply(UNSUPPORTED, &[])?,
        }
    }
}

/// Answers until the client goes: what can be answered of what is there is answered at once.
pub fn transmit(socket: &UnixStream) -> io::Result<()> {
    let mut input = BufReader::with_capacity(BUFFER_BYTES, socket);
    let mut output = Vec::with_capacity(BUFFER_BYTES);
    let data = vec![0; LARGEST_READ];
    loop {
        if input.buffer().len() < REQUEST_BYTES || output.len() >= BUFFER_BYTES {
            flush(socket, &mut output)?;
        }
        let header: [u8; REQUEST_BYTES] = number(&mut input)?;
        let [m0, m1, m2, m3, _, _, c0, c1, .., l0, l1, l2, l3] = header;
        let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if u32::from_be_bytes([m0, m1, m2, m3]) != REQUEST_MAGIC || len > LARGEST_READ {
            return Err(ErrorKind::InvalidData.into());
        }
        let command = u16::from_be_bytes([c0, c1]);
        match command {
            DISCONNECT => return Ok(()),
            WRITE => skip(&mut input, len)?,
            _ => {}
        }
        output.extend(REPLY_MAGIC.to_be_bytes());
        output.extend([0; 4]);
        output.extend(&header[8..16]);
        if command == READ && len > COPY_BYTES {
            flush(socket, &mut output)?;
            let mut socket = socket;
            socket.write_all(&data[..len])?;
        } else if command == READ {
            output.extend(&data[..len]);
        }
    }
}

fn flush(mut socket: &UnixStream, output: &mut Vec<u8>) -> io::Result<()> {
    socket.write_all(output)?;
    output.clear();
    Ok(())
}

fn skip(input: &mut impl BufRead, mut bytes: usize) -> io::Result<()> {
    while bytes > 0 {
        let there = input.fill_buf()?.len().min(bytes);
        if there == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        input.consume(there);
        bytes -= there;
    }
    Ok(())
}
