// SPDX-License-Identifier: GPL-2.0

//! A thousand devices come, are used, and go without a trace.

use std::collections::HashMap;
use std::fs::{self, DirEntry};
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{MIB, move_data};
use crate::debug_kernel::enough;
use crate::device::{self, SOON};
use crate::driver::{Driver, devices};
use crate::harness::{Guest, Test, say, wait_until};
use crate::netlink::{DESTROY_ON_DISCONNECT, Netlink, Setup};
use crate::server::{Server, Transport};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(a_thousand_devices)
            .parameters("nbds_max=0")
            .limit_seconds(400),
    ]
}

/// How many there are; fewer on the debug kernel, where each takes a third of a second to go.
fn count() -> u32 {
    enough(1000, 200)
}

/// What may be missing when all are gone. The kernel keeps 7 to 12 MiB the first time that it has so
/// many devices, and no more the next time. One object that is left of each device would hide in
/// that; [`Usage::slabs`] shows it, unless there are hundreds of workers, as on PREEMPT_RT.
const LOST_KIB: i64 = 16 << 10;

/// How many objects of one cache a work queue's worker has at most: its `struct pid` and its
/// `struct cred` can share one, and so do its `struct kthread` and its `struct worker`.
const OBJECTS_OF_A_WORKER: i64 = 2;

/// How much memory a worker has: a stack of 16 KiB, and what describes it.
const KIB_OF_A_WORKER: i64 = 28;

/// What the machine has in use.
struct Usage {
    /// Kernel threads and processes.
    tasks: usize,
    /// Those of them that are work queues' workers. They are everybody's, and the kernel keeps what it
    /// has of them for minutes after they had something to do last.
    workers: usize,
    /// MemAvailable.
    available_kib: i64,
    /// Objects that are allocated, of each kind.
    slabs: HashMap<String, i64>,
}

impl Usage {
    /// Usage when all is given back that can be.
    fn now() -> Self {
        fs::write("/proc/sys/vm/drop_caches", "2").expect("drop_caches");
        for cache in fs::read_dir("/sys/kernel/slab").unwrap() {
            // Processors keep some objects for later, which would count.
            let _ = fs::write(cache.unwrap().path().join("shrink"), "1");
        }
        let tasks = tasks();
        Self {
            tasks: tasks.len(),
            workers: tasks.iter().filter(|name| is_worker(name)).count(),
            available_kib: available_kib(),
            slabs: slabs(),
        }
    }

    /// Usage once it no longer changes much: the kernel frees some things later.
    fn settled() -> Self {
        let mut last = Self::now();
        let _ = wait_until(Duration::from_secs(5), || {
            thread::sleep(Duration::from_millis(300));
            let before = std::mem::replace(&mut last, Self::now());
            last.available_kib.abs_diff(before.available_kib) < 256
        });
        last
    }

    /// What there is more of than before `count` devices came and went.
    fn lost_since(&self, before: &Self, count: u32) -> Vec<String> {
        let mut lost = Vec::new();
        let more_workers = self.workers.saturating_sub(before.workers) as i64;
        let kib = before.available_kib - self.available_kib;
        if kib - more_workers * KIB_OF_A_WORKER > LOST_KIB {
            lost.push(format!("{kib} KiB of memory"));
        }
        let [now, then] = [self, before].map(|usage| usage.tasks - usage.workers);
        if now > then + 8 {
            lost.push(format!("{now} tasks besides workers, {then} before"));
        }
        for (name, objects) in &self.slabs {
            let more = objects - before.slabs.get(name).unwrap_or(&0);
            // The debug kernel keeps the one for later, and has the other for all objects together.
            if !["debug_objects_cache", "kmemleak_object"].contains(&name.as_str())
                && more - more_workers * OBJECTS_OF_A_WORKER > i64::from(count) / 2
            {
                lost.push(format!("{more} objects of {name}"));
            }
        }
        lost
    }
}

/// The names of all kernel threads and processes.
fn tasks() -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap();
    let name = |entry: io::Result<DirEntry>| {
        let path = entry.ok()?.path();
        path.file_name()?.to_str()?.parse::<u32>().ok()?;
        fs::read_to_string(path.join("comm")).ok()
    };
    entries.filter_map(name).collect()
}

/// A work queue's rescuer is its own, and no worker.
fn is_worker(name: &str) -> bool {
    name.starts_with("kworker/") && !name.starts_with("kworker/R-")
}

fn available_kib() -> i64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.expect("MemAvailable").trim_end_matches("kB").trim();
    kib.parse().expect("a number")
}

/// The objects that /proc/slabinfo counts.
fn slabs() -> HashMap<String, i64> {
    let text = fs::read_to_string("/proc/slabinfo").unwrap();
    let lines = text.lines().skip(2);
    let cache = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    lines.filter_map(cache).collect()
}

/// A server with a thread for each of many connections.
struct Crowd {
    server: Server,
    sockets: Vec<OwnedFd>,
}

impl Crowd {
    fn gather(count: u32) -> Self {
        let server = Server::new();
        let sockets = (0..count)
            .map(|_| server.connect(Transport::Unix))
            .collect();
        Self { server, sockets }
    }
}

/// Makes, uses and removes a device for each socket of the crowd; `full` is told when all are there.
fn live(netlink: &Netlink, crowd: &mut Crowd, full: impl FnOnce()) {
    let sockets = std::mem::take(&mut crowd.sockets);
    let count = sockets.len() as u32;
    timed("connected", count, || {
        for (index, socket) in (0..).zip(sockets) {
            let setup = Setup::new(MIB)
                .index(index)
                .client_flags(DESTROY_ON_DISCONNECT)
                .sockets([socket]);
            assert_eq!(netlink.connect(&setup), Ok(index));
        }
    });
    assert_eq!(devices(), (0..count).collect::<Vec<_>>());
    full();
    // A fifth of them, since the first to open a device has it searched for partitions.
    timed("written and read", count / 5, || {
        for index in (0..count).step_by(5) {
            let direct = device::open(index, libc::O_DIRECT).unwrap();
            move_data(&direct, u64::from(index % 4) << 16, index.into());
        }
    });
    timed("removed", count, || {
        for index in 0..count {
            assert_eq!(netlink.disconnect(index), Ok(()));
        }
        let gone = wait_until(Duration::from_secs(100), || netlink.status(None).is_empty());
        assert!(gone.is_ok(), "{:?} are left", netlink.status(None));
    });
}

fn timed(what: &str, count: u32, f: impl FnOnce()) {
    let began = Instant::now();
    f();
    say(&format!(
        "{count} devices {what} in {:.1} s",
        began.elapsed().as_secs_f32()
    ));
}

fn debugfs_entries() -> usize {
    fs::read_dir("/sys/kernel/debug/nbd").map_or(0, Iterator::count)
}

fn a_thousand_devices(guest: &Guest) {
    let count = count();
    let descriptors = u64::from(4 * count);
    let limit = getrlimit(Resource::Nofile);
    let higher = Rlimit {
        current: Some(descriptors),
        maximum: limit.maximum.map(|maximum| maximum.max(descriptors)),
    };
    setrlimit(Resource::Nofile, higher).expect("RLIMIT_NOFILE");
    let netlink = Netlink::open();
    // What the kernel allocates once and keeps is not to count.
    let mut crowd = Crowd::gather(count);
    crowd.sockets.truncate(64);
    live(&netlink, &mut crowd, || ());
    drop(crowd);

    let before = Usage::settled();
    let mut crowd = Crowd::gather(count);
    let connected = Usage::settled();
    live(&netlink, &mut crowd, || {
        let full = Usage::settled();
        let kib = (connected.available_kib - full.available_kib) / i64::from(count);
        let tasks = full.tasks.saturating_sub(connected.tasks);
        say(&format!("{kib} KiB for each device, {tasks} more threads"));
        match guest.expected("devices-need-no-threads") {
            Driver::Nbd => assert!(tasks >= count as usize, "{tasks}"),
            Driver::Rnbd => assert!(tasks < 50, "{tasks}"),
        }
        let shown = wait_until(SOON, || debugfs_entries() == count as usize);
        assert!(shown.is_ok(), "{} in debugfs", debugfs_entries());
    });
    let served = wait_until(Duration::from_secs(10), || crowd.server.living() == 0);
    assert!(served.is_ok(), "sockets are kept");
    drop(crowd);
    assert_eq!(devices(), []);
    assert_eq!(debugfs_entries(), 0);
    drop(netlink);
    guest.driver.unload().expect("rmmod");

    let mut lost = Vec::new();
    let freed = wait_until(Duration::from_secs(20), || {
        let after = Usage::settled();
        say(&format!(
            "{} KiB less than before, {} workers, {} before",
            before.available_kib - after.available_kib,
            after.workers,
            before.workers
        ));
        lost = after.lost_since(&before, count);
        lost.is_empty()
    });
    assert!(freed.is_ok(), "left behind: {lost:?}");
    setrlimit(Resource::Nofile, limit).expect("RLIMIT_NOFILE");
}
