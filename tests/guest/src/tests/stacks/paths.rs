// SPDX-License-Identifier: GPL-2.0

//! Two devices as paths to one export (dm-multipath), each with a server of its own.

use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{Disk, Image, MIB, Stack, direct, link, run, under_writers};
use crate::device::{self, SOON, errno};
use crate::driver::Driver;
use crate::harness::{Guest, Test, complain, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::Command;
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(fail_in_turn),
        test!(fail_in_turn_below_bios),
        test!(a_full_server_fails_no_path),
    ]
}

const SIZE: u64 = 16 * MIB;
const DEVICE: &str = "/dev/mapper/paths";

/// Makes a device of both paths, which take turns. `features` has their number in front.
fn assemble(stack: &mut Stack, features: &str) {
    run("modprobe dm-multipath && modprobe dm-round-robin");
    let sectors = SIZE / 512;
    stack.up(
        &format!(
            "dmsetup create paths --table '0 {sectors} multipath {features} 0 1 1 \
             round-robin 0 2 1 /dev/nbd0 1 /dev/nbd1 1'"
        ),
        "dmsetup remove --retry paths",
    );
}

/// Whether each path is active.
fn active() -> [bool; 2] {
    let status = run("dmsetup status paths");
    [0, 1].map(|index| {
        let device = run(&format!("cat /sys/block/nbd{index}/dev"));
        status.contains(&format!(" {} A ", device.trim()))
    })
}

fn expect_active(expected: [bool; 2]) {
    let reached = wait_until(3 * SOON, || active() == expected);
    assert!(reached.is_ok(), "{}", run("dmsetup status paths"));
}

/// As multipathd does when a path answers again.
fn reinstate(index: u32) {
    run(&format!(
        "dmsetup message paths 0 reinstate_path $(cat /sys/block/nbd{index}/dev)"
    ));
    assert!(active()[index as usize], "nbd{index} is no path");
}

/// Each path fails, then both.
fn fails_in_turn(features: &str) {
    let image = Image::new("/tmp/paths.img", SIZE);
    let mut disks = [Disk::new(0, &image, 0), Disk::new(1, &image, 0)];
    let mut stack = Stack::new();
    assemble(&mut stack, features);
    let written = under_writers(DEVICE, |progress| {
        for round in 0..4 {
            progress.expect(20);
            let index = round % 2;
            disks[index].lose();
            let mut expected = [true; 2];
            expected[index] = false;
            expect_active(expected);
            progress.expect(20);
            disks[index].restore();
            reinstate(index as u32);
        }
        progress.expect(20);
        for disk in &mut disks {
            disk.lose();
        }
        expect_active([false; 2]);
        disks[1].restore();
        reinstate(1);
        progress.expect(20);
    });
    written.verify(DEVICE);
    stack.take_down();
    drop(disks);
    written.verify(&image.0);
}

fn fail_in_turn(_: &Guest) {
    fails_in_turn("1 queue_if_no_path");
}

/// The other kind of multipath devices, which hands its paths bios instead of requests.
fn fail_in_turn_below_bios(_: &Guest) {
    fails_in_turn("3 queue_if_no_path queue_mode bio");
}

/// Device 1, which leads to the same server.
struct Second(Netlink);

impl Second {
    fn connect(link: &Link) -> Self {
        let second = Self(Netlink::open());
        let setup = Setup::new(SIZE)
            .index(1)
            .sockets([link.server.connect(Transport::Unix)]);
        assert_eq!(second.0.connect(&setup), Ok(1));
        drop(device::open(1, 0).expect("the device"));
        second
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.0.disconnect(1);
        let status = || self.0.status(Some(1));
        if wait_until(SOON, || status() == [(1, false)]).is_err() {
            complain("nbd1 is still in use".into());
        }
    }
}

/// Another path to a server that has no space left would not help.
fn a_full_server_fails_no_path(guest: &Guest) {
    let link = link(SIZE);
    let second = Second::connect(&link);
    let mut stack = Stack::new();
    assemble(&mut stack, "0");
    link.server.script(|conn, request| {
        const ENOSPC: u32 = 28;
        if request.command == Command::Write {
            conn.refuse(request, ENOSPC)
        } else {
            conn.serve(request)
        }
    });
    let device = direct(DEVICE);
    let wrote = errno(device.write_all_at(&Buffer::new(4096), 0));
    let read = errno(device.read_exact_at(&mut Buffer::new(4096), 0));
    match guest.expected("server-errors-keep-their-meaning") {
        Driver::Nbd => {
            assert_eq!((wrote, read), (Err(Errno::IO), Err(Errno::IO)));
            assert_eq!(active(), [false; 2]);
        }
        Driver::Rnbd => {
            assert_eq!((wrote, read), (Err(Errno::NOSPC), Ok(())));
            assert_eq!(active(), [true; 2]);
        }
    }
    drop(device);
    stack.take_down();
    drop(second);
}
