// SPDX-License-Identifier: GPL-2.0

//! A mirror (md) of which each leg is on another server.

use super::{Disk, Image, MIB, Stack, Written, run, sysfs, try_run, under_writers, written_to};
use crate::device::SOON;
use crate::harness::{Guest, Test, say, wait_until};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![test!(legs_die_and_come_back)]
}

const SIZE: u64 = 64 * MIB;

fn degraded() -> bool {
    sysfs("/sys/block/md0/md/degraded") != "0"
}

/// Kills a leg's server, and waits until the mirror does without it.
fn lose(leg: &mut Disk) {
    leg.lose();
    let noticed = wait_until(3 * SOON, degraded);
    assert!(noticed.is_ok(), "nbd{} is still a leg", leg.index);
}

/// Starts a leg's server again, and adds it again.
fn add_again(leg: &mut Disk) {
    leg.restore();
    let device = format!("/dev/nbd{}", leg.index);
    // The last request to it may not have failed yet.
    let removed = wait_until(3 * SOON, || {
        try_run(&format!("mdadm /dev/md0 --remove {device}")).is_ok()
    });
    assert!(removed.is_ok(), "{}", sysfs("/proc/mdstat"));
    run(&format!("mdadm /dev/md0 --re-add {device}"));
    let whole = wait_until(6 * SOON, || {
        !degraded() && sysfs("/sys/block/md0/md/sync_action") == "idle"
    });
    assert!(whole.is_ok(), "{}", sysfs("/proc/mdstat"));
}

/// The one that was away is the only one later, so that what it missed would be missing.
fn legs_die_and_come_back(_: &Guest) {
    run("modprobe raid1");
    let images = ["/tmp/left.img", "/tmp/right.img"].map(|path| Image::new(path, SIZE));
    let mut left = Disk::new(0, &images[0], 0);
    let mut right = Disk::new(1, &images[1], 0);
    let mut stack = Stack::new();
    // The superblock is at the end, so that the legs have at 0 what the mirror has there.
    stack.up(
        "mdadm --create /dev/md0 --run --assume-clean --level=1 --raid-devices=2 --metadata=1.0 \
         --bitmap=internal --bitmap-chunk=64K /dev/nbd0 /dev/nbd1",
        "mdadm --stop /dev/md0",
    );
    let written = under_writers("/dev/md0", |progress| {
        progress.expect(30);
        lose(&mut right);
        progress.expect(60);
        add_again(&mut right);
        progress.expect(30);
        lose(&mut left);
        progress.expect(60);
    });
    written.verify("/dev/md0");
    // Nobody writes now but who brings it up to date: where writers have written, and no more.
    let before = written_to(0);
    add_again(&mut left);
    let resynced = written_to(0) - before;
    say(&format!("{} KiB were brought up to date", resynced >> 10));
    assert!(resynced > 0, "nothing was brought up to date");
    assert!(
        resynced < Written::END + MIB,
        "{resynced} of {SIZE} bytes were copied"
    );
    written.verify("/dev/md0");
    let size = sysfs("/sys/block/md0/size").parse::<u64>().unwrap() * 512;
    stack.take_down();
    for image in &images {
        written.verify(&image.0);
    }
    run(&format!("cmp -n {size} {} {}", images[0].0, images[1].0));
}
