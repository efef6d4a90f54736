// SPDX-License-Identifier: GPL-2.0

//! File systems on a server that crashes and loses what was not flushed: their journals bring them
//! in order, and what was synced is there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use fastrand::Rng;

use super::integrity::{DEAD_TIMEOUT_SECONDS, Habits, Load, Tally, setup, transport, wait_free};
use crate::device::pattern;
use crate::harness::{Guest, Test, Until, say, seed};
use crate::ledger::{Ledger, SECTOR};
use crate::netlink::Netlink;
use crate::programs::{sh, try_sh};
use crate::test;
use crate::volatile::{Disk, Honesty, Host};

pub fn tests() -> Vec<Test> {
    vec![test!(ext4), test!(xfs), test!(btrfs)]
}

/// A kind of file system.
#[derive(Clone, Copy)]
pub struct Kind {
    pub make: &'static str,
    pub check: &'static str,
    pub size: u64,
}

pub const EXT4: Kind = Kind {
    make: "mkfs.ext4 -q -F -E nodiscard",
    check: "fsck.ext4 -fn",
    size: 96 << 20,
};

pub const XFS: Kind = Kind {
    // It wants more, and a longer log, but for tests.
    make: "mkfs.xfs -q -f -K --unsupported -l size=16m",
    check: "xfs_repair -n",
    size: 128 << 20,
};

pub const BTRFS: Kind = Kind {
    make: "mkfs.btrfs -q -f -K --mixed",
    check: "btrfs check -p",
    size: 128 << 20,
};

/// Where device 0 is mounted.
const MOUNTED: &str = "/tmp/mnt";

/// File systems take it for granted that a disk writes so much in one piece.
pub const GRANULE: usize = 4096;

/// Of a file that is written over again and again.
const SECTORS: usize = 2 << 10;

const HABITS: Habits = Habits {
    flushes: 8,
    fua: 6,
    reads: 20,
};

/// Makes files that it syncs and remembers, and much that it does not.
pub struct Churn {
    directory: PathBuf,
    /// Number and length of the files that are there, with what is in them, whatever happens.
    kept: Mutex<Vec<(u64, usize)>>,
    made: AtomicU64,
}

/// No more than so many files are kept.
const KEPT: usize = 40;

impl Churn {
    pub fn new(name: &str) -> Self {
        let directory = Path::new(MOUNTED).join(name);
        fs::create_dir(&directory).unwrap();
        Self {
            directory,
            kept: Mutex::default(),
            made: AtomicU64::new(0),
        }
    }

    pub fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// Until it is told that that is enough.
    pub fn run(&self, disk: &Disk, random: &mut Rng, done: &AtomicBool) {
        while !done.load(Ordering::Relaxed) {
            // What fails is promised nothing.
            if self.step(disk, random).is_err() {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn file(&self, number: u64) -> PathBuf {
        self.directory.join(format!("kept-{number}"))
    }

    fn step(&self, disk: &Disk, random: &mut Rng) -> io::Result<()> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        match random.u32(..8) {
            0..4 => self.keep(number, disk, random),
            4 => self.remove(random),
            _ => self.scratch(number, random),
        }
    }

    fn keep(&self, number: u64, disk: &Disk, random: &mut Rng) -> io::Result<()> {
        let len = random.usize(1..4096) * 8;
        let mut data = vec![0; len];
        pattern(number, 0, &mut data);
        let incarnation = disk.incarnation();
        let mut file = File::create_new(self.file(number))?;
        file.write_all(&data)?;
        file.sync_all()?;
        File::open(&self.directory)?.sync_all()?;
        if disk.incarnation() == incarnation {
            self.kept.lock().unwrap().push((number, len));
        }
        if self.kept.lock().unwrap().len() > KEPT {
            self.remove(random)?;
        }
        Ok(())
    }

    fn remove(&self, random: &mut Rng) -> io::Result<()> {
        let number = {
            let mut kept = self.kept.lock().unwrap();
            if kept.is_empty() {
                return Ok(());
            }
            let index = random.usize(..kept.len());
            kept.swap_remove(index).0
        };
        fs::remove_file(self.file(number))
    }

    /// Names and data that nobody syncs.
    fn scratch(&self, number: u64, random: &mut Rng) -> io::Result<()> {
        let name = self.directory.join(format!("scratch-{}", number % 16));
        let other = self.directory.join(format!("scratch-{}", random.u32(..16)));
        match random.u32(..6) {
            0 => fs::create_dir_all(name.join("a/b")),
            1 => fs::rename(name, other),
            2 => fs::remove_dir_all(name).or_else(|_| fs::remove_file(other)),
            3 => std::os::unix::fs::symlink(&other, name),
            4 => OpenOptions::new()
                .write(true)
                .open(name)?
                .set_len(random.u64(..100_000)),
            _ => fs::write(name, vec![1; random.usize(..60_000)]),
        }
    }

    /// Looks whether what was promised is there. What is not promised may be anything but in the
    /// way: it is removed.
    pub fn check(&self) -> Result<(), String> {
        let kept = self.kept.lock().unwrap().clone();
        for (number, len) in &kept {
            let path = self.file(*number);
            let data = fs::read(&path)
                .map_err(|error| format!("{} was synced, but: {error}", path.display()))?;
            let mut expected = vec![0; *len];
            pattern(*number, 0, &mut expected);
            if data != expected {
                return Err(format!("{} has not what was synced", path.display()));
            }
        }
        let entries = fs::read_dir(&self.directory).map_err(|error| error.to_string())?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if !kept.iter().any(|(number, _)| self.file(*number) == path) {
                let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
            }
        }
        Ok(())
    }
}

/// A device with a file system that is in use.
pub struct Mounted {
    kind: Kind,
    host: Host,
    netlink: Netlink,
    /// A file that is there whatever happens, and the ledger of what is written to it.
    versions: PathBuf,
    ledger: Ledger,
    pub churn: Churn,
    pub tally: Tally,
    random: Rng,
}

impl Mounted {
    pub const CONNECTIONS: usize = 2;

    /// Makes one on device 0.
    pub fn new(kind: Kind, random: &mut Rng) -> Self {
        let (host, netlink) = (Host::new(kind.size, Honesty::Honest), Netlink::open());
        connect(&netlink, &host);
        let made = try_sh(&format!(
            "{} /dev/nbd0 && mkdir -p {MOUNTED} && mount /dev/nbd0 {MOUNTED}",
            kind.make
        ));
        made.unwrap_or_else(|what| {
            let _ = netlink.disconnect(0);
            panic!("{what}");
        });
        let versions = Path::new(MOUNTED).join("versions");
        fs::write(&versions, vec![0; SECTORS * SECTOR]).unwrap();
        let churn = Churn::new("churn");
        sh(&format!("sync -f {MOUNTED}"));
        Self {
            kind,
            ledger: Ledger::new(random.u64(..), &host.disk, SECTORS),
            host,
            netlink,
            versions,
            churn,
            tally: Tally::default(),
            random: random.fork(),
        }
    }

    /// Lets all work while `f` does something to the server. Answers what they found.
    pub fn under_load(&mut self, f: impl FnOnce(&mut Host, &mut Rng, &Netlink)) -> Vec<String> {
        let file = open(&self.versions).expect("the file");
        let load = Load {
            file: &file,
            ledger: &self.ledger,
            tally: &self.tally,
            habits: HABITS,
            writers: 1,
        };
        let (host, netlink, churn) = (&mut self.host, &self.netlink, &self.churn);
        let (disk, mut churning) = (Arc::clone(&host.disk), self.random.fork());
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| churn.run(&disk, &mut churning, &done));
            let _until_done = Until(&done);
            load.during(&mut self.random, |random| f(host, random, netlink))
        })
    }

    /// After a crash: mounts it anew and looks at it; leaves it mounted.
    pub fn recover(&mut self) -> Result<(), String> {
        sh(&format!("umount {MOUNTED}"));
        wait_free(&self.netlink, 0);
        connect(&self.netlink, &self.host);
        try_sh(&format!("mount /dev/nbd0 {MOUNTED}"))?;
        let findings = open(&self.versions).and_then(|file| self.ledger.check_after_crash(&file));
        let findings = findings.map_err(|error| error.to_string())?;
        if !findings.is_empty() {
            return Err(findings.join("\n"));
        }
        self.churn.check()?;
        let check = self.kind.check;
        try_sh(&format!("umount {MOUNTED} && {check} /dev/nbd0"))?;
        try_sh(&format!("mount /dev/nbd0 {MOUNTED}")).map(drop)
    }

    /// Lets the server forget what it has been asked.
    pub fn forget_requests(&self) {
        self.host.forget_requests();
    }

    pub fn end(self) {
        // It is not mounted where mounting failed.
        let _ = try_sh(&format!("umount {MOUNTED}"));
        let _ = self.netlink.disconnect(0);
        wait_free(&self.netlink, 0);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Also where a test panics: who follows wants the device.
        let _ = try_sh(&format!("umount {MOUNTED}"));
        let _ = self.netlink.disconnect(0);
    }
}

fn connect(netlink: &Netlink, host: &Host) {
    let sockets = (0..Mounted::CONNECTIONS).map(|number| host.connect(transport(number)));
    let setup = setup(host.disk.size, Mounted::CONNECTIONS).dead_timeout(DEAD_TIMEOUT_SECONDS);
    assert_eq!(netlink.connect(&setup.sockets(sockets)), Ok(0));
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// The server crashes a few times under a file system.
fn survives(kind: Kind) {
    let mut random = Rng::with_seed(seed());
    let mut mounted = Mounted::new(kind, &mut random);
    let mut wrong = Vec::new();
    for round in 0..3 {
        wrong = mounted.under_load(|host, random, netlink| {
            thread::sleep(Duration::from_millis(random.u64(1000..2500)));
            host.crash(random, GRANULE);
            let _ = netlink.disconnect(0);
        });
        wrong.extend(mounted.recover().err());
        if !wrong.is_empty() {
            wrong.insert(0, format!("after crash {round}:"));
            break;
        }
    }
    let (tally, made) = (&mounted.tally, mounted.churn.made());
    say(&format!("{tally}; {made} names"));
    mounted.end();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn ext4(_: &Guest) {
    survives(EXT4);
}

fn xfs(_: &Guest) {
    survives(XFS);
}

fn btrfs(_: &Guest) {
    survives(BTRFS);
}
