// SPDX-License-Identifier: GPL-2.0

//! What a session leaves behind for the next one on the same device.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use crate::device::{self, Plan, SOON, USUAL_FLAGS, errno};
use crate::driver::Driver;
use crate::front::{Export, FRONTS, Front, Session};
use crate::harness::{Guest, Test, wait_until};
use crate::programs::sh;
use crate::proto::{BLKROGET, BLKROSET, BLKRRPART, Command, READ_ONLY};
use crate::server::Server;
use crate::sys::{Buffer, ioctl_number, ioctl_pointer};
use crate::test;
use crate::uevents::Uevents;

pub fn tests() -> Vec<Test> {
    vec![
        test!(the_read_only_mark),
        test!(a_read_only_export_stays_read_only),
        test!(the_write_cache_setting),
        test!(the_write_cache_setting_of_an_idle_device),
        test!(settings_of_the_queue),
        test!(partitions),
        test!(partitions_without_minors).parameters("nbds_max=1 max_part=0"),
        test!(partitions_in_use),
        test!(the_sequence_number_of_the_disk),
        test!(events_come_when_all_is_set),
    ]
}

const SIZE: u64 = 8 << 20;

fn export(flags: u64) -> Export {
    Export::new(SIZE).flags(flags)
}

// --- Read-only ----------------------------------------------------------------

fn set_read_only(device: &File, on: bool) {
    ioctl_pointer(device, BLKROSET, &mut i32::from(on)).expect("BLKROSET");
}

fn is_read_only(device: &File) -> bool {
    let mut on = 0;
    ioctl_pointer(device, BLKROGET, &mut on).expect("BLKROGET");
    on != 0
}

fn write_one(device: &File) -> Result<usize, Errno> {
    errno(device.write_at(&Buffer::new(4096), 0))
}

/// Each session decides whether it is read-only, by its flags or by BLKROSET.
fn the_read_only_mark(guest: &Guest) {
    let stays = guest.expected("read-only-ends-with-the-session") == Driver::Nbd;
    for first in FRONTS {
        for next in FRONTS {
            let session = first.start(Server::new(), &export(USUAL_FLAGS));
            let device = device::open(0, libc::O_DIRECT).unwrap();
            set_read_only(&device, true);
            assert_eq!(write_one(&device), Err(Errno::PERM));
            drop(device);
            // With the session, not with the close of somebody else.
            assert_eq!(device::sysfs(0, "ro"), "1");
            session.end();
            assert_eq!(device::sysfs(0, "ro"), if stays { "1" } else { "0" });
            let session = next.start(Server::new(), &export(USUAL_FLAGS));
            let device = device::open(0, libc::O_DIRECT).unwrap();
            assert_eq!(is_read_only(&device), stays);
            assert_eq!(write_one(&device).is_err(), stays);
            set_read_only(&device, false);
            assert_eq!(write_one(&device), Ok(4096));
            drop(device);
            session.end();
        }
    }
    // Nor does the mark of a read-only export stay.
    for front in FRONTS {
        let session = front.start(Server::new(), &export(USUAL_FLAGS | READ_ONLY));
        assert_eq!(device::sysfs(0, "ro"), "1");
        session.end();
        assert_eq!(device::sysfs(0, "ro"), if stays { "1" } else { "0" });
        let session = front.start(Server::new(), &export(USUAL_FLAGS));
        assert_eq!(device::sysfs(0, "ro"), "0");
        session.end();
    }
}

/// BLKROSET (`blockdev --setrw`) takes away only what it has set.
fn a_read_only_export_stays_read_only(_: &Guest) {
    for front in FRONTS {
        let session = front.start(Server::new(), &export(USUAL_FLAGS | READ_ONLY));
        let device = device::open(0, libc::O_DIRECT).unwrap();
        set_read_only(&device, true);
        set_read_only(&device, false);
        assert!(is_read_only(&device));
        assert_eq!(write_one(&device), Err(Errno::PERM));
        drop(device);
        session.end();
    }
}

// --- Settings of the queue ----------------------------------------------------

fn set(name: &str, value: &str) {
    let path = format!("/sys/block/nbd0/queue/{name}");
    fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

fn queue(name: &str) -> String {
    device::sysfs(0, &format!("queue/{name}"))
}

/// Whether fsync reaches the server.
fn fsync_flushes(session: &Session) -> bool {
    let device = device::open(0, 0).unwrap();
    device.write_all_at(&[1; 4096], 0).unwrap();
    device.sync_all().unwrap();
    !session.server().requests_of(Command::Flush).is_empty()
}

/// A session that was told that it has no write cache does not tell the next one.
fn the_write_cache_setting(guest: &Guest) {
    let stays = guest.expected("write-cache-is-decided-anew") == Driver::Nbd;
    for first in FRONTS {
        for next in FRONTS {
            let session = first.start(Server::new(), &export(USUAL_FLAGS));
            assert_eq!(queue("write_cache"), "write back");
            set("write_cache", "write through");
            assert_eq!(queue("write_cache"), "write through");
            assert!(!fsync_flushes(&session), "it is heeded in its own session");
            session.end();
            let session = next.start(Server::new(), &export(USUAL_FLAGS));
            assert_eq!(queue("write_cache") == "write through", stays);
            assert_eq!(fsync_flushes(&session), !stays);
            set("write_cache", "write back");
            session.end();
        }
    }
}

/// Nor does one that comes late, such as from a program that was told of the last session.
fn the_write_cache_setting_of_an_idle_device(guest: &Guest) {
    let stays = guest.expected("write-cache-is-decided-anew") == Driver::Nbd;
    for front in FRONTS {
        front.start(Server::new(), &export(USUAL_FLAGS)).end();
        set("write_cache", "write through");
        let session = front.start(Server::new(), &export(USUAL_FLAGS));
        assert_eq!(fsync_flushes(&session), !stays);
        set("write_cache", "write back");
        session.end();
    }
}

/// What the guide says of each.
fn settings_of_the_queue(guest: &Guest) {
    let cache = match guest.expected("write-cache-is-decided-anew") {
        Driver::Nbd => "write through",
        Driver::Rnbd => "write back",
    };
    for front in FRONTS {
        // nbd-client's ioctls always set one.
        let stays = front == Front::Netlink
            && guest.expected("timeouts-end-with-the-connection") == Driver::Nbd;
        let timeout = if stays { "1200" } else { "30000" };
        let settings = [
            // What it is set to, and what the next session has.
            ("write_cache", "write through", cache),
            ("rotational", "1", "0"),
            ("io_timeout", "1200", timeout),
            ("read_ahead_kb", "4096", "4096"),
            ("scheduler", "none", "[none]"),
            ("nr_requests", "32", "32"),
            ("max_sectors_kb", "64", "64"),
            ("discard_max_bytes", "1048576", "1048576"),
            ("nomerges", "2", "2"),
            ("rq_affinity", "2", "2"),
            ("iostats", "0", "0"),
            ("iostats_passthrough", "1", "1"),
            ("add_random", "1", "1"),
            ("stable_writes", "1", "1"),
        ];
        let session = front.start(Server::new(), &export(USUAL_FLAGS));
        for (name, value, _) in settings {
            set(name, value);
        }
        session.end();
        let session = front.start(Server::new(), &export(USUAL_FLAGS));
        for (name, _, next) in settings {
            let now = queue(name);
            let is = now.split(' ').any(|word| word == next) || now == next;
            assert!(is, "{name} is {now}, not {next}");
        }
        set("write_cache", "write back");
        session.end();
    }
}

// --- Partitions ---------------------------------------------------------------

/// An image with a GPT of two partitions.
fn partitioned_image() -> Vec<u8> {
    let mut rig = Plan::new(SIZE).attach();
    sh("printf 'label: gpt\\n2048,2048\\n4096,4096\\n' | sfdisk --no-tell-kernel -q /dev/nbd0");
    assert_eq!(rig.disconnect(), Ok(0));
    rig.server.peek(0, SIZE as usize)
}

/// Starts a session with an image whose partitions are looked for, whatever max_part is.
fn start_with(image: &[u8], front: Front) -> Session {
    let server = Server::new();
    server.poke(0, image);
    let session = front.start(server, &export(USUAL_FLAGS));
    let device = File::open("/dev/nbd0").unwrap();
    assert_eq!(ioctl_number(device, BLKRRPART, 0), Ok(0));
    assert!(has_partition());
    session
}

fn has_partition() -> bool {
    Path::new("/sys/block/nbd0/nbd0p1").exists() || Path::new("/dev/nbd0p2").exists()
}

/// They go with the session, and not only when somebody opens the device.
fn partitions(guest: &Guest) {
    let stay = guest.expected("partitions-end-with-the-session") == Driver::Nbd;
    let image = partitioned_image();
    for front in FRONTS {
        let session = start_with(&image, front);
        let mut uevents = Uevents::listen();
        session.end();
        assert_eq!(has_partition(), stay);
        if !stay {
            uevents.expect(&["ACTION=remove", "DEVNAME=nbd0p1"]);
            uevents.expect(&["ACTION=remove", "DEVNAME=nbd0p2"]);
        }
        // Neither are they there in the next session, which has none.
        let session = front.start(Server::new(), &export(USUAL_FLAGS));
        drop(File::open("/dev/nbd0").unwrap());
        let max_part = fs::read_to_string("/sys/module/rnbd/parameters/max_part");
        if !stay || max_part.is_ok_and(|max_part| max_part.trim() != "0") {
            assert!(!has_partition());
        }
        session.end();
    }
}

fn partitions_without_minors(guest: &Guest) {
    partitions(guest);
}

/// One that is in use stays for as long.
fn partitions_in_use(guest: &Guest) {
    let stay = guest.expected("partitions-end-with-the-session") == Driver::Nbd;
    let image = partitioned_image();
    let Session::Netlink(link) = start_with(&image, Front::Netlink) else {
        unreachable!("a session by netlink");
    };
    let partition = File::open("/dev/nbd0p1").unwrap();
    link.disconnect().unwrap();
    assert!(has_partition());
    let read = partition.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(errno(read), Err(Errno::IO));
    drop(partition);
    link.wait_free();
    assert_eq!(has_partition(), stay);
}

// --- Identity -----------------------------------------------------------------

fn diskseq() -> u64 {
    device::sysfs(0, "diskseq").parse().expect("a number")
}

/// Each image has another one, by which udev tells them apart.
fn the_sequence_number_of_the_disk(guest: &Guest) {
    let netlink_keeps = guest.expected("images-have-a-diskseq") == Driver::Nbd;
    for front in FRONTS {
        let keeps = netlink_keeps && front == Front::Netlink;
        let mut last = diskseq();
        for _ in 0..3 {
            let mut uevents = Uevents::listen();
            let session = front.start(Server::new(), &export(USUAL_FLAGS));
            let now = diskseq();
            if keeps {
                assert_eq!(now, last);
            } else {
                assert!(now > last, "{last}, {now}: an image is not an idle device");
            }
            let number = format!("DISKSEQ={now}");
            uevents.expect(&["ACTION=change", "DEVNAME=nbd0", &number]);
            uevents.rest();
            session.end();
            if !keeps {
                assert!(diskseq() > now, "an idle device is not the last image");
            }
            let number = format!("DISKSEQ={}", diskseq());
            if !netlink_keeps {
                uevents.expect(&["ACTION=change", "DEVNAME=nbd0", &number]);
            }
            last = diskseq();
        }
    }
}

/// When udev hears of a change, the size and `pid` are what they are going to be.
fn events_come_when_all_is_set(guest: &Guest) {
    let is_ours = guest.expected("events-come-last") == Driver::Rnbd;
    // Those who hear it later delay the driver.
    let crowd: Vec<Uevents> = (0..400).map(|_| Uevents::listen()).collect();
    let mut uevents = Uevents::listen();
    let (stop, seen) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for event in uevents.rest() {
                    let size = device::sysfs(0, "size");
                    let pid = device::pid(0).is_some();
                    let has = |line: &str| event.lines().any(|have| have == line);
                    if has("ACTION=change") && has("DEVNAME=nbd0") {
                        seen.lock().unwrap().push((event.clone(), size, pid));
                    }
                }
            }
        });
        let watched = || {
            // With rnbd the event of a read-only mark is never the last one.
            let is_last = |event: &str| !is_ours || !event.contains("DISK_RO=");
            let come = wait_until(SOON, || seen.lock().unwrap().iter().any(|e| is_last(&e.0)));
            assert!(come.is_ok(), "no uevent");
            thread::sleep(Duration::from_millis(20));
            std::mem::take(&mut *seen.lock().unwrap())
        };
        let mut wrong = Vec::new();
        for round in 0..20 {
            let front = FRONTS[round % 2];
            let session = front.start(Server::new(), &export(USUAL_FLAGS | READ_ONLY));
            let connected = watched();
            session.end();
            let ended = watched();
            let sectors = (SIZE / 512).to_string();
            wrong.extend(connected.into_iter().filter(|e| e.1 != sectors || !e.2));
            wrong.extend(ended.into_iter().filter(|e| e.1 != "0" || e.2));
        }
        stop.store(true, Ordering::Relaxed);
        if is_ours {
            assert!(wrong.is_empty(), "{wrong:#?}");
        }
    });
    drop(crowd);
}
