// SPDX-License-Identifier: GPL-2.0

//! A write that was reported as failed, or was sent again by another connection, must not reach the
//! server any more: newer data may be there by then.
//!
//! The server has taken the header of a write and a little of its data; the rest waits in the client's
//! socket. When all is over the server goes on reading, and stores whatever write it gets all of.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt;

use crate::debug_kernel::patient;
use crate::device::{self, Plan, SOON, USUAL_FLAGS, assert_pattern, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, run_on, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::proto::{self, CAN_MULTI_CONN, Command, Request};
use crate::server::{Conn, MPTCP, Server, Transport, mptcp_pair, ok, tcp_pair};
use crate::sys::{self, Buffer, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(after_clear_sock),
        test!(after_a_netlink_disconnect),
        test!(after_the_client_was_killed),
        test!(after_the_server_has_half_closed),
        test!(after_the_server_broke_the_protocol),
        test!(over_mptcp),
        test!(over_mptcp_that_has_fallen_back),
        test!(a_connection_that_owes_nothing_ends_politely),
    ]
}

const LEN: usize = 1 << 20;
const OLD: u64 = 1;
const NEW: u64 = 2;

/// A server whose first connection stops reading within the data of its first write, until it is let go.
struct Lazy {
    server: Server,
    let_go: Arc<AtomicBool>,
    /// The server's end of the connection over which little gets to it.
    narrow: Mutex<Option<UnixStream>>,
    /// Makes that connection.
    pair: fn() -> (OwnedFd, UnixStream),
}

impl Lazy {
    /// `first` is what it does before it stops.
    fn new(first: impl Fn(&mut Conn) + Send + Sync + 'static) -> Self {
        let server = Server::new();
        let let_go = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&let_go);
        server.script(move |conn: &mut Conn, request: &Request| {
            if conn.index > 0 || request.command != Command::Write {
                return conn.serve(request);
            }
            first(conn);
            let _ = wait_until(patient(SOON), || told.load(Ordering::Relaxed));
            let data = conn.read_data(request)?;
            conn.store(request, &data);
            conn.send(&ok(request))
        });
        Lazy {
            server,
            let_go,
            narrow: Mutex::default(),
            pair: || tcp_pair((Ipv4Addr::LOCALHOST, 0).into()),
        }
    }

    /// A connection over which little gets to the server, and of which the client's socket takes much.
    fn connect(&self) -> OwnedFd {
        let (client, served) = (self.pair)();
        sockopt::set_socket_recv_buffer_size(&served, 4096).expect("SO_RCVBUF");
        sockopt::set_socket_send_buffer_size(&client, 4 * LEN).expect("SO_SNDBUF");
        *self.narrow.lock().unwrap() = Some(served.try_clone().expect("dup"));
        self.server.serve_socket(served);
        client
    }

    /// Goes on reading, until nothing more can come.
    fn read_on(&self, living: usize) {
        if let Some(narrow) = self.narrow.lock().unwrap().take() {
            sockopt::set_socket_recv_buffer_size(&narrow, 4 * LEN).expect("SO_RCVBUF");
        }
        self.let_go.store(true, Ordering::Relaxed);
        let ended = wait_until(patient(SOON), || self.server.living() <= living);
        assert!(ended.is_ok(), "the first connection did not end");
    }

    /// Asserts that the newer data is there, unless that driver lets the older one come late.
    fn judge(&self, guest: &Guest) {
        let stored = self.server.peek(0, LEN);
        match guest.expected("given-up-writes-stay-given-up") {
            Driver::Nbd => assert_pattern(OLD, 0, &stored),
            Driver::Rnbd => assert_pattern(NEW, 0, &stored),
        }
    }
}

fn buffer(seed: u64) -> Buffer {
    Buffer::filled(LEN, |data| pattern(seed, 0, data))
}

/// Writes the old data, does `then` when the server has got to it, and answers how the write ended.
fn write_old(lazy: &Lazy, direct: &File, then: impl FnOnce()) -> Result<(), Errno> {
    thread::scope(|scope| {
        let writer = scope.spawn(|| errno(direct.write_all_at(&buffer(OLD), 0)));
        lazy.server.wait_for_command(Command::Write);
        // All of it is in the client's socket soon.
        thread::sleep(Duration::from_millis(100));
        then();
        writer.join().unwrap()
    })
}

fn write_new(direct: &File) {
    direct
        .write_all_at(&buffer(NEW), 0)
        .expect("the newer data");
    direct.sync_all().expect("a flush");
}

/// Has a netlink session end by `end` while a write is on its way, and writes newer data in another one.
fn sessions_one_after_the_other(guest: &Guest, end: impl FnOnce(&Netlink, &File)) {
    sessions_over(&Lazy::new(|_| ()), guest, end);
}

fn sessions_over(lazy: &Lazy, guest: &Guest, end: impl FnOnce(&Netlink, &File)) {
    let netlink = Netlink::open();
    let setup = || Setup::new(LEN as u64).index(0).flags(USUAL_FLAGS);
    assert_eq!(netlink.connect(&setup().sockets([lazy.connect()])), Ok(0));
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    let written = write_old(lazy, &direct, || end(&netlink, &direct));
    assert_eq!(written, Err(Errno::IO));
    drop(direct);
    super::integrity::wait_free(&netlink, 0);

    let socket = lazy.server.connect(Transport::Unix);
    assert_eq!(netlink.connect(&setup().sockets([socket])), Ok(0));
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    write_new(&direct);
    lazy.read_on(1);
    lazy.judge(guest);
    drop(direct);
    assert_eq!(netlink.disconnect(0), Ok(()));
    super::integrity::wait_free(&netlink, 0);
}

fn after_clear_sock(guest: &Guest) {
    sessions_one_after_the_other(guest, |_, direct| {
        ioctl_number(direct, proto::CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
    });
}

fn after_a_netlink_disconnect(guest: &Guest) {
    sessions_one_after_the_other(guest, |netlink, _| {
        assert_eq!(netlink.disconnect(0), Ok(()));
    });
}

fn after_the_client_was_killed(guest: &Guest) {
    sys::handle_and_ignore(libc::SIGUSR1, false);
    let lazy = Lazy::new(|_| ());
    let plan = Plan::new(LEN as u64);
    let mut client = plan.start_over(vec![lazy.connect()]);
    client.wait_ready(LEN as u64);
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    let written = write_old(&lazy, &direct, || {
        sys::signal_thread(client.tid, libc::SIGUSR1);
    });
    assert_eq!(written, Err(Errno::IO));
    let _ = client.wait();
    drop(direct);

    let mut client = plan.start_over(vec![lazy.server.connect(Transport::Unix)]);
    client.wait_ready(LEN as u64);
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    write_new(&direct);
    lazy.read_on(1);
    lazy.judge(guest);
    drop(direct);
    lazy.server.kill();
    let _ = client.wait();
}

/// Has the server's first connection end by `first`, and newer data come by its second one.
fn connections_one_beside_the_other(
    guest: &Guest,
    first: impl Fn(&mut Conn) + Send + Sync + 'static,
) {
    let lazy = Lazy::new(first);
    let netlink = Netlink::open();
    let sockets = [lazy.connect(), lazy.server.connect(Transport::Unix)];
    // nbd.ko sends it again when its time is up.
    let setup = Setup::new(LEN as u64)
        .index(0)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .timeout(2)
        .sockets(sockets);
    assert_eq!(netlink.connect(&setup), Ok(0));
    drop(setup);
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    let by_first = |processor: &usize| {
        run_on(*processor);
        lazy.server.forget_requests();
        direct
            .read_exact_at(&mut Buffer::new(4096), 0)
            .expect("to read");
        lazy.server.requests().iter().all(|r| r.connection == 0)
    };
    let processors = thread::available_parallelism().unwrap().get();
    (0..processors)
        .find(by_first)
        .expect("a processor whose requests go by the first connection");
    direct
        .write_all_at(&buffer(OLD), 0)
        .expect("the older data");
    let by = lazy.server.requests_of(Command::Write);
    let by: Vec<usize> = by.iter().map(|request| request.connection).collect();
    assert_eq!(by, [0, 1]);
    write_new(&direct);
    lazy.read_on(1);
    lazy.judge(guest);
    drop(direct);
    assert_eq!(netlink.disconnect(0), Ok(()));
    super::integrity::wait_free(&netlink, 0);
}

fn after_the_server_has_half_closed(guest: &Guest) {
    connections_one_beside_the_other(guest, |conn| {
        conn.half_close().expect("to half-close");
    });
}

fn after_the_server_broke_the_protocol(guest: &Guest) {
    connections_one_beside_the_other(guest, |conn| {
        conn.send(&[0x55; proto::REPLY_LEN]).expect("to send");
    });
}

fn over_mptcp(guest: &Guest) {
    over(guest, || mptcp_pair(MPTCP));
}

fn over_mptcp_that_has_fallen_back(guest: &Guest) {
    over(guest, || mptcp_pair(None));
}

fn over(guest: &Guest, pair: fn() -> (OwnedFd, UnixStream)) {
    let ends: [fn(&Netlink, &File); 2] = [
        |netlink, _| assert_eq!(netlink.disconnect(0), Ok(())),
        |_, direct| {
            ioctl_number(direct, proto::CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
        },
    ];
    for end in ends {
        let mut lazy = Lazy::new(|_| ());
        lazy.pair = pair;
        sessions_over(&lazy, guest, end);
    }
}

/// The server hears the goodbye, and sees the end of the stream rather than a reset.
fn a_connection_that_owes_nothing_ends_politely(_: &Guest) {
    let (client, served) = tcp_pair((Ipv4Addr::LOCALHOST, 0).into());
    let server = Server::new();
    let setup = Setup::new(1 << 20).index(0).sockets([client]);
    let netlink = Netlink::open();
    let heard = served.try_clone().expect("dup");
    server.serve_socket(served);
    assert_eq!(netlink.connect(&setup), Ok(0));
    drop(setup);
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    direct
        .write_all_at(&Buffer::new(64 << 10), 0)
        .expect("to write");
    // Whoever looks for partitions has been answered by then.
    thread::sleep(Duration::from_millis(500));
    drop(direct);
    assert_eq!(netlink.disconnect(0), Ok(()));
    super::integrity::wait_free(&netlink, 0);
    let ended = wait_until(SOON, || server.living() == 0);
    assert!(ended.is_ok(), "the server heard no goodbye");
    assert_eq!(sockopt::socket_error(&heard), Ok(Ok(())), "it was a reset");
}
