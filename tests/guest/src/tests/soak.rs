// SPDX-License-Identifier: GPL-2.0

//! Everything at once, for as long as `HOURS` in the environment says: see `make soak`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::integrity::{
    DEAD_TIMEOUT_SECONDS, Load, MIXED, Tally, granule, reconnect, setup, transport, wait_free,
};
use super::journals::{BTRFS, EXT4, GRANULE, Kind, Mounted, XFS};
use super::network::{self, Path};
use crate::device::{self, pattern};
use crate::harness::{Guest, Test, Until, complain, say, seed};
use crate::klog;
use crate::ledger::Ledger;
use crate::netlink::{DESTROY_ON_DISCONNECT, Netlink, Setup};
use crate::sys::Buffer;
use crate::test;
use crate::volatile::{Honesty, Host};

pub fn tests() -> Vec<Test> {
    let seconds = (hours() * 3600.0) as u64;
    vec![
        test!(mixed_load)
            .parameters("nbds_max=4")
            .limit_seconds(seconds + seconds / 10 + 300)
            .on_request(),
    ]
}

fn hours() -> f64 {
    let hours = std::env::var("HOURS").ok();
    hours.and_then(|hours| hours.parse().ok()).unwrap_or(0.05)
}

/// After so long everybody stops, all is looked at, and a line is printed.
const ROUND: Duration = Duration::from_secs(50);

/// The file system's server crashes in every so many rounds.
const ROUNDS_TO_A_CRASH: u32 = 4;

/// How long requests wait for a connection that is stuck.
const TIMEOUT_SECONDS: u64 = 3;

/// The device with the file system on it, and the one that is written to directly.
const FS: u32 = 0;
const RAW: u32 = 1;

const RAW_SECTORS: usize = 16 << 10;
const RAW_WRITERS: usize = 3;
const RAW_CONNECTIONS: usize = 4;

/// What happened so far, of all devices.
#[derive(Default)]
struct Events {
    faults: Mutex<BTreeMap<&'static str, u64>>,
    reconnects: AtomicU64,
    devices: AtomicU64,
}

impl Events {
    fn fault(&self, kind: &'static str) {
        *self.faults.lock().unwrap().entry(kind).or_default() += 1;
    }

    fn reconnected(&self, connections: usize) {
        self.reconnects
            .fetch_add(connections as u64, Ordering::Relaxed);
    }
}

/// Sleeps for so many milliseconds, or until it is over; true if it is not.
fn pause(random: &mut Rng, milliseconds: std::ops::Range<u64>, done: &AtomicBool) -> bool {
    let until = Instant::now() + Duration::from_millis(random.u64(milliseconds));
    while Instant::now() < until && !done.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(20));
    }
    !done.load(Ordering::Relaxed)
}

/// Nobody is answered for a while; if that is longer than the timeout, connections die of it.
fn stick(host: &Host, events: &Events, for_long: bool) {
    host.stick(true);
    if for_long {
        events.fault("stuck for long");
        thread::sleep(Duration::from_secs(2 * TIMEOUT_SECONDS + 1));
        // What was asked for before that is done elsewhere by then, so not here any more.
        host.reset();
    } else {
        events.fault("stuck");
        thread::sleep(Duration::from_secs(1));
    }
    host.stick(false);
}

/// A device that is written to directly. Its server crashes now and then and loses what was not
/// flushed, and one of the ways there is a bad network.
struct Raw {
    host: Host,
    ledger: Ledger,
    netlink: Netlink,
    path: Path,
    random: Rng,
    tally: Tally,
}

impl Raw {
    fn new(random: &mut Rng) -> Self {
        let host = Host::new((RAW_SECTORS * 512) as u64, Honesty::Honest);
        let raw = Self {
            ledger: Ledger::new(random.u64(..), &host.disk, RAW_SECTORS),
            host,
            netlink: Netlink::open(),
            path: Path::new("soak", 7),
            random: random.fork(),
            tally: Tally::default(),
        };
        let sockets = (0..RAW_CONNECTIONS).map(|number| {
            if number % 2 == 0 {
                network::connect(&raw.path, &raw.host).expect("to connect")
            } else {
                raw.host.connect(transport(number))
            }
        });
        let setup = setup(raw.host.disk.size, RAW_CONNECTIONS)
            .index(RAW)
            .timeout(TIMEOUT_SECONDS)
            .dead_timeout(2 * DEAD_TIMEOUT_SECONDS)
            .sockets(sockets);
        assert_eq!(raw.netlink.connect(&setup), Ok(RAW));
        raw
    }

    /// Answers what is wrong.
    fn round(&mut self, events: &Events, done: &AtomicBool) -> Vec<String> {
        let direct = device::open(RAW, libc::O_DIRECT).expect("the device");
        let before = self.tally.completed();
        let load = Load {
            file: &direct,
            ledger: &self.ledger,
            tally: &self.tally,
            habits: MIXED,
            writers: RAW_WRITERS,
        };
        let (host, netlink, path) = (&mut self.host, &self.netlink, &self.path);
        let mut findings = load.during(&mut self.random, |random| {
            let _until_done = Until(done);
            while pause(random, 500..6000, done) {
                Self::torment(host, netlink, path, random, events);
            }
        });
        findings.extend(self.ledger.check_all(&direct).expect("to read"));
        let errors = self.tally.errors.load(Ordering::Relaxed);
        if errors > 0 {
            findings.push(format!("{errors} operations failed, though there was time"));
        }
        if self.tally.completed() == before {
            findings.push("nothing goes on".into());
        }
        self.host.forget_requests();
        findings
    }

    fn torment(host: &mut Host, netlink: &Netlink, path: &Path, random: &mut Rng, events: &Events) {
        match random.u32(..9) {
            0 | 1 => {
                events.fault("crash");
                let granule = granule(random);
                host.crash(random, granule);
            }
            2 => {
                events.fault("reset");
                host.reset();
            }
            3 => {
                events.fault("cut");
                host.cut(random.usize(..host.connections()));
            }
            4 => stick(host, events, false),
            5 => stick(host, events, true),
            6 => {
                events.fault("black hole");
                path.netem("loss 100%");
                thread::sleep(Duration::from_secs(2 * TIMEOUT_SECONDS + 1));
                Self::heal(host, path);
            }
            7 => {
                events.fault("link down");
                path.link("down");
                thread::sleep(Duration::from_millis(random.u64(50..1500)));
                path.link("up");
                Self::heal(host, path);
            }
            _ => {
                events.fault("bad network");
                path.netem("loss 2% delay 3ms 3ms duplicate 2% corrupt 1% reorder 10%");
                thread::sleep(Duration::from_secs(3));
                Self::heal(host, path);
            }
        }
        let dead = RAW_CONNECTIONS.saturating_sub(host.living());
        // One of them over the bad network, if that is there.
        if dead > 1 && random.bool() {
            if let Some(socket) = network::connect(path, host) {
                let change = Setup::change(RAW).sockets([socket]);
                assert_eq!(netlink.reconfigure(&change), Ok(()));
            }
        }
        reconnect(netlink, RAW, host, RAW_CONNECTIONS);
        events.reconnected(dead);
    }

    /// The network is good again. What was under way may come now, and do no harm; then all
    /// connections are made anew, since the server does not know which of them are no more.
    fn heal(host: &Host, path: &Path) {
        path.heal();
        thread::sleep(Duration::from_secs(2));
        host.reset();
    }

    fn end(self) {
        let _ = self.netlink.disconnect(RAW);
        wait_free(&self.netlink, RAW);
    }
}

/// A round of a device with a file system: connections are lost under it, and at the end of some
/// rounds its server crashes, so that it is mounted anew. Answers what is wrong.
fn use_mounted(
    mounted: &mut Mounted,
    events: &Events,
    done: &AtomicBool,
    crash: bool,
) -> Vec<String> {
    let mut findings = mounted.under_load(|host, random, netlink| {
        let until_done = Until(done);
        while pause(random, 2000..12_000, done) {
            torment_mounted(host, netlink, random, events);
        }
        if crash {
            events.fault("crash under a file system");
            host.crash(random, GRANULE);
            let _ = netlink.disconnect(FS);
        }
        drop(until_done);
    });
    let errors = mounted.tally.errors.swap(0, Ordering::Relaxed);
    if crash {
        findings.extend(mounted.recover().err());
    } else if errors > 0 {
        findings.push(format!("{errors} operations failed on a file"));
    }
    mounted.forget_requests();
    findings
}

/// What loses nothing but connections.
fn torment_mounted(host: &Host, netlink: &Netlink, random: &mut Rng, events: &Events) {
    match random.u32(..4) {
        0 => {
            events.fault("reset");
            host.reset();
        }
        1 => {
            events.fault("cut");
            host.cut(random.usize(..host.connections()));
        }
        2 => stick(host, events, false),
        _ => stick(host, events, true),
    }
    let dead = Mounted::CONNECTIONS.saturating_sub(host.living());
    reconnect(netlink, FS, host, Mounted::CONNECTIONS);
    events.reconnected(dead);
}

fn any_kind(random: &mut Rng) -> Kind {
    [EXT4, XFS, BTRFS][random.usize(..3)]
}

/// Devices that come and go.
fn come_and_go(random: &mut Rng, events: &Events, done: &AtomicBool) {
    const LEN: usize = 64 << 10;
    while pause(random, 0..300, done) {
        let destroy = if random.bool() {
            DESTROY_ON_DISCONNECT
        } else {
            0
        };
        let link = Setup::new(1 << 20)
            .client_flags(destroy)
            .timeout(TIMEOUT_SECONDS)
            .attach();
        let direct = link.direct();
        let (seed, offset) = (random.u64(..), random.u64(..15) << 16);
        let data = Buffer::filled(LEN, |data| pattern(seed, offset, data));
        let dies = random.u32(..4) == 0;
        if dies {
            link.server.kill();
        }
        let mut read = Buffer::new(LEN);
        let done = direct
            .write_all_at(&data, offset)
            .and_then(|()| direct.read_exact_at(&mut read, offset));
        if done.is_ok() && *read != *data {
            complain(format!("nbd{} has read what was not written", link.index));
        }
        if done.is_err() != dies {
            complain(format!(
                "nbd{}: {done:?}, its server dead: {dies}",
                link.index
            ));
        }
        events.devices.fetch_add(1, Ordering::Relaxed);
    }
}

/// The machine's memory and threads.
struct Machine {
    available_kb: u64,
    unreclaimable_kb: u64,
    threads: usize,
}

impl Machine {
    fn now() -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
        let number = |name: &str| {
            let line = meminfo.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let loadavg = fs::read_to_string("/proc/loadavg").unwrap();
        let threads = loadavg.split(['/', ' ']).nth(4).unwrap();
        Self {
            available_kb: number("MemAvailable:"),
            unreclaimable_kb: number("SUnreclaim:"),
            threads: threads.parse().unwrap(),
        }
    }

    /// What has grown since `before` more than can be by chance.
    fn growth(&self, before: &Self) -> Option<String> {
        let slab = self
            .unreclaimable_kb
            .saturating_sub(before.unreclaimable_kb);
        let lost = before.available_kb.saturating_sub(self.available_kb);
        let threads = self.threads.saturating_sub(before.threads);
        (slab > 24 << 10 || lost > 192 << 10 || threads > 40).then(|| {
            format!("since the first round: {slab} KB more slab, {lost} KB less available, {threads} more threads")
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (available, slab) = (self.available_kb >> 10, self.unreclaimable_kb >> 10);
        write!(
            f,
            "{available} MB available, {slab} MB slab, {} threads",
            self.threads
        )
    }
}

fn line(began: Instant, raw: &Raw, mounted: &Mounted, events: &Events, machine: &Machine) {
    let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut text = format!("{:4} min: ", began.elapsed().as_secs() / 60);
    for (name, tally) in [("raw", &raw.tally), ("file", &mounted.tally)] {
        let (all, mb) = (tally.completed(), number(&tally.bytes) >> 20);
        let verified = number(&tally.reads);
        write!(text, "{name} {all} I/Os, {mb} MB, {verified} verified; ").unwrap();
    }
    write!(
        text,
        "{} names; {} devices; ",
        mounted.churn.made(),
        number(&events.devices)
    )
    .unwrap();
    for (kind, count) in events.faults.lock().unwrap().iter() {
        write!(text, "{kind} {count}, ").unwrap();
    }
    write!(text, "reconnects {}; {machine}", number(&events.reconnects)).unwrap();
    say(&text);
}

fn mixed_load(guest: &Guest) {
    let mut random = Rng::with_seed(seed());
    let began = Instant::now();
    let length = Duration::from_secs_f64(hours() * 3600.0);
    let events = Events::default();
    let mut raw = Raw::new(&mut random);
    let mut mounted = Mounted::new(any_kind(&mut random), &mut random);
    let mut first = None;
    for round in 1.. {
        let crash = round % ROUNDS_TO_A_CRASH == 0;
        let done = AtomicBool::new(false);
        let mut churning = random.fork();
        let findings: Vec<String> = thread::scope(|scope| {
            let raw = scope.spawn(|| raw.round(&events, &done));
            let mounted = scope.spawn(|| use_mounted(&mut mounted, &events, &done, crash));
            scope.spawn(|| come_and_go(&mut churning, &events, &done));
            let until = Instant::now() + ROUND;
            while Instant::now() < until && !done.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(200));
            }
            drop(Until(&done));
            let found = [raw, mounted].map(|part| part.join().expect("a part of the load"));
            found.into_iter().flatten().collect()
        });
        let machine = Machine::now();
        line(began, &raw, &mounted, &events, &machine);
        let log = guest.log();
        let alarms = klog::alarms(&log);
        // The harness complains of these.
        let over = began.elapsed() >= length || !findings.is_empty() || !alarms.is_empty();
        findings.into_iter().for_each(complain);
        let first = first.get_or_insert(machine);
        if over {
            if let Some(growth) = Machine::now().growth(first) {
                complain(growth);
            }
            break;
        }
        if crash && random.bool() {
            mounted.end();
            mounted = Mounted::new(any_kind(&mut random), &mut random);
        }
    }
    mounted.end();
    raw.end();
}
