// SPDX-License-Identifier: GPL-2.0

//! Data comes back as it was written, whatever its size and its place in memory.

use std::fs;
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::{KIB, MIB, essences, written};
use crate::device::{Plan, Rig, assert_pattern, errno, pattern};
use crate::harness::{Guest, Test};
use crate::proto::Command;
use crate::server::{Server, Transport};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(every_transport_carries_data),
        test!(buffered_data_comes_back),
        test!(requests_of_32_mib),
        test!(skewed_buffers),
        test!(vectored_buffers),
        test!(requests_that_are_split),
        test!(every_small_size),
        test!(end_of_the_device),
        test!(random_concurrent_io_is_consistent),
        test!(two_devices_do_not_mix),
    ]
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
