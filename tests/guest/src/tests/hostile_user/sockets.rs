// SPDX-License-Identifier: GPL-2.0

//! Sockets that listen, and sockets that somebody else goes on using.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::io::Errno;
use rustix::net::{RecvFlags, connect_unspec, recv, sockopt};

use super::{MIB, Over};
use crate::debug_kernel::{self, patient};
use crate::device::{self, assert_usable};
use crate::driver::Driver;
use crate::harness::{Guest, Test, say, seed, skip, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::{CAN_MULTI_CONN, DO_IT, SET_SIZE, SET_SOCK};
use crate::server::{Server, Transport, encrypt, tcp_pair};
use crate::sys::{Buffer, SysResult, ioctl_number, set_socket_option};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(listening_sockets),
        test!(a_connection_that_begins_to_listen),
        test!(meddling_with_the_socket),
        test!(tls_behind_the_drivers_back)
            .leaves_module()
            .on_request(),
    ]
}

/// A socket that listens is no connection. Those that come in on it are somebody else's, whatever the
/// driver does with the one that listens.
fn listening_sockets(_: &Guest) {
    let accepted = AtomicU64::new(0);
    for round in 0..40 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| connect_till_refused(address, &over));
            }
            scope.spawn(|| accept_till_over(&listener, &over, &accepted));
            thread::sleep(Duration::from_millis(round % 8));
            // It may begin, and ends at once.
            let _over = Over(&over);
            let _ = start_with(&listener);
        });
    }
    say(&format!("{} connections accepted", accepted.into_inner()));
    let path = format!("/tmp/listener-{}", std::process::id());
    let _ = start_with(UnixListener::bind(&path).unwrap());
    std::fs::remove_file(&path).unwrap();
    assert_usable(0);
}

fn start_with(socket: impl AsFd) -> SysResult {
    let device = device::open(0, 0).unwrap();
    ioctl_number(&device, SET_SOCK, socket.as_fd().as_raw_fd() as u64)?;
    ioctl_number(&device, SET_SIZE, MIB)?;
    ioctl_number(&device, DO_IT, 0)
}

fn connect_till_refused(address: SocketAddr, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let Ok(mut client) = TcpStream::connect(address) else {
            return;
        };
        // When whoever accepts it waits for that.
        thread::sleep(Duration::from_millis(3));
        let _ = client.write_all(b"x");
    }
}

fn accept_till_over(listener: &TcpListener, over: &AtomicBool, accepted: &AtomicU64) {
    while !over.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((socket, _)) => {
                assert_receives(socket);
                accepted.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// The same with one that was a connection when the device was given it.
fn a_connection_that_begins_to_listen(_: &Guest) {
    let mut heard = 0;
    for _ in 0..30 {
        let server = Server::new();
        let ours = server.connect(Transport::Tcp4);
        let netlink = Netlink::open();
        let setup = Setup::new(MIB)
            .index(0)
            .sockets([ours.try_clone().unwrap()]);
        let index = netlink.connect(&setup).expect("to connect");
        let _link = Link {
            server,
            netlink,
            index,
        };
        connect_unspec(&ours).expect("to undo the connection");
        // Where the driver was quicker, the socket is shut down and cannot.
        if rustix::net::listen(&ours, 4).is_ok() {
            let listener = TcpListener::from(ours);
            let port = listener.local_addr().unwrap().port();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            heard += u32::from(hears_of(&listener, address));
        }
    }
    say(&format!("{heard} times something came in on it"));
    assert_usable(0);
}

/// Connects to a socket that may not listen any more. Whether that went well.
fn hears_of(listener: &TcpListener, address: SocketAddr) -> bool {
    listener.set_nonblocking(true).unwrap();
    let Ok(mut client) = TcpStream::connect(address) else {
        return false;
    };
    let Ok((accepted, _)) = listener.accept() else {
        return false;
    };
    let _ = client.write_all(b"x");
    assert_receives(accepted);
    true
}

/// It is told what is sent to it, or that the connection is over.
fn assert_receives(mut socket: TcpStream) {
    let limit = Some(patient(device::SOON));
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(limit).unwrap();
    if let Err(error) = socket.read(&mut [0]) {
        let kind = error.kind();
        assert_eq!(
            kind,
            ErrorKind::ConnectionReset,
            "a connection that hears nothing"
        );
    }
}

/// One who keeps the descriptor of a socket can do to it what he likes.
fn meddling_with_the_socket(_: &Guest) {
    if debug_kernel::runs() {
        // Its calls look at user's memory with the socket locked; lockdep is right, and then off.
        skip("who uses a device's socket can wait for memory that the device must write out");
    }
    let mut random = Rng::with_seed(seed());
    for round in 0..9 {
        let kind = [Transport::Tcp4, Transport::Tcp6, Transport::Unix][round % 3];
        meddle(kind, &mut random);
    }
    assert_usable(0);
}

fn meddle(kind: Transport, random: &mut Rng) {
    let server = Server::new();
    let sockets = [server.connect(kind), server.connect(kind)];
    let netlink = Netlink::open();
    let setup = Setup::new(MIB)
        .index(0)
        .timeout(1)
        .flags(device::USUAL_FLAGS | CAN_MULTI_CONN);
    let copies = sockets.iter().map(|socket| socket.try_clone().unwrap());
    let index = netlink.connect(&setup.sockets(copies)).expect("to connect");
    let device = device::open(index, libc::O_DIRECT).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // With an error, or not; but it ends.
                let _ = device.read_at(&mut Buffer::new(4096), 0);
                let _ = device.write_at(&Buffer::new(64 << 10), 65536);
            }
        });
        for _ in 0..12 {
            thread::sleep(Duration::from_millis(random.u64(..6)));
            torment(&sockets[random.usize(..2)], random);
        }
        over.store(true, Ordering::Relaxed);
        // Who has lost a part of a reply to us waits for its timeout.
    });
    drop(device);
    netlink.disconnect(index).expect("to disconnect");
    let free = wait_until(device::SOON, || {
        netlink.status(Some(index)) == [(index, false)]
    });
    assert!(free.is_ok(), "the device is still in use");
}

fn torment(socket: &OwnedFd, random: &mut Rng) {
    use rustix::net::{Shutdown, shutdown};
    const TCP_ULP: i32 = 31;
    const IPV6_ADDRFORM: i32 = 1;
    match random.u8(..10) {
        0 => drop(recv(socket, &mut [0; 100][..], RecvFlags::DONTWAIT)),
        1 => drop(sockopt::set_socket_send_buffer_size(
            socket,
            1 << random.u32(..20),
        )),
        2 => drop(sockopt::set_socket_recv_buffer_size(
            socket,
            1 << random.u32(..20),
        )),
        3 => drop(set_socket_option(
            socket,
            libc::IPPROTO_TCP,
            TCP_ULP,
            b"tls\0",
        )),
        4 => drop(set_socket_option(
            socket,
            libc::IPPROTO_IPV6,
            IPV6_ADDRFORM,
            &libc::AF_INET.to_ne_bytes(),
        )),
        5 => drop(sockopt::set_socket_linger(socket, Some(Duration::ZERO))),
        6 => drop(sockopt::set_tcp_cork(socket, random.bool())),
        7 => drop(sockopt::set_tcp_user_timeout(socket, random.u32(..100))),
        8 if random.u8(..3) == 0 => drop(shutdown(socket, Shutdown::Both)),
        9 if random.u8(..3) == 0 => {
            // It is no connection any more, and then it listens.
            let _ = connect_unspec(socket);
            let _ = rustix::net::listen(socket, 1);
        }
        _ => {}
    }
}

/// TLS that is set up on a socket that a device has keeps the callbacks that it finds there, and calls them
/// when the device has long let go of the socket.
fn tls_behind_the_drivers_back(guest: &Guest) {
    let (ours, mut served) = tcp_pair((Ipv4Addr::LOCALHOST, 0).into());
    let netlink = Netlink::open();
    let setup = Setup::new(MIB)
        .index(0)
        .sockets([ours.try_clone().unwrap()]);
    let index = netlink.connect(&setup).expect("to connect");
    encrypt(&ours);
    encrypt(&served);
    // Each is a record. They come together, and are more than the driver takes before it finds no reply in
    // them.
    sockopt::set_tcp_cork(&served, true).unwrap();
    for _ in 0..20 {
        served.write_all(&[0xee; 600]).expect("to send");
    }
    sockopt::set_tcp_cork(&served, false).unwrap();
    thread::sleep(device::SOON / 20);
    netlink.disconnect(index).expect("to disconnect");
    let unloaded = guest.driver.unload();
    let mut received = 0;
    while let Ok((bytes @ 1.., _)) = recv(&ours, &mut [0; 600][..], RecvFlags::DONTWAIT) {
        received += bytes;
    }
    match guest.driver {
        Driver::Nbd => assert_eq!(unloaded, Ok(())),
        Driver::Rnbd => {
            assert!(received > 0, "nothing was left that would call anybody");
            assert_eq!(unloaded, Err(Errno::WOULDBLOCK));
        }
    }
}
