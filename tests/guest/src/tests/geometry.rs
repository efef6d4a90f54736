// SPDX-License-Identifier: GPL-2.0

//! Sizes, partitions, and what udev is told of them.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;

use crate::device::{self, Plan, SOON};
use crate::harness::{Guest, Test, wait_until};
use crate::programs::sh;
use crate::proto::{
    BLKGETSIZE64, BLKPBSZGET, BLKRRPART, BLKSSZGET, SET_BLKSIZE, SET_SIZE, SET_SIZE_BLOCKS,
};
use crate::server::Server;
use crate::sys::{Buffer, ioctl_number, ioctl_pointer};
use crate::test;
use crate::uevents::Uevents;

pub fn tests() -> Vec<Test> {
    vec![
        test!(size_is_seen_by_everybody),
        test!(a_size_that_is_no_whole_sector_is_cut),
        test!(an_enormous_device),
        test!(size_changes_while_connected),
        test!(block_size_changes_while_connected),
        test!(wrong_sizes_change_nothing_while_connected),
        test!(udev_hears_of_connections),
        test!(udev_hears_of_a_new_size),
        test!(partitions_appear_when_made),
        test!(partitions_appear_on_connection),
        test!(partitions_beyond_max_part).parameters("nbds_max=1 max_part=1"),
        test!(partitions_without_minors).parameters("nbds_max=1 max_part=0"),
    ]
}

fn size_in_bytes(device: &std::fs::File) -> u64 {
    let mut size = 0;
    ioctl_pointer(device, BLKGETSIZE64, &mut size).unwrap();
    size
}

fn size_is_seen_by_everybody(_: &Guest) {
    let mut rig = Plan::new(3 << 20).block_size(2048).attach();
    let device = rig.open();
    assert_eq!(size_in_bytes(&device), 3 << 20);
    let (mut logical, mut physical) = (0, 0);
    ioctl_pointer(&device, BLKSSZGET, &mut logical).unwrap();
    ioctl_pointer(&device, BLKPBSZGET, &mut physical).unwrap();
    assert_eq!((logical, physical), (2048, 2048));
    assert_eq!(rig.sysfs("size"), "6144");
    drop(device);
    assert_eq!(rig.disconnect(), Ok(0));
    assert_eq!(rig.sysfs("size"), "0");
}

fn a_size_that_is_no_whole_sector_is_cut(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let device = rig.open();
    assert_eq!(ioctl_number(&device, SET_SIZE, 100_000), Ok(0));
    assert_eq!(rig.sysfs("size"), "195");
}

fn an_enormous_device(_: &Guest) {
    let size: u64 = 1 << 60;
    let rig = Plan::new(size).block_size(4096).attach();
    let direct = rig.direct();
    let last = size - 4096;
    let written = Buffer::filled(4096, |data| device::pattern(1, last, data));
    direct.write_all_at(&written, last).unwrap();
    assert_eq!(rig.server.requests()[0].offset, last);
    let mut read = Buffer::new(4096);
    direct.read_exact_at(&mut read, last).unwrap();
    device::assert_pattern(1, last, &read);
}

fn size_changes_while_connected(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let device = rig.direct();
    for size in [2 << 20, 16 << 20, 1 << 20, 512] {
        assert_eq!(ioctl_number(&device, SET_SIZE, size), Ok(0));
        assert_eq!(size_in_bytes(&device), size);
        let mut buffer = Buffer::new(512);
        device.read_exact_at(&mut buffer, size - 512).unwrap();
        assert_eq!(
            device.read_at(&mut buffer, size).unwrap(),
            0,
            "beyond the end"
        );
    }
    assert_eq!(ioctl_number(&device, SET_SIZE_BLOCKS, 4096), Ok(0));
    assert_eq!(size_in_bytes(&device), 2 << 20);
}

fn block_size_changes_while_connected(_: &Guest) {
    let rig = Plan::new(1 << 20).block_size(512).attach();
    let device = rig.direct();
    device.read_exact_at(&mut Buffer::new(512), 512).unwrap();
    assert_eq!(ioctl_number(&device, SET_BLKSIZE, 4096), Ok(0));
    assert_eq!(rig.sysfs("queue/logical_block_size"), "4096");
    let read = device.read_exact_at(&mut Buffer::new(512), 512);
    assert_eq!(device::errno(read), Err(Errno::INVAL));
    device.read_exact_at(&mut Buffer::new(4096), 4096).unwrap();
}

fn wrong_sizes_change_nothing_while_connected(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let device = rig.open();
    assert_eq!(ioctl_number(&device, SET_SIZE, 1 << 63), Err(Errno::INVAL));
    assert_eq!(ioctl_number(&device, SET_BLKSIZE, 513), Err(Errno::INVAL));
    assert_eq!(
        ioctl_number(&device, SET_SIZE_BLOCKS, 1 << 62),
        Err(Errno::INVAL)
    );
    assert_eq!(size_in_bytes(&device), 1 << 20);
    assert_eq!(rig.sysfs("queue/logical_block_size"), "512");
}

fn udev_hears_of_connections(_: &Guest) {
    let mut uevents = Uevents::listen();
    let change = ["ACTION=change", "DEVNAME=nbd0", "DEVTYPE=disk", "MAJOR=43"];
    for _ in 0..2 {
        let mut rig = Plan::new(1 << 20).attach();
        uevents.expect(&change);
        uevents.rest();
        assert_eq!(rig.disconnect(), Ok(0));
        uevents.expect(&change);
        uevents.rest();
    }
}

fn udev_hears_of_a_new_size(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let mut uevents = Uevents::listen();
    assert_eq!(ioctl_number(rig.open(), SET_SIZE, 2 << 20), Ok(0));
    uevents.expect(&["ACTION=change", "DEVNAME=nbd0", "RESIZE=1"]);
}

/// A server with a GPT of two partitions: 1 MiB from 1 MiB on, and 2 MiB from 2 MiB on.
pub fn partitioned_server() -> Server {
    let server = Server::new();
    let mut rig = Plan::new(8 << 20).attach_to(server);
    make_partitions();
    assert_eq!(rig.disconnect(), Ok(0));
    // A new server with the old contents.
    let server = Server::new();
    server.poke(0, &rig.server.peek(0, 8 << 20));
    server
}

/// The same, but it closes the connection instead of serving the request after the first `count`.
pub fn partitioned_server_of_few(count: usize) -> Server {
    let server = partitioned_server();
    server.forget_requests();
    serve_few(&server, count);
    server
}

/// Has `server` close the connection instead of serving the request after the first `count`.
pub fn serve_few(server: &Server, count: usize) {
    let served = AtomicUsize::new(0);
    server.script(
        move |conn, request| match served.fetch_add(1, Ordering::Relaxed) < count {
            true => conn.serve(request),
            false => conn.close(),
        },
    );
}

pub fn make_partitions() {
    sh("printf 'label: gpt\\n2048,2048\\n4096,4096\\n' | sfdisk --no-tell-kernel -q /dev/nbd0");
}

fn partitions_appear_when_made(_: &Guest) {
    let mut rig = Plan::new(8 << 20).attach();
    let mut uevents = Uevents::listen();
    make_partitions();
    assert!(!Path::new("/sys/block/nbd0/nbd0p1").exists());
    assert_eq!(ioctl_number(rig.open(), BLKRRPART, 0), Ok(0));
    uevents.expect(&[
        "ACTION=add",
        "DEVNAME=nbd0p1",
        "DEVTYPE=partition",
        "MAJOR=43",
        "MINOR=1",
    ]);
    assert_eq!(rig.sysfs("nbd0p1/start"), "2048");
    assert_eq!(rig.sysfs("nbd0p2/size"), "4096");
    assert_eq!(rig.sysfs("nbd0p2/dev"), "43:2");
    // What is written to a partition lands where it starts.
    let partition = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/nbd0p2")
        .unwrap();
    let mut data = vec![0; 4096];
    device::pattern(3, 0, &mut data);
    partition.write_all_at(&data, 8192).unwrap();
    partition.sync_all().unwrap();
    assert_eq!(rig.server.peek((2 << 20) + 8192, 4096), data);
    drop(partition);
    assert_eq!(rig.disconnect(), Ok(0));
}

fn partitions_appear_on_connection(_: &Guest) {
    let mut rig = Plan::new(8 << 20).attach_to(partitioned_server());
    let seen = wait_until(SOON, || Path::new("/dev/nbd0p2").exists());
    assert!(
        seen.is_ok(),
        "the first to open the device has its partitions looked for"
    );
    assert_eq!(rig.sysfs("nbd0p1/dev"), "43:1");
    assert_eq!(rig.disconnect(), Ok(0));
    // And whoever opens it next finds it empty.
    drop(device::open(0, 0));
    assert!(!Path::new("/dev/nbd0p1").exists());
}

fn partitions_beyond_max_part(_: &Guest) {
    let rig = Plan::new(8 << 20).attach_to(partitioned_server());
    assert_eq!(ioctl_number(rig.open(), BLKRRPART, 0), Ok(0));
    assert_eq!(rig.sysfs("nbd0p1/dev"), "43:1");
    assert!(
        rig.sysfs("nbd0p2/dev").starts_with("259:"),
        "of the block layer's own major"
    );
}

fn partitions_without_minors(_: &Guest) {
    let rig = Plan::new(8 << 20).attach_to(partitioned_server());
    assert!(
        !Path::new("/dev/nbd0p1").exists(),
        "with max_part=0 nobody looks by himself"
    );
    assert_eq!(ioctl_number(rig.open(), BLKRRPART, 0), Ok(0));
    assert!(rig.sysfs("nbd0p1/dev").starts_with("259:"));
}
