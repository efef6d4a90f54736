// SPDX-License-Identifier: GPL-2.0

//! After what, and with what, a device cannot be started again.

use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::{
    SIZE, assert_restarts, can_be_restarted, lost_device, pass_socket, persistent, wait_readable,
};
use crate::device::{self, Plan, SOON, assert_usable, read_page};
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{CLEAR_SOCK, DISCONNECT, DO_IT, SET_BLKSIZE, SET_SIZE, SET_SOCK};
use crate::server::{Server, Transport};
use crate::sys::{SysResult, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(not_after_its_client_was_killed).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(not_after_its_client_has_cleared_it).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(not_by_a_program_that_looks_for_a_free_device),
        test!(not_after_it_was_ended),
        test!(not_with_another_block_size),
        test!(not_with_sockets_that_cannot_be_used),
        test!(not_with_another_size),
    ]
}

/// Its session has ended with the process.
fn not_after_its_client_was_killed(_: &Guest) {
    let server = Server::new();
    let mut killed = helper("attach", server.connect(Transport::Unix));
    let connected = wait_until(SOON, || {
        device::sysfs(0, "size") == (SIZE / 512).to_string()
    });
    assert!(connected.is_ok());
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    killed.kill().expect("to kill it");
    killed.wait().expect("it to end");
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    ioctl_number(&direct, SET_SIZE, SIZE).expect("NBD_SET_SIZE");
    assert_eq!(pass_socket(&direct, &Server::new()), Err(Errno::BUSY));
    drop(direct);
    assert_usable(0);
}

/// Starts `rnbd-guest helper` with nbd0 as its device and `socket` as its standard input; see helper.rs.
fn helper(what: &str, socket: OwnedFd) -> std::process::Child {
    std::process::Command::new("/proc/self/exe")
        .args(["helper", what, "/dev/nbd0", &SIZE.to_string()])
        .stdin(socket)
        .spawn()
        .expect("a process")
}

/// Some programs look for a free device by passing their socket to one after another. They must not get a
/// device that others have open, since those would then read and write another image.
fn not_by_a_program_that_looks_for_a_free_device(guest: &Guest) {
    let (_rig, direct) = lost_device(&persistent(SIZE));
    let server = Server::new();
    let mut other = helper("probe", server.connect(Transport::Unix));
    assert_eq!(
        other.wait().expect("it to end").code(),
        Some(Errno::BUSY.raw_os_error())
    );
    // A program that sets the size first has chosen this device.
    if can_be_restarted(guest) {
        let mut other = helper("attach", server.connect(Transport::Unix));
        wait_readable(&direct);
        ioctl_number(&direct, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert!(other.wait().expect("it to end").success());
    }
    // Ends the connection of the program that was refused.
    server.kill();
    let gone = wait_until(SOON, || server.living() == 0);
    assert!(gone.is_ok());
    drop(direct);
    assert_usable(0);
}

/// A client that cleans up and ends, as nbd-client without -persist and qemu-nbd do.
fn not_after_its_client_has_cleared_it(_: &Guest) {
    let mut rig = Plan::new(SIZE).hold().attach();
    let direct = rig.direct();
    rig.server.kill();
    rig.client.wait_lost();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        thread::sleep(Duration::from_millis(100));
        // The client calls NBD_CLEAR_SOCK and closes the device.
        rig.client.go_on();
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    assert_eq!(pass_socket(&direct, &Server::new()), Err(Errno::BUSY));
    drop(direct);
    assert_usable(0);
}

/// After NBD_DISCONNECT or NBD_CLEAR_SOCK no other server takes the place of the first one.
fn not_after_it_was_ended(_: &Guest) {
    for end in [DISCONNECT, CLEAR_SOCK] {
        let mut rig = persistent(SIZE).attach();
        let direct = rig.direct();
        assert_eq!(ioctl_number(&direct, end, 0), Ok(0));
        assert_eq!(rig.client.wait(), Ok(0));
        assert_eq!(pass_socket(&direct, &Server::new()), Err(Errno::BUSY));
        assert_eq!(ioctl_number(&direct, DO_IT, 0), Err(Errno::BUSY));
        drop(direct);
        assert_usable(0);
    }
}

/// Passes `sockets` to a lost device, and returns what NBD_DO_IT returns.
fn pass_and_start(sockets: &[OwnedFd]) -> SysResult {
    let device = device::open(0, 0).expect("the device");
    for socket in sockets {
        ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64)?;
    }
    ioctl_number(&device, DO_IT, 0)
}

fn not_with_another_block_size(guest: &Guest) {
    let plan = persistent(SIZE);
    let (_rig, direct) = lost_device(&plan);
    if can_be_restarted(guest) {
        let server = Server::new();
        assert_eq!(ioctl_number(&direct, SET_BLKSIZE, 4096), Ok(0));
        assert_eq!(
            pass_and_start(&[server.connect(Transport::Unix)]),
            Err(Errno::INVAL)
        );
        let line = "nbd0: cannot be started again with 1048576 bytes in blocks of 4096";
        assert!(guest.has_logged(line));
        assert!(server.is_deserted());
        // Old clients set another block size first, and then the right one.
        assert_eq!(ioctl_number(&direct, SET_BLKSIZE, 4096), Ok(0));
    }
    assert_restarts(guest, &plan, &direct);
    drop(direct);
    assert_usable(0);
}

fn not_with_sockets_that_cannot_be_used(guest: &Guest) {
    let plan = persistent(SIZE);
    let (_rig, direct) = lost_device(&plan);
    if can_be_restarted(guest) {
        let server = Server::new();
        // Another device uses it.
        let taken = server.connect(Transport::Unix);
        let copy = taken.try_clone().expect("dup");
        let other = persistent(SIZE).index(1);
        let mut other_client = other.start_over(vec![copy]);
        other_client.wait_ready(SIZE);
        assert_eq!(pass_and_start(&[taken]), Err(Errno::BUSY));
        // The attempt failed, so the device has no sockets.
        assert_eq!(pass_and_start(&[]), Err(Errno::BUSY));
        // Two, although the server's flags do not allow several connections.
        let several = [(); 2].map(|()| server.connect(Transport::Unix));
        assert_eq!(pass_and_start(&several), Err(Errno::INVAL));
        let device = device::open(1, 0).expect("the device");
        ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert_eq!(other_client.wait(), Ok(0));
    }
    assert_restarts(guest, &plan, &direct);
    drop(direct);
    assert_usable(0);
}

fn not_with_another_size(guest: &Guest) {
    let plan = persistent(SIZE);
    let (_rig, direct) = lost_device(&plan);
    if can_be_restarted(guest) {
        let server = Server::new();
        assert_eq!(ioctl_number(&direct, SET_SIZE, 2 * SIZE), Ok(0));
        assert_eq!(
            pass_and_start(&[server.connect(Transport::Unix)]),
            Err(Errno::INVAL)
        );
    }
    assert_restarts(guest, &plan, &direct);
    drop(direct);
    assert_usable(0);
}
