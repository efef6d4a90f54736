// SPDX-License-Identifier: GPL-2.0

//! The command `connect` of the family "rnbd".

mod refused;
pub mod request;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::events::listener::{Heard, Listener};
use crate::device::{self, SOON, USUAL_FLAGS, assert_usable, errno, largest_block, pattern};
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Netlink, Setup, attr, number, text};
use crate::proto::{CAN_MULTI_CONN, Command};
use crate::server::{Server, Transport};
use crate::sys::Buffer;
use crate::test;
use request::{
    BACKEND, CONNECT, DEAD_CONN_TIMEOUT, DESTROY_ON_DISCONNECT, DEVICE, DEVICE_GET,
    DISCONNECT_ON_CLOSE, MAXIMUM_PAYLOAD, MINIMUM_BLOCK_SIZE, NO_PARTITION_SCAN, OWNED,
    PREFERRED_BLOCK_SIZE, SIZE, TIMEOUT, connect, connect_to, flag, open, sockets_attr,
};

pub fn tests() -> Vec<Test> {
    [of_all_kinds(), refused::tests()]
        .into_iter()
        .flatten()
        .collect()
}

fn of_all_kinds() -> Vec<Test> {
    vec![
        test!(as_it_was_asked_for),
        test!(sizes_of_requests),
        test!(no_request_is_too_large),
        test!(partitions_are_not_looked_for),
        test!(a_device_ends_with_its_owner),
        test!(the_last_close_disconnects_and_removes),
    ]
}

const MIB: u64 = 1 << 20;
const KIB: u32 = 1 << 10;

/// Attributes of a device in a list.
mod listed {
    pub const BACKEND: u16 = 5;
    pub const SIZE: u16 = 6;
    pub const BLOCK_SIZE: u16 = 7;
    pub const FLAGS: u16 = 8;
    pub const CONNECTIONS: u16 = 9;
    pub const TIMEOUT: u16 = 11;
    pub const DEAD_CONN_TIMEOUT: u16 = 12;
}

/// The number in a file of nbd0's queue.
fn limit(name: &str) -> u32 {
    let text = fs::read_to_string(format!("/sys/block/nbd0/queue/{name}")).expect(name);
    text.trim().parse().expect("a number")
}

fn as_it_was_asked_for(guest: &Guest) {
    let rnbd = open(guest);
    let listener = Listener::new(guest, 0);
    let more = [
        attr(BACKEND, "an image"),
        attr(TIMEOUT, 1500_u64),
        attr(DEAD_CONN_TIMEOUT, 2500_u64),
        attr(MINIMUM_BLOCK_SIZE, 4096_u32),
    ];
    let link = connect_to(
        &rnbd,
        Server::new(),
        &[Transport::Tcp4, Transport::Unix],
        &more,
    );
    let link = link.expect("to connect");
    assert_eq!(listener.next(), Heard::Connected);
    let device = rnbd
        .list(DEVICE_GET, vec![attr(DEVICE, 0_u32)])
        .expect("a list");
    let attrs = &device[0];
    assert_eq!(text(attrs, listed::BACKEND).as_deref(), Some("an image"));
    assert_eq!(number(attrs, listed::SIZE), Some(8 * MIB));
    assert_eq!(number(attrs, listed::BLOCK_SIZE), Some(4096_u32));
    let flags = USUAL_FLAGS | CAN_MULTI_CONN;
    assert_eq!(number(attrs, listed::FLAGS), Some(flags));
    assert_eq!(number(attrs, listed::CONNECTIONS), Some(2_u32));
    assert_eq!(number(attrs, listed::TIMEOUT), Some(1500_u64));
    assert_eq!(number(attrs, listed::DEAD_CONN_TIMEOUT), Some(2500_u64));
    // It is like any device that was connected by netlink.
    let change = Setup::change(0).backend("an image").size(4 * MIB);
    assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    assert_eq!(listener.next(), Heard::Resized(4 * MIB));
    assert_eq!(link.netlink.disconnect_backend(0, b"an image"), Ok(()));
    link.wait_free();
    assert_eq!(listener.next(), Heard::Disconnected);
    assert_usable(0);
}

/// The block layer, and so file systems, learn what the server likes. The next session begins anew.
fn sizes_of_requests(guest: &Guest) {
    let rnbd = open(guest);
    let names = [
        "logical_block_size",
        "physical_block_size",
        "minimum_io_size",
        "optimal_io_size",
        "max_hw_sectors_kb",
    ];
    let usual = [512, 512, 512, 128 * KIB, 32 * KIB];
    for (minimum, preferred, payload, expected) in [
        (
            4096_u32,
            65536,
            1024 * KIB,
            [4096, 65536, 65536, 128 * KIB, 1024],
        ),
        (512, 4096, u32::MAX, [512, 4096, 4096, 128 * KIB, 32 * KIB]),
        // The payload is rounded down to blocks.
        (
            1024,
            256 * KIB,
            300_000,
            [1024, 256 * KIB, 256 * KIB, 256 * KIB, 292],
        ),
        (512, 512, 64 * KIB, [512, 512, 512, 64 * KIB, 64]),
    ] {
        let link = connect(
            &rnbd,
            &[
                attr(MINIMUM_BLOCK_SIZE, minimum),
                attr(PREFERRED_BLOCK_SIZE, preferred),
                attr(MAXIMUM_PAYLOAD, payload),
            ],
        );
        assert_eq!(
            names.map(limit),
            expected,
            "{minimum} {preferred} {payload}"
        );
        assert!(limit("read_ahead_kb") >= 2 * expected[3] / KIB);
        assert_eq!(limit("discard_granularity"), expected[1]);
        assert_eq!(discard_alignment(), 0);
        // The preference survives a change of the block size.
        if expected[0] == 4096 {
            // Not all kernels have blocks larger than a page.
            let possible = |size: &u32| u64::from(*size) <= largest_block();
            for block_size in [8192, 512].into_iter().filter(possible) {
                let change = Setup::change(0).block_size(block_size.into());
                assert_eq!(link.netlink.reconfigure(&change), Ok(()));
                let physical = ["logical_block_size", "physical_block_size"].map(limit);
                assert_eq!(physical, [block_size, 65536]);
            }
        }
        link.disconnect_and_wait();
        let link = Setup::new(MIB).index(0).attach();
        assert_eq!(names.map(limit), usual);
        link.disconnect_and_wait();
    }
    // A block must fit into a request.
    let link = connect(&rnbd, &[attr(MAXIMUM_PAYLOAD, 4096_u32)]);
    let change = Setup::change(0).block_size(8192);
    assert_eq!(link.netlink.reconfigure(&change), Err(Errno::INVAL));
    let change = Setup::change(0).block_size(4096);
    assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    assert_eq!(names.map(limit), [4096, 4096, 4096, 4096, 4]);
    link.disconnect_and_wait();
    let link = connect(&rnbd, &[]);
    assert_eq!(names.map(limit), usual);
    link.disconnect_and_wait();
}

/// Where in a device the first piece begins that can be discarded as one.
fn discard_alignment() -> u32 {
    let text = fs::read_to_string("/sys/block/nbd0/discard_alignment").expect("a limit");
    text.trim().parse().expect("a number")
}

/// Not even those that read the partition table, or read ahead.
fn no_request_is_too_large(guest: &Guest) {
    const LARGEST: u32 = 16 * KIB;
    let rnbd = open(guest);
    let link = connect(&rnbd, &[attr(MAXIMUM_PAYLOAD, LARGEST)]);
    link.server.wait_for_command(Command::Read);
    // Its answer would be an error that ends the connection, as with some servers.
    link.server.script(|conn, request| {
        let moves_data = [Command::Read, Command::Write].contains(&request.command);
        if moves_data && request.len > LARGEST {
            return conn.close();
        }
        conn.serve(request)
    });
    let data = Buffer::filled(MIB as usize, |data| pattern(1, 0, data));
    let mut back = Buffer::new(MIB as usize);
    let direct = link.direct();
    assert_eq!(errno(direct.write_all_at(&data, 0)), Ok(()));
    assert_eq!(errno(direct.read_exact_at(&mut back, 0)), Ok(()));
    assert!(*back == *data);
    let buffered = File::open("/dev/nbd0").expect("the device");
    assert_eq!(errno(buffered.read_exact_at(&mut back, 0)), Ok(()));
    assert!(*back == *data);
    let longest = link
        .server
        .requests()
        .into_iter()
        .map(|request| request.len)
        .max();
    assert_eq!(longest, Some(LARGEST));
    drop((direct, buffered));
    link.disconnect_and_wait();
}

fn partitions_are_not_looked_for(guest: &Guest) {
    let rnbd = open(guest);
    // The first session leaves its partition table to the next open.
    for wanted in [true, false, true] {
        let attrs = [flag(NO_PARTITION_SCAN)];
        let link = connect(&rnbd, if wanted { &[] } else { &attrs });
        if wanted {
            link.server.wait_for_command(Command::Read);
        } else {
            for _ in 0..3 {
                drop(File::open("/dev/nbd0").expect("the device"));
            }
            thread::sleep(Duration::from_millis(200));
            assert_eq!(link.server.requests(), []);
        }
        link.disconnect_and_wait();
    }
}

fn a_device_ends_with_its_owner(guest: &Guest) {
    let rnbd = open(guest);
    let link = connect(&rnbd, &[flag(OWNED)]);
    assert!(device::pid(0).is_some());
    drop(rnbd);
    assert!(wait_until(SOON, || device::pid(0).is_none()).is_ok());
    link.wait_free();
}

fn the_last_close_disconnects_and_removes(guest: &Guest) {
    let rnbd = open(guest);
    let link = connect(&rnbd, &[flag(DISCONNECT_ON_CLOSE)]);
    drop(link.direct());
    link.wait_free();
    let server = Server::new();
    let sockets = [server.connect(Transport::Unix)];
    let attrs = vec![
        sockets_attr(&sockets),
        attr(SIZE, MIB),
        flag(DESTROY_ON_DISCONNECT),
        attr(DEVICE, 40_u32),
    ];
    assert!(rnbd.ask(CONNECT, attrs).is_ok());
    let disk = "/sys/block/nbd40";
    assert!(fs::exists(disk).expect("sysfs"));
    assert_eq!(Netlink::open().disconnect(40), Ok(()));
    let gone = wait_until(SOON, || !fs::exists(disk).expect("sysfs"));
    assert!(gone.is_ok(), "the device was not removed");
}
