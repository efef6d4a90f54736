// SPDX-License-Identifier: GPL-2.0

//! What people put on top of a network block device: RAID, volumes, encryption, several paths, caches, and the
//! kernel's own targets. Each does to its device what nothing else in this suite does, such as failing it for
//! one error, queueing for it or holding it open from within the kernel.
//!
//! They take minutes, so "make check-stacks" runs them, and "make check" does not.
//!
//! - `raid`: two servers as the legs of a mirror
//! - `volumes`: LVM and its thin pools
//! - `paths`: two devices as paths to one export
//! - `encryption`: dm-crypt and dm-integrity
//! - `caches`: dm-cache
//! - `targets`: a device behind the kernel's NVMe and SCSI targets
//! - `virtual_media`: a device as a USB disk

mod caches;
mod encryption;
mod paths;
mod raid;
mod targets;
mod virtual_media;
mod volumes;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::outages::Ledger;
use super::user_space::serve;
use crate::device::{self, SOON};
use crate::harness::{Test, Until, complain, seed, wait_until};
use crate::negotiate::{Export, dial};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::{Daemon, sh, try_sh};

pub fn tests() -> Vec<Test> {
    [
        raid::tests(),
        volumes::tests(),
        paths::tests(),
        encryption::tests(),
        caches::tests(),
        targets::tests(),
        virtual_media::tests(),
    ]
    .into_iter()
    .flatten()
    .map(|test| test.limit_seconds(600).on_request_of_its_group())
    .collect()
}

const MIB: u64 = 1 << 20;

/// How long requests wait for a connection that is stuck (and for a dead one, with nbd.ko).
const TIMEOUT_SECONDS: u64 = 3;

/// Longer than any server is away, where that is to be no error.
const DEAD_TIMEOUT_SECONDS: u64 = 60;

/// No udevd runs here: who waits for it would wait in vain.
const ENVIRONMENT: &str =
    "export DM_DISABLE_UDEV=1 MDADM_NO_UDEV=1 LVM_SYSTEM_DIR=/tmp/lvm LVM_SUPPRESS_FD_WARNINGS=1";

/// As [`sh`], for programs that would wait for udev.
fn run(script: &str) -> String {
    sh(&format!("{ENVIRONMENT}\n{script}"))
}

/// As [`run`], where it may fail.
fn try_run(script: &str) -> Result<String, String> {
    try_sh(&format!("{ENVIRONMENT}\n{script}"))
}

/// What a test has put on top of its devices. It is taken down in the opposite order, also where a test fails.
struct Stack(Vec<String>);

impl Stack {
    fn new() -> Self {
        Self(Vec::new())
    }

    /// Sets something up, which `down` takes down.
    fn up(&mut self, up: &str, down: &str) -> String {
        let said = run(up);
        self.0.push(down.to_owned());
        said
    }

    /// Takes down what was set up last.
    fn down(&mut self) {
        let script = self.0.pop().expect("something that is set up");
        run(&script);
    }

    /// Takes everything down.
    fn take_down(mut self) {
        while !self.0.is_empty() {
            self.down();
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        while let Some(script) = self.0.pop() {
            if let Err(failure) = try_run(&script) {
                complain(failure);
            }
        }
    }
}

/// A file that a server exports.
struct Image(String);

impl Image {
    fn new(path: &str, size: u64) -> Self {
        File::create(path).unwrap().set_len(size).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A server (nbdkit) of an image, and the device that is connected to it.
struct Disk {
    index: u32,
    image: String,
    server: Option<Daemon>,
    netlink: Netlink,
}

impl Disk {
    /// A device that waits for a server that is away, or fails at once.
    fn new(index: u32, image: &Image, dead_timeout: u64) -> Self {
        let mut disk = Self {
            index,
            image: image.0.clone(),
            server: None,
            netlink: Netlink::open(),
        };
        let export = disk.serve();
        let setup = Setup::new(export.size)
            .index(index)
            .flags(export.flags)
            .timeout(TIMEOUT_SECONDS)
            .dead_timeout(dead_timeout)
            .sockets([export.socket]);
        assert_eq!(disk.netlink.connect(&setup), Ok(index));
        drop(device::open(index, 0).expect("the device"));
        disk
    }

    /// Starts the server, and connects to it.
    fn serve(&mut self) -> Export {
        let socket = format!("/tmp/stack-{}.sock", self.index);
        let _ = fs::remove_file(&socket);
        let image = &self.image;
        self.server = Some(serve(
            &format!("nbdkit -f -U {socket} file {image}"),
            &socket,
        ));
        dial(&socket).expect("the server")
    }

    /// Kills the server, and waits until the driver knows.
    fn lose(&mut self) {
        let news = Netlink::listen();
        self.server = None;
        let heard = wait_until(SOON, || news.dead_link() == Some(self.index));
        assert!(heard.is_ok(), "no news of nbd{}'s death", self.index);
    }

    /// Starts the server again, and gives the device a connection to it.
    fn restore(&mut self) {
        let socket = self.serve().socket;
        let setup = Setup::change(self.index).sockets([socket]);
        assert_eq!(self.netlink.reconfigure(&setup), Ok(()));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.netlink.disconnect(self.index);
        let status = || self.netlink.status(Some(self.index));
        if wait_until(SOON, || status() == [(self.index, false)]).is_err() {
            complain(format!("nbd{} is still in use", self.index));
        }
    }
}

/// Device 0, connected to a server of this process, for which it waits if it is away.
fn link(size: u64) -> Link {
    Setup::new(size)
        .index(0)
        .timeout(TIMEOUT_SECONDS)
        .dead_timeout(DEAD_TIMEOUT_SECONDS)
        .attach()
        .settle()
}

/// Ends the server's connection and makes a new one, while the writers go on.
fn interrupt(link: &Link, progress: &Progress) {
    for _ in 0..3 {
        progress.expect(20);
        link.kill_server();
        assert_eq!(link.revive(), Ok(()));
    }
    progress.expect(20);
}

/// How far the writers have come.
struct Progress<'a>(&'a AtomicU64);

impl Progress<'_> {
    /// Waits for so many more writes to be acknowledged.
    fn expect(&self, writes: u64) {
        let enough = self.0.load(Ordering::Relaxed) + writes;
        let goes_on = wait_until(6 * SOON, || self.0.load(Ordering::Relaxed) >= enough);
        assert!(goes_on.is_ok(), "nothing goes on");
    }
}

/// What writers have written.
struct Written([Ledger; 2]);

impl Written {
    /// Where they have written nothing.
    const END: u64 = 4 * MIB;

    /// Asserts that everything that was acknowledged is there, in a device or in a file.
    fn verify(&self, path: &str) {
        let file = direct(path);
        for ledger in &self.0 {
            ledger.verify(&file);
        }
    }
}

/// Opens a device, or a file, past the page cache.
fn direct(path: &str) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path);
    file.unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Lets writers write to a device until `f` returns. No write may fail.
fn under_writers(path: &str, f: impl FnOnce(&Progress)) -> Written {
    let seed = seed();
    let (acknowledged, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut ledgers = [0, 1].map(Ledger::new);
    thread::scope(|scope| {
        let _until_done = Until(&done);
        for ledger in &mut ledgers {
            let (acknowledged, done) = (&acknowledged, &done);
            let device = direct(path);
            scope.spawn(move || ledger.write(&device, seed, acknowledged, done));
        }
        f(&Progress(&acknowledged));
    });
    Written(ledgers)
}

/// What a file of sysfs, or of /proc, says.
fn sysfs(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().to_owned()
}

/// How many bytes have been written to a device so far.
fn written_to(index: u32) -> u64 {
    let stat = device::sysfs(index, "stat");
    let sectors = stat.split_whitespace().nth(6).expect("sectors written");
    sectors.parse::<u64>().expect("a number") * 512
}

/// Waits until a file is there.
fn wait_for_file(path: &str) {
    let there = wait_until(2 * SOON, || fs::exists(path).unwrap_or(false));
    assert!(there.is_ok(), "{path} does not come");
}
