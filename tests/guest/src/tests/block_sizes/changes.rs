// SPDX-License-Identifier: GPL-2.0

//! Changes of the block size of a running device.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{
    PARTITIONED, SIZE, cache_block_size, contents, end, export, forget_pages, partitioned_image,
    read, server, set_cache_block_size, use_all, use_page_cache,
};
use crate::debug_kernel::{enough, patient};
use crate::device::{self, SOON, errno, largest_block, sysfs};
use crate::driver::Driver;
use crate::front::{self, Export, FRONTS, Front, Session};
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::{Command, SET_BLKSIZE};
use crate::server::{Server, Transport};
use crate::sys::{MIB, Mapping, SysResult, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(within_the_page_cache),
        test!(while_nobody_has_it_open),
        test!(while_the_partition_table_is_read),
        test!(while_a_partition_is_open),
        test!(while_pages_are_faulted_in),
        test!(while_a_server_is_silent),
        test!(while_others_open_and_close).limit_seconds(120),
    ]
}

/// Changes the block size of a session, whose device is open.
fn change(session: &Session, device: &File, block_size: u64) -> SysResult<()> {
    match session {
        Session::Ioctl(_) => ioctl_number(device, SET_BLKSIZE, block_size).map(drop),
        Session::Netlink(link) => reconfigure(link, block_size),
    }
}

fn reconfigure(link: &Link, block_size: u64) -> SysResult<()> {
    let setup = Setup::change(0).block_size(block_size);
    link.netlink.reconfigure(&setup)
}

/// Ends the loops of other threads, also if the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A change to blocks that are larger than those of the page cache is refused, and changes nothing.
fn assert_refused(guest: &Guest, session: &Session, device: &File, block_size: u64) {
    let before = sysfs(0, "queue/logical_block_size");
    let changed = change(session, device, block_size);
    match guest.expected("large-blocks-work-in-the-page-cache") {
        Driver::Nbd => {
            assert_eq!(changed, Ok(()));
            change(session, device, before.parse().unwrap()).unwrap();
        }
        Driver::Rnbd => {
            assert_eq!(changed, Err(Errno::BUSY));
            let line = format!(
                "cannot change the block size to {block_size} while the page cache is in use"
            );
            assert!(guest.log().iter().any(|logged| logged.contains(&line)));
        }
    }
    assert_eq!(sysfs(0, "queue/logical_block_size"), before);
}

fn within_the_page_cache(guest: &Guest) {
    for front in FRONTS {
        let session = front.start(server(), &export(512));
        let device = device::open(0, 0).unwrap();
        use_page_cache(session.server(), &device).unwrap();
        for cached in [4096, 2048, largest_block()] {
            set_cache_block_size(&device, cached);
            for block_size in [1024, cached] {
                change(&session, &device, block_size).unwrap();
                assert_eq!(sysfs(0, "queue/logical_block_size"), block_size.to_string());
                use_all(&session, block_size, true);
            }
            if cached < largest_block() {
                assert_refused(guest, &session, &device, 2 * cached);
            }
            change(&session, &device, 512).unwrap();
            assert_eq!(cache_block_size(&device), cached);
        }
        end(session, device);
    }
}

/// The next open bases the page cache on the new size.
fn while_nobody_has_it_open(_: &Guest) {
    let link = front::connect(server(), &export(512)).settle();
    for block_size in [largest_block(), 512] {
        let changed = wait_until(SOON, || reconfigure(&link, block_size).is_ok());
        assert!(changed.is_ok(), "{block_size}");
        let device = device::open(0, 0).unwrap();
        assert_eq!(cache_block_size(&device), block_size.max(4096));
        use_page_cache(&link.server, &device).unwrap();
    }
}

/// The driver itself has the device open then, for as long as the server takes, which the change waits for.
fn while_the_partition_table_is_read(_: &Guest) {
    let server = Server::new();
    let reads = AtomicUsize::new(0);
    server.script(move |conn, request| {
        if reads.fetch_add(1, Ordering::Relaxed) == 1 {
            thread::sleep(Duration::from_secs(1));
        }
        conn.serve(request)
    });
    let link = front::connect(server, &export(512));
    thread::sleep(Duration::from_millis(300));
    assert_eq!(reconfigure(&link, largest_block()), Ok(()));
    assert_eq!(
        sysfs(0, "queue/logical_block_size"),
        largest_block().to_string()
    );
    link.disconnect_and_wait();
}

fn while_a_partition_is_open(guest: &Guest) {
    let image = partitioned_image("dos", 512);
    for front in FRONTS {
        let server = Server::new();
        server.poke(0, &image);
        let session = front.start(server, &Export::new(PARTITIONED));
        let device = File::open("/dev/nbd0").unwrap();
        let partition = File::open("/dev/nbd0p1").unwrap();
        set_cache_block_size(&partition, 2048);
        assert_refused(guest, &session, &device, 4096);
        change(&session, &device, 2048).unwrap();
        assert!(read(&partition, 10_001, 5).unwrap() == image[(1 << 20) + 10_001..][..5]);
        drop(partition);
        end(session, device);
    }
}

/// A page fault chooses the size of the pages before it takes a lock.
fn while_pages_are_faulted_in(guest: &Guest) {
    if guest.expected("large-blocks-work-in-the-page-cache") == Driver::Nbd {
        return;
    }
    let session = Front::Ioctl.start(server(), &export(512));
    let device = device::open(0, 0).unwrap();
    set_cache_block_size(&device, 512);
    let stop = AtomicBool::new(false);
    let fault = || {
        while !stop.load(Ordering::Relaxed) {
            let mapping = Mapping::new(&device, MIB);
            for at in (0..MIB).step_by(65536) {
                mapping.read(at, 1);
            }
        }
    };
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(fault);
        scope.spawn(fault);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            forget_pages(&device);
            let changed = change(&session, &device, largest_block());
            assert_eq!(changed, Err(Errno::BUSY));
        }
    });
    end(session, device);
}

/// Nobody waits for the server.
fn while_a_server_is_silent(guest: &Guest) {
    if guest.expected("changes-do-not-hang") == Driver::Nbd {
        return;
    }
    for front in FRONTS {
        let session = front.start(server(), &export(512));
        let device = device::open(0, 0).unwrap();
        session.server().script(|_, _| Ok(()));
        thread::scope(|scope| {
            let reader = scope.spawn(|| errno(read(&device, SIZE as usize - 5, 5)));
            session.server().wait_for_command(Command::Read);
            let begin = Instant::now();
            assert_eq!(change(&session, &device, 1024), Err(Errno::BUSY));
            assert!(begin.elapsed() < patient(Duration::from_secs(8)));
            assert_eq!(sysfs(0, "queue/logical_block_size"), "512");
            session.server().kill();
            assert_eq!(reader.join().unwrap(), Err(Errno::IO));
        });
        drop(device);
    }
}

/// Programs that come and go have no effect on a session's blocks.
fn while_others_open_and_close(guest: &Guest) {
    if guest.expected("large-blocks-work-in-the-page-cache") == Driver::Nbd {
        return;
    }
    let stop = AtomicBool::new(false);
    let come_and_go = || {
        while !stop.load(Ordering::Relaxed) {
            if let Ok(device) = File::open("/dev/nbd0") {
                // Between sessions there is nothing to be read.
                let _ = device.read_at(&mut [0; 5], 1001);
            }
        }
    };
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(come_and_go);
        scope.spawn(come_and_go);
        for round in 0..enough(60, 12) {
            let block_size = [512, largest_block(), 4096][round / 2 % 3];
            let session = start(FRONTS[round % 2], block_size);
            let device = File::open("/dev/nbd0").unwrap();
            assert!(cache_block_size(&device) >= block_size, "round {round}");
            for offset in [5, 100_001] {
                assert!(read(&device, offset, 100).unwrap() == contents(1, offset, 100));
            }
            for other in [4096, largest_block(), 512] {
                match change(&session, &device, other) {
                    Ok(()) => assert!(read(&device, 200_001, 9).is_ok(), "round {round}"),
                    Err(error) => assert_eq!(error, Errno::BUSY),
                }
            }
            drop(device);
            match session {
                Session::Ioctl(mut rig) => drop(rig.disconnect()),
                Session::Netlink(link) => link.disconnect().unwrap(),
            }
        }
    });
}

/// Starts a session as soon as the programs of the last one have closed the device.
fn start(front: Front, block_size: u64) -> Session {
    let server = server();
    if front == Front::Ioctl {
        let free = wait_until(SOON, || device::pid(0).is_none());
        assert!(free.is_ok());
        return front.start(server, &export(block_size));
    }
    let netlink = Netlink::open();
    let setup = Setup::new(SIZE).index(0).block_size(block_size);
    loop {
        let socket = server.connect(Transport::Unix);
        match netlink.connect(&setup.clone().sockets([socket])) {
            Ok(index) => {
                return Session::Netlink(Link {
                    server,
                    netlink,
                    index,
                });
            }
            Err(error) => assert_eq!(error, Errno::BUSY),
        }
    }
}
