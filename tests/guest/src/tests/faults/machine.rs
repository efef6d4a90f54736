// SPDX-License-Identifier: GPL-2.0

//! A machine that is short of memory, loses processors, or stands still for a while.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::user_space::{Client, fio, serve};
use super::{Load, MIB};
use crate::device::{self, SOON};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, say, seed, skip, wait_until};
use crate::negotiate::dial;
use crate::netlink::{Netlink, Setup};
use crate::programs::{Daemon, sh, try_sh};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(processors_go_and_come_back).limit_seconds(160),
        test!(processors_go_and_come_back_with_4_connections).limit_seconds(160),
        test!(dirty_file_system_in_little_memory).limit_seconds(300),
        test!(server_is_frozen),
        test!(submitters_are_frozen),
        test!(client_is_frozen),
        test!(user_space_is_frozen),
    ]
}

const SOCKET: &str = "/tmp/machine.sock";
const STORAGE: &str = "/tmp/storage.img";

/// nbdkit on a UNIX socket, with a file that stays.
fn nbdkit() -> Daemon {
    let _ = fs::remove_file(SOCKET);
    serve(&format!("nbdkit -f -U {SOCKET} file {STORAGE}"), SOCKET)
}

fn make_storage(bytes: u64) {
    File::create(STORAGE).unwrap().set_len(bytes).unwrap();
}

/// A second processor that can be taken away.
struct Processor;

impl Processor {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";

    fn second() -> Self {
        if !Path::new(Self::ONLINE).exists() {
            skip("this machine has no processor that can be taken away");
        }
        Self
    }

    fn online(&self, yes: bool) {
        fs::write(Self::ONLINE, if yes { "1" } else { "0" }).expect(Self::ONLINE);
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let _ = fs::write(Self::ONLINE, "1");
    }
}

fn lose_processors(connections: u32) {
    let processor = Processor::second();
    let _server = serve("nbdkit -f -p 10809 -i 127.0.0.1 memory 64M", "10809");
    let client = Client::connect(&format!("-C {connections} 127.0.0.1 10809"));
    let done = AtomicBool::new(false);
    let runs: u32 = thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut runs = 0;
            while !done.load(Ordering::Relaxed) {
                fio("--rw=randrw --bsrange=4k-64k --size=4M --ioengine=libaio --iodepth=16");
                runs += 1;
            }
            runs
        });
        let until_done = Until(&done);
        for _ in 0..6 {
            thread::sleep(Duration::from_millis(400));
            processor.online(false);
            thread::sleep(Duration::from_millis(400));
            processor.online(true);
        }
        drop(until_done);
        load.join().expect("fio")
    });
    say(&format!(
        "{runs} runs of fio while the processor went 6 times"
    ));
    // A session that is made with one processor, and used with two; and the other way round.
    client.disconnect();
    processor.online(false);
    let client = Client::connect(&format!("-C {connections} 127.0.0.1 10809"));
    fio("--rw=randwrite --bs=4k --size=2M --ioengine=libaio --iodepth=8");
    processor.online(true);
    fio("--rw=randwrite --bs=4k --size=2M --ioengine=libaio --iodepth=8");
    client.disconnect();
}

fn processors_go_and_come_back(_: &Guest) {
    lose_processors(1);
}

fn processors_go_and_come_back_with_4_connections(_: &Guest) {
    lose_processors(4);
}

/// A control group, with this kernel's second version of them.
struct Group(&'static str);

const GROUPS: &str = "/tmp/cgroup";

impl Group {
    fn new(name: &'static str) -> Self {
        if !Path::new("/proc/self/cgroup").exists() {
            skip("this kernel has no control groups");
        }
        sh(&format!(
            "mkdir -p {GROUPS} && mount -t cgroup2 none {GROUPS}
            echo +memory > {GROUPS}/cgroup.subtree_control
            mkdir {GROUPS}/{name}"
        ));
        Self(name)
    }

    fn set(&self, knob: &str, value: &str) {
        fs::write(format!("{GROUPS}/{}/{knob}", self.0), value).expect(knob);
    }

    fn get(&self, knob: &str) -> String {
        fs::read_to_string(format!("{GROUPS}/{}/{knob}", self.0)).expect(knob)
    }

    fn add(&self, process: u32) {
        self.set("cgroup.procs", &process.to_string());
    }

    /// Waits until all of them stand still.
    fn freeze(&self) {
        self.set("cgroup.freeze", "1");
        let frozen = wait_until(SOON, || self.get("cgroup.events").contains("frozen 1"));
        assert!(frozen.is_ok(), "{}", self.get("cgroup.events"));
    }

    fn thaw(&self) {
        self.set("cgroup.freeze", "0");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.thaw();
        // Whoever is left goes to the root.
        let _ = try_sh(&format!(
            "for task in $(cat {GROUPS}/{0}/cgroup.procs); do
                echo $task > {GROUPS}/cgroup.procs || true
            done
            rmdir {GROUPS}/{0}; umount {GROUPS}",
            self.0
        ));
    }
}

/// Device 0, connected by netlink to nbdkit.
struct Attached {
    netlink: Netlink,
}

impl Attached {
    fn new(timeout: u64) -> Self {
        let export = dial(SOCKET).expect("nbdkit");
        let setup = Setup::new(export.size)
            .index(0)
            .flags(export.flags)
            .timeout(timeout)
            .dead_timeout(60)
            .sockets([export.socket]);
        let netlink = Netlink::open();
        assert_eq!(netlink.connect(&setup), Ok(0));
        Self { netlink }
    }

    fn reconnect(&self) {
        let export = dial(SOCKET).expect("nbdkit");
        let setup = Setup::change(0).sockets([export.socket]);
        assert_eq!(self.netlink.reconfigure(&setup), Ok(()));
    }

    fn disconnect(self) {
        assert_eq!(self.netlink.disconnect(0), Ok(()));
        let gone = wait_until(SOON, || self.netlink.status(Some(0)) == [(0, false)]);
        assert!(gone.is_ok());
    }
}

/// More than a control group is to keep in memory is written to a file system on the device, whose
/// server is killed meanwhile and comes back. The group is slowed down at that size; with a limit
/// (`memory.max`) its writers are killed while there is no server.
fn dirty_file_system_in_little_memory(_: &Guest) {
    let group = Group::new("tight");
    group.set("memory.high", "24M");
    make_storage(256 * MIB);
    let mut server = nbdkit();
    let attached = Attached::new(5);
    let news = Netlink::listen();
    sh("mkfs.ext4 -q /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt");
    let outcome = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            try_sh(&format!(
                "echo $$ > {GROUPS}/tight/cgroup.procs
                cp -a /usr/sbin /tmp/mnt/
                dd if=/dev/zero of=/tmp/mnt/zeroes bs=1M count=24 status=none
                sync -f /tmp/mnt"
            ))
        });
        let mut outages = 0;
        while !writer.is_finished() && outages < 4 {
            thread::sleep(Duration::from_millis(600));
            server.kill();
            let dead = wait_until(SOON, || news.dead_link().is_some());
            assert!(dead.is_ok(), "no news of the server's death");
            thread::sleep(Duration::from_millis(400));
            server = nbdkit();
            attached.reconnect();
            outages += 1;
        }
        say(&format!("{outages} outages"));
        writer.join().expect("the writer")
    });
    let peak = group.get("memory.peak");
    sh("umount /tmp/mnt");
    outcome.unwrap_or_else(|said| panic!("{said}"));
    say(&format!(
        "at most {} KiB of memory",
        peak.trim().parse::<u64>().unwrap() / 1024
    ));
    // Few large reads are quicker where a switch between tasks takes long.
    fs::write("/sys/block/nbd0/queue/read_ahead_kb", "4096").unwrap();
    sh("fsck.ext4 -fn /dev/nbd0
        mount -o ro /dev/nbd0 /tmp/mnt
        diff -r --no-dereference /usr/sbin /tmp/mnt/sbin
        test $(tr -d '\\0' < /tmp/mnt/zeroes | wc -c) = 0
        umount /tmp/mnt");
    attached.disconnect();
    server.kill();
    fs::remove_file(STORAGE).unwrap();
}

/// For less than the timeout: requests wait. For longer: the connection is given up, and requests
/// wait for another.
fn server_is_frozen(_: &Guest) {
    let group = Group::new("frozen");
    make_storage(Load::BYTES);
    let mut server = nbdkit();
    let attached = Attached::new(3);
    let news = Netlink::listen();
    let mut load = Load::new(0, seed());
    let ((), tally) = load.run(false, |tally| {
        group.add(server.id());
        let moves = |more: u64| {
            let before = tally.done();
            let moved = wait_until(SOON, || tally.done() > before + more);
            assert!(moved.is_ok(), "nothing moves: {tally:?}");
        };
        for _ in 0..3 {
            moves(50);
            group.freeze();
            let before = tally.done();
            thread::sleep(Duration::from_millis(800));
            assert!(tally.done() <= before + Load::WRITERS);
            group.thaw();
        }
        moves(50);
        assert_eq!(news.dead_link(), None);
        group.freeze();
        let dead = wait_until(SOON, || news.dead_link().is_some());
        assert!(dead.is_ok(), "the timeout does not end it");
        // It never gets to what it was sent.
        server.kill();
        group.thaw();
        server = nbdkit();
        attached.reconnect();
        moves(50);
    });
    say(&format!("{tally:?}"));
    assert_eq!(tally.failed(), 0);
    load.verify();
    attached.disconnect();
    load.verify_in(&File::open(STORAGE).unwrap());
    server.kill();
    fs::remove_file(STORAGE).unwrap();
}

/// fio stands still with requests in flight, for longer than a timeout; others go on.
fn submitters_are_frozen(_: &Guest) {
    let group = Group::new("frozen");
    make_storage(64 * MIB);
    let mut server = nbdkit();
    let attached = Attached::new(2);
    let news = Netlink::listen();
    let mut load = Load::new(0, seed());
    let job = "fio --name=verify --filename=/dev/nbd0 --direct=1 --offset=16M --size=8M --time_based --runtime=9 \
         --rw=randwrite --bs=16k --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 \
         --do_verify=1 --thread --output=/tmp/fio.txt --aux-path=/tmp";
    let mut fio = Daemon::start(job);
    group.add(fio.id());
    let ((), tally) = load.run(false, |tally| {
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(300));
            group.freeze();
            let before = tally.done();
            thread::sleep(Duration::from_millis(2500));
            let moved = wait_until(SOON, || tally.done() > before + 50);
            assert!(moved.is_ok(), "others stand still, too");
            group.thaw();
        }
    });
    assert!(
        fio.wait(6 * SOON),
        "{}",
        fs::read_to_string("/tmp/fio.txt").unwrap()
    );
    assert_eq!((news.dead_link(), tally.failed()), (None, 0));
    load.verify();
    attached.disconnect();
    server.kill();
    fs::remove_file(STORAGE).unwrap();
}

/// Whoever is in NBD_DO_IT is woken to be frozen, which both drivers take for a signal: the session
/// ends as after one, and the device is free when the client goes on.
fn client_is_frozen(guest: &Guest) {
    let group = Group::new("frozen");
    make_storage(Load::BYTES);
    let mut server = nbdkit();
    let mut client = Client::connect(&format!("-unix {SOCKET}"));
    let mut load = Load::new(0, seed());
    let ((), tally) = load.run(true, |tally| {
        let moves = wait_until(SOON, || tally.done() > 50);
        assert!(moves.is_ok());
        group.add(client.0.id());
        group.freeze();
        match guest.expected("signals-leave-the-session") {
            Driver::Nbd => {
                let stopped = wait_until(SOON, || tally.failed() == Load::WRITERS);
                assert!(stopped.is_ok(), "somebody hangs: {tally:?}");
                group.thaw();
            }
            Driver::Rnbd => {
                let moves = |more: u64| {
                    let before = tally.done();
                    let moves = wait_until(SOON, || tally.done() > before + more);
                    assert!(moves.is_ok(), "nothing moves: {tally:?}");
                };
                moves(50);
                group.thaw();
                moves(50);
            }
        }
    });
    say(&format!("{tally:?}"));
    if guest.expected("signals-leave-the-session") == Driver::Nbd {
        client.0.wait(SOON);
        let gone = wait_until(SOON, || device::pid(0).is_none());
        assert!(gone.is_ok());
        client = Client::connect(&format!("-unix {SOCKET}"));
    }
    load.verify();
    client.disconnect();
    server.kill();
    fs::remove_file(STORAGE).unwrap();
}

/// As before a suspend: every process stands still for a second, the server too.
fn user_space_is_frozen(_: &Guest) {
    const TEST: &str = "/sys/power/pm_test";
    if !Path::new(TEST).exists() {
        skip("this kernel cannot freeze user space for a test");
    }
    fs::write("/sys/module/suspend/parameters/pm_test_delay", "1").expect("pm_test_delay");
    fs::write(TEST, "freezer").expect(TEST);
    make_storage(64 * MIB);
    let mut server = nbdkit();
    let attached = Attached::new(30);
    let began = Instant::now();
    let mut times = 0;
    thread::scope(|scope| {
        // Who waits in a system call that no signal ends cannot be frozen: hence libaio.
        let load = scope.spawn(|| {
            fio("--rw=randrw --bs=16k --ioengine=libaio --iodepth=8 --time_based --runtime=8");
        });
        thread::sleep(Duration::from_secs(1));
        while !load.is_finished() && times < 3 {
            fs::write("/sys/power/state", "freeze").expect("to suspend");
            times += 1;
            thread::sleep(Duration::from_millis(700));
        }
        load.join().expect("fio");
    });
    fs::write(TEST, "none").expect(TEST);
    say(&format!(
        "{times} times in {:.0} s",
        began.elapsed().as_secs_f32()
    ));
    assert!(times > 1);
    attached.disconnect();
    server.kill();
    fs::remove_file(STORAGE).unwrap();
}
