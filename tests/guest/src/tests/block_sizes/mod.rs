// SPDX-License-Identifier: GPL-2.0

//! Every block size: I/O through the page cache, direct and mapped; partitions; the next session.

mod changes;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::device::{self, Plan, SOON, assert_pattern, errno, largest_block, pattern, sysfs};
use crate::driver::Driver;
use crate::front::{Export, FRONTS, Front, Session};
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::Setup;
use crate::programs::sh;
use crate::proto::{BLKRRPART, Command, Request, SET_SIZE};
use crate::server::Server;
use crate::sys::{Buffer, MIB, Mapping, ioctl_number, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        test!(read_and_write),
        test!(partitions),
        test!(the_next_session),
        test!(the_next_session_of_a_device_that_stays_open),
        test!(a_block_size_that_a_program_has_set),
        test!(limits_of_the_last_session),
        test!(a_small_limit_of_the_last_session),
        test!(a_size_that_is_no_whole_block),
        test!(file_systems),
    ];
    tests.extend(changes::tests());
    tests
}

const SIZE: u64 = 2 << 20;
/// That of a device with partitions.
const PARTITIONED: u64 = 8 << 20;

const BLKFLSBUF: u32 = 0x1261;
const BLKBSZGET: u32 = 0x8008_1270;
const BLKBSZSET: u32 = 0x4008_1271;

fn block_sizes() -> impl Iterator<Item = u64> + Clone {
    let sizes = [512, 4096, 16384, 65536];
    sizes.into_iter().filter(|size| *size <= largest_block())
}

fn export(block_size: u64) -> Export {
    Export::new(SIZE).block_size(block_size)
}

/// A server whose contents are known.
fn server() -> Server {
    let server = Server::new();
    server.poke(0, &contents(1, 0, SIZE as usize));
    server
}

/// `len` bytes of what `seed` says belongs to `offset`, which may be odd.
fn contents(seed: u64, offset: usize, len: usize) -> Vec<u8> {
    let start = offset & !7;
    let mut data = vec![0; (offset - start + len).next_multiple_of(8)];
    pattern(seed, start as u64, &mut data);
    data[offset - start..][..len].to_vec()
}

/// The size of the blocks in the page cache.
fn cache_block_size(device: &File) -> u64 {
    let mut size = 0;
    ioctl_pointer(device, BLKBSZGET, &mut size).expect("BLKBSZGET");
    size
}

fn set_cache_block_size(device: &File, size: u64) {
    let mut size = size;
    ioctl_pointer(device, BLKBSZSET, &mut size).expect("BLKBSZSET");
}

/// Has the next read ask the server.
fn forget_pages(device: &File) {
    assert_eq!(ioctl_number(device, BLKFLSBUF, 0), Ok(0));
}

fn read(device: &File, offset: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    device.read_exact_at(&mut data, offset as u64)?;
    Ok(data)
}

/// Reads and writes through the page cache, at offsets that are no multiples of anything.
fn use_page_cache(server: &Server, device: &File) -> io::Result<()> {
    for (offset, len) in [(0, 1), (70_001, 130_003), (SIZE as usize - 5, 5)] {
        assert!(read(device, offset, len)? == contents(1, offset, len));
    }
    for (offset, len) in [(1, 3), (300_007, 200_009), (SIZE as usize - 700, 700)] {
        device.write_all_at(&contents(2, offset, len), offset as u64)?;
    }
    device.sync_all()?;
    let mut expected = contents(1, 0, SIZE as usize);
    for (offset, len) in [(1, 3), (300_007, 200_009), (SIZE as usize - 700, 700)] {
        expected[offset..][..len].copy_from_slice(&contents(2, offset, len));
    }
    assert!(server.peek(0, SIZE as usize) == expected);
    forget_pages(device);
    assert!(read(device, 0, SIZE as usize)? == expected);
    // As it was.
    device.write_all_at(&contents(1, 0, SIZE as usize), 0)?;
    device.sync_all()
}

fn use_directly(server: &Server, block_size: u64) {
    let device = device::open(0, libc::O_DIRECT).unwrap();
    let len = block_size as usize;
    for offset in [0, 3 * block_size, SIZE - block_size] {
        let mut data = Buffer::new(len);
        device.read_exact_at(&mut data, offset).unwrap();
        assert_pattern(1, offset, &data);
        pattern(3, offset, &mut data);
        device.write_all_at(&data, offset).unwrap();
        assert!(server.peek(offset, len) == *data);
        pattern(1, offset, &mut data);
        device.write_all_at(&data, offset).unwrap();
    }
    let half = device.read_exact_at(&mut Buffer::new(len), block_size / 2);
    assert_eq!(errno(half), Err(Errno::INVAL));
}

fn use_mapping(server: &Server, device: &File) {
    let (len, offset) = (MIB, 500_003);
    let mut mapping = Mapping::new(device, len);
    assert!(mapping.read(offset, 100) == contents(1, offset, 100));
    mapping.write(offset, &contents(4, offset, 70_001));
    mapping.sync().unwrap();
    let mut expected = contents(1, 0, len);
    expected[offset..][..70_001].copy_from_slice(&contents(4, offset, 70_001));
    assert!(server.peek(0, len) == expected);
    mapping.write(offset, &contents(1, offset, 70_001));
    mapping.sync().unwrap();
}

/// Whether the page cache works, which with nbd.ko is so only for pages.
fn works(guest: &Guest, front: Front, block_size: u64) -> bool {
    let all = guest.expected("large-blocks-work-in-the-page-cache") == Driver::Rnbd;
    all || front == Front::Netlink || block_size <= 4096
}

/// Everything that can be done with a block device.
fn use_all(session: &Session, block_size: u64, works: bool) {
    let device = device::open(0, 0).unwrap();
    session.server().forget_requests();
    let cached = errno(use_page_cache(session.server(), &device));
    if !works {
        assert_eq!(cached, Err(Errno::IO), "{block_size}");
        return;
    }
    assert_eq!(cached, Ok(()), "{block_size}");
    use_mapping(session.server(), &device);
    forget_pages(&device);
    use_directly(session.server(), block_size);
    let whole = |request: &Request| {
        let moves = matches!(request.command, Command::Read | Command::Write);
        !moves || (request.offset | u64::from(request.len)) % block_size == 0
    };
    assert!(session.server().requests().iter().all(whole));
}

fn read_and_write(guest: &Guest) {
    for front in FRONTS {
        for block_size in block_sizes() {
            let session = front.start(server(), &export(block_size));
            use_all(&session, block_size, works(guest, front, block_size));
            session.end();
        }
    }
}

/// An image with two partitions, made by a device with such blocks.
fn partitioned_image(label: &str, block_size: u64) -> Vec<u8> {
    let export = Export::new(PARTITIONED).block_size(block_size);
    let session = Front::Netlink.start(server(), &export);
    sh(&format!(
        "printf 'label: {label}\\nstart=1MiB,size=1MiB\\nstart=4MiB,size=3MiB\\n' |
         sfdisk --no-tell-kernel -q --wipe never /dev/nbd0"
    ));
    let image = session.server().peek(0, PARTITIONED as usize);
    session.end();
    image
}

fn partitions(guest: &Guest) {
    for label in ["gpt", "dos"] {
        for block_size in block_sizes() {
            let image = partitioned_image(label, block_size);
            for front in FRONTS {
                let server = Server::new();
                server.poke(0, &image);
                let export = Export::new(PARTITIONED).block_size(block_size);
                let session = front.start(server, &export);
                let found = wait_until(SOON, || fs::exists("/dev/nbd0p2").unwrap());
                if !works(guest, front, block_size) {
                    session.end();
                    continue;
                }
                assert!(found.is_ok(), "{label}, {front:?}, {block_size}");
                assert_eq!(sysfs(0, "nbd0p1/start"), "2048");
                assert_eq!(sysfs(0, "nbd0p2/size"), "6144");
                let partition = File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/nbd0p2")
                    .unwrap();
                let (start, offset, len) = (4 << 20, 10_001, 100_003);
                assert!(read(&partition, offset, len).unwrap() == image[start + offset..][..len]);
                let data = contents(5, offset, len);
                partition.write_all_at(&data, offset as u64).unwrap();
                partition.sync_all().unwrap();
                let stored = session.server().peek((start + offset) as u64, len);
                assert!(stored == data);
                drop(partition);
                session.end();
            }
        }
    }
}

/// A session is followed by one with larger or smaller blocks.
fn the_next_session(guest: &Guest) {
    for block_size in block_sizes() {
        for next in block_sizes().filter(|next| *next != block_size) {
            for front in FRONTS {
                // With blocks of the page cache of its own.
                Front::Ioctl.start(server(), &export(block_size)).end();
                let session = front.start(server(), &export(next));
                assert_eq!(sysfs(0, "queue/logical_block_size"), next.to_string());
                let larger = block_size >= next;
                use_all(&session, next, larger || works(guest, front, next));
                session.end();
            }
        }
    }
}

/// A program opens the device before the session with other blocks, and keeps it open.
fn the_next_session_of_a_device_that_stays_open(guest: &Guest) {
    let connects = guest.expected("connect-takes-an-open-device") == Driver::Rnbd;
    for block_size in block_sizes() {
        for next in block_sizes().filter(|next| *next != block_size) {
            for front in FRONTS {
                if front == Front::Netlink && !connects {
                    continue;
                }
                Front::Ioctl.start(server(), &export(block_size)).end();
                let device = device::open(0, 0).unwrap();
                let session = front.start(server(), &export(next));
                if works(guest, Front::Ioctl, next.max(block_size)) {
                    assert_eq!(cache_block_size(&device), next.max(4096));
                }
                if works(guest, Front::Ioctl, next) {
                    use_page_cache(session.server(), &device).unwrap();
                    use_mapping(session.server(), &device);
                    assert_eq!(ioctl_number(&device, BLKRRPART, 0), Ok(0));
                }
                end(session, device);
            }
        }
    }
}

/// Ends a session of a device that the caller has open.
fn end(session: Session, device: File) {
    match session {
        Session::Ioctl(mut rig) => {
            assert_eq!(rig.disconnect(), Ok(0));
            drop(device);
        }
        Session::Netlink(link) => {
            link.disconnect().unwrap();
            drop(device);
            link.wait_free();
        }
    }
}

/// BLKBSZSET is left alone, unless it is too small.
fn a_block_size_that_a_program_has_set(guest: &Guest) {
    for (set, block_size, then) in [
        (512, 512, 512),
        (1024, 512, 1024),
        (1024, 4096, 4096),
        (8192, 512, 8192),
        (8192, 65536, 65536),
    ] {
        let sizes = [set, block_size, then];
        if sizes.into_iter().any(|size| size > largest_block()) {
            continue;
        }
        Front::Ioctl.start(server(), &export(512)).end();
        let device = device::open(0, 0).unwrap();
        set_cache_block_size(&device, set);
        let session = Front::Ioctl.start(server(), &export(block_size));
        let is = cache_block_size(&device);
        match guest.expected("large-blocks-work-in-the-page-cache") {
            Driver::Rnbd => assert_eq!(is, then, "{set}, {block_size}"),
            Driver::Nbd => assert_eq!(is, set),
        }
        if is >= block_size {
            use_page_cache(session.server(), &device).unwrap();
        }
        end(session, device);
    }
}

/// What the block layer tells file systems and partitioning programs follows each session's blocks.
fn limits_of_the_last_session(guest: &Guest) {
    let stay = guest.expected("limits-follow-the-block-size") == Driver::Nbd;
    for front in FRONTS {
        front.start(server(), &export(largest_block())).end();
        let session = front.start(server(), &export(512));
        for name in ["minimum_io_size", "discard_granularity"] {
            let stays = stay && name == "minimum_io_size";
            let size = if stays { largest_block() } else { 512 };
            assert_eq!(sysfs(0, &format!("queue/{name}")), size.to_string());
        }
        session.end();
    }
}

/// An administrator's limit that is less than a block of the next session.
fn a_small_limit_of_the_last_session(guest: &Guest) {
    let path = "/sys/block/nbd0/queue/max_sectors_kb";
    if largest_block() == 4096 {
        return;
    }
    for front in FRONTS {
        let session = front.start(server(), &export(512));
        fs::write(path, "4").unwrap();
        let device = device::open(0, 0).unwrap();
        use_page_cache(session.server(), &device).unwrap();
        drop(device);
        session.end();
        let session = front.start(server(), &export(65536));
        match guest.expected("limits-follow-the-block-size") {
            Driver::Nbd => {
                assert_eq!(sysfs(0, "queue/max_sectors_kb"), "0");
                let device = device::open(0, libc::O_DIRECT).unwrap();
                let read = device.read_exact_at(&mut Buffer::new(65536), 0);
                assert_eq!(errno(read), Err(Errno::INVAL));
            }
            Driver::Rnbd => {
                assert_eq!(sysfs(0, "queue/max_sectors_kb"), "64");
                use_all(&session, 65536, works(guest, front, 65536));
            }
        }
        fs::write(path, "1280").unwrap();
        session.end();
    }
}

/// The blocks before the end can be used.
fn a_size_that_is_no_whole_block(guest: &Guest) {
    for front in FRONTS {
        for block_size in block_sizes().filter(|size| *size > 512) {
            if !works(guest, front, block_size) {
                continue;
            }
            let whole = 16 * block_size;
            let link;
            let rig;
            let server = match front {
                Front::Ioctl => {
                    rig = Plan::new(whole).block_size(block_size).attach();
                    let size = ioctl_number(rig.open(), SET_SIZE, whole + 512);
                    assert_eq!(size, Ok(0));
                    &rig.server
                }
                Front::Netlink => {
                    link = Setup::new(whole + 512)
                        .index(0)
                        .block_size(block_size)
                        .attach()
                        .settle();
                    &link.server
                }
            };
            assert_eq!(sysfs(0, "size"), (whole / 512 + 1).to_string());
            let device = device::open(0, 0).unwrap();
            device
                .write_all_at(&contents(2, 0, whole as usize), 0)
                .unwrap();
            device.sync_all().unwrap();
            assert!(server.peek(0, whole as usize) == contents(2, 0, whole as usize));
            forget_pages(&device);
            assert!(read(&device, 0, whole as usize).unwrap() == contents(2, 0, whole as usize));
            // What is left is less than the device can read.
            assert_eq!(errno(read(&device, whole as usize, 512)), Err(Errno::IO));
        }
    }
}

/// Those that can have such blocks. btrfs cannot, nor can XFS have more than 32 KiB.
fn file_systems(guest: &Guest) {
    if largest_block() == 4096 {
        return;
    }
    for (make, check, block_size, size) in [
        ("mkfs.ext4 -q -F -b 16384", "fsck.ext4 -fn", 16384, 64 << 20),
        ("mkfs.ext4 -q -F -b 65536", "fsck.ext4 -fn", 65536, 64 << 20),
        (
            "mkfs.xfs -q -b size=16384",
            "xfs_repair -n",
            16384,
            512 << 20,
        ),
    ] {
        for front in FRONTS {
            if !works(guest, front, block_size) {
                continue;
            }
            let export = Export::new(size).block_size(block_size);
            let session = front.start(Server::new(), &export);
            sh(&format!(
                "{make} /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt"
            ));
            fs::write("/tmp/mnt/file", contents(1, 0, 5 * MIB)).unwrap();
            sh("umount /tmp/mnt && mount /dev/nbd0 /tmp/mnt");
            assert!(fs::read("/tmp/mnt/file").unwrap() == contents(1, 0, 5 * MIB));
            sh(&format!("umount /tmp/mnt && {check} /dev/nbd0"));
            session.end();
        }
    }
}
