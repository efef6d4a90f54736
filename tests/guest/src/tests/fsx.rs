// SPDX-License-Identifier: GPL-2.0

//! fsx, the file system exerciser: what it reads is what it last wrote, to a file or to the device
//! itself, while connections are lost and replaced and the page cache forgets.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::journals::{BTRFS, EXT4, Kind, XFS};
use crate::debug_kernel::enough;
use crate::device::{Plan, USUAL_FLAGS, largest_block};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, say, seed};
use crate::netlink::{Link, Netlink, Setup};
use crate::programs::sh;
use crate::proto::CAN_MULTI_CONN;
use crate::server::Transport;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(on_the_device),
        test!(on_a_device_with_large_blocks),
        test!(on_ext4),
        test!(on_xfs),
        test!(on_btrfs),
    ]
}

const FILE: &str = "
flen = 2097152
[opsize]
max = 32768
[weights]
read = 10
write = 10
mapread = 10
mapwrite = 10
truncate = 5
punch_hole = 3
copy_file_range = 3
sendfile = 3
close_open = 1
invalidate = 1
fsync = 1
fdatasync = 1
posix_fallocate = 1
posix_fadvise = 5
";

/// A device has one size, and makes holes of whole blocks.
const DEVICE: &str = "
blockmode = true
flen = 4194304
[opsize]
max = 32768
align = ALIGN
[weights]
read = 10
write = 10
mapread = 10
mapwrite = 10
truncate = 0
punch_hole = 5
sendfile = 3
invalidate = 1
fsync = 1
fdatasync = 1
posix_fadvise = 5
";

/// After how many seconds a request goes elsewhere, and how often a connection is lost. nbd.ko has
/// the requests of a lost connection wait for their timeout.
fn pace(guest: &Guest) -> (u64, Duration) {
    match guest.expected("failover-is-immediate") {
        Driver::Nbd => (2, Duration::from_secs(5)),
        Driver::Rnbd => (20, Duration::from_millis(200)),
    }
}

/// A new device, with two connections.
fn attach(guest: &Guest, size: u64) -> Link {
    Setup::new(size)
        .index(0)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .timeout(pace(guest).0)
        .dead_timeout(60)
        .attach_over(&[Transport::Unix, Transport::Tcp4])
        .settle()
}

/// Ends connections until it is done, the oldest first, and puts new ones in their places.
fn lose_connections(link: &Link, pause: Duration, done: &AtomicBool) -> usize {
    let news = Netlink::listen();
    let mut lost = 0;
    while !done.load(Ordering::Relaxed) {
        thread::sleep(pause);
        link.server.kill_connection(lost);
        lost += 1;
        assert_eq!(news.expect_dead_link(), link.index);
        assert_eq!(link.revive(), Ok(()));
        // So that what is read comes from the server.
        fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    }
    lost
}

fn exercise(guest: &Guest, link: &Link, file: &str, config: &str) {
    let (seed, operations) = (seed(), enough(1000, 300));
    fs::write("/tmp/fsx.toml", config).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _until_done = Until(&done);
            sh(&format!(
                "/rnbd/fsx -q -f /tmp/fsx.toml -P /tmp -S {seed} -N {operations} {file}"
            ));
        });
        let lost = lose_connections(link, pace(guest).1, &done);
        say(&format!("{operations} operations, {lost} connections lost"));
    });
}

fn on_the_device(guest: &Guest) {
    let link = attach(guest, 4 << 20);
    exercise(guest, &link, "/dev/nbd0", &DEVICE.replace("ALIGN", "512"));
}

/// By ioctl: the page cache was there before the block size was set.
fn on_a_device_with_large_blocks(guest: &Guest) {
    if guest.expected("large-blocks-work-in-the-page-cache") == Driver::Nbd {
        return;
    }
    let block_size = largest_block();
    let mut rig = Plan::new(4 << 20).block_size(block_size).attach();
    let config = DEVICE.replace("ALIGN", &block_size.to_string());
    let config = config.replace("max = 32768", "max = 262144");
    fs::write("/tmp/fsx.toml", config).unwrap();
    let (seed, operations) = (seed(), enough(1000, 300));
    sh(&format!(
        "/rnbd/fsx -q -f /tmp/fsx.toml -P /tmp -S {seed} -N {operations} /dev/nbd0"
    ));
    assert_eq!(rig.disconnect(), Ok(0));
}

fn on_file_system(guest: &Guest, kind: Kind) {
    let link = attach(guest, kind.size);
    let make = kind.make;
    sh(&format!(
        "{make} /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt"
    ));
    let mounted = Mounted;
    exercise(guest, &link, "/tmp/mnt/file", FILE);
    drop(mounted);
    sh(&format!("{} /dev/nbd0", kind.check));
}

struct Mounted;

impl Drop for Mounted {
    fn drop(&mut self) {
        sh("umount /tmp/mnt");
    }
}

fn on_ext4(guest: &Guest) {
    on_file_system(guest, EXT4);
}

fn on_xfs(guest: &Guest) {
    on_file_system(guest, XFS);
}

fn on_btrfs(guest: &Guest) {
    on_file_system(guest, BTRFS);
}
