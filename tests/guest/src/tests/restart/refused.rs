// SPDX-License-Identifier: GPL-2.0

//! When a device is not started again, and what the next server must have in common with the first one.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::{SIZE, disconnect, lose, plan_of, start_again};
use crate::device::{self, Plan, SOON, assert_usable};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{CLEAR_SOCK, DISCONNECT, DO_IT, SET_BLKSIZE, SET_SIZE, SET_SOCK};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult, ioctl_number};
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

/// The end of the process is the end of its session.
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
    let failed = direct.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(device::errno(failed), Err(Errno::IO));
    let socket = Server::new().connect(Transport::Unix);
    ioctl_number(&direct, SET_SIZE, SIZE).expect("NBD_SET_SIZE");
    let passed = ioctl_number(&direct, SET_SOCK, socket.as_raw_fd() as u64);
    assert_eq!(passed, Err(Errno::BUSY));
    drop(direct);
    assert_usable(0);
}

/// A process of its own that uses nbd0 and `socket`; see helper.rs.
fn helper(what: &str, socket: OwnedFd) -> std::process::Child {
    std::process::Command::new("/proc/self/exe")
        .args(["helper", what, "/dev/nbd0", &SIZE.to_string()])
        .stdin(socket)
        .spawn()
        .expect("a process")
}

/// A program that looks for a free device by passing each its socket must not get one that is in use,
/// whose users would go on with another image.
fn not_by_a_program_that_looks_for_a_free_device(guest: &Guest) {
    let mut rig = plan_of(SIZE).attach();
    let direct = rig.direct();
    lose(&mut rig);
    let server = Server::new();
    let mut other = helper("probe", server.connect(Transport::Unix));
    assert_eq!(
        other.wait().expect("it to end").code(),
        Some(Errno::BUSY.raw_os_error())
    );
    // One that sets the size first means this device.
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let mut other = helper("attach", server.connect(Transport::Unix));
        let served = wait_until(SOON, || {
            direct.read_exact_at(&mut Buffer::new(4096), 0).is_ok()
        });
        assert!(served.is_ok());
        ioctl_number(&direct, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert!(other.wait().expect("it to end").success());
    }
    // The program that was refused has left a connection.
    server.kill();
    let gone = wait_until(SOON, || server.living() == 0);
    assert!(gone.is_ok());
    drop(direct);
    assert_usable(0);
}

/// A client that ends, and does not come back: nbd-client without -persist, qemu-nbd.
fn not_after_its_client_has_cleared_it(_: &Guest) {
    let mut rig = Plan::new(SIZE).hold().attach();
    let direct = rig.direct();
    rig.server.kill();
    rig.client.wait_lost();
    thread::scope(|scope| {
        let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
        thread::sleep(Duration::from_millis(100));
        // NBD_CLEAR_SOCK, and a close.
        rig.client.go_on();
        assert_eq!(device::errno(reader.join().unwrap()), Err(Errno::IO));
    });
    let socket = Server::new().connect(Transport::Unix);
    let passed = ioctl_number(&direct, SET_SOCK, socket.as_raw_fd() as u64);
    assert_eq!(passed, Err(Errno::BUSY));
    drop(direct);
    assert_usable(0);
}

/// Who has disconnected it, or has dropped its sockets, wants no other server to take its place.
fn not_after_it_was_ended(_: &Guest) {
    for end in [DISCONNECT, CLEAR_SOCK] {
        let mut rig = plan_of(SIZE).attach();
        let direct = rig.direct();
        assert_eq!(ioctl_number(&direct, end, 0), Ok(0));
        assert_eq!(rig.client.wait(), Ok(0));
        let server = Server::new();
        let socket = server.connect(Transport::Unix);
        let passed = ioctl_number(&direct, SET_SOCK, socket.as_raw_fd() as u64);
        assert_eq!(passed, Err(Errno::BUSY));
        assert_eq!(ioctl_number(&direct, DO_IT, 0), Err(Errno::BUSY));
        drop(direct);
        assert_usable(0);
    }
}

/// Passes `sockets` to a lost device, and answers what NBD_DO_IT does.
fn pass_and_start(sockets: &[OwnedFd]) -> SysResult {
    let device = device::open(0, 0).expect("the device");
    for socket in sockets {
        ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64)?;
    }
    ioctl_number(&device, DO_IT, 0)
}

fn not_with_another_block_size(guest: &Guest) {
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let server = Server::new();
        assert_eq!(ioctl_number(&direct, SET_BLKSIZE, 4096), Ok(0));
        assert_eq!(
            pass_and_start(&[server.connect(Transport::Unix)]),
            Err(Errno::INVAL)
        );
        let line = "nbd0: cannot be started again with 1048576 bytes in blocks of 4096";
        assert!(guest.log().iter().any(|l| l.contains(line)));
        assert!(server.is_deserted());
    }
    // A client that sets another one in between, as old ones do, is not stopped.
    let server = Server::new();
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        assert_eq!(ioctl_number(&direct, SET_BLKSIZE, 4096), Ok(0));
    }
    if let Some(mut client) = start_again(guest, &plan, &server) {
        direct
            .read_exact_at(&mut Buffer::new(512), 512)
            .expect("to read");
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

fn not_with_sockets_that_cannot_be_used(guest: &Guest) {
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    let server = Server::new();
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        // In use by another device.
        let taken = server.connect(Transport::Unix);
        let copy = taken.try_clone().expect("dup");
        let other = plan_of(SIZE).index(1);
        let mut other_client = other.start_over(vec![copy]);
        other_client.wait_ready(SIZE);
        assert_eq!(pass_and_start(&[taken]), Err(Errno::BUSY));
        // It was not started, so there are no sockets.
        assert_eq!(pass_and_start(&[]), Err(Errno::BUSY));
        // Several, which the server does not allow.
        let several = [(); 2].map(|()| server.connect(Transport::Unix));
        assert_eq!(pass_and_start(&several), Err(Errno::INVAL));
        let device = device::open(1, 0).expect("the device");
        ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert_eq!(other_client.wait(), Ok(0));
    }
    if let Some(mut client) = start_again(guest, &plan, &server) {
        direct
            .read_exact_at(&mut Buffer::new(4096), 0)
            .expect("to read");
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

fn not_with_another_size(guest: &Guest) {
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let server = Server::new();
        assert_eq!(ioctl_number(&direct, SET_SIZE, 2 * SIZE), Ok(0));
        assert_eq!(
            pass_and_start(&[server.connect(Transport::Unix)]),
            Err(Errno::INVAL)
        );
    }
    if let Some(mut client) = start_again(guest, &plan, &Server::new()) {
        assert_eq!(device::sysfs(0, "size"), (SIZE / 512).to_string());
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}
