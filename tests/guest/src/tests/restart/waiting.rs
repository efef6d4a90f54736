// SPDX-License-Identifier: GPL-2.0

//! Requests, and data in the page cache, wait for the new server.

use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{
    SIZE, assert_restarts, can_be_restarted, lost_device, pass_socket, persistent, start_again,
};
use crate::device::{self, SOON, assert_usable, pattern, read_page};
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{CLEAR_SOCK, DISCONNECT, DO_IT};
use crate::server::Server;
use crate::sys::{Buffer, ioctl_number};
use crate::test;
use crate::tests::do_it::lost;

pub fn tests() -> Vec<Test> {
    vec![
        test!(requests_wait_for_it).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(requests_wait_no_longer_than_told).parameters("nbds_max=4 dead_conn_timeout=2"),
        test!(a_disconnect_ends_the_wait).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(nothing_is_lost_silently),
    ]
}

fn requests_wait_for_it(guest: &Guest) {
    // With nbd.ko they wait for their timeout of 30 seconds.
    if !can_be_restarted(guest) {
        return;
    }
    let plan = persistent(SIZE).connections(2);
    let mut rig = plan.attach();
    let direct = rig.direct();
    let written = Buffer::filled(64 << 10, |data| pattern(5, 0, data));
    thread::scope(|scope| {
        rig.server.script(|conn, _| conn.close());
        let writes = scope.spawn(|| {
            direct.write_all_at(&written, 0)?;
            direct.sync_all()
        });
        assert_eq!(rig.client.wait(), lost(guest));
        thread::sleep(Duration::from_millis(300));
        assert!(!writes.is_finished());
        let server = Server::new();
        let client = start_again(guest, &plan, &server);
        writes.join().unwrap().expect("to write");
        assert_eq!(server.peek(0, written.len()), *written);
        ioctl_number(&direct, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert_eq!(client.unwrap().wait(), Ok(0));
    });
    drop(direct);
    assert_usable(0);
}

fn requests_wait_no_longer_than_told(guest: &Guest) {
    let plan = persistent(SIZE);
    let (_rig, direct) = lost_device(&plan);
    let began = Instant::now();
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    if can_be_restarted(guest) {
        let waited = began.elapsed();
        assert!(waited >= Duration::from_millis(1900), "{waited:?}");
        let line = "nbd0: no connection left, I/O fails until the device is reconnected";
        assert!(guest.has_logged(line));
    }
    // The device can still be started again.
    assert_restarts(guest, &plan, &direct);
    drop(direct);
    assert_usable(0);
}

/// The ioctls of `nbd-client -d` and `qemu-nbd -d`.
fn a_disconnect_ends_the_wait(guest: &Guest) {
    let (_rig, direct) = lost_device(&persistent(SIZE));
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        if can_be_restarted(guest) {
            thread::sleep(Duration::from_millis(300));
            assert!(!reader.is_finished());
        }
        let device = device::open(0, 0).expect("the device");
        ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
        ioctl_number(&device, CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    drop(direct);
    assert_usable(0);
}

/// Data that was still in the page cache when the server was lost is sent to the next server, or a flush
/// fails.
fn nothing_is_lost_silently(guest: &Guest) {
    for stays_open in [true, false] {
        let mut rig = persistent(SIZE).hold().attach();
        let other = stays_open.then(|| rig.open());
        let written = Buffer::filled(256 << 10, |data| pattern(9, 0, data));
        rig.open().write_all_at(&written, 0).expect("to write");
        rig.server.kill();
        rig.client.wait_lost();
        rustix::fs::sync();
        if !can_be_restarted(guest) {
            rig.client.go_on();
            continue;
        }
        let server = Server::new();
        let device = device::open(0, 0).expect("the device");
        pass_socket(&device, &server).expect("NBD_SET_SOCK");
        thread::scope(|scope| {
            let runs = scope.spawn(|| ioctl_number(&device, DO_IT, 0));
            let mut page = Buffer::new(4096);
            let readable = wait_until(SOON, || {
                let read = rig.direct().read_exact_at(&mut page, SIZE - 4096);
                read.is_ok()
            });
            assert!(readable.is_ok());
            let flushed = rig.open().sync_all();
            let there = server.peek(0, written.len()) == *written;
            assert!(there || flushed.is_err(), "stays open: {stays_open}");
            ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
            assert_eq!(runs.join().unwrap(), Ok(0));
        });
        drop((device, other));
        rig.client.go_on();
    }
    assert_usable(0);
}
