// SPDX-License-Identifier: GPL-2.0

//! With systemd-udevd, which opens the devices at times that the tests do not choose.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::io::Errno;

use super::geometry::partitioned_server;
use crate::device::SOON;
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Setup};
use crate::programs::{Daemon, sh};
use crate::server::{Server, Transport};
use crate::test;
use crate::uevents::{Uevents, added_once};

pub fn tests() -> Vec<Test> {
    vec![
        test!(connects_right_after_loading)
            .unloaded()
            .limit_seconds(300),
        test!(knows_each_image).limit_seconds(180),
        test!(finds_partitions_once).limit_seconds(180),
    ]
}

const SIZE: u64 = 8 << 20;

/// A running systemd-udevd, which is killed at the end.
struct Udev(Daemon);

impl Udev {
    fn start() -> Self {
        let udev = Daemon::start("/usr/lib/systemd/systemd-udevd");
        let ready = wait_until(SOON * 3, || Path::new("/run/udev/control").exists());
        assert!(ready.is_ok(), "{}", udev.said());
        settle();
        Self(udev)
    }
}

impl Drop for Udev {
    fn drop(&mut self) {
        settle();
        self.0.kill();
    }
}

/// Waits until udev has handled all events.
fn settle() {
    sh("udevadm settle --timeout=60");
}

fn connect(server: Server) -> Result<Link, Errno> {
    let setup = Setup::new(SIZE).index(0);
    setup.try_attach_to(server, &[Transport::Unix])
}

/// udev opens all devices as soon as they are there.
fn connects_right_after_loading(guest: &Guest) {
    let _udev = Udev::start();
    let mut busy = 0;
    for _ in 0..12 {
        guest.driver.load("nbds_max=2").expect("to load the module");
        match connect(Server::new()) {
            Ok(link) => {
                link.disconnect_and_wait();
            }
            Err(errno) => {
                assert_eq!(errno, Errno::BUSY);
                busy += 1;
            }
        }
        settle();
        guest.driver.unload().expect("to unload the module");
    }
    // With nbd.ko this fails in some rounds only.
    if guest.expected("connect-takes-an-open-device") == Driver::Rnbd {
        assert_eq!(busy, 0, "of 12 rounds");
    }
}

/// The names in /dev/disk/by-diskseq that lead to nbd0.
fn diskseq_links() -> BTreeSet<String> {
    let Ok(links) = fs::read_dir("/dev/disk/by-diskseq") else {
        return BTreeSet::new();
    };
    let of_nbd0 =
        |entry: &fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("nbd0"));
    let links = links.map(Result::unwrap).filter(of_nbd0);
    links
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

/// A property of nbd0 in udev's database.
fn property(name: &str) -> String {
    sh(&format!(
        "udevadm info --query=property --property={name} --value /dev/nbd0"
    ))
    .trim()
    .to_owned()
}

/// The links and properties of nbd0 are those of the image that is connected.
fn knows_each_image(guest: &Guest) {
    let _udev = Udev::start();
    let mut seen = BTreeSet::new();
    for partitioned in [true, false, true] {
        let server = if partitioned {
            partitioned_server()
        } else {
            Server::new()
        };
        settle();
        let link = connect(server).expect("to connect");
        settle();
        let table = property("ID_PART_TABLE_TYPE");
        assert_eq!(table, if partitioned { "gpt" } else { "" });
        let now = diskseq_links();
        assert_eq!(now.len(), 1, "{now:?}");
        let new = now.iter().all(|link| seen.insert(link.clone()));
        if guest.expected("images-have-a-diskseq") == Driver::Rnbd {
            assert!(new, "{now:?} of {seen:?}");
        }
        link.disconnect_and_wait();
        settle();
    }
}

/// The partitions are added once, although udev opens the device several times.
fn finds_partitions_once(guest: &Guest) {
    let image = partitioned_server().peek(0, SIZE as usize);
    let _udev = Udev::start();
    let mut wrong = 0;
    for round in 0..10 {
        let server = Server::new();
        server.poke(0, &image);
        let mut uevents = Uevents::listen();
        let link = connect(server).expect("to connect");
        let there = wait_until(SOON, || Path::new("/dev/nbd0p2").exists());
        assert!(there.is_ok(), "round {round}");
        settle();
        wrong += u32::from(!added_once(&uevents.rest(), "nbd0p1"));
        link.disconnect_and_wait();
        settle();
    }
    // With nbd.ko this fails in some rounds only.
    if guest.expected("partitions-appear-by-themselves") == Driver::Rnbd {
        assert_eq!(wrong, 0, "of 10 rounds");
    }
}
