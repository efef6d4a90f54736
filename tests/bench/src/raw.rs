// SPDX-License-Identifier: GPL-2.0

//! The same bytes over a socket and nothing else, neither block layer nor driver nor storage: what
//! no client can do without.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::server;

const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;

/// A stream of requests of one kind.
pub struct Stream {
    pub write: bool,
    pub block: usize,
    pub depth: usize,
}

fn pair(unix: bool) -> Outcome<(UnixStream, UnixStream)> {
    if unix {
        return Ok(UnixStream::pair()?);
    }
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((OwnedFd::from(near).into(), OwnedFd::from(far).into()))
}

fn request(stream: &Stream, cookie: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(REQUEST_BYTES + stream.block);
    message.extend(0x2560_9513u32.to_be_bytes());
    message.extend(u32::from(stream.write).to_be_bytes());
    message.extend(cookie.to_be_bytes());
    message.extend(0u64.to_be_bytes());
    message.extend((stream.block as u32).to_be_bytes());
    if stream.write {
        message.resize(REQUEST_BYTES + stream.block, 0);
    }
    message
}

/// Runs until `ios` requests are answered or `limit` is over. Returns how many were, and the time.
pub fn run(
    unix: bool,
    stream: &Stream,
    ios: Option<u64>,
    limit: Duration,
) -> Outcome<(u64, Duration)> {
    let (mut near, far) = pair(unix)?;
    let server = thread::spawn(move || {
        let _ = server::transmit(&far);
    });
    let message = request(stream, 0);
    let mut answer = vec![0; REPLY_BYTES + if stream.write { 0 } else { stream.block }];
    let (mut sent, mut done) = (0, 0);
    let start = Instant::now();
    loop {
        let more = ios.map_or_else(|| start.elapsed() < limit, |ios| sent < ios);
        if more && sent - done < stream.depth as u64 {
            near.write_all(&message)?;
            sent += 1;
            continue;
        }
        if done == sent {
            break;
        }
        near.read_exact(&mut answer)?;
        done += 1;
    }
    let elapsed = start.elapsed();
    near.shutdown(std::net::Shutdown::Both)?;
    let _ = server.join();
    Ok((done, elapsed))
}
