// SPDX-License-Identifier: GPL-2.0

//! A cache of local memory (dm-cache) in front of the device, which has what was written first.

use super::{MIB, Stack, link, run, under_writers};
use crate::device::SOON;
use crate::harness::{Guest, Test, say, wait_until};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![test!(written_back_later)]
}

const SIZE: u64 = 16 * MIB;
const CACHED: &str = "/dev/mapper/cached";

fn table(policy: &str) -> String {
    let sectors = SIZE / 512;
    format!(
        "0 {sectors} cache /dev/mapper/cache-metadata /dev/mapper/cache-blocks /dev/nbd0 128 1 \
         writeback {policy} 0"
    )
}

/// Blocks that the device does not have yet.
fn dirty() -> u64 {
    let status = run("dmsetup status cached");
    let number = status.split_whitespace().nth(13).map(str::parse);
    number
        .and_then(Result::ok)
        .unwrap_or_else(|| panic!("{status}"))
}

/// The server is away for a while when only the cache has some blocks, and when they are written back.
fn written_back_later(_: &Guest) {
    run("modprobe dm-cache && modprobe dm-cache-smq");
    let link = link(SIZE);
    let mut stack = Stack::new();
    stack.up("modprobe brd rd_nr=1 rd_size=20480", "modprobe -r brd");
    for (name, sectors, from) in [("metadata", 8192, 0), ("blocks", 32768, 8192)] {
        stack.up(
            &format!("dmsetup create cache-{name} --table '0 {sectors} linear /dev/ram0 {from}'"),
            &format!("dmsetup remove --retry cache-{name}"),
        );
    }
    stack.up(
        &format!("dmsetup create cached --table '{}'", table("smq")),
        "dmsetup remove --retry cached",
    );
    let written = under_writers(CACHED, |progress| {
        let some = wait_until(6 * SOON, || dirty() > 4);
        assert!(some.is_ok(), "{}", run("dmsetup status cached"));
        // Nothing is to be written back in the background from now on.
        run("dmsetup message cached 0 migration_threshold 0");
        for _ in 0..3 {
            progress.expect(20);
            link.kill_server();
            assert_eq!(link.revive(), Ok(()));
        }
        progress.expect(100);
    });
    written.verify(CACHED);
    let left = dirty();
    say(&format!("{left} blocks to be written back"));
    assert!(left > 0, "the cache had nothing for itself");
    run(&format!(
        "dmsetup suspend --noflush cached
        dmsetup reload cached --table '{}'",
        table("cleaner")
    ));
    link.kill_server();
    run("dmsetup resume cached");
    assert_eq!(link.revive(), Ok(()));
    let clean = wait_until(6 * SOON, || dirty() == 0);
    assert!(clean.is_ok(), "{}", run("dmsetup status cached"));
    stack.take_down();
    written.verify("/dev/nbd0");
}
