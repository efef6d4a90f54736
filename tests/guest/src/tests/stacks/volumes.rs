// SPDX-License-Identifier: GPL-2.0

//! Logical volumes (LVM), with thin pools.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{Disk, Image, MIB, Stack, direct, link, run};
use crate::device::{assert_pattern, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::netlink::Setup;
use crate::programs::{sh, try_sh};
use crate::sys::{Buffer, SysResult};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(a_full_server_under_a_thin_pool),
        test!(extended_after_a_resize),
    ]
}

/// Without udev, and without a look at other disks.
const CONFIG: &str = "
devices {
    use_devicesfile = 0
    obtain_device_list_from_udev = 0
    external_device_info_source = \"none\"
    filter = [ \"a|^/dev/nbd|\", \"r|.*|\" ]
}
activation {
    udev_sync = 0
    udev_rules = 0
    monitoring = 0
}
global {
    event_activation = 0
    use_lvmpolld = 0
}
backup {
    backup = 0
    archive = 0
}
";

fn configure() {
    fs::create_dir_all("/tmp/lvm").unwrap();
    fs::write("/tmp/lvm/lvm.conf", CONFIG).unwrap();
    run("modprobe dm-thin-pool");
}

/// Of the pool, and so what it provides at once.
const CHUNK: u64 = 64 << 10;

fn write(volume: &File, offset: u64, len: u64) -> SysResult<()> {
    let data = Buffer::filled(len as usize, |data| pattern(1, offset, data));
    errno(volume.write_all_at(&data, offset))
}

/// The server has promised more than it has. What the pool has provided already is sparse there: where the pool
/// itself needs space, it reports its own error.
fn a_full_server_under_a_thin_pool(guest: &Guest) {
    configure();
    let mut stack = Stack::new();
    stack.up(
        "mkdir -p /tmp/small && mount -t tmpfs -o size=64M none /tmp/small",
        "umount /tmp/small",
    );
    let images = [
        Image::new("/tmp/small/data.img", 64 * MIB),
        Image::new("/tmp/metadata.img", 16 * MIB),
    ];
    let disks = [Disk::new(0, &images[0], 0), Disk::new(1, &images[1], 0)];
    let mut pool = Stack::new();
    pool.up(
        "vgcreate -q stack /dev/nbd0 /dev/nbd1",
        "vgremove -q -f stack",
    );
    // What a pool does when its metadata cannot be written is another story.
    run("lvcreate -q -an -Zn -l 100%PVS -n pool stack /dev/nbd0
        lvcreate -q -an -Zn -L 4M -n metadata stack /dev/nbd1
        lvconvert -q -y --type thin-pool --chunksize 64k --poolmetadata stack/metadata \
            --poolmetadataspare n stack/pool
        lvcreate -q -V 16M -T stack/pool -n thin");
    let volume = direct("/dev/stack/thin");
    let size = 16 * MIB;
    for offset in (0..size).step_by(CHUNK as usize) {
        assert_eq!(write(&volume, offset, 4096), Ok(()), "at {offset}");
    }
    sh("fallocate -d /tmp/small/data.img && mount -o remount,size=8M /tmp/small");
    let mut offset = 0;
    let error = loop {
        assert!(offset < size, "the server had room for everything");
        match write(&volume, offset, CHUNK) {
            Ok(()) => offset += CHUNK,
            Err(error) => break error,
        }
    };
    assert!(offset >= MIB, "the server was full at once");
    let expected = match guest.expected("server-errors-keep-their-meaning") {
        Driver::Nbd => Errno::IO,
        Driver::Rnbd => Errno::NOSPC,
    };
    assert_eq!(error, expected);
    let status = run("dmsetup status stack-pool-tpool");
    assert!(status.contains(" rw "), "{status}");
    // Somebody makes room.
    sh("mount -o remount,size=64M /tmp/small");
    while offset < size {
        assert_eq!(write(&volume, offset, CHUNK), Ok(()), "at {offset}");
        offset += CHUNK;
    }
    for offset in (0..size).step_by(MIB as usize) {
        let mut data = Buffer::new(MIB as usize);
        volume.read_exact_at(&mut data, offset).expect("to read");
        // A pattern is one of the whole, wherever it begins.
        assert_pattern(1, offset, &data);
    }
    drop(volume);
    pool.take_down();
    drop(disks);
    drop(images);
    stack.take_down();
}

/// The device grows, and then all that is on top of it, while a file system is mounted.
fn extended_after_a_resize(_: &Guest) {
    configure();
    let link = link(64 * MIB);
    let mut stack = Stack::new();
    stack.up("vgcreate -q stack /dev/nbd0", "vgremove -q -f stack");
    run(
        "lvcreate -q -L 40M --type thin-pool --poolmetadatasize 4M --poolmetadataspare n \
            --chunksize 64k -n pool stack
        lvcreate -q -V 36M -T stack/pool -n thin
        mkfs.ext4 -q /dev/stack/thin",
    );
    stack.up(
        "mkdir -p /tmp/mnt && mount /dev/stack/thin /tmp/mnt",
        "umount /tmp/mnt",
    );
    sh("cp /usr/bin/[a-c]* /tmp/mnt/ && sync -f /tmp/mnt");
    let more =
        "dd if=/dev/urandom of=/tmp/more bs=1M count=60 status=none && cp /tmp/more /tmp/mnt/";
    assert!(try_sh(more).is_err(), "there was room");
    assert!(try_sh("lvextend -q -L 100M stack/pool").is_err());

    let grown = Setup::change(0).size(160 * MIB);
    assert_eq!(link.netlink.reconfigure(&grown), Ok(()));
    run("pvresize -q /dev/nbd0
        lvextend -q -L 120M stack/pool
        lvextend -q -L 110M stack/thin
        resize2fs /dev/stack/thin
        cp /tmp/more /tmp/mnt/
        sync -f /tmp/mnt");
    stack.down();
    run("echo 3 > /proc/sys/vm/drop_caches
        fsck.ext4 -fn /dev/stack/thin");
    stack.up("mount -o ro /dev/stack/thin /tmp/mnt", "umount /tmp/mnt");
    sh("cmp /tmp/more /tmp/mnt/more
        for file in /usr/bin/[a-c]*; do
            test -L $file || cmp $file /tmp/mnt/${file##*/}
        done
        rm /tmp/more");
    stack.take_down();
    drop(link);
}
