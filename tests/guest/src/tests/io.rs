// SPDX-License-Identifier: GPL-2.0

//! Data: what goes over the wire for it, and that it comes back right.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_send_buffer_size, set_tcp_nodelay, tcp_nodelay};

use crate::debug_kernel::enough;
use crate::device::{self, Plan, Rig, USUAL_FLAGS, assert_pattern, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, run_on, say, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::proto::{
    self, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, Command, READ_ONLY, SEND_FLUSH, SEND_TRIM,
    SEND_WRITE_ZEROES,
};
use crate::server::{Server, Transport};
use crate::stacks;
use crate::sys::{Buffer, ioctl_number, ioctl_pointer};
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
        test!(every_transport_carries_data),
        test!(buffered_data_comes_back),
        test!(requests_of_32_mib),
        test!(skewed_buffers),
        test!(vectored_buffers),
        test!(requests_that_are_split),
        test!(every_small_size),
        test!(end_of_the_device),
        test!(read_only_devices_are_not_written),
        test!(replies_out_of_order),
        test!(many_replies_in_one_segment),
        test!(replies_byte_by_byte),
        test!(replies_below_the_low_water_mark),
        test!(requests_are_in_flight_together),
        test!(more_at_once_than_one_call_sends),
        test!(more_than_one_turn_sends),
        test!(what_is_queued_last_is_sent),
        test!(nothing_is_kept_back),
        test!(programs_that_forget_tcp_nodelay),
        test!(random_concurrent_io_is_consistent),
        test!(two_devices_do_not_mix),
    ]
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

const BLKDISCARD: u32 = 0x1277;
const BLKZEROOUT: u32 = 0x127f;
const BLKROGET: u32 = 0x125e;

fn essences(rig: &Rig) -> Vec<(Command, u16, u64, u32)> {
    rig.server
        .requests()
        .iter()
        .map(|request| request.essence())
        .collect()
}

fn written(seed: u64, offset: u64, len: usize) -> Buffer {
    Buffer::filled(len, |data| pattern(seed, offset, data))
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

fn every_transport_carries_data(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Tcp6, Transport::Unix] {
        let mut rig = Plan::new(4 << 20).transport(transport).attach();
        let direct = rig.direct();
        direct
            .write_all_at(&written(4, 4096, 2 * MIB), 4096)
            .unwrap();
        let mut back = Buffer::new(2 * MIB);
        direct.read_exact_at(&mut back, 4096).unwrap();
        assert_pattern(4, 4096, &back);
        assert!(rig.server.peek(4096, 2 * MIB) == *back, "{transport:?}");
        drop(direct);
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

fn buffered_data_comes_back(_: &Guest) {
    let mut rig = Plan::new(8 << 20).attach();
    let mut device = rig.open();
    let mut data = vec![0; 4 * MIB];
    pattern(5, 1 << 20, &mut data);
    device.seek(SeekFrom::Start(1 << 20)).unwrap();
    device.write_all(&data).unwrap();
    device.sync_all().unwrap();
    drop(device);
    assert!(rig.server.peek(1 << 20, data.len()) == data);
    assert_eq!(rig.disconnect(), Ok(0));
    // Nothing of it is left in the page cache for the next connection.
    let rig = Plan::new(8 << 20).attach();
    let mut back = vec![1; 4 * MIB];
    rig.open().read_exact_at(&mut back, 1 << 20).unwrap();
    assert!(
        back.iter().all(|byte| *byte == 0),
        "the old export's data is read from the new one"
    );
}

fn requests_of_32_mib(_: &Guest) {
    let rig = Plan::new(64 << 20).attach();
    std::fs::write("/sys/block/nbd0/queue/max_sectors_kb", "32768").unwrap();
    let direct = rig.direct();
    let mut data = Buffer::huge(32 * MIB);
    pattern(6, 16 << 20, &mut data);
    direct.write_all_at(&data, 16 << 20).unwrap();
    data.fill(0);
    direct.read_exact_at(&mut data, 16 << 20).unwrap();
    assert_pattern(6, 16 << 20, &data);
    assert_eq!(
        essences(&rig),
        [
            (Command::Write, 0, 16 << 20, 32 << 20),
            (Command::Read, 0, 16 << 20, 32 << 20)
        ]
    );
}

fn skewed_buffers(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    for skew in [512, 1024, 3584] {
        for len in [512, 4096, 64 * KIB + 512] {
            let mut data = Buffer::skewed(len, skew);
            pattern(skew as u64, 1024, &mut data);
            direct.write_all_at(&data, 1024).unwrap();
            let mut back = Buffer::skewed(len, 4096 - skew);
            direct.read_exact_at(&mut back, 1024).unwrap();
            assert!(*back == *data, "{len} bytes, {skew} into the page");
        }
    }
}

/// The block layer makes several requests of one long piece of memory, which begin and end within it.
fn requests_that_are_split(_: &Guest) {
    const REQUEST_KIB: usize = 64;
    let rig = Plan::new(4 << 20).attach();
    fs::write(
        "/sys/block/nbd0/queue/max_sectors_kb",
        REQUEST_KIB.to_string(),
    )
    .unwrap();
    let direct = rig.direct();
    let mut data = Buffer::huge(2 * MIB);
    pattern(9, 0, &mut data);
    direct.write_all_at(&data, 0).expect("to write");
    assert_pattern(9, 0, &rig.server.peek(0, data.len()));
    data.fill(0);
    direct.read_exact_at(&mut data, 0).expect("to read");
    assert_pattern(9, 0, &data);
    let requests = rig.server.requests();
    let longest = requests.iter().map(|request| request.len as usize).max();
    assert_eq!(longest, Some(REQUEST_KIB * KIB));
}

fn vectored_buffers(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let mut direct = rig.direct();
    let lens = [512, 4096, 1024, 8192, 512, 32768];
    let mut buffers: Vec<Buffer> = lens.iter().map(|len| Buffer::skewed(*len, 512)).collect();
    let mut offset = 0;
    for buffer in &mut buffers {
        pattern(8, offset, buffer);
        offset += buffer.len() as u64;
    }
    let slices: Vec<IoSlice> = buffers.iter().map(|buffer| IoSlice::new(buffer)).collect();
    assert_eq!(direct.write_vectored(&slices).unwrap() as u64, offset);
    assert_eq!(
        essences(&rig),
        [(Command::Write, 0, 0, offset as u32)],
        "one request"
    );
    for buffer in &mut buffers {
        buffer.fill(0);
    }
    direct.seek(SeekFrom::Start(0)).unwrap();
    let mut slices: Vec<IoSliceMut> = buffers
        .iter_mut()
        .map(|buffer| IoSliceMut::new(buffer))
        .collect();
    assert_eq!(direct.read_vectored(&mut slices).unwrap() as u64, offset);
    let mut at = 0;
    for buffer in &buffers {
        assert_pattern(8, at, buffer);
        at += buffer.len() as u64;
    }
}

fn every_small_size(_: &Guest) {
    let rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    for sectors in 1..=40 {
        let (offset, len) = (sectors * 512, sectors as usize * 512);
        direct
            .write_all_at(&written(sectors, offset, len), offset)
            .unwrap();
        let mut back = Buffer::new(len);
        direct.read_exact_at(&mut back, offset).unwrap();
        assert_pattern(sectors, offset, &back);
    }
}

fn end_of_the_device(_: &Guest) {
    let size = (1 << 20) + 512;
    let rig = Plan::new(size).attach();
    let direct = rig.direct();
    let mut sector = Buffer::new(512);
    direct.write_all_at(&sector, size - 512).unwrap();
    direct.read_exact_at(&mut sector, size - 512).unwrap();
    assert_eq!(direct.read_at(&mut sector, size).unwrap(), 0);
    assert_eq!(errno(direct.write_at(&sector, size)), Err(Errno::NOSPC));
    assert_eq!(
        direct.read_at(&mut Buffer::new(4096), size - 512).unwrap(),
        512,
        "a short read"
    );
    // The last page of a device is cached although it is not whole.
    let buffered = rig.open();
    let mut tail = [1; 1024];
    assert_eq!(buffered.read_at(&mut tail, size - 1024).unwrap(), 1024);
    assert!(
        rig.server
            .requests()
            .iter()
            .all(|r| r.offset + u64::from(r.len) <= size)
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

/// Reads `count` blocks at once, each by a thread of its own, and checks them.
fn read_together(rig: &Rig, seed: u64, count: u64) {
    thread::scope(|scope| {
        for index in 0..count {
            let direct = rig.direct();
            scope.spawn(move || {
                let offset = index * 8192;
                let mut back = Buffer::new(8192);
                direct.read_exact_at(&mut back, offset).unwrap();
                assert_pattern(seed, offset, &back);
            });
        }
    });
}

fn stored_pattern(rig: &Rig, seed: u64, len: usize) {
    let mut data = vec![0; len];
    pattern(seed, 0, &mut data);
    rig.server.poke(0, &data);
}

fn replies_out_of_order(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let rig = Plan::new(1 << 20).transport(transport).attach();
        stored_pattern(&rig, 9, MIB);
        rig.server.script(|conn, request| {
            conn.defer(request)?;
            if conn.deferred() == 5 {
                conn.send_deferred()
            } else {
                Ok(())
            }
        });
        for _ in 0..3 {
            read_together(&rig, 9, 16);
        }
        rig.server.be_honest();
    }
}

fn many_replies_in_one_segment(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let rig = Plan::new(1 << 20).transport(transport).attach();
        stored_pattern(&rig, 10, MIB);
        // Nothing is answered before no request has come for a while.
        rig.server.script(|conn, request| conn.defer(request));
        for _ in 0..3 {
            read_together(&rig, 10, 32);
        }
        rig.server.be_honest();
    }
}

fn replies_byte_by_byte(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let rig = Plan::new(1 << 20).transport(transport).attach();
        stored_pattern(&rig, 11, MIB);
        rig.server.script(|conn, request| {
            let reply = conn.answer(request)?;
            reply.iter().try_for_each(|byte| conn.send(&[*byte]))
        });
        let direct = rig.direct();
        let mut back = Buffer::new(1024);
        for offset in [0, 4096, 8192] {
            direct.read_exact_at(&mut back, offset).unwrap();
            assert_pattern(11, offset, &back);
        }
        direct.write_all_at(&written(12, 4096, 1024), 4096).unwrap();
        rig.server.be_honest();
    }
}

/// A program that has the socket wake it up for much only, and then hands it over.
fn replies_below_the_low_water_mark(guest: &Guest) {
    let mut rig = Plan::new(MIB as u64)
        .transport(Transport::Tcp4)
        .low_water(1000)
        .timeout(2)
        .attach();
    let direct = rig.direct();
    direct.read_exact_at(&mut Buffer::new(4 * KIB), 0).unwrap();
    // Its reply has 16 bytes. What has come in is also looked at when the connection ends by its timeout;
    // then there is none for the second one.
    let write = || errno(direct.write_all_at(&Buffer::new(4 * KIB), 0));
    let written = write().and_then(|()| write());
    drop(direct);
    match guest.expected("low-water-mark-is-reset") {
        Driver::Nbd => {
            assert_eq!(written, Err(Errno::IO));
            let _ = rig.client.wait();
        }
        Driver::Rnbd => {
            assert_eq!(written, Ok(()));
            assert_eq!(rig.disconnect(), Ok(0));
        }
    }
}

fn requests_are_in_flight_together(_: &Guest) {
    const COUNT: usize = 24;
    let rig = Plan::new(1 << 20).attach();
    // Answers only when all have come, so fewer in flight would never be answered.
    rig.server.script(|conn, request| {
        conn.defer(request)?;
        while conn.deferred() < COUNT {
            let next = conn.next_request()?;
            conn.defer(&next)?;
        }
        conn.send_deferred()
    });
    thread::scope(|scope| {
        for index in 0..COUNT as u64 {
            let direct = rig.direct();
            // Far apart, so that they are not merged.
            scope.spawn(move || {
                direct
                    .read_exact_at(&mut Buffer::new(512), index * 8192)
                    .unwrap()
            });
        }
    });
    rig.server.be_honest();
}

/// So many requests wait for a socket that takes nothing that they are not all sent by one call.
fn more_at_once_than_one_call_sends(_: &Guest) {
    const READS: u64 = 100;
    let rig = Plan::new(16 << 20).send_buffer(16 * KIB).attach();
    fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
    let go_on = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&go_on);
    rig.server.script(move |conn, request| {
        while !told.load(Ordering::Relaxed) && !conn.is_ended() {
            thread::sleep(Duration::from_millis(5));
        }
        conn.serve(request)
    });
    let direct = rig.direct();
    thread::scope(|scope| {
        let _go_on = Until(&go_on);
        scope.spawn(|| {
            let data = Buffer::new(MIB);
            direct.write_all_at(&data, 0).expect("to write");
        });
        rig.server.wait_for_command(Command::Write);
        for index in 0..READS {
            // Far apart, so that they are not merged.
            let offset = 2 * MIB as u64 + index * 8192;
            let direct = &direct;
            scope.spawn(move || {
                direct
                    .read_exact_at(&mut Buffer::new(512), offset)
                    .expect("to read");
            });
        }
        assert!(wait_until(device::SOON, stacks::others_wait).is_ok());
    });
    assert_eq!(rig.server.requests_of(Command::Read).len() as u64, READS);
}

/// There is room for all at once, after there was none: far more than a sender sends before it lets others
/// have a turn.
fn more_than_one_turn_sends(_: &Guest) {
    const LIMIT: &str = "/proc/sys/net/core/wmem_max";
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    let ours = socket.try_clone().unwrap();
    set_socket_send_buffer_size(&ours, 4096).expect("SO_SNDBUF");
    let netlink = Netlink::open();
    let index = netlink.connect(&Setup::new(64 << 20).sockets([socket]));
    let index = index.expect("to connect");
    let direct = device::open(index, libc::O_DIRECT).expect("the device");
    let reads = Arc::new(AtomicBool::new(false));
    let may_read = Arc::clone(&reads);
    server.script(move |conn, request| {
        while !may_read.load(Ordering::Relaxed) && !conn.is_ended() {
            thread::sleep(Duration::from_millis(10));
        }
        conn.serve(request)
    });
    let mut data = Buffer::scattered(32 * MIB);
    pattern(8, 0, &mut data);
    thread::scope(|scope| {
        let writer = scope.spawn(|| direct.write_all_at(&data, 0));
        server.wait_for_command(Command::Write);
        // By then the other requests of this write are queued, too.
        thread::sleep(enough(Duration::from_millis(500), Duration::from_secs(3)));
        let before = fs::read_to_string(LIMIT).unwrap();
        fs::write(LIMIT, (128 * MIB).to_string()).unwrap();
        set_socket_send_buffer_size(&ours, 64 * MIB).expect("SO_SNDBUF");
        fs::write(LIMIT, before).unwrap();
        reads.store(true, Ordering::Relaxed);
        writer.join().unwrap().expect("to write");
    });
    assert_pattern(8, 0, &server.peek(0, 32 * MIB));
    netlink.disconnect(index).expect("to disconnect");
}

/// Of two that queue a request at the same time one sends for both, and nothing comes afterwards that would
/// send what he has left.
fn what_is_queued_last_is_sent(_: &Guest) {
    // rnbd has a long read sent by whoever submits it.
    const LONG: usize = 64 * KIB;
    // More loops than the first one takes to send.
    const LATEST: usize = 4096;
    let rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    let (together, arrived) = (Barrier::new(2), AtomicUsize::new(0));
    let end = Instant::now() + enough(Duration::from_secs(10), Duration::from_secs(5));
    let over = AtomicBool::new(false);
    let rounds = |late: bool| {
        let mut buffer = Buffer::new(LONG);
        let mut random = Rng::new();
        for round in 1.. {
            if together.wait().is_leader() {
                over.store(Instant::now() > end, Ordering::Relaxed);
            }
            together.wait();
            if over.load(Ordering::Relaxed) {
                return round;
            }
            // Closer than any barrier brings two tasks together.
            arrived.fetch_add(1, Ordering::Relaxed);
            while arrived.load(Ordering::Relaxed) < 2 * round {
                std::hint::spin_loop();
            }
            if late {
                (0..random.usize(..LATEST)).for_each(|_| std::hint::spin_loop());
            }
            let at = u64::from(late) * LONG as u64;
            direct.read_exact_at(&mut buffer, at).unwrap();
        }
        unreachable!()
    };
    let rounds = &rounds;
    thread::scope(|scope| {
        let threads = [false, true].map(|late| {
            scope.spawn(move || {
                run_on(usize::from(late));
                rounds(late)
            })
        });
        let counts = threads.map(|thread| thread.join().unwrap());
        say(&format!("{} rounds", counts[0]));
    });
}

/// TCP would keep back for 200 ms what is sent with the promise that more follows.
fn nothing_is_kept_back(_: &Guest) {
    let rig = Plan::new(1 << 20).transport(Transport::Tcp4).attach();
    let direct = rig.direct();
    let shortest = |transfer: &dyn Fn()| {
        let times = (0..20).map(|_| {
            let began = Instant::now();
            transfer();
            began.elapsed()
        });
        times.min().unwrap()
    };
    let read = shortest(&|| direct.read_exact_at(&mut Buffer::new(512), 0).unwrap());
    let write = shortest(&|| direct.write_all_at(&Buffer::new(512), 0).unwrap());
    for took in [read, write] {
        assert!(took < Duration::from_millis(150), "{took:?} at least");
    }
}

/// Threads that each own every n-th block, write it, read it back, and forget nothing.
fn random_concurrent_io_is_consistent(_: &Guest) {
    const THREADS: u64 = 6;
    const BLOCKS: u64 = 96;
    const BLOCK: usize = 16 * KIB;
    let size = THREADS * BLOCKS * BLOCK as u64;
    let rig = Plan::new(size)
        .connections(2)
        .transport(Transport::Tcp4)
        .attach();
    // Replies come in changing order.
    rig.server.script(|conn, request| {
        conn.defer(request)?;
        if conn.deferred() as u64 > request.cookie % 4 {
            conn.send_deferred()
        } else {
            Ok(())
        }
    });
    let versions = Mutex::new(vec![0; (THREADS * BLOCKS) as usize]);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (direct, versions) = (rig.direct(), &versions);
            scope.spawn(move || {
                let mut random = thread + 1;
                let mut next = move |below: u64| {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (random >> 33) % below
                };
                let mut data = Buffer::new(BLOCK);
                for round in 1..=150 {
                    let block = next(BLOCKS) * THREADS + thread;
                    let (offset, index) = (block * BLOCK as u64, block as usize);
                    if next(2) == 0 {
                        pattern(round, offset, &mut data);
                        direct.write_all_at(&data, offset).unwrap();
                        versions.lock().unwrap()[index] = round;
                    } else {
                        direct.read_exact_at(&mut data, offset).unwrap();
                        match versions.lock().unwrap()[index] {
                            0 => assert!(data.iter().all(|byte| *byte == 0)),
                            version => assert_pattern(version, offset, &data),
                        }
                    }
                }
            });
        }
    });
    rig.server.be_honest();
    for (block, version) in versions.into_inner().unwrap().into_iter().enumerate() {
        let offset = (block * BLOCK) as u64;
        if version != 0 {
            assert_pattern(version, offset, &rig.server.peek(offset, BLOCK));
        }
    }
}

/// A program dials, forgets the option, and hands the socket over.
fn programs_that_forget_tcp_nodelay(guest: &Guest) {
    let driver = guest.expected("tcp-nodelay-is-set");
    let set = driver == Driver::Rnbd;
    let nodelay = |socket: &OwnedFd| tcp_nodelay(socket).unwrap();
    let server = Server::new();
    let forgetful = |transport| {
        let socket = server.connect(transport);
        set_tcp_nodelay(&socket, false).unwrap();
        let kept = socket.try_clone().unwrap();
        (socket, kept)
    };
    for transport in [Transport::Tcp4, Transport::Tcp6, Transport::Tls] {
        // By ioctl.
        let (socket, kept) = forgetful(transport);
        let plan = Plan::new(MIB as u64);
        let mut client = plan.start_over(vec![socket]);
        client.wait_ready(MIB as u64);
        assert_eq!(nodelay(&kept), set, "{transport:?}");
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        direct.write_all_at(&written(1, 0, 4 * KIB), 0).unwrap();
        assert_eq!(ioctl_number(&direct, proto::DISCONNECT, 0), Ok(0));
        drop(direct);
        assert_eq!(client.wait(), Ok(0));
        assert_eq!(nodelay(&kept), set, "it stays");
        // By netlink: for a new device, and in the place of a dead connection.
        let (socket, kept) = forgetful(transport);
        let netlink = Netlink::open();
        let setup = Setup::new(MIB as u64).index(1).dead_timeout(5);
        assert_eq!(netlink.connect(&setup.sockets([socket])), Ok(1));
        assert_eq!(nodelay(&kept), set, "{transport:?}");
        let news = Netlink::listen();
        server.kill();
        assert_eq!(news.expect_dead_link(), 1);
        let (socket, kept) = forgetful(transport);
        assert!(!nodelay(&kept), "not yet");
        let change = Setup::change(1).sockets([socket]);
        assert_eq!(netlink.reconfigure(&change), Ok(()));
        assert_eq!(nodelay(&kept), set, "{transport:?}");
        let direct = device::open(1, libc::O_DIRECT).unwrap();
        direct.write_all_at(&written(2, 0, 4 * KIB), 0).unwrap();
        drop(direct);
        netlink.disconnect(1).unwrap();
        assert_eq!(nodelay(&kept), set, "it stays");
    }
}

fn two_devices_do_not_mix(_: &Guest) {
    let rigs: Vec<Rig> = (0..2)
        .map(|index| Plan::new(4 << 20).index(index).attach_to(Server::new()))
        .collect();
    thread::scope(|scope| {
        for rig in &rigs {
            scope.spawn(|| {
                let direct = rig.direct();
                let seed = 20 + u64::from(rig.index);
                for offset in (0..4 << 20).step_by(256 * KIB) {
                    direct
                        .write_all_at(&written(seed, offset, 256 * KIB), offset)
                        .unwrap();
                }
            });
        }
    });
    for rig in &rigs {
        assert_pattern(20 + u64::from(rig.index), 0, &rig.server.peek(0, 4 * MIB));
    }
    // One ends; the other does not notice.
    let [mut first, second] = <[Rig; 2]>::try_from(rigs).ok().unwrap();
    assert_eq!(first.disconnect(), Ok(0));
    assert!(second.client.still_runs_after(Duration::from_millis(50)));
    second
        .direct()
        .read_exact_at(&mut Buffer::new(4096), 0)
        .unwrap();
}
