// SPDX-License-Identifier: GPL-2.0

//! Requests and replies, while allocations fail.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use super::of_driver;
use crate::device::{Plan, SOON, USUAL_FLAGS, assert_pattern, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, say, seed, wait_until};
use crate::injection::sweep;
use crate::netlink::{Netlink, Setup};
use crate::proto::CAN_MULTI_CONN;
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;
use crate::tests::faults::{Load, MIB};

pub fn tests() -> Vec<Test> {
    vec![
        test!(of_reads_and_writes),
        test!(of_workers_over_tcp),
        test!(of_workers_over_unix_sockets),
    ]
}

fn of_reads_and_writes(guest: &Guest) {
    let _allocations = of_driver(guest);
    let transports = match guest.expected("short-of-memory-is-not-broken") {
        Driver::Nbd => [Transport::Tcp4, Transport::Tcp6],
        Driver::Rnbd => [Transport::Tcp4, Transport::Unix],
    };
    for transport in transports {
        let mut rig = Plan::new(MIB).transport(transport).attach();
        // Then it is the task that makes a request that sends it.
        fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
        let direct = rig.direct();
        let written = Buffer::filled(64 << 10, |data| pattern(19, 4096, data));
        let swept = sweep(&format!("a write over {transport:?}"), |nth| {
            assert_eq!(
                nth.fail(|| errno(direct.write_all_at(&written, 4096))),
                Ok(())
            );
            assert_pattern(19, 4096, &rig.server.peek(4096, written.len()));
        });
        assert!(swept.failed > 0, "it was not the task that sent");
        let mut read = Buffer::new(written.len());
        // To ask for data may take no allocation.
        sweep(&format!("a read over {transport:?}"), |nth| {
            assert_eq!(
                nth.fail(|| errno(direct.read_exact_at(&mut read, 4096))),
                Ok(())
            );
            assert_pattern(19, 4096, &read);
        });
        drop(direct);
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

/// One in twenty of all allocations under the driver fail, whoever it works for, while data moves.
fn of_workers(guest: &Guest, transport: Transport) {
    let allocations = of_driver(guest);
    let setup = Setup::new(Load::BYTES).index(0).timeout(20);
    let link = setup
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .attach_over(&[transport; 2])
        .settle();
    let news = Netlink::listen();
    let mut load = Load::new(0, seed());
    let (failed, tally) = load.run(false, |tally| {
        thread::sleep(Duration::from_millis(300));
        allocations.fail(5);
        let enough = wait_until(3 * SOON, || tally.done() + tally.failed() > 500);
        let failed = allocations.stop();
        assert!(enough.is_ok(), "it has come to a halt: {tally:?}");
        failed
    });
    let lost = std::iter::from_fn(|| news.dead_link()).count();
    say(&format!(
        "{failed} allocations failed, {lost} connections were lost; {tally:?}"
    ));
    assert!(failed > 20);
    match guest.expected("short-of-memory-is-not-broken") {
        Driver::Nbd => {}
        Driver::Rnbd => {
            assert_eq!((lost, tally.failed()), (0, 0));
            load.verify();
        }
    }
    let stored = link.server.peek(0, Load::BYTES as usize);
    let copy = fs::File::from(memory(&stored));
    load.verify_in(&copy);
}

/// A file that only this process has.
fn memory(contents: &[u8]) -> std::os::fd::OwnedFd {
    use rustix::fs::{MemfdFlags, memfd_create};
    let file = memfd_create("stored", MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(file);
    file.write_all_at(contents, 0).expect("to write");
    file.into()
}

fn of_workers_over_tcp(guest: &Guest) {
    of_workers(guest, Transport::Tcp4);
}

fn of_workers_over_unix_sockets(guest: &Guest) {
    of_workers(guest, Transport::Unix);
}
