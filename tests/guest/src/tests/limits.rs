// SPDX-License-Identifier: GPL-2.0

//! /sys/block/nbdN/queue: what the block layer is told of a device.

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::device::{Plan, USUAL_FLAGS, largest_block, sysfs};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::proto::{
    Command, READ_ONLY, ROTATIONAL, Request, SEND_FAST_ZERO, SEND_FLUSH, SEND_FUA, SEND_TRIM,
    SEND_WRITE_ZEROES,
};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(before_a_connection),
        test!(follow_the_servers_flags),
        test!(fast_zeroes),
        test!(follow_the_block_size),
        test!(are_reset_after_a_connection),
        test!(timeout_is_the_block_layers_too),
    ]
}

/// What every export has.
fn assert_constants(guest: &Guest) {
    let (scheduler, nr_requests) = match guest.expected("no-scheduler-by-default") {
        Driver::Nbd => ("none [mq-deadline]", "256"),
        Driver::Rnbd => ("[none] mq-deadline", "128"),
    };
    for (name, value) in [
        ("max_hw_sectors_kb", "32768"),
        ("max_segments", "65535"),
        ("max_segment_size", "4294967295"),
        ("dma_alignment", "511"),
        ("virt_boundary_mask", "0"),
        ("chunk_sectors", "0"),
        ("discard_zeroes_data", "0"),
        ("write_same_max_bytes", "0"),
        ("max_integrity_segments", "0"),
        ("zoned", "none"),
        ("stable_writes", "0"),
        ("scheduler", scheduler),
        ("nr_requests", nr_requests),
        ("io_poll", "0"),
        ("dax", "0"),
    ] {
        let seen = sysfs(0, &format!("queue/{name}"));
        // A scheduler that is built in is offered, one that is not loaded is not.
        assert_eq!(seen.trim_end_matches(" kyber"), value, "{name}");
    }
}

fn before_a_connection(guest: &Guest) {
    assert_constants(guest);
    for (name, value) in [
        ("logical_block_size", "512"),
        ("physical_block_size", "512"),
        ("minimum_io_size", "512"),
        ("optimal_io_size", "131072"),
        ("discard_max_bytes", "0"),
        ("write_zeroes_max_bytes", "0"),
        ("write_cache", "write through"),
        ("fua", "0"),
        ("rotational", "0"),
        ("io_timeout", "30000"),
    ] {
        assert_eq!(sysfs(0, &format!("queue/{name}")), value, "{name}");
    }
    assert_eq!(sysfs(0, "removable"), "0");
    assert_eq!(sysfs(0, "ro"), "0");
    assert_eq!(sysfs(0, "range"), "32");
}

fn follow_the_servers_flags(guest: &Guest) {
    const ALL: &str = "4294966784"; // UINT_MAX, in whole sectors
    for (flags, cache, fua, rotational, trim, zeroes, read_only) in [
        (0, "write through", "0", "0", "0", "0", "0"),
        (SEND_FLUSH, "write back", "0", "0", "0", "0", "0"),
        (SEND_FLUSH | SEND_FUA, "write back", "1", "0", "0", "0", "0"),
        (SEND_FUA, "write through", "0", "0", "0", "0", "0"),
        (ROTATIONAL, "write through", "0", "1", "0", "0", "0"),
        (SEND_TRIM, "write through", "0", "0", ALL, "0", "0"),
        (SEND_WRITE_ZEROES, "write through", "0", "0", "0", ALL, "0"),
        (READ_ONLY, "write through", "0", "0", "0", "0", "1"),
        (USUAL_FLAGS, "write back", "1", "0", ALL, ALL, "0"),
    ] {
        let mut rig = Plan::new(1 << 20).flags(flags).attach();
        for (name, value) in [
            ("queue/write_cache", cache),
            ("queue/fua", fua),
            ("queue/rotational", rotational),
            ("queue/discard_max_bytes", trim),
            ("queue/discard_max_hw_bytes", trim),
            ("queue/write_zeroes_max_bytes", zeroes),
            ("ro", read_only),
        ] {
            assert_eq!(rig.sysfs(name), value, "{name} with flags {flags:#x}");
        }
        assert_constants(guest);
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

/// A program that asks for zeroes which need not be written gets them from a server that can tell.
fn fast_zeroes(guest: &Guest) {
    const WRITE_ZEROES: FallocateFlags = FallocateFlags::from_bits_retain(0x80);
    let flags = USUAL_FLAGS & !SEND_WRITE_ZEROES;
    for (flags, has_fast) in [
        (flags | SEND_WRITE_ZEROES | SEND_FAST_ZERO, true),
        (flags | SEND_WRITE_ZEROES, false),
        (flags | SEND_FAST_ZERO, false),
        (flags, false),
    ] {
        let has_fast = has_fast && guest.expected("fast-zeroes") == Driver::Rnbd;
        let mut rig = Plan::new(1 << 20).flags(flags).attach();
        let most = rig.sysfs("queue/write_zeroes_unmap_max_hw_bytes");
        assert_eq!(most != "0", has_fast, "{most} with flags {flags:#x}");
        let device = rig.direct();
        let zeroed = rustix::fs::fallocate(&device, WRITE_ZEROES, 65536, 8192);
        let requests = rig.server.requests_of(Command::WriteZeroes);
        let seen: Vec<_> = requests.iter().map(Request::essence).collect();
        if has_fast {
            assert_eq!(zeroed, Ok(()));
            // A server that cannot do it fast does it all the same.
            assert_eq!(seen, [(Command::WriteZeroes, 0, 65536, 8192)]);
        } else {
            assert_eq!(zeroed, Err(Errno::OPNOTSUPP));
            assert_eq!(seen, []);
        }
        drop(device);
        assert_eq!(rig.disconnect(), Ok(0));
        assert_eq!(rig.sysfs("queue/write_zeroes_unmap_max_hw_bytes"), "0");
    }
}

fn follow_the_block_size(_: &Guest) {
    let sizes = [512, 1024, 4096, 8192, 65536];
    for block_size in sizes.into_iter().filter(|size| *size <= largest_block()) {
        let mut rig = Plan::new(1 << 20).block_size(block_size).attach();
        for name in [
            "logical_block_size",
            "physical_block_size",
            "minimum_io_size",
            "discard_granularity",
        ] {
            assert_eq!(
                rig.sysfs(&format!("queue/{name}")),
                block_size.to_string(),
                "{name}"
            );
        }
        assert_eq!(rig.sysfs("queue/optimal_io_size"), "131072");
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

fn are_reset_after_a_connection(_: &Guest) {
    let mut rig = Plan::new(1 << 20)
        .flags(USUAL_FLAGS | ROTATIONAL)
        .block_size(4096)
        .attach();
    assert_eq!(rig.disconnect(), Ok(0));
    for (name, value) in [
        ("discard_max_bytes", "0"),
        ("discard_granularity", "0"),
        ("write_zeroes_max_bytes", "0"),
        ("write_cache", "write through"),
        ("fua", "0"),
        ("rotational", "0"),
        ("logical_block_size", "4096"),
    ] {
        assert_eq!(rig.sysfs(&format!("queue/{name}")), value, "{name}");
    }
}

fn timeout_is_the_block_layers_too(_: &Guest) {
    for (seconds, shown) in [(0, "30000"), (7, "7000")] {
        let mut rig = Plan::new(1 << 20).timeout(seconds).attach();
        assert_eq!(rig.sysfs("queue/io_timeout"), shown);
        assert_eq!(rig.disconnect(), Ok(0));
    }
}
