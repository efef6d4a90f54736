// SPDX-License-Identifier: GPL-2.0

//! Servers that crash and lose what was not flushed, under writers that know what was promised.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::io::ReadWriteFlags;

use crate::device::{self, SOON, USUAL_FLAGS};
use crate::harness::{Guest, Test, Until, say, seed, wait_until};
use crate::ledger::{Ledger, SECTOR};
use crate::netlink::{Netlink, Setup};
use crate::proto::CAN_MULTI_CONN;
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;
use crate::volatile::{Honesty, Host};

pub fn tests() -> Vec<Test> {
    vec![
        test!(crashes_with_one_connection),
        test!(crashes_with_four_connections),
        test!(crashes_where_only_fua_is_heeded),
        test!(crashes_under_a_living_device),
        test!(crashes_under_a_living_device_with_four_connections),
        test!(a_server_that_does_not_flush_is_found),
        test!(a_server_that_ignores_fua_is_found),
        test!(a_server_that_flushes_one_connection_only_is_found),
        test!(a_server_that_misplaces_writes_is_found),
    ]
}

/// Of the device; small, so that blocks are written over again and again.
const SECTORS: usize = 4 << 10;
const WRITERS: usize = 3;

/// The longest write, in sectors.
const LONGEST: usize = 128;

/// For nbd.ko, whose requests wait for it where a connection is lost.
const TIMEOUT_SECONDS: u64 = 2;

/// Longer than any connection is away.
pub const DEAD_TIMEOUT_SECONDS: u64 = 60;

/// What a writer asks for.
#[derive(Clone, Copy)]
pub struct Habits {
    /// Of 100 operations; the rest are plain writes and reads.
    pub flushes: u32,
    pub fua: u32,
    pub reads: u32,
}

pub const MIXED: Habits = Habits {
    flushes: 8,
    fua: 12,
    reads: 20,
};

/// What writers have done.
#[derive(Default)]
pub struct Tally {
    pub writes: AtomicU64,
    pub bytes: AtomicU64,
    pub fua: AtomicU64,
    pub flushes: AtomicU64,
    pub reads: AtomicU64,
    /// Operations that failed.
    pub errors: AtomicU64,
}

impl Tally {
    pub fn completed(&self) -> u64 {
        let counters = [&self.writes, &self.fua, &self.flushes, &self.reads];
        counters
            .map(|counter| counter.load(Ordering::Relaxed))
            .iter()
            .sum()
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [writes, fua, flushes, reads, errors] = [
            &self.writes,
            &self.fua,
            &self.flushes,
            &self.reads,
            &self.errors,
        ]
        .map(|counter| counter.load(Ordering::Relaxed));
        write!(
            f,
            "{writes} writes, {fua} with FUA, {flushes} flushes, {reads} reads, {errors} failed"
        )
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What is written to, and who knows what was promised of it.
pub struct Load<'a> {
    pub file: &'a File,
    pub ledger: &'a Ledger,
    pub tally: &'a Tally,
    pub habits: Habits,
    pub writers: usize,
}

impl Load<'_> {
    /// Lets the writers work, each on its part, while `f` runs. Answers what they read that they
    /// should not have.
    pub fn during(&self, random: &mut Rng, f: impl FnOnce(&mut Rng)) -> Vec<String> {
        let done = AtomicBool::new(false);
        let share = self.ledger.sectors() / self.writers;
        thread::scope(|scope| {
            let writers: Vec<_> = (0..self.writers)
                .map(|number| {
                    let writer = Writer {
                        load: self,
                        part: number * share..(number + 1) * share,
                        random: random.fork(),
                    };
                    scope.spawn(|| writer.run(&done))
                })
                .collect();
            let until_done = Until(&done);
            f(random);
            drop(until_done);
            let writers = writers.into_iter();
            let found = writers.map(|writer| writer.join().expect("a writer"));
            found.flatten().collect()
        })
    }
}

/// One thread's writes to its part of a medium.
struct Writer<'a> {
    load: &'a Load<'a>,
    part: Range<usize>,
    random: Rng,
}

impl Writer<'_> {
    /// Writes, flushes and reads at random until it is told that that is enough.
    fn run(mut self, done: &AtomicBool) -> Vec<String> {
        let mut findings = Vec::new();
        while !done.load(Ordering::Relaxed) {
            match self.step() {
                Ok(found) => findings.extend(found),
                Err(_) => {
                    count(&self.load.tally.errors);
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        findings.truncate(3);
        findings
    }

    fn step(&mut self) -> io::Result<Vec<String>> {
        let Habits {
            flushes,
            fua,
            reads,
        } = self.load.habits;
        let choice = self.random.u32(..100);
        if choice < flushes {
            self.flush()?;
        } else if choice < flushes + fua {
            self.write(true)?;
        } else if choice < flushes + fua + reads {
            return self.read();
        } else {
            self.write(false)?;
        }
        Ok(Vec::new())
    }

    fn flush(&mut self) -> io::Result<()> {
        let flush = self.load.ledger.begin_flush();
        self.load.file.sync_data()?;
        self.load.ledger.flushed(&flush);
        count(&self.load.tally.flushes);
        Ok(())
    }

    /// A few sectors anywhere, now and then many.
    fn sectors(&mut self) -> Range<usize> {
        let most = if self.random.u32(..8) == 0 {
            LONGEST
        } else {
            16
        };
        let len = self.random.usize(1..=most);
        let first = self.random.usize(self.part.start..=self.part.end - len);
        first..first + len
    }

    fn write(&mut self, fua: bool) -> io::Result<()> {
        let Load {
            file,
            ledger,
            tally,
            ..
        } = self.load;
        let sectors = self.sectors();
        let offset = (sectors.start * SECTOR) as u64;
        let write = ledger.begin_write(sectors);
        let data = ledger.data(&write);
        let flags = if fua {
            ReadWriteFlags::DSYNC
        } else {
            ReadWriteFlags::empty()
        };
        let written = rustix::io::pwritev2(file, &[IoSlice::new(&data)], offset, flags)?;
        if written != data.len() {
            // As where the device ends, or a part of it failed.
            return Err(io::ErrorKind::WriteZero.into());
        }
        ledger.acknowledge(&write, fua);
        tally.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        count(if fua { &tally.fua } else { &tally.writes });
        Ok(())
    }

    fn read(&mut self) -> io::Result<Vec<String>> {
        let Load {
            file,
            ledger,
            tally,
            ..
        } = self.load;
        let sectors = self.sectors();
        let mut data = Buffer::new(sectors.len() * SECTOR);
        let before = ledger.incarnation();
        file.read_exact_at(&mut data, (sectors.start * SECTOR) as u64)?;
        let steady = ledger.incarnation() == before;
        tally.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        count(&tally.reads);
        Ok(ledger.check(sectors.start, &data, steady.then_some(before)))
    }
}

/// A device, and writers that know what was promised.
pub struct Bench {
    pub host: Host,
    pub ledger: Ledger,
    pub netlink: Netlink,
    pub tally: Tally,
    connections: usize,
    habits: Habits,
    random: Rng,
}

impl Bench {
    pub fn new(connections: usize, honesty: Honesty, habits: Habits) -> Self {
        let seed = seed();
        let host = Host::new((SECTORS * SECTOR) as u64, honesty);
        Self {
            ledger: Ledger::new(seed, &host.disk, SECTORS),
            host,
            netlink: Netlink::open(),
            connections,
            habits,
            random: Rng::with_seed(seed),
            tally: Tally::default(),
        }
    }

    pub fn setup(&self) -> Setup {
        setup(self.host.disk.size, self.connections)
    }

    fn connect(&self, setup: Setup) {
        let sockets = (0..self.connections).map(|number| self.host.connect(transport(number)));
        assert_eq!(self.netlink.connect(&setup.sockets(sockets)), Ok(0));
    }

    pub fn disconnect(&self) {
        let _ = self.netlink.disconnect(0);
        wait_free(&self.netlink, 0);
    }

    /// Looks at all of the device.
    pub fn check_all(&self) -> Vec<String> {
        let direct = device::open(0, libc::O_DIRECT).expect("the device");
        self.ledger.check_all(&direct).expect("to read")
    }

    /// Lets the writers work while `f` does something to the server. Answers what they found.
    pub fn under_load(&mut self, f: impl FnOnce(&mut Host, &mut Rng, &Netlink)) -> Vec<String> {
        let direct = device::open(0, libc::O_DIRECT).expect("the device");
        let load = Load {
            file: &direct,
            ledger: &self.ledger,
            tally: &self.tally,
            habits: self.habits,
            writers: WRITERS,
        };
        let (host, netlink) = (&mut self.host, &self.netlink);
        load.during(&mut self.random, |random| f(host, random, netlink))
    }

    /// A crash under load, and a new connection; answers what is wrong.
    fn round(&mut self) -> Vec<String> {
        self.connect(self.setup());
        let mut findings = self.under_load(|host, random, netlink| {
            thread::sleep(Duration::from_millis(random.u64(200..1200)));
            let granule = granule(random);
            host.crash(random, granule);
            let _ = netlink.disconnect(0);
        });
        wait_free(&self.netlink, 0);
        self.connect(self.setup());
        let direct = device::open(0, libc::O_DIRECT).expect("the device");
        findings.extend(self.ledger.check_after_crash(&direct).expect("to read"));
        drop(direct);
        self.disconnect();
        findings
    }

    fn rounds(&mut self, rounds: u32) {
        for round in 0..rounds {
            let findings = self.round();
            assert!(
                findings.is_empty(),
                "after crash {round}:\n{}",
                findings.join("\n")
            );
        }
        say(&format!("{rounds} crashes, {}", self.tally));
        assert!(self.tally.completed() > 10 * u64::from(rounds));
    }

    /// The test of the test.
    fn finds_something(&mut self) {
        for round in 0..20 {
            let findings = self.round();
            if let Some(finding) = findings.first() {
                say(&format!("found in round {round}: {finding}"));
                return;
            }
        }
        panic!("a bug of the server was not found");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Also where a test panics: who follows wants the device.
        let _ = self.netlink.disconnect(0);
    }
}

pub fn setup(size: u64, connections: usize) -> Setup {
    let several = if connections > 1 { CAN_MULTI_CONN } else { 0 };
    Setup::new(size)
        .index(0)
        .flags(USUAL_FLAGS | several)
        .timeout(TIMEOUT_SECONDS)
}

pub fn transport(number: usize) -> Transport {
    [Transport::Tcp4, Transport::Unix, Transport::Tcp6][number % 3]
}

/// What disks write in one piece.
pub fn granule(random: &mut Rng) -> usize {
    if random.bool() { 512 } else { 4096 }
}

pub fn wait_free(netlink: &Netlink, index: u32) {
    let free = wait_until(SOON, || netlink.status(Some(index)) == [(index, false)]);
    assert!(free.is_ok(), "nbd{index} is still in use");
}

/// Replaces dead connections of device `index` until it has `connections`. The driver answers yes
/// and takes nothing as long as it does not know of a dead one.
pub fn reconnect(netlink: &Netlink, index: u32, host: &Host, connections: usize) {
    let complete = wait_until(6 * SOON, || {
        if host.living() >= connections {
            // One that was not taken ends soon.
            thread::sleep(Duration::from_millis(50));
            return host.living() >= connections;
        }
        let socket = host.connect(transport(host.connections()));
        let taken = netlink.reconfigure(&Setup::change(index).sockets([socket]));
        assert_eq!(taken, Ok(()));
        false
    });
    assert!(
        complete.is_ok(),
        "{} of {connections} connections",
        host.living()
    );
}

fn crashes_with_one_connection(_: &Guest) {
    Bench::new(1, Honesty::Honest, MIXED).rounds(10);
}

fn crashes_with_four_connections(_: &Guest) {
    Bench::new(4, Honesty::Honest, MIXED).rounds(10);
}

/// A write of a block device with RWF_DSYNC is followed by a flush, which would hide that FUA is
/// lost on the way.
const ONLY_FUA: Habits = Habits {
    flushes: 0,
    fua: 40,
    reads: 10,
};

fn crashes_where_only_fua_is_heeded(_: &Guest) {
    Bench::new(4, Honesty::NoFlush, ONLY_FUA).rounds(8);
}

fn a_server_that_does_not_flush_is_found(_: &Guest) {
    Bench::new(1, Honesty::NoFlush, MIXED).finds_something();
}

fn a_server_that_ignores_fua_is_found(_: &Guest) {
    Bench::new(4, Honesty::Careless, ONLY_FUA).finds_something();
}

fn a_server_that_flushes_one_connection_only_is_found(_: &Guest) {
    Bench::new(4, Honesty::FlushOfOneConnection, MIXED).finds_something();
}

fn a_server_that_misplaces_writes_is_found(_: &Guest) {
    Bench::new(1, Honesty::Misplaced, MIXED).finds_something();
}

/// The device stays connected, as far as it knows. Of a server that has crashed and is back, what
/// was flushed or written with FUA is promised, and no more: the new one does not know what the
/// old one had acknowledged.
fn live(connections: usize, faults: u32) {
    let mut bench = Bench::new(connections, Honesty::Honest, MIXED);
    bench.connect(bench.setup().dead_timeout(DEAD_TIMEOUT_SECONDS));
    let mut crashes = 0;
    let mut findings = bench.under_load(|host, random, netlink| {
        for _ in 0..faults {
            thread::sleep(Duration::from_millis(random.u64(20..600)));
            match random.u32(..3) {
                0 => {
                    let granule = granule(random);
                    host.crash(random, granule);
                    crashes += 1;
                }
                1 => host.reset(),
                _ => {
                    let made = host.connections();
                    host.cut(made - random.usize(1..=connections));
                }
            }
            reconnect(netlink, 0, host, connections);
        }
    });
    say(&format!(
        "{faults} faults, {crashes} of them crashes, {}",
        bench.tally
    ));
    findings.extend(bench.check_all());
    bench.disconnect();
    assert!(findings.is_empty(), "{}", findings.join("\n"));
    let errors = bench.tally.errors.load(Ordering::Relaxed);
    assert_eq!(errors, 0, "operations failed, though there was time");
}

fn crashes_under_a_living_device(guest: &Guest) {
    live(1, faults(guest));
}

fn crashes_under_a_living_device_with_four_connections(guest: &Guest) {
    live(4, faults(guest));
}

/// nbd.ko has requests wait for their timeout each time.
fn faults(guest: &Guest) -> u32 {
    use crate::driver::Driver;
    match guest.expected("failover-is-immediate") {
        Driver::Nbd => 6,
        Driver::Rnbd => 30,
    }
}
