// SPDX-License-Identifier: GPL-2.0

//! A server that says no, politely.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::device::{self, Plan, Rig, errno};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::proto::{BLKDISCARD, Command};
use crate::sys::{Buffer, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(of_every_number_for_a_read),
        test!(of_every_number_for_a_write),
        test!(of_every_number_for_a_flush),
        test!(of_every_number_for_a_trim),
        test!(of_every_number_for_zeroes),
        test!(do_not_end_the_connection),
        test!(are_logged),
        test!(of_buffered_writes_reach_fsync),
    ]
}

/// The protocol's numbers but for ESHUTDOWN (see `shutdowns`), and some that are none.
const NUMBERS: [u32; 14] = [
    1,  // EPERM
    5,  // EIO
    12, // ENOMEM
    22, // EINVAL
    28, // ENOSPC
    30, // EROFS
    75, // EOVERFLOW
    95, // ENOTSUP
    2,
    110,
    255,
    4096,
    0x7fff_ffff,
    u32::MAX,
];
const EPERM: u32 = 1;
const ENOSPC: u32 = 28;

/// Lets the server refuse all requests of one kind, with one number after the other.
fn refused_with(
    command: Command,
    mut act: impl FnMut(&Rig) -> Result<(), Errno>,
) -> Vec<(u32, Result<(), Errno>)> {
    let mut rig = Plan::new(1 << 20).attach();
    let answers = NUMBERS.map(|number| {
        rig.server.script(move |conn, request| {
            if request.command == command {
                conn.refuse(request, number)
            } else {
                conn.serve(request)
            }
        });
        (number, act(&rig))
    });
    rig.server.be_honest();
    assert_eq!(rig.disconnect(), Ok(0), "the connection lived on");
    answers.to_vec()
}

/// What a read, a write or a flush that the server refuses looks like to a program.
fn assert_usual_errnos(guest: &Guest, answers: &[(u32, Result<(), Errno>)]) {
    for (number, answer) in answers {
        let wanted = match (number, guest.expected("server-errors-keep-their-meaning")) {
            (&ENOSPC, Driver::Rnbd) => Errno::NOSPC,
            (&EPERM, Driver::Rnbd) => Errno::REMOTEIO,
            _ => Errno::IO,
        };
        assert_eq!(*answer, Err(wanted), "the server said {number}");
    }
}

fn of_every_number_for_a_read(guest: &Guest) {
    let answers = refused_with(Command::Read, |rig| {
        errno(rig.direct().read_exact_at(&mut Buffer::new(4096), 0))
    });
    assert_usual_errnos(guest, &answers);
}

fn of_every_number_for_a_write(guest: &Guest) {
    let answers = refused_with(Command::Write, |rig| {
        errno(rig.direct().write_all_at(&Buffer::new(4096), 0))
    });
    assert_usual_errnos(guest, &answers);
}

fn of_every_number_for_a_flush(guest: &Guest) {
    let answers = refused_with(Command::Flush, |rig| errno(rig.direct().sync_all()));
    assert_usual_errnos(guest, &answers);
}

fn of_every_number_for_a_trim(guest: &Guest) {
    let answers = refused_with(Command::Trim, |rig| {
        ioctl_pointer(rig.open(), BLKDISCARD, &mut [0, 65536_u64]).map(drop)
    });
    for (number, answer) in answers {
        let wanted = match (number, guest.expected("server-errors-keep-their-meaning")) {
            (ENOSPC, Driver::Rnbd) => Err(Errno::NOSPC),
            (EPERM, Driver::Rnbd) => Err(Errno::REMOTEIO),
            // The block layer takes "not supported" for done: a trim is but a hint.
            (22 | 95, Driver::Rnbd) => Ok(()),
            _ => Err(Errno::IO),
        };
        assert_eq!(answer, wanted, "the server said {number}");
    }
}

fn of_every_number_for_zeroes(guest: &Guest) {
    let answers = refused_with(Command::WriteZeroes, |rig| {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(rig.open(), punch, 0, 65536)
    });
    for (number, answer) in answers {
        let wanted = match (number, guest.expected("server-errors-keep-their-meaning")) {
            (ENOSPC, Driver::Rnbd) => Errno::NOSPC,
            (EPERM, Driver::Rnbd) => Errno::REMOTEIO,
            (22 | 95, Driver::Rnbd) => Errno::OPNOTSUPP,
            _ => Errno::IO,
        };
        assert_eq!(answer, Err(wanted), "the server said {number}");
    }
}

fn do_not_end_the_connection(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    rig.server.script(|conn, request| {
        if request.offset == 4096 {
            conn.refuse(request, 5)
        } else {
            conn.serve(request)
        }
    });
    let direct = rig.direct();
    for _ in 0..10 {
        let mut buffer = Buffer::new(4096);
        assert_eq!(
            errno(direct.read_exact_at(&mut buffer, 4096)),
            Err(Errno::IO)
        );
        direct.read_exact_at(&mut buffer, 0).unwrap();
        assert_eq!(errno(direct.write_all_at(&buffer, 4096)), Err(Errno::IO));
        direct.write_all_at(&buffer, 0).unwrap();
    }
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
}

fn are_logged(guest: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    rig.server.script(|conn, request| conn.refuse(request, 5));
    let read = rig.direct().read_exact_at(&mut Buffer::new(4096), 8192);
    assert_eq!(errno(read), Err(Errno::IO));
    guest.expect_logged(
        "block nbd0: Other side returned error (5)",
        "nbd0: server returned error 5 for read of 4096 bytes at 8192",
    );
    rig.server.be_honest();
}

fn of_buffered_writes_reach_fsync(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let device: File = rig.open();
    device.write_all_at(&[1; 65536], 0).unwrap();
    rig.server.script(|conn, request| {
        if request.command == Command::Write {
            conn.refuse(request, 5)
        } else {
            conn.serve(request)
        }
    });
    assert_eq!(errno(device.sync_all()), Err(Errno::IO));
    rig.server.be_honest();
    device.write_all_at(&[2; 4096], 0).unwrap();
    assert_eq!(errno(device.sync_all()), Ok(()), "each error is told once");
    assert_eq!(rig.server.peek(0, 4096), [2; 4096]);
    drop((rig, device));
    device::assert_usable(0);
}
