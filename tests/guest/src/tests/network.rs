// SPDX-License-Identifier: GPL-2.0

//! Networks that lose, delay, reorder, repeat and spoil packets, or that are gone for a while.
//! I/O goes on or fails in time, and never does harm.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::integrity::{Bench, DEAD_TIMEOUT_SECONDS, MIXED};
use super::outages::Namespace;
use crate::debug_kernel::patient;
use crate::device::{self, SOON, assert_pattern, errno, pattern};
use crate::driver::Driver;
use crate::firewall::Firewall;
use crate::harness::{Guest, Test, say, tcp_sockets, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::programs::{sh, try_sh};
use crate::proto::Command;
use crate::server::{Server, Transport, ok};
use crate::sys::{Buffer, set_socket_option};
use crate::test;
use crate::volatile::{Honesty, Host};

pub fn tests() -> Vec<Test> {
    vec![
        test!(packets_are_lost),
        test!(packets_are_late_and_out_of_order),
        test!(packets_come_twice),
        test!(packets_are_spoilt),
        test!(the_mtu_changes),
        test!(the_link_flaps),
        test!(one_of_two_paths_is_a_black_hole),
        test!(the_only_path_is_a_black_hole),
        test!(a_write_does_not_come_late),
        test!(a_firewall_forgets_connections),
        test!(the_window_is_closed),
        test!(a_byte_at_a_time),
        test!(little_may_be_unsent),
    ]
}

/// A path to a server, through a pair of devices of which one is in a namespace of its own.
pub struct Path {
    namespace: Namespace,
    listener: TcpListener,
    number: u8,
}

impl Path {
    pub fn new(name: &'static str, number: u8) -> Self {
        sh("modprobe veth && modprobe sch_netem");
        let namespace = Namespace::new(name, number);
        let address = SocketAddr::from(([10, 9, number, 2], Namespace::PORT));
        Self {
            listener: namespace.inside(|| TcpListener::bind(address).expect("to listen")),
            namespace,
            number,
        }
    }

    /// Something that sees what comes to the server.
    fn firewall(&self) -> Firewall {
        self.namespace.inside(Firewall::new)
    }

    /// A connection through it, if it can be had within seconds.
    pub fn connect(&self, serve: impl FnOnce(UnixStream)) -> Option<OwnedFd> {
        let address = self.listener.local_addr().unwrap();
        let client = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
        loop {
            let (served, peer) = self.listener.accept().expect("accept");
            // Others were given up by who dialled.
            if peer == client.local_addr().unwrap() {
                client.set_nodelay(true).expect("TCP_NODELAY");
                served.set_nodelay(true).expect("TCP_NODELAY");
                serve(UnixStream::from(OwnedFd::from(served)));
                return Some(client.into());
            }
        }
    }

    /// What the network does to packets of either direction, in the words of tc-netem(8).
    pub fn netem(&self, what: &str) {
        let (number, name) = (self.number, self.namespace.0);
        sh(&format!(
            "tc qdisc replace dev veth{number} root netem {what}
            tc -n {name} qdisc replace dev eth0 root netem {what}"
        ));
    }

    /// Everything passes again.
    pub fn heal(&self) {
        let (number, name) = (self.number, self.namespace.0);
        let _ = try_sh(&format!("tc qdisc del dev veth{number} root"));
        let _ = try_sh(&format!("tc -n {name} qdisc del dev eth0 root"));
    }

    /// "up" or "down".
    pub fn link(&self, state: &str) {
        self.namespace.link(state);
    }

    fn mtu(&self, bytes: u32) {
        let (number, name) = (self.number, self.namespace.0);
        sh(&format!(
            "ip link set veth{number} mtu {bytes} && ip -n {name} link set eth0 mtu {bytes}"
        ));
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        // The namespace lives as long as a socket in it, and the pair of devices as long as that.
        let _ = try_sh(&format!("ip link del veth{}", self.number));
    }
}

/// Connects device 0 with a connection through each of `paths`.
fn attach<'a>(bench: &Bench, setup: Setup, paths: impl IntoIterator<Item = &'a Path>) {
    let sockets = paths
        .into_iter()
        .map(|path| connect(path, &bench.host).expect("to connect"));
    assert_eq!(bench.netlink.connect(&setup.sockets(sockets)), Ok(0));
}

pub fn connect(path: &Path, host: &Host) -> Option<OwnedFd> {
    path.connect(|socket| host.serve_socket(socket))
}

/// Asserts that all is there that was written.
fn finish(bench: &Bench, mut findings: Vec<String>) {
    findings.extend(bench.check_all());
    bench.disconnect();
    say(&bench.tally.to_string());
    assert!(findings.is_empty(), "{}", findings.join("\n"));
    assert_eq!(bench.tally.errors.load(Ordering::Relaxed), 0);
}

/// Nothing fails while `torment` goes on, and there is some progress.
fn goes_on(connections: usize, torment: impl FnOnce(&Path)) {
    let path = Path::new("left", 1);
    let mut bench = Bench::new(connections, Honesty::Honest, MIXED);
    let setup = bench.setup().timeout(40);
    attach(&bench, setup, (0..connections).map(|_| &path));
    let findings = bench.under_load(|_, _, _| {
        torment(&path);
        path.heal();
        thread::sleep(Duration::from_secs(1));
    });
    let completed = bench.tally.completed();
    finish(&bench, findings);
    assert!(completed > 50, "only {completed} operations");
}

fn netem_for_a_while(what: &str) {
    goes_on(2, |path| {
        path.netem(what);
        thread::sleep(Duration::from_secs(4));
    });
}

fn packets_are_lost(_: &Guest) {
    netem_for_a_while("loss 3%");
}

fn packets_are_late_and_out_of_order(_: &Guest) {
    netem_for_a_while("delay 8ms 6ms distribution normal reorder 25% 50%");
}

fn packets_come_twice(_: &Guest) {
    netem_for_a_while("duplicate 20% delay 2ms 2ms");
}

fn packets_are_spoilt(_: &Guest) {
    netem_for_a_while("corrupt 3%");
}

fn the_mtu_changes(_: &Guest) {
    goes_on(2, |path| {
        for mtu in [600, 9000, 1280, 1500, 60000, 1500] {
            path.mtu(mtu);
            thread::sleep(Duration::from_millis(800));
        }
    });
}

fn the_link_flaps(_: &Guest) {
    goes_on(2, |path| {
        for round in 1..10 {
            path.link("down");
            thread::sleep(Duration::from_millis(40 * round));
            path.link("up");
            thread::sleep(Duration::from_millis(600));
        }
    });
}

/// How long the driver waits for replies, where it is not to wait long.
const TIMEOUT_SECONDS: u64 = 2;

fn one_of_two_paths_is_a_black_hole(_: &Guest) {
    let paths = [Path::new("left", 1), Path::new("right", 2)];
    let [left, right] = &paths;
    let mut bench = Bench::new(4, Honesty::Honest, MIXED);
    let setup = bench.setup().timeout(TIMEOUT_SECONDS);
    let setup = setup.dead_timeout(DEAD_TIMEOUT_SECONDS);
    attach(&bench, setup, [left, left, right, right]);
    let news = Netlink::listen();
    let findings = bench.under_load(|host, _, netlink| {
        for _ in 0..2 {
            thread::sleep(Duration::from_secs(1));
            left.netem("loss 100%");
            assert_eq!(news.expect_dead_link(), 0);
            thread::sleep(Duration::from_secs(2 * TIMEOUT_SECONDS));
            left.heal();
            // What was on its way comes now, if it ever does.
            thread::sleep(Duration::from_secs(2));
            for _ in 0..2 {
                let socket = connect(left, host).expect("to connect");
                let change = Setup::change(0).sockets([socket]);
                assert_eq!(netlink.reconfigure(&change), Ok(()));
            }
            while news.dead_link().is_some() {}
        }
    });
    finish(&bench, findings);
}

fn the_only_path_is_a_black_hole(guest: &Guest) {
    let before = tcp_sockets();
    let path = Path::new("left", 1);
    let bench = Bench::new(1, Honesty::Honest, MIXED);
    attach(&bench, bench.setup().timeout(TIMEOUT_SECONDS), [&path]);
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    let data = Buffer::filled(64 << 10, |data| pattern(1, 0, data));
    direct.write_all_at(&data, 0).expect("to write");
    path.netem("loss 100%");
    let began = Instant::now();
    let failed = direct.write_all_at(&data, 1 << 20);
    let took = began.elapsed();
    assert_eq!(errno(failed), Err(rustix::io::Errno::IO));
    // The block layer looks at timeouts now and then.
    let limit = Duration::from_secs(2 * TIMEOUT_SECONDS + 3);
    assert!(took < patient(limit), "it failed after {took:?}");
    let began = Instant::now();
    assert!(direct.write_all_at(&data, 1 << 20).is_err());
    assert!(began.elapsed() < patient(Duration::from_secs(1)));
    drop(direct);
    bench.disconnect();
    // What is still to be sent keeps a socket that nobody has open. (The server's end, in another
    // namespace, is not counted.)
    if guest.expected("given-up-writes-stay-given-up") == Driver::Nbd {
        assert!(tcp_sockets() > before, "TCP has nothing to send any more");
        path.heal();
    }
    // TCP tries again ever more rarely.
    let gone = wait_until(2 * SOON, || tcp_sockets() == before);
    assert!(gone.is_ok(), "TCP still has something to send");
}

/// A write that was given up on one connection and done on another must not be done again later,
/// when the network lets through what had been sent.
fn a_write_does_not_come_late(guest: &Guest) {
    let paths = [Path::new("left", 1), Path::new("right", 2)];
    let [left, right] = &paths;
    let server = Server::new();
    let netlink = Netlink::open();
    let news = Netlink::listen();
    let dial = |path: &Path| path.connect(|socket| server.serve_socket(socket)).unwrap();
    let setup = Setup::new(1 << 20)
        .index(0)
        .timeout(TIMEOUT_SECONDS)
        .dead_timeout(DEAD_TIMEOUT_SECONDS)
        .sockets([dial(left)]);
    assert_eq!(netlink.connect(&setup), Ok(0));
    drop(setup);
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    let [first, second] = [1, 2].map(|seed| Buffer::filled(8 << 10, |data| pattern(seed, 0, data)));
    left.netem("loss 100%");
    thread::scope(|scope| {
        let write = scope.spawn(|| direct.write_all_at(&first, 0));
        assert_eq!(news.expect_dead_link(), 0);
        let change = Setup::change(0).sockets([dial(right)]);
        assert_eq!(netlink.reconfigure(&change), Ok(()));
        write.join().unwrap().expect("the first write");
    });
    direct.write_all_at(&second, 0).expect("the second write");
    left.heal();
    // TCP tries again ever more rarely: as long as this, if anything is to come.
    let by_left = || {
        let writes = server.requests_of(Command::Write);
        writes.iter().filter(|write| write.connection == 0).count()
    };
    let late = wait_until(Duration::from_secs(8), || by_left() > 0);
    let mut data = Buffer::new(second.len());
    direct.read_exact_at(&mut data, 0).expect("to read");
    drop(direct);
    netlink.disconnect(0).unwrap();
    super::integrity::wait_free(&netlink, 0);
    match guest.expected("given-up-writes-stay-given-up") {
        Driver::Nbd => assert!(late.is_ok(), "no write came late"),
        Driver::Rnbd => {
            assert!(late.is_err(), "a write that had been given up came late");
            assert_pattern(2, 0, &data);
        }
    }
}

/// The client is told that its connection was reset, the server is not.
fn a_firewall_forgets_connections(_: &Guest) {
    let path = Path::new("left", 1);
    let mut bench = Bench::new(1, Honesty::Honest, MIXED);
    let setup = bench.setup().timeout(TIMEOUT_SECONDS);
    attach(&bench, setup.dead_timeout(DEAD_TIMEOUT_SECONDS), [&path]);
    let news = Netlink::listen();
    let findings = bench.under_load(|host, _, netlink| {
        for _ in 0..6 {
            thread::sleep(Duration::from_millis(300));
            let firewall = path.firewall();
            host.stick(true);
            let died = wait_until(SOON, || {
                firewall.refuse(Namespace::PORT);
                news.dead_link().is_some()
            });
            assert!(died.is_ok(), "no reset was believed");
            // What the server has of this connection it could still carry out, after what comes by the
            // next one. No client can prevent that.
            host.cut(host.connections() - 1);
            host.stick(false);
            let socket = connect(&path, host).expect("to connect");
            let change = Setup::change(0).sockets([socket]);
            assert_eq!(netlink.reconfigure(&change), Ok(()));
        }
    });
    finish(&bench, findings);
}

/// A server that does not read for a while, and then does; and one that never does again.
fn the_window_is_closed(_: &Guest) {
    let mut bench = Bench::new(1, Honesty::Honest, MIXED);
    let socket = bench.host.connect(Transport::Tcp4);
    let setup = bench.setup().timeout(20).sockets([socket]);
    assert_eq!(bench.netlink.connect(&setup), Ok(0));
    drop(setup);
    let findings = bench.under_load(|host, _, _| {
        for milliseconds in [300, 1500, 4000] {
            host.stick(true);
            thread::sleep(Duration::from_millis(milliseconds));
            host.stick(false);
            thread::sleep(Duration::from_millis(300));
        }
    });
    finish(&bench, findings);
}

/// With `TCP_NOTSENT_LOWAT`, or the system's `tcp_notsent_lowat`, a socket takes little ahead of what the
/// congestion window lets go. Whoever sends has to wait for that, not for a time.
fn little_may_be_unsent(_: &Guest) {
    const TCP_NOTSENT_LOWAT: i32 = 25;
    const LEN: usize = 1 << 20;
    let took = |unsent: Option<u32>| {
        let path = Path::new("left", 1);
        let server = Server::new();
        let socket = path.connect(|socket| server.serve_socket(socket)).unwrap();
        if let Some(bytes) = unsent {
            let value = bytes.to_ne_bytes();
            set_socket_option(&socket, libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT, &value)
                .expect("TCP_NOTSENT_LOWAT");
        }
        let netlink = Netlink::open();
        let setup = Setup::new(8 * LEN as u64).index(0).sockets([socket]);
        assert_eq!(netlink.connect(&setup), Ok(0));
        drop(setup);
        let direct = device::open(0, libc::O_DIRECT).expect("the device");
        path.netem("delay 5ms");
        let data = Buffer::filled(LEN, |data| pattern(1, 0, data));
        // The congestion window grows.
        direct.write_all_at(&data, 0).expect("to write");
        let began = Instant::now();
        for part in 1..8 {
            direct
                .write_all_at(&data, part * LEN as u64)
                .expect("to write");
        }
        let took = began.elapsed();
        path.heal();
        assert!(server.peek(7 * LEN as u64, LEN) == *data);
        drop(direct);
        netlink.disconnect(0).unwrap();
        super::integrity::wait_free(&netlink, 0);
        took
    };
    // The machine may do other things, too: the best of three.
    let best = |unsent| (0..3).map(|_| took(unsent)).min().unwrap();
    let (usual, little) = (best(None), best(Some(4096)));
    say(&format!("with little unsent {little:?}, else {usual:?}"));
    assert!(
        little < 2 * usual + Duration::from_millis(100),
        "it dragged on"
    );
}

/// So much of a reply comes byte by byte.
const SLOWLY: usize = 600;

/// A server that reads and sends one byte at a time.
fn a_byte_at_a_time(_: &Guest) {
    // All requests wait for one another.
    let setup = Setup::new(1 << 20).index(0).timeout(60);
    let link = setup.attach_over(&[Transport::Tcp4]);
    link.server.script(|conn, request| {
        let reply = match request.command {
            Command::Write => {
                let mut data = Vec::new();
                for at in 0..request.len as usize {
                    data.extend(conn.read_bytes(1)?);
                    if at % 16 == 0 {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
                conn.store(request, &data);
                ok(request).to_vec()
            }
            _ => conn.answer(request)?,
        };
        let (slow, rest) = reply.split_at(reply.len().min(SLOWLY));
        for byte in slow {
            conn.send(&[*byte])?;
            thread::sleep(Duration::from_micros(300));
        }
        conn.send(rest)
    });
    let direct = link.direct();
    thread::scope(|scope| {
        for part in 0..4 {
            let direct = &direct;
            scope.spawn(move || {
                let offset = part * 4096;
                let data = Buffer::filled(512, |data| pattern(part, offset, data));
                direct.write_all_at(&data, offset).expect("to write");
                let mut data = Buffer::new(512);
                direct.read_exact_at(&mut data, offset).expect("to read");
                assert_pattern(part, offset, &data);
            });
        }
    });
}
