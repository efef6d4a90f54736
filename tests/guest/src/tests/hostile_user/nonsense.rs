// SPDX-License-Identifier: GPL-2.0

//! What is asked for: any ioctl, any message, and descriptors of anything.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Mutex;

use fastrand::Rng;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketType, socket};

use super::{MIB, OUT_OF_REACH};
use crate::netlink;
use crate::proto::{SET_SIZE, SET_SOCK};
use crate::server::{Server, Transport};
use crate::sys::{SysResult, ioctl_compat, ioctl_number};

/// Numbers at the edges of what types and devices can hold.
const EDGES: [u64; 22] = [
    0,
    1,
    2,
    511,
    512,
    513,
    1024,
    4096,
    4097,
    65536,
    MIB,
    i32::MAX as u64,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    (1 << 32) + 512,
    1 << 53,
    i64::MAX as u64 - 511,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

fn number(random: &mut Rng) -> u64 {
    match random.u8(..4) {
        0 => random.u64(..) >> random.u32(..64),
        _ => EDGES[random.usize(..EDGES.len())],
    }
}

/// The number of a descriptor that is none of a server's: whoever passes that to a device ends it.
fn out_of_the_servers_reach(number: u64) -> u64 {
    const SERVERS: Range<u32> = OUT_OF_REACH as u32..1 << 16;
    match SERVERS.contains(&(number as u32)) {
        true => u64::MAX,
        false => number,
    }
}

/// Descriptors of everything, some of which will do. Whoever holds it may let go of some.
pub struct Pool {
    files: Mutex<Vec<OwnedFd>>,
    server: Mutex<Server>,
}

impl Pool {
    pub fn new() -> Self {
        let pool = Self {
            files: Mutex::default(),
            server: Mutex::new(Server::new()),
        };
        pool.refill();
        pool
    }

    /// Ends every connection to the server.
    pub fn kill_server(&self) {
        self.server.lock().unwrap().kill();
    }

    /// Ends what there was. A server keeps a descriptor of each connection that it ever had: here is
    /// another one.
    pub fn refill(&self) {
        let server = Server::with_descriptors_from(OUT_OF_REACH);
        let mut files = strange_files();
        // Whoever asks with a number that was closed may mean what is being made here, and spoil it.
        let connections = [Transport::Tcp4, Transport::Unix].map(|kind| server.try_connect(kind));
        files.extend(connections.into_iter().flatten());
        // The other end is closed already.
        files.push(UnixStream::pair().unwrap().0.into());
        *self.files.lock().unwrap() = files;
        *self.server.lock().unwrap() = server;
    }

    /// A descriptor's number, that of a file or any. It may be closed by the time that it is used.
    fn descriptor(&self, random: &mut Rng) -> u64 {
        let mut files = self.files.lock().unwrap();
        match random.u8(..20) {
            0 => out_of_the_servers_reach(number(random)),
            1 if files.len() > 4 => {
                let at = random.usize(..files.len());
                let closed = files.swap_remove(at);
                closed.as_raw_fd() as u64
            }
            2..12 => files.last().map_or(0, |file| file.as_raw_fd() as u64),
            _ => {
                let file = random.choice(files.iter());
                file.map_or(0, |file| file.as_raw_fd() as u64)
            }
        }
    }
}

/// No connected streams.
pub fn strange_files() -> Vec<OwnedFd> {
    let (reads, writes) = rustix::pipe::pipe().unwrap();
    let raw = |family, kind| socket(family, kind, None).unwrap();
    vec![
        reads,
        writes,
        File::open("/dev/null").unwrap().into(),
        File::open("/proc/self/exe").unwrap().into(),
        epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
        eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        memfd_create("file", MemfdFlags::CLOEXEC).unwrap(),
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().into(),
        UnixDatagram::unbound().unwrap().into(),
        raw(AddressFamily::UNIX, SocketType::SEQPACKET),
        raw(AddressFamily::NETLINK, SocketType::RAW),
        raw(AddressFamily::INET, SocketType::STREAM),
        raw(AddressFamily::INET6, SocketType::STREAM),
        raw(AddressFamily::UNIX, SocketType::STREAM),
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().into(),
    ]
}

/// Makes any ioctl; which one, and the answer.
pub fn any_ioctl(device: &File, pool: &Pool, random: &mut Rng) -> (u32, SysResult) {
    let request = match random.u8(..16) {
        0 => 0xab00 | random.u32(..256),
        // The same numbers with a direction and a size, and what is nobody's.
        1 => 0xab00 | random.u32(..16) | (random.u32(..) << 16),
        2 => 0xac00 | random.u32(..256),
        _ => 0xab00 | random.u32(..11),
    };
    let argument = match request {
        SET_SOCK => pool.descriptor(random),
        SET_SIZE if random.bool() => MIB,
        _ => number(random),
    };
    let answer = if random.u8(..4) == 0 {
        ioctl_compat(device, request, argument as u32)
    } else {
        ioctl_number(device, request, argument)
    };
    (request, answer)
}

fn put(bytes: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    bytes.extend((payload.len() as u16 + 4).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn any_bytes(random: &mut Rng) -> Vec<u8> {
    let longest = 1 << random.u32(..11);
    (0..random.usize(..longest))
        .map(|_| random.u8(..))
        .collect()
}

/// A list of sockets, or what might be taken for one.
fn any_sockets(pool: &Pool, random: &mut Rng) -> Vec<u8> {
    let mut list = Vec::new();
    for _ in 0..random.u8(..4) {
        let mut item = Vec::new();
        let descriptor = pool.descriptor(random);
        match random.u8(..8) {
            0 => item = any_bytes(random),
            1 => put(&mut item, netlink::SOCK_FD, &descriptor.to_ne_bytes()),
            2 => put(
                &mut item,
                random.u16(..),
                &(descriptor as u32).to_ne_bytes(),
            ),
            3 => {}
            _ => put(
                &mut item,
                netlink::SOCK_FD,
                &(descriptor as u32).to_ne_bytes(),
            ),
        }
        let kind = if random.u8(..8) == 0 {
            random.u16(..4)
        } else {
            netlink::SOCK_ITEM
        };
        put(&mut list, kind | (random.u16(..2) << 15), &item);
    }
    list
}

fn any_attribute(bytes: &mut Vec<u8>, pool: &Pool, random: &mut Rng) {
    let kind = match random.u8(..16) {
        0 => random.u16(..),
        1 => random.u16(11..16),
        _ => random.u16(..11),
    };
    let payload = match (kind, random.u8(..6)) {
        (_, 0) => any_bytes(random),
        (netlink::SOCKETS, _) => any_sockets(pool, random),
        (netlink::INDEX, _) => vec![random.u8(..2), 0, 0, 0],
        (netlink::SIZE_BYTES, 1..4) => MIB.to_ne_bytes().into(),
        (netlink::BACKEND_IDENTIFIER, 1..4) => b"backend\0".into(),
        (_, 1) => (number(random) as u32).to_ne_bytes().into(),
        _ => number(random).to_ne_bytes().into(),
    };
    put(bytes, kind, &payload);
    // A wrong length now and then.
    let start = bytes.len() - payload.len().next_multiple_of(4) - 4;
    if random.u8(..24) == 0 {
        bytes[start] ^= 1 << random.u8(..8);
    }
}

/// A message to the family, which is more or less one.
pub fn any_message(family: u16, command: u8, pool: &Pool, random: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes.extend([command, 1, 0, 0]);
    // The device that is meant, so that most are about one that there is.
    if random.u8(..8) > 0 {
        put(&mut bytes, netlink::INDEX, &[random.u8(..2), 0, 0, 0]);
    }
    if command == netlink::CONNECT && random.bool() {
        put(&mut bytes, netlink::SIZE_BYTES, &MIB.to_ne_bytes());
        put(&mut bytes, netlink::SOCKETS, &any_sockets(pool, random));
    }
    for _ in 0..random.u8(..6) {
        any_attribute(&mut bytes, pool, random);
    }
    if random.u8(..16) == 0 {
        bytes.truncate(random.usize(16..=bytes.len()));
    }
    let flags = if random.u8(..16) == 0 {
        random.u16(..)
    } else {
        5
    }; // NLM_F_REQUEST | NLM_F_ACK
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..6].copy_from_slice(&family.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(flags | 5).to_ne_bytes());
    bytes
}
