// SPDX-License-Identifier: GPL-2.0

//! With the real udev, which opens devices when it likes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::io::Errno;

use super::geometry::partitioned_server;
use crate::device::{SOON, USUAL_FLAGS};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::{Daemon, sh};
use crate::server::{Server, Transport};
use crate::test;
use crate::uevents::Uevents;

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

/// systemd-udevd, and nothing of it is left afterwards.
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

/// Waits until udev has done what it was told of.
fn settle() {
    sh("udevadm settle --timeout=60");
}

fn connect(netlink: Netlink, server: Server) -> Result<Link, Errno> {
    let setup = Setup::new(SIZE).index(0).flags(USUAL_FLAGS);
    let socket = server.connect(Transport::Unix);
    let index = netlink.connect(&setup.sockets([socket]))?;
    Ok(Link {
        server,
        netlink,
        index,
    })
}

/// udev opens all devices as soon as they are there.
fn connects_right_after_loading(guest: &Guest) {
    let _udev = Udev::start();
    let mut busy = 0;
    for _ in 0..12 {
        guest.driver.load("nbds_max=2").expect("to load the module");
        match connect(Netlink::open(), Server::new()) {
            Ok(link) => {
                link.disconnect().expect("to disconnect");
                link.wait_free();
            }
            Err(errno) => {
                assert_eq!(errno, Errno::BUSY);
                busy += 1;
            }
        }
        settle();
        guest.driver.unload().expect("to unload the module");
    }
    // nbd.ko: now and then.
    if guest.expected("connect-takes-an-open-device") == Driver::Rnbd {
        assert_eq!(busy, 0, "of 12 times");
    }
}

/// The links to nbd0 by the number of its image.
fn images() -> BTreeSet<String> {
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

fn property(name: &str) -> String {
    sh(&format!(
        "udevadm info --query=property --property={name} --value /dev/nbd0"
    ))
    .trim()
    .to_owned()
}

/// Its links and properties are those of the image that is connected.
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
        let link = connect(Netlink::open(), server).expect("to connect");
        settle();
        let table = property("ID_PART_TABLE_TYPE");
        assert_eq!(table, if partitioned { "gpt" } else { "" });
        let now = images();
        assert_eq!(now.len(), 1, "{now:?}");
        let new = now.iter().all(|image| seen.insert(image.clone()));
        if guest.expected("images-have-a-diskseq") == Driver::Rnbd {
            assert!(new, "{now:?} of {seen:?}");
        }
        link.disconnect().expect("to disconnect");
        link.wait_free();
        settle();
    }
}

/// Although udev opens the device several times.
fn finds_partitions_once(guest: &Guest) {
    let image = partitioned_server().peek(0, SIZE as usize);
    let _udev = Udev::start();
    let mut not_once = 0;
    for round in 0..10 {
        let server = Server::new();
        server.poke(0, &image);
        let mut uevents = Uevents::listen();
        let link = connect(Netlink::open(), server).expect("to connect");
        let there = wait_until(SOON, || Path::new("/dev/nbd0p2").exists());
        assert!(there.is_ok(), "round {round}");
        settle();
        let events = uevents.rest();
        let count = |action: &str| {
            let is = |event: &&String| {
                let lines: Vec<&str> = event.lines().collect();
                lines.contains(&action) && lines.contains(&"DEVNAME=nbd0p1")
            };
            events.iter().filter(is).count()
        };
        not_once += usize::from(count("ACTION=add") != 1 || count("ACTION=remove") != 0);
        link.disconnect().expect("to disconnect");
        link.wait_free();
        settle();
    }
    // nbd.ko: now and then.
    if guest.expected("partitions-appear-by-themselves") == Driver::Rnbd {
        assert_eq!(not_once, 0, "of 10 times");
    }
}
