// SPDX-License-Identifier: GPL-2.0

//! The same bytes over a socket and nothing else, neither block layer nor driver nor storage: what
//! no client can do without.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::programs::PORT;
use crate::server;

const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
/// In memory.
const FILE: &str = "/tmp/bench.request";

/// A stream of requests of one kind.
pub struct Stream {
    pub write: bool,
    pub block: usize,
    pub depth: usize,
    /// What is written comes from a file, and is sent by reference where that is possible.
    pub from_file: bool,
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
    let done = exchange_until(&mut near, stream, ios, limit)?;
    near.shutdown(std::net::Shutdown::Both)?;
    let _ = server.join();
    Ok(done)
}

/// Connects to the benchmark's own server, up to where requests are sent.
pub fn connect_to(server: &str) -> Outcome<UnixStream> {
    const CLIENT_FLAGS: u32 = 3;
    const EXPORT_NAME: u32 = 1;
    let mut stream = TcpStream::connect((server, PORT))?;
    stream.set_nodelay(true)?;
    stream.read_exact(&mut [0; 18])?;
    let mut message = CLIENT_FLAGS.to_be_bytes().to_vec();
    message.extend(b"IHAVEOPT");
    message.extend(EXPORT_NAME.to_be_bytes());
    message.extend(0u32.to_be_bytes());
    stream.write_all(&message)?;
    stream.read_exact(&mut [0; 10])?;
    Ok(OwnedFd::from(stream).into())
}

/// Runs until `ios` requests are answered. Returns the time.
pub fn exchange(near: &mut UnixStream, stream: &Stream, ios: u64) -> Outcome<Duration> {
    exchange_until(near, stream, Some(ios), Duration::MAX).map(|(_, time)| time)
}

fn exchange_until(
    near: &mut UnixStream,
    stream: &Stream,
    ios: Option<u64>,
    limit: Duration,
) -> Outcome<(u64, Duration)> {
    let mut message = request(stream, 0);
    let mut file = None;
    if stream.from_file {
        fs::write(FILE, &message)?;
        message.clear();
        file = Some(File::open(FILE)?);
    }
    let mut answer = vec![0; REPLY_BYTES + if stream.write { 0 } else { stream.block }];
    let (mut sent, mut done) = (0, 0);
    let start = Instant::now();
    loop {
        let more = ios.map_or_else(|| start.elapsed() < limit, |ios| sent < ios);
        if more && sent - done < stream.depth as u64 {
            near.write_all(&message)?;
            if let Some(file) = &mut file {
                // The standard library does this with sendfile().
                file.rewind()?;
                io::copy(file, near)?;
            }
            sent += 1;
            continue;
        }
        if done == sent {
            break;
        }
        near.read_exact(&mut answer)?;
        done += 1;
    }
    Ok((done, start.elapsed()))
}
