// SPDX-License-Identifier: GPL-2.0

//! What the programs that have the device open notice, and how the new server may differ.

use std::os::unix::fs::FileExt;
use std::thread;

use rustix::io::Errno;

use super::{
    SIZE, can_be_restarted, disconnect, kill_server, lost_device, pass_socket, persistent,
    start_again, wait_readable,
};
use crate::device::{self, SOON, assert_usable, pattern, read_page};
use crate::harness::{Guest, Test, wait_until};
use crate::programs::sh;
use crate::proto::{CAN_MULTI_CONN, Command, DO_IT, SEND_FLUSH, SET_BLKSIZE, SET_SIZE};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, ioctl_number};
use crate::test;
use crate::tests::do_it::lost;

pub fn tests() -> Vec<Test> {
    vec![
        test!(while_a_program_has_it_open),
        test!(by_the_task_that_has_it_open),
        test!(with_fewer_and_with_more_connections),
        test!(with_other_flags),
    ]
}

fn while_a_program_has_it_open(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let plan = persistent(SIZE).transport(transport);
        let mut rig = plan.attach();
        let direct = rig.direct();
        kill_server(&mut rig);
        assert_eq!(read_page(&direct, 0), Err(Errno::IO));

        let server = Server::new();
        let Some(mut client) = start_again(guest, &plan, &server) else {
            return;
        };
        // The program finds the device as it was.
        let written = Buffer::filled(64 << 10, |data| pattern(3, 0, data));
        direct.write_all_at(&written, 4096).expect("to write");
        direct.sync_all().expect("to flush");
        assert_eq!(server.peek(4096, written.len()), *written);
        let mut read = Buffer::new(written.len());
        direct.read_exact_at(&mut read, 4096).expect("to read");
        assert!(*read == *written);
        assert_eq!(device::sysfs(0, "size"), (SIZE / 512).to_string());

        disconnect(&direct, &mut client);
        drop(direct);
        assert_usable(0);
    }
}

/// The task calls NBD_DO_IT again without closing the device in between.
fn by_the_task_that_has_it_open(guest: &Guest) {
    let device = device::open(0, 0).expect("the device");
    for round in 0..5 {
        let server = Server::new();
        if round == 0 {
            ioctl_number(&device, SET_BLKSIZE, 512).expect("NBD_SET_BLKSIZE");
            ioctl_number(&device, SET_SIZE, SIZE).expect("NBD_SET_SIZE");
        }
        let passed = pass_socket(&device, &server);
        if round > 0 && !can_be_restarted(guest) {
            assert_eq!(passed, Err(Errno::BUSY));
            break;
        }
        assert_eq!(passed, Ok(0));
        let answer = thread::scope(|scope| {
            let runs = scope.spawn(|| ioctl_number(&device, DO_IT, 0));
            let direct = device::open(0, libc::O_DIRECT).expect("the device");
            wait_readable(&direct);
            drop(direct);
            server.kill();
            runs.join().unwrap()
        });
        assert_eq!(answer, lost(guest), "round {round}");
    }
    drop(device);
    assert_usable(0);
}

fn with_fewer_and_with_more_connections(guest: &Guest) {
    let (_rig, direct) = lost_device(&persistent(SIZE).connections(2));
    for connections in [1, 3, 2] {
        let server = Server::new();
        let plan = persistent(SIZE)
            .flags(device::USUAL_FLAGS | CAN_MULTI_CONN)
            .connections(connections);
        let Some(mut client) = start_again(guest, &plan, &server) else {
            break;
        };
        for _ in 0..8 {
            assert_eq!(read_page(&direct, 0), Ok(()));
        }
        let used = wait_until(SOON, || server.living() == connections.min(2));
        assert!(used.is_ok(), "{connections}: {}", server.living());
        server.kill();
        assert_eq!(client.wait(), Err(Errno::PIPE), "{connections}");
    }
    drop(direct);
    assert_usable(0);
}

/// The device keeps the flags of its first server, so that nothing changes for programs that have it open.
fn with_other_flags(guest: &Guest) {
    let (_rig, direct) = lost_device(&persistent(SIZE));
    let server = Server::new();
    let plan = persistent(SIZE).flags(SEND_FLUSH);
    if let Some(mut client) = start_again(guest, &plan, &server) {
        assert!(guest.has_logged("nbd0: the server's flags were"));
        // The commands that the first server supported are still sent.
        direct
            .write_all_at(&Buffer::new(4096), 0)
            .expect("to write");
        direct.sync_all().expect("to flush");
        assert_eq!(server.requests_of(Command::Flush).len(), 1);
        sh("blkdiscard -l 65536 /dev/nbd0");
        assert_eq!(server.requests_of(Command::Trim).len(), 1);
        // They still are after a change of the size.
        assert_eq!(ioctl_number(&direct, SET_SIZE, 2 * SIZE), Ok(0));
        sh("blkdiscard -l 65536 /dev/nbd0");
        assert_eq!(server.requests_of(Command::Trim).len(), 2);
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}
