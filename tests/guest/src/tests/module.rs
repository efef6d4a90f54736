// SPDX-License-Identifier: GPL-2.0

//! The module: parameters, devices, loading and unloading.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::Errno;

use crate::device::{self, Plan};
use crate::driver::{Driver, MAJOR, devices};
use crate::harness::{Guest, Test, skip};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(defaults).unloaded(),
        test!(parameters_are_taken).parameters("nbds_max=3 max_part=16 pre_defined_connections=2"),
        test!(wrong_parameters_are_refused).unloaded(),
        test!(numbers_that_no_int_holds).unloaded(),
        test!(largest_parameters_are_accepted).unloaded(),
        test!(no_devices_at_all).parameters("nbds_max=0"),
        test!(minors_follow_max_part).unloaded(),
        test!(predefined_connections_are_hardware_queues)
            .parameters("nbds_max=1 pre_defined_connections=4"),
        test!(major_is_registered_as_nbd),
        test!(refuses_to_load_while_the_major_is_taken),
        test!(cannot_be_unloaded_while_open),
        test!(cannot_be_unloaded_while_connected),
        test!(loads_and_unloads_again_and_again).unloaded(),
        test!(unloads_right_after_a_connection).unloaded(),
        test!(survives_opening_while_it_is_unloaded).unloaded(),
    ]
}

fn defaults(guest: &Guest) {
    guest.driver.load("").unwrap();
    assert_eq!(devices(), (0..16).collect::<Vec<_>>());
    assert_parameters(guest, "16", "31", "1");
    for index in devices() {
        assert_eq!(device::sysfs(index, "size"), "0");
        assert_eq!(device::pid(index), None);
    }
}

/// What sysfs shows of the parameters.
fn assert_parameters(guest: &Guest, nbds_max: &str, max_part: &str, connections: &str) {
    let parameters = [
        ("nbds_max", nbds_max),
        ("max_part", max_part),
        ("pre_defined_connections", connections),
    ];
    for (name, value) in parameters {
        assert_eq!(
            guest.driver.parameter(name).as_deref(),
            Some(value),
            "{name}"
        );
    }
}

fn parameters_are_taken(guest: &Guest) {
    assert_eq!(devices(), [0, 1, 2]);
    assert_parameters(guest, "3", "31", "2");
}

fn numbers_that_no_int_holds(guest: &Guest) {
    assert_eq!(guest.driver.load("nbds_max=99999999999"), Err(Errno::RANGE));
}

fn wrong_parameters_are_refused(guest: &Guest) {
    for parameters in [
        "max_part=-1",
        "max_part=256",
        "max_part=2147483647",
        "max_part=16 nbds_max=32769",
        "max_part=0 nbds_max=1048577",
        "nbds_max=-1",
        "nbds_max=many",
        "pre_defined_connections=0",
        "pre_defined_connections=-1",
        "pre_defined_connections=",
    ] {
        let answer = guest.driver.load(parameters);
        assert_eq!(answer, Err(Errno::INVAL), "{parameters}");
        assert!(devices().is_empty(), "{parameters} left devices behind");
    }
}

fn largest_parameters_are_accepted(guest: &Guest) {
    for parameters in [
        "nbds_max=1 max_part=255",
        "nbds_max=1 pre_defined_connections=1000000",
    ] {
        guest
            .driver
            .load(parameters)
            .unwrap_or_else(|errno| panic!("{parameters}: {errno}"));
        device::assert_usable(0);
        guest.driver.unload().unwrap();
    }
}

fn no_devices_at_all(_: &Guest) {
    assert!(devices().is_empty());
}

fn minors_follow_max_part(guest: &Guest) {
    for (max_part, minor) in [(0, 1), (1, 2), (16, 32), (63, 64), (255, 256)] {
        guest
            .driver
            .load(&format!("nbds_max=2 max_part={max_part}"))
            .unwrap();
        assert_eq!(device::sysfs(0, "dev"), format!("{MAJOR}:0"));
        assert_eq!(
            device::sysfs(1, "dev"),
            format!("{MAJOR}:{minor}"),
            "max_part={max_part}"
        );
        let node = fs::metadata("/dev/nbd1").expect("a device node");
        assert!(node.file_type().is_block_device());
        assert_eq!(
            (libc::major(node.rdev()), libc::minor(node.rdev())),
            (MAJOR, minor)
        );
        guest.driver.unload().unwrap();
    }
}

fn predefined_connections_are_hardware_queues(_: &Guest) {
    assert_eq!(hardware_queues(), 4.min(processors()));
    let rig = Plan::new(1 << 20).attach();
    assert_eq!(hardware_queues(), 1, "one connection, one hardware queue");
    drop(rig);
}

fn hardware_queues() -> usize {
    fs::read_dir("/sys/block/nbd0/mq")
        .expect("/sys/block/nbd0/mq")
        .count()
}

fn processors() -> usize {
    thread::available_parallelism().unwrap().get()
}

fn major_is_registered_as_nbd(_: &Guest) {
    let registered = fs::read_to_string("/proc/devices").unwrap();
    let (_, block) = registered.split_once("Block devices:").unwrap();
    assert!(
        block
            .lines()
            .any(|line| line.trim() == format!("{MAJOR} nbd")),
        "{block}"
    );
}

fn refuses_to_load_while_the_major_is_taken(guest: &Guest) {
    // Whichever driver is tested: the one that comes second goes.
    let second = guest.driver.other();
    if !second.file().exists() {
        skip("the other driver is not here");
    }
    assert_eq!(second.load("nbds_max=1"), Err(Errno::IO));
    assert!(!second.loaded());
    assert_eq!(devices(), [0, 1], "the devices of the first");
    guest.driver.unload().unwrap();

    second.load("nbds_max=1").unwrap();
    let answer = guest.driver.load("nbds_max=1");
    let lines = guest.log();
    second.unload().unwrap();
    assert_eq!(answer, Err(Errno::IO));
    if guest.driver == Driver::Rnbd {
        assert!(
            lines
                .iter()
                .any(|line| line.contains("43") && line.contains("rnbd")),
            "{lines:?}"
        );
    }
}

fn cannot_be_unloaded_while_open(guest: &Guest) {
    let open = device::open(0, 0).unwrap();
    assert!(guest.driver.references() > 0);
    assert_eq!(guest.driver.try_unload(), Err(Errno::WOULDBLOCK));
    drop(open);
    assert_eq!(guest.driver.unload(), Ok(()));
}

fn cannot_be_unloaded_while_connected(guest: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    assert!(guest.driver.references() > 0);
    assert_eq!(guest.driver.try_unload(), Err(Errno::WOULDBLOCK));
    assert_eq!(rig.disconnect(), Ok(0));
    assert_eq!(guest.driver.unload(), Ok(()));
}

fn loads_and_unloads_again_and_again(guest: &Guest) {
    for round in 0..10 {
        guest.driver.load("nbds_max=4").unwrap();
        assert_eq!(devices().len(), 4, "round {round}");
        guest.driver.unload().unwrap();
        assert!(devices().is_empty(), "round {round}");
    }
}

fn unloads_right_after_a_connection(guest: &Guest) {
    for _ in 0..5 {
        guest.driver.load("nbds_max=1").unwrap();
        device::assert_usable(0);
        guest.driver.unload().unwrap();
    }
}

/// Runs `f` while nothing loads a module by itself.
pub fn without_modprobe(f: impl FnOnce()) {
    const MODPROBE: &str = "/proc/sys/kernel/modprobe";
    let modprobe = fs::read_to_string(MODPROBE).unwrap();
    fs::write(MODPROBE, "/bin/true").unwrap();
    f();
    fs::write(MODPROBE, modprobe).unwrap();
}

fn survives_opening_while_it_is_unloaded(guest: &Guest) {
    let done = AtomicBool::new(false);
    without_modprobe(|| {
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    drop(device::open(0, 0));
                    thread::yield_now();
                }
            });
            for _ in 0..10 {
                guest.driver.load("nbds_max=1").unwrap();
                while guest.driver.try_unload().is_err() {}
            }
            done.store(true, Ordering::Relaxed);
        });
    });
}
