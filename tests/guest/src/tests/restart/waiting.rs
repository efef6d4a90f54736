// SPDX-License-Identifier: GPL-2.0

//! Requests that wait for the next server, and data that was written before the server was lost.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{SIZE, disconnect, lose, plan_of, start_again};
use crate::device::{self, SOON, assert_usable, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{CLEAR_SOCK, DISCONNECT, DO_IT, SET_SOCK};
use crate::server::{Server, Transport};
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
    let plan = plan_of(SIZE).connections(2);
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
        if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
            assert_eq!(device::errno(writes.join().unwrap()), Err(Errno::IO));
            return;
        }
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
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    let began = Instant::now();
    let failed = direct.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(device::errno(failed), Err(Errno::IO));
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let waited = began.elapsed();
        assert!(waited >= Duration::from_millis(1900), "{waited:?}");
        let log = guest.log();
        let line = "nbd0: no connection left, I/O fails until the device is reconnected";
        assert!(log.iter().any(|l| l.contains(line)), "{log:?}");
    }
    // That is not too late for it.
    let server = Server::new();
    if let Some(mut client) = start_again(guest, &plan, &server) {
        direct
            .read_exact_at(&mut Buffer::new(4096), 0)
            .expect("to read");
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

/// `nbd-client -d`, `qemu-nbd -d`
fn a_disconnect_ends_the_wait(guest: &Guest) {
    let mut rig = plan_of(SIZE).attach();
    let direct = rig.direct();
    lose(&mut rig);
    thread::scope(|scope| {
        let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
        if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
            thread::sleep(Duration::from_millis(300));
            assert!(!reader.is_finished());
        }
        let device = device::open(0, 0).expect("the device");
        ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
        ioctl_number(&device, CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
        assert_eq!(device::errno(reader.join().unwrap()), Err(Errno::IO));
    });
    drop(direct);
    assert_usable(0);
}

/// What was written, and was not sent when the server was lost, is sent to the next one, or whoever
/// flushes it is told.
fn nothing_is_lost_silently(guest: &Guest) {
    let plan = plan_of(SIZE);
    for others in [true, false] {
        let mut rig = plan.clone().hold().attach();
        let other = others.then(|| rig.open());
        let written = Buffer::filled(256 << 10, |data| pattern(9, 0, data));
        rig.open().write_all_at(&written, 0).expect("to write");
        rig.server.kill();
        rig.client.wait_lost();
        rustix::fs::sync();
        if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
            rig.client.go_on();
            continue;
        }
        let server = Server::new();
        let device = device::open(0, 0).expect("the device");
        let socket = server.connect(Transport::Unix);
        ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64).expect("NBD_SET_SOCK");
        thread::scope(|scope| {
            let runs = scope.spawn(|| ioctl_number(&device, DO_IT, 0));
            let served = wait_until(SOON, || {
                rig.direct()
                    .read_exact_at(&mut Buffer::new(4096), SIZE - 4096)
                    .is_ok()
            });
            assert!(served.is_ok());
            let flushed = rig.open().sync_all();
            let there = server.peek(0, written.len()) == *written;
            assert!(there || flushed.is_err(), "others: {others}");
            ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
            assert_eq!(runs.join().unwrap(), Ok(0));
        });
        drop((device, other));
        rig.client.go_on();
    }
    assert_usable(0);
}
