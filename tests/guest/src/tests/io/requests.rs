// SPDX-License-Identifier: GPL-2.0

//! The request that each operation makes of the server.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{KIB, essences, written};
use crate::device::{self, Plan, Rig, USUAL_FLAGS, errno};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::proto::{
    BLKDISCARD, BLKROGET, BLKZEROOUT, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, Command, READ_ONLY,
    SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES,
};
use crate::sys::{Buffer, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(reads_and_writes_on_the_wire),
        test!(flushes_on_the_wire),
        test!(fua_on_the_wire),
        test!(fua_without_a_server_that_can_is_a_flush),
        test!(without_flush_nothing_is_flushed),
        test!(trims_on_the_wire),
        test!(zeroes_on_the_wire),
        test!(what_the_server_cannot_do_is_not_asked),
        test!(offsets_of_partitions),
        test!(cookies_differ),
        test!(read_only_devices_are_not_written),
    ]
}

fn reads_and_writes_on_the_wire(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    direct.write_all_at(&written(1, 8192, 4096), 8192).unwrap();
    direct
        .read_exact_at(&mut Buffer::new(512), 12 * 512)
        .unwrap();
    direct.read_exact_at(&mut Buffer::new(64 * KIB), 0).unwrap();
    assert_eq!(
        essences(&rig),
        [
            (Command::Write, 0, 8192, 4096),
            (Command::Read, 0, 6144, 512),
            (Command::Read, 0, 0, 65536),
        ]
    );
}

fn flushes_on_the_wire(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    rig.direct().sync_all().unwrap();
    assert_eq!(essences(&rig), [(Command::Flush, 0, 0, 0)]);
    rig.server.forget_requests();
    let buffered = rig.open();
    buffered.write_all_at(&[1; 4096], 4096).unwrap();
    buffered.sync_all().unwrap();
    assert_eq!(
        essences(&rig),
        [(Command::Write, 0, 4096, 4096), (Command::Flush, 0, 0, 0)]
    );
}

/// Writes 4 KiB at `offset` that must be stored when the call returns.
fn write_durably(rig: &Rig, offset: u64) {
    let flags = libc::O_DIRECT | libc::O_DSYNC;
    let device = device::open(rig.index, flags).unwrap();
    device
        .write_all_at(&written(2, offset, 4096), offset)
        .unwrap();
}

fn fua_on_the_wire(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    write_durably(&rig, 4096);
    assert_eq!(
        essences(&rig)[0],
        (Command::Write, CMD_FLAG_FUA, 4096, 4096)
    );
}

fn fua_without_a_server_that_can_is_a_flush(_: &Guest) {
    let rig = Plan::new(1 << 20).flags(SEND_FLUSH).attach();
    write_durably(&rig, 4096);
    let seen = essences(&rig);
    assert_eq!(
        seen[..2],
        [(Command::Write, 0, 4096, 4096), (Command::Flush, 0, 0, 0)]
    );
}

fn without_flush_nothing_is_flushed(_: &Guest) {
    let rig = Plan::new(1 << 20).flags(0).attach();
    write_durably(&rig, 4096);
    rig.open().sync_all().unwrap();
    assert_eq!(essences(&rig), [(Command::Write, 0, 4096, 4096)]);
}

fn discard(device: &File, offset: u64, len: u64) -> Result<i32, Errno> {
    ioctl_pointer(device, BLKDISCARD, &mut [offset, len])
}

fn zero_out(device: &File, offset: u64, len: u64) -> Result<i32, Errno> {
    ioctl_pointer(device, BLKZEROOUT, &mut [offset, len])
}

fn trims_on_the_wire(_: &Guest) {
    let rig = Plan::new(1 << 33).attach();
    rig.server.poke(64 << 10, &[1; 128 << 10]);
    let device = rig.open();
    assert_eq!(discard(&device, 64 << 10, 64 << 10), Ok(0));
    assert_eq!(essences(&rig), [(Command::Trim, 0, 64 << 10, 64 << 10)]);
    assert_eq!(
        rig.server.peek(128 << 10, 512),
        [1; 512],
        "what lies behind is left alone"
    );
    // As much as fits into a request at a time.
    rig.server.forget_requests();
    assert_eq!(discard(&device, 0, 1 << 33), Ok(0));
    let total: u64 = rig
        .server
        .requests_of(Command::Trim)
        .iter()
        .map(|r| u64::from(r.len))
        .sum();
    assert_eq!(total, 1 << 33);
    assert!(
        rig.server.requests().len() <= 4,
        "{:?}",
        rig.server.requests()
    );
}

fn zeroes_on_the_wire(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let device = rig.open();
    rig.server.poke(0, &[1; 1 << 20]);
    assert_eq!(zero_out(&device, 4096, 8192), Ok(0));
    assert_eq!(
        essences(&rig),
        [(Command::WriteZeroes, CMD_FLAG_NO_HOLE, 4096, 8192)]
    );
    rig.server.forget_requests();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&device, punch, 65536, 4096).unwrap();
    assert_eq!(essences(&rig), [(Command::WriteZeroes, 0, 65536, 4096)]);
    rig.server.forget_requests();
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&device, zero, 131_072, 4096).unwrap();
    assert_eq!(
        essences(&rig),
        [(Command::WriteZeroes, CMD_FLAG_NO_HOLE, 131_072, 4096)]
    );
    assert_eq!(rig.server.peek(4096, 8192), [0; 8192]);
    assert_eq!(rig.server.peek(12288, 512), [1; 512]);
}

fn what_the_server_cannot_do_is_not_asked(_: &Guest) {
    let rig = Plan::new(1 << 20).flags(SEND_FLUSH).attach();
    let device = rig.open();
    rig.server.poke(0, &[1; 1 << 20]);
    assert_eq!(discard(&device, 0, 65536), Err(Errno::OPNOTSUPP));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(
        rustix::fs::fallocate(&device, punch, 0, 4096),
        Err(Errno::OPNOTSUPP)
    );
    // Zeroes are then written.
    assert_eq!(zero_out(&device, 65536, 65536), Ok(0));
    assert!(
        rig.server
            .requests()
            .iter()
            .all(|request| request.command == Command::Write)
    );
    assert_eq!(rig.server.peek(65536, 65536), vec![0; 65536]);
    drop((rig, device));

    // TRIM and WRITE_ZEROES are separate abilities.
    let rig = Plan::new(1 << 20).flags(SEND_TRIM).attach();
    assert_eq!(discard(&rig.open(), 0, 65536), Ok(0));
    drop(rig);
    let rig = Plan::new(1 << 20).flags(SEND_WRITE_ZEROES).attach();
    assert_eq!(discard(&rig.open(), 0, 65536), Err(Errno::OPNOTSUPP));
}

fn offsets_of_partitions(_: &Guest) {
    let rig = Plan::new(8 << 20).attach();
    crate::programs::sh("echo 4096,4096 | sfdisk -q --label dos /dev/nbd0");
    rig.server.forget_requests();
    let partition = File::options().write(true).open("/dev/nbd0p1").unwrap();
    assert_eq!(zero_out(&partition, 4096, 4096), Ok(0));
    let seen = rig.server.requests_of(Command::WriteZeroes);
    assert_eq!((seen[0].offset, seen[0].len), ((2 << 20) + 4096, 4096));
}

fn cookies_differ(guest: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    for _ in 0..300 {
        direct.read_exact_at(&mut Buffer::new(512), 0).unwrap();
    }
    let requests = rig.server.requests();
    let cookies: HashSet<u64> = requests.iter().map(|request| request.cookie).collect();
    if guest.expected("cookies-do-not-repeat-soon") == Driver::Rnbd {
        assert_eq!(cookies.len(), 300);
    }
    assert!(
        requests
            .windows(2)
            .all(|pair| pair[0].cookie != pair[1].cookie)
    );
}

fn read_only_devices_are_not_written(_: &Guest) {
    let rig = Plan::new(1 << 20).flags(USUAL_FLAGS | READ_ONLY).attach();
    // Opening it to write is another matter.
    let device = rig.direct();
    assert_eq!(
        errno(device.write_at(&Buffer::new(4096), 0)),
        Err(Errno::PERM)
    );
    assert_eq!(errno(rig.open().write_at(&[0; 4096], 0)), Err(Errno::PERM));
    assert_eq!(discard(&device, 0, 4096), Err(Errno::PERM));
    let mut read_only = 0;
    ioctl_pointer(&device, BLKROGET, &mut read_only).unwrap();
    assert_eq!(read_only, 1);
    device.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
    assert!(
        rig.server
            .requests()
            .iter()
            .all(|request| request.command == Command::Read)
    );
    drop((rig, device));
    // The next export can be written again.
    device::assert_usable(0);
}
