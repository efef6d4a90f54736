// SPDX-License-Identifier: GPL-2.0

//! Sockets of connected devices that another part of the kernel takes over without asking, and what a socket
//! is like when a device has let go of it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, sendto, shutdown,
    socket_with, sockopt,
};

use crate::debug_kernel::patient;
use crate::device::{self, assert_usable, errno};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::programs::sh;
use crate::proto::{DO_IT, SET_SIZE, SET_SOCK};
use crate::server::{Server, Transport, tcp_pair};
use crate::sys::{Buffer, SysResult, ioctl_number, set_socket_option, socket_option};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(sockets_that_are_not_connected),
        test!(sockets_that_were_connected),
        test!(settings_are_given_back),
        test!(others_use_them_meanwhile),
        test!(bound_by_iscsi).leaves_module().on_request(),
        test!(bound_by_iscsi_and_released)
            .leaves_module()
            .on_request(),
    ]
}

const MIB: u64 = 1 << 20;

/// What the driver says to a socket, and to a start with it if it takes it.
fn start_with(socket: impl AsFd) -> SysResult {
    let device = device::open(0, 0).unwrap();
    ioctl_number(&device, SET_SOCK, socket.as_fd().as_raw_fd() as u64)?;
    ioctl_number(&device, SET_SIZE, MIB)?;
    ioctl_number(&device, DO_IT, 0)
}

fn new_socket(family: AddressFamily) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family, SocketType::STREAM, flags, None).expect("a socket")
}

/// Nothing can come of them.
fn sockets_that_are_not_connected(guest: &Guest) {
    let expected = match guest.expected("sockets-must-be-connected") {
        Driver::Nbd => Ok(0),
        Driver::Rnbd => Err(Errno::NOTCONN),
    };
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    assert_eq!(start_with(&listener), expected, "a listening TCP socket");
    for family in [
        AddressFamily::INET,
        AddressFamily::INET6,
        AddressFamily::UNIX,
    ] {
        let answer = start_with(new_socket(family));
        assert_eq!(answer, expected, "{family:?}");
        // The kernel notes that nothing can be sent and received, but it may still begin to listen.
        let ended = new_socket(family);
        let _ = shutdown(&ended, Shutdown::Both);
        let answer = start_with(&ended);
        assert_eq!(answer, expected, "{family:?}, shut down");
    }
    let (connecting, _others) = half_open();
    let device = device::open(0, 0).unwrap();
    // nbd.ko would wait for the connection.
    let answer = ioctl_number(&device, SET_SOCK, connecting.as_raw_fd() as u64);
    assert_eq!(answer, expected, "one that is being connected");
    drop(device);
    if guest.driver == Driver::Rnbd {
        let what = "unsupported socket: not connected";
        let said = || guest.has_logged(what);
        assert!(
            wait_until(device::SOON, said).is_ok(),
            "it does not say why"
        );
    }
    let netlink = Netlink::open();
    let setup = Setup::new(MIB)
        .index(0)
        .sockets([new_socket(AddressFamily::INET)]);
    let answer = netlink.connect(&setup).map(|index| {
        assert_over(&netlink, index);
        0
    });
    assert_eq!(answer, expected, "by netlink");
    assert_usable(0);
}

/// A socket that waits for the other side, whose queue is full, and what keeps it so.
fn half_open() -> (OwnedFd, Vec<OwnedFd>) {
    let listener = new_socket(AddressFamily::INET);
    rustix::net::bind(
        &listener,
        &std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
    )
    .unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = rustix::net::getsockname(&listener).unwrap();
    let mut others = vec![listener];
    for _ in 0..3 {
        let other = new_socket(AddressFamily::INET);
        let _ = rustix::net::connect(&other, &address);
        others.push(other);
    }
    thread::sleep(Duration::from_millis(100));
    let socket = others.pop().expect("a socket");
    (socket, others)
}

/// They are taken, and their session is over at once.
fn sockets_that_were_connected(_: &Guest) {
    for reset in [false, true] {
        let (ours, served) = tcp_pair((Ipv4Addr::LOCALHOST, 0).into());
        if reset {
            sockopt::set_socket_linger(&served, Some(Duration::ZERO)).unwrap();
        }
        drop(served);
        assert_eq!(start_with(&ours), device::lost(), "TCP, reset: {reset}");
    }
    let (ours, served) = UnixStream::pair().unwrap();
    drop(served);
    assert_eq!(start_with(&ours), device::lost(), "UNIX");
    assert_usable(0);
}

/// A program that has lent its socket gets it back as it was.
fn settings_are_given_back(_: &Guest) {
    const LOW_WATER: u32 = 1000;
    for kind in [Transport::Tcp4, Transport::Tcp6, Transport::Unix] {
        let server = Server::new();
        let ours = server.connect(kind);
        let value = LOW_WATER.to_ne_bytes();
        set_socket_option(&ours, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &value).expect("SO_RCVLOWAT");
        let netlink = Netlink::open();
        let setup = Setup::new(MIB)
            .index(0)
            .sockets([ours.try_clone().unwrap()]);
        let index = netlink.connect(&setup).expect("to connect");
        let read = device::open(index, libc::O_DIRECT).unwrap();
        errno(read.read_exact_at(&mut Buffer::new(4096), 0)).expect("to read");
        drop(read);
        netlink.disconnect(index).expect("to disconnect");
        // nbd.ko does not touch it.
        let given_back = wait_until(device::SOON, || low_water(&ours) == LOW_WATER);
        assert!(given_back.is_ok(), "{kind:?}: {}", low_water(&ours));
    }
}

/// Whoever has a socket's descriptor can wait for the socket's lock while the driver hooks it, or lets go of it.
/// On the debug kernel, lockdep then looks at the lock while the driver changes its class.
fn others_use_them_meanwhile(guest: &Guest) {
    let mut kinds = vec![Transport::Tcp4, Transport::Unix];
    if guest.expected("takes-mptcp-and-vsock") == Driver::Rnbd {
        sh("modprobe vsock_loopback");
        kinds.push(Transport::Vsock);
    }
    let netlink = Netlink::open();
    for kind in kinds {
        for _ in 0..50 {
            let server = Server::new();
            let ours = server.connect(kind);
            let setup = Setup::new(MIB)
                .index(0)
                .sockets([ours.try_clone().unwrap()]);
            let done = AtomicBool::new(false);
            thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !done.load(Ordering::Relaxed) {
                            let on = 1_i32.to_ne_bytes();
                            // An option for which each kind of socket is locked.
                            set_socket_option(&ours, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &on)
                                .expect("SO_KEEPALIVE");
                        }
                    });
                }
                let ended = netlink
                    .connect(&setup)
                    .and_then(|index| netlink.disconnect(index));
                done.store(true, Ordering::Relaxed);
                ended.expect("to connect and to disconnect");
            });
        }
    }
}

fn low_water(socket: &OwnedFd) -> u32 {
    socket_option(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT).expect("SO_RCVLOWAT")
}

/// As `iscsid` talks to `iscsi_tcp.c` (scsi/iscsi_if.h).
struct Iscsi {
    socket: OwnedFd,
    transport: u64,
}

const ISCSI: u32 = 8; // NETLINK_ISCSI
const CREATE_SESSION: u32 = 11;
const DESTROY_SESSION: u32 = 12;
const CREATE_CONN: u32 = 13;
const DESTROY_CONN: u32 = 14;
const BIND_CONN: u32 = 15;
const STOP_CONN: u32 = 18;
/// Of `struct iscsi_uevent`: what is asked, and where the answer is.
const QUESTION: usize = 16;
const ANSWER: usize = 40;
const UEVENT_LEN: usize = 56;

impl Iscsi {
    fn open() -> Self {
        sh("modprobe iscsi_tcp");
        let handle = fs::read_to_string("/sys/class/iscsi_transport/tcp/handle").unwrap();
        let protocol = netlink_protocol(ISCSI);
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol);
        Self {
            socket: socket.expect("a netlink socket"),
            transport: handle.trim().parse().expect("a number"),
        }
    }

    /// Asks, with numbers as the question has them. The answer is the first two numbers of the kernel's.
    fn ask(&self, what: u32, question: &[u32]) -> (u32, u32) {
        const HEADER: usize = 16;
        let mut message = vec![0; HEADER + UEVENT_LEN];
        let len = message.len() as u32;
        message[..4].copy_from_slice(&len.to_ne_bytes());
        message[4..6].copy_from_slice(&(what as u16).to_ne_bytes());
        message[HEADER..][..4].copy_from_slice(&what.to_ne_bytes());
        message[HEADER + 8..][..8].copy_from_slice(&self.transport.to_ne_bytes());
        for (index, number) in question.iter().enumerate() {
            message[HEADER + QUESTION + 4 * index..][..4].copy_from_slice(&number.to_ne_bytes());
        }
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.socket, &message, SendFlags::empty(), &kernel).expect("to ask");
        let mut answer = [0; 4096];
        loop {
            let (len, _) =
                recv(&self.socket, &mut answer[..], RecvFlags::empty()).expect("an answer");
            let number =
                |at: usize| u32::from_ne_bytes(answer[HEADER + at..][..4].try_into().unwrap());
            if len >= HEADER + UEVENT_LEN && number(0) == what {
                assert_eq!(number(4), 0, "the answer to {what} {question:?}");
                return (number(ANSWER), number(ANSWER + 4));
            }
        }
    }

    /// Has a new connection of a new session use a socket.
    fn bind(&self, socket: impl AsFd) -> Bound<'_> {
        let depth = 32 | (32 << 16);
        let (session, _) = self.ask(CREATE_SESSION, &[1, depth]);
        let (_, connection) = self.ask(CREATE_CONN, &[session, 0]);
        let socket = socket.as_fd().as_raw_fd() as u32;
        let (error, _) = self.ask(BIND_CONN, &[session, connection, socket, 0, 1]);
        assert_eq!(error, 0, "to bind the socket");
        Bound {
            iscsi: self,
            session,
            connection,
        }
    }
}

fn netlink_protocol(number: u32) -> Option<rustix::net::Protocol> {
    let raw = std::num::NonZeroU32::new(number)?;
    Some(rustix::net::Protocol::from_raw(raw))
}

/// Puts back the callbacks that it has found when it is dropped.
struct Bound<'a> {
    iscsi: &'a Iscsi,
    session: u32,
    connection: u32,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        const TERM: u32 = 1;
        let (session, connection) = (self.session, self.connection);
        // There is a handle of 64 bits in between.
        self.iscsi
            .ask(STOP_CONN, &[session, connection, 0, 0, TERM]);
        self.iscsi.ask(DESTROY_CONN, &[session, connection]);
        self.iscsi.ask(DESTROY_SESSION, &[session]);
    }
}

/// `iscsi_tcp` keeps the callbacks that it finds, and calls them. It has `sk_user_data` to itself.
fn bound_by_iscsi(guest: &Guest) {
    let iscsi = Iscsi::open();
    for _ in 0..3 {
        let (ours, served, netlink, index) = connected();
        let bound = iscsi.bind(&ours);
        // The other side goes, with a reset: `sk_state_change` and `sk_error_report`.
        sockopt::set_socket_linger(&served, Some(Duration::ZERO)).unwrap();
        drop(served);
        thread::sleep(patient(Duration::from_millis(300)));
        assert_over(&netlink, index);
        // What it calls now, and puts back, is ours.
        drop(bound);
        assert_still_heard_of(ours);
    }
    assert_module_stays(guest);
}

/// It lets go of the socket before the device does, which then finds its own callbacks there.
fn bound_by_iscsi_and_released(guest: &Guest) {
    let iscsi = Iscsi::open();
    let (ours, served, netlink, index) = connected();
    // This ends the connection.
    drop(iscsi.bind(&ours));
    assert_over(&netlink, index);
    drop(served);
    // Nor can another device have it.
    let setup = Setup::new(MIB)
        .index(0)
        .sockets([ours.try_clone().unwrap()]);
    let again = netlink.connect(&setup);
    match guest.driver {
        Driver::Nbd => netlink
            .disconnect(again.expect("to connect"))
            .expect("to disconnect"),
        Driver::Rnbd => assert_eq!(again, Err(Errno::BUSY)),
    }
    assert_still_heard_of(ours);
    assert_module_stays(guest);
}

fn connected() -> (OwnedFd, UnixStream, Netlink, u32) {
    let (ours, served) = tcp_pair((Ipv4Addr::LOCALHOST, 0).into());
    let netlink = Netlink::open();
    let setup = Setup::new(MIB)
        .index(0)
        .sockets([ours.try_clone().unwrap()]);
    let index = netlink.connect(&setup).expect("to connect");
    (ours, served, netlink, index)
}

fn assert_over(netlink: &Netlink, index: u32) {
    netlink.disconnect(index).expect("to disconnect");
    let free = wait_until(device::SOON, || {
        netlink.status(Some(index)) == [(index, false)]
    });
    assert!(free.is_ok(), "the device is still in use");
    assert_usable(0);
}

/// The end of the stream is told to who waits for it, and all goes well when the last one closes it.
fn assert_still_heard_of(socket: OwnedFd) {
    let mut socket = TcpStream::from(socket);
    socket.set_nonblocking(false).unwrap();
    socket
        .set_read_timeout(Some(patient(device::SOON)))
        .unwrap();
    let read = socket.read(&mut [0]);
    let timed_out = read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    assert!(!timed_out, "nothing is heard of the connection's end");
    let _ = socket.write(&[0]);
}

fn assert_module_stays(guest: &Guest) {
    let unloaded = guest.driver.unload();
    match guest.driver {
        Driver::Nbd => assert_eq!(unloaded, Ok(())),
        Driver::Rnbd => assert_eq!(unloaded, Err(Errno::WOULDBLOCK)),
    }
}
