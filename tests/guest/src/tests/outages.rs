// SPDX-License-Identifier: GPL-2.0

//! Real servers that die and come back, while real programs or a careful writer use the device.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use regex_lite::Regex;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::user_space::{fio, serve};
use crate::device::{self, SOON, assert_pattern, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, say, seed, tcp_sockets, wait_until};
use crate::negotiate::{Export, dial};
use crate::netlink::{Netlink, Setup};
use crate::programs::{Daemon, sh, try_sh};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(servers_of_single_connections_die).limit_seconds(300),
        test!(servers_shut_down).limit_seconds(400),
        test!(a_host_is_cut_off).limit_seconds(300),
        test!(a_daemon_reconnects).limit_seconds(400),
        test!(a_daemon_reconnects_200_times)
            .limit_seconds(1500)
            .on_request(),
    ]
}

pub const STORAGE: &str = "/tmp/storage.img";
pub const SIZE: u64 = 16 << 20;

/// How long requests of a stuck connection wait (and of a dead one, with nbd.ko).
const TIMEOUT_SECONDS: u64 = 3;

/// Longer than any connection is away.
const DEAD_TIMEOUT_SECONDS: u64 = 60;

/// The file that all servers export.
pub struct Storage;

impl Storage {
    pub fn new() -> Self {
        File::create(STORAGE).unwrap().set_len(SIZE).unwrap();
        Self
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let _ = fs::remove_file(STORAGE);
    }
}

/// One nbdkit, and where it is.
pub struct Host {
    address: String,
    /// Where it listens, as `serve` wants to know it.
    waiting: String,
    command: String,
    server: Option<Daemon>,
}

impl Host {
    /// On a UNIX socket.
    pub fn local(name: &str) -> Self {
        let path = format!("/tmp/{name}.sock");
        Self::start(Self {
            command: format!("nbdkit -f -U {path} file {STORAGE}"),
            waiting: path.clone(),
            address: path,
            server: None,
        })
    }

    fn start(mut self) -> Self {
        self.revive();
        self
    }

    pub fn revive(&mut self) {
        let _ = fs::remove_file(&self.waiting);
        self.server = Some(serve(&self.command, &self.waiting));
    }

    /// kill -9
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Asks it to end, and waits until it has.
    pub fn shut_down(&mut self) {
        let mut server = self.server.take().expect("a server");
        server.terminate();
        assert!(server.wait(SOON), "{}", server.said());
    }

    /// Dials, for a while: neighbours that were cut off are not found at once.
    pub fn dial(&self) -> Export {
        let mut answer = dial(&self.address);
        let _ = wait_until(SOON, || {
            if answer.is_err() {
                answer = dial(&self.address);
            }
            answer.is_ok()
        });
        answer.unwrap_or_else(|error| panic!("{}: {error}", self.address))
    }
}

/// A device with connections to several servers.
pub struct Attached {
    netlink: Netlink,
    pub news: Netlink,
}

impl Attached {
    /// Connects device 0, with a connection to each of `hosts`.
    pub fn to<'a>(hosts: impl IntoIterator<Item = &'a Host>) -> Self {
        let exports: Vec<Export> = hosts.into_iter().map(Host::dial).collect();
        let setup = Setup::new(exports[0].size)
            .index(0)
            .flags(exports[0].flags)
            .timeout(TIMEOUT_SECONDS)
            .dead_timeout(DEAD_TIMEOUT_SECONDS)
            .sockets(exports.into_iter().map(|export| export.socket));
        let attached = Self {
            netlink: Netlink::open(),
            news: Netlink::listen(),
        };
        assert_eq!(attached.netlink.connect(&setup), Ok(0));
        attached
    }

    /// A new connection to `host` takes the place of a dead one, if there is any.
    fn reconnect(&self, host: &Host) {
        let setup = Setup::change(0).sockets([host.dial().socket]);
        assert_eq!(self.netlink.reconfigure(&setup), Ok(()));
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.netlink.disconnect(0);
        let gone = wait_until(SOON, || self.netlink.status(Some(0)) == [(0, false)]);
        if gone.is_err() {
            crate::harness::complain("nbd0 is still in use".into());
        }
    }
}

/// Lets fio write, read and verify again and again, until `f` returns. Says how long the slowest request took.
pub fn under_fio(f: impl FnOnce()) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut runs, mut slowest) = (0, Duration::ZERO);
            while !done.load(Ordering::Relaxed) {
                fio(
                    "--rw=randrw --bsrange=4k-32k --ioengine=libaio --iodepth=16 --output-format=json",
                );
                runs += 1;
                slowest = slowest.max(slowest_request());
            }
            (runs, slowest)
        });
        let until_done = Until(&done);
        f();
        drop(until_done);
        let (runs, slowest): (u32, Duration) = load.join().expect("fio");
        let slowest = slowest.as_millis();
        say(&format!(
            "{runs} runs of fio; the slowest request took {slowest} ms"
        ));
    });
}

/// Of the last run of fio.
fn slowest_request() -> Duration {
    let report = fs::read_to_string("/tmp/fio.txt").expect("the report");
    let latency = Regex::new(r#""clat_ns" : \{\s*"min" : \d+,\s*"max" : (\d+)"#).unwrap();
    let found = latency.captures_iter(&report);
    let slowest = found.map(|found| found[1].parse().expect("nanoseconds"));
    Duration::from_nanos(slowest.max().expect("a latency"))
}

fn servers_of_single_connections_die(_: &Guest) {
    let _storage = Storage::new();
    let mut hosts = ["a", "b", "c", "d"].map(Host::local);
    let attached = Attached::to(&hosts);
    under_fio(|| {
        for round in 0..8 {
            thread::sleep(Duration::from_millis(700));
            let host = &mut hosts[round % 4];
            host.kill();
            assert_eq!(attached.news.expect_dead_link(), 0);
            thread::sleep(Duration::from_millis(500));
            host.revive();
            attached.reconnect(host);
        }
    });
}

/// nbdkit answers what comes after SIGTERM with ESHUTDOWN, and stays until its clients have said
/// goodbye.
fn servers_shut_down(guest: &Guest) {
    say(sh("nbdkit --version").trim());
    if guest.expected("shutting-down-is-not-an-error") == Driver::Nbd {
        let _storage = Storage::new();
        let host = Host::local("a");
        let attached = Attached::to([&host]);
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        host.server.as_ref().expect("a server").terminate();
        thread::sleep(Duration::from_millis(200));
        let read = direct.read_exact_at(&mut Buffer::new(4096), 0);
        assert_eq!(device::errno(read), Err(Errno::IO));
        drop((direct, attached));
        return;
    }
    let storage = Storage::new();
    let mut hosts = ["a", "b"].map(Host::local);
    let attached = Attached::to(&hosts);
    under_fio(|| {
        for round in 0..8 {
            thread::sleep(Duration::from_millis(700));
            let host = &mut hosts[round % 2];
            host.shut_down();
            assert_eq!(attached.news.expect_dead_link(), 0);
            host.revive();
            attached.reconnect(host);
        }
    });
    drop((attached, hosts, storage));
    // The only server.
    restart_under_load(20, Host::shut_down);
}

/// A host of its own, as far as the network is concerned.
pub struct Namespace(pub &'static str);

impl Namespace {
    pub const PORT: u16 = 10809;

    /// `number` is part of its address.
    pub fn new(name: &'static str, number: u8) -> Self {
        let namespace = Self(name);
        sh(&format!(
            "ip netns add {name}
            ip link add veth{number} type veth peer name eth0 netns {name}
            ip addr add 10.9.{number}.1/24 dev veth{number}
            ip link set veth{number} up
            ip -n {name} addr add 10.9.{number}.2/24 dev eth0
            ip -n {name} link set eth0 up"
        ));
        namespace
    }

    /// Does something in it, such as opening sockets.
    pub fn inside<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        // A thread that has moved does not come back.
        let moved = || {
            let namespace = File::open(format!("/run/netns/{}", self.0)).expect("the namespace");
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).expect("setns");
            f()
        };
        thread::scope(|scope| scope.spawn(moved).join().expect("what it is to do"))
    }

    pub fn host(&self, number: u8) -> Host {
        let (name, port) = (self.0, Self::PORT);
        let address = format!("10.9.{number}.2:{port}");
        Host::start(Host {
            command: format!("ip netns exec {name} nbdkit -f -p {port} file {STORAGE}"),
            waiting: address.clone(),
            address,
            server: None,
        })
    }

    pub fn link(&self, state: &str) {
        sh(&format!("ip -n {} link set eth0 {state}", self.0));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = try_sh(&format!("ip netns del {}", self.0));
    }
}

/// Requests that the device has completed.
fn completed() -> u64 {
    let stat = device::sysfs(0, "stat");
    let numbers: Vec<u64> = stat
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    numbers[0] + numbers[4]
}

fn a_host_is_cut_off(guest: &Guest) {
    sh("modprobe veth");
    let before = tcp_sockets();
    let _storage = Storage::new();
    let namespaces = [Namespace::new("left", 1), Namespace::new("right", 2)];
    let hosts = [namespaces[0].host(1), namespaces[1].host(2)];
    let [left, right] = &hosts;
    // Requests prefer the first connections, as many as there are processors.
    let attached = Attached::to([left, left, right, right]);
    under_fio(|| {
        // After the first round the preferred ones are those of the left host again.
        for round in 0..2 {
            thread::sleep(Duration::from_secs(1));
            namespaces[0].link("down");
            assert_eq!(attached.news.expect_dead_link(), 0, "round {round}");
            // If both were in use, both are given up.
            thread::sleep(Duration::from_secs(2 * TIMEOUT_SECONDS));
            let before = completed();
            let goes_on = wait_until(SOON, || completed() > before + 50);
            assert!(goes_on.is_ok(), "nothing goes on in round {round}");
            namespaces[0].link("up");
            for _ in 0..2 {
                attached.reconnect(left);
            }
            while attached.news.dead_link().is_some() {}
        }
    });
    drop(attached);
    if guest.expected("given-up-writes-stay-given-up") == Driver::Nbd {
        // What is still to be sent keeps a socket that nobody has open.
        let sent = wait_until(Duration::from_secs(120), || tcp_sockets() <= before);
        assert!(sent.is_ok(), "TCP does not get rid of it");
    }
    drop(hosts);
}

/// A daemon as users write it: it hears that a connection has died, dials until somebody answers,
/// and gives the device the new connection.
fn keep_connected(index: u32, address: &str, ready: impl FnOnce(), done: &AtomicBool) -> u32 {
    let (netlink, news) = (Netlink::open(), Netlink::listen());
    ready();
    let mut reconnected = 0;
    while !done.load(Ordering::Relaxed) {
        if news.dead_link() != Some(index) {
            thread::sleep(Duration::from_millis(2));
            continue;
        }
        while !done.load(Ordering::Relaxed) {
            let Ok(export) = dial(address) else {
                thread::sleep(Duration::from_millis(5));
                continue;
            };
            let setup = Setup::change(index)
                .dead_timeout(DEAD_TIMEOUT_SECONDS)
                .sockets([export.socket]);
            assert_eq!(netlink.reconfigure(&setup), Ok(()));
            reconnected += 1;
            break;
        }
    }
    reconnected
}

/// A writer's part of the device, and what was last acknowledged for each block of it.
pub struct Ledger {
    number: u64,
    generations: Vec<u64>,
}

impl Ledger {
    const BLOCK: usize = 8 << 10;
    const BLOCKS: u64 = 256;

    pub fn new(number: u64) -> Self {
        Self {
            number,
            generations: vec![0; Self::BLOCKS as usize],
        }
    }

    fn offset(&self, block: u64) -> u64 {
        (self.number * Self::BLOCKS + block) * Self::BLOCK as u64
    }

    /// Writes blocks anywhere, each with its generation, and counts what is acknowledged.
    pub fn write(&mut self, direct: &File, seed: u64, acknowledged: &AtomicU64, done: &AtomicBool) {
        let mut random = Rng::with_seed(seed ^ self.number);
        let mut generation = 0;
        while !done.load(Ordering::Relaxed) {
            generation += 1;
            let block = random.u64(..Self::BLOCKS);
            let offset = self.offset(block);
            let data = Buffer::filled(Self::BLOCK, |data| pattern(generation, offset, data));
            direct.write_all_at(&data, offset).expect("to write");
            self.generations[block as usize] = generation;
            acknowledged.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Asserts that everything that was acknowledged is there.
    pub fn verify(&self, file: &File) {
        for (block, generation) in (0..).zip(&self.generations) {
            let mut data = Buffer::new(Self::BLOCK);
            file.read_exact_at(&mut data, self.offset(block)).unwrap();
            if *generation == 0 {
                assert!(data.iter().all(|byte| *byte == 0));
            } else {
                assert_pattern(*generation, self.offset(block), &data);
            }
        }
    }
}

/// Ends and restarts a server so many times while blocks are written; verifies them all.
fn restart_under_load(restarts: u32, end: impl Fn(&mut Host)) {
    let seed = seed();
    let mut random = Rng::with_seed(seed);
    let _storage = Storage::new();
    let mut host = Host::local("restarted");
    let address = host.address.clone();
    let attached = Attached::to([&host]);
    let (acknowledged, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut ledgers = [0, 1, 2].map(Ledger::new);
    let began = Instant::now();
    thread::scope(|scope| {
        let _until_done = Until(&done);
        let (say_ready, ready) = std::sync::mpsc::channel();
        let daemon =
            scope.spawn(|| keep_connected(0, &address, move || say_ready.send(()).unwrap(), &done));
        ready.recv().unwrap();
        for ledger in &mut ledgers {
            let (acknowledged, done) = (&acknowledged, &done);
            let direct = device::open(0, libc::O_DIRECT).unwrap();
            scope.spawn(move || ledger.write(&direct, seed, acknowledged, done));
        }
        for restart in 0..restarts {
            // More than one for each writer: not all of them were on their way already.
            let enough = acknowledged.load(Ordering::Relaxed) + random.u64(4..30);
            let goes_on = wait_until(6 * SOON, || acknowledged.load(Ordering::Relaxed) >= enough);
            assert!(goes_on.is_ok(), "nothing goes on after {restart} restarts");
            end(&mut host);
            thread::sleep(Duration::from_millis(random.u64(..40)));
            host.revive();
        }
        let before = acknowledged.load(Ordering::Relaxed);
        let goes_on = wait_until(6 * SOON, || acknowledged.load(Ordering::Relaxed) > before);
        assert!(goes_on.is_ok(), "nothing goes on at the end");
        done.store(true, Ordering::Relaxed);
        let reconnected = daemon.join().expect("the daemon");
        assert!(reconnected >= restarts, "{reconnected} of {restarts}");
    });
    say(&format!(
        "{restarts} restarts, {} writes in {:.0} s",
        acknowledged.load(Ordering::Relaxed),
        began.elapsed().as_secs_f32()
    ));
    let direct = device::open(0, libc::O_DIRECT).unwrap();
    let storage = File::open(STORAGE).unwrap();
    for ledger in &ledgers {
        ledger.verify(&direct);
        ledger.verify(&storage);
    }
    drop(direct);
    drop(attached);
}

fn a_daemon_reconnects(guest: &Guest) {
    // nbd.ko has requests wait for their timeout each time.
    let restarts = match guest.expected("failover-is-immediate") {
        Driver::Nbd => 5,
        Driver::Rnbd => 50,
    };
    restart_under_load(restarts, Host::kill);
}

fn a_daemon_reconnects_200_times(_: &Guest) {
    restart_under_load(200, Host::kill);
}
