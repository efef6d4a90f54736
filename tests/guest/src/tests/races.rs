// SPDX-License-Identifier: GPL-2.0

//! Everybody at once: devices are connected, opened, changed, disconnected and destroyed, and the
//! module is unloaded and loaded, while others look on.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::io::Errno;

use super::module::without_modprobe;
use crate::device;
use crate::harness::{Guest, Test, say, seed};
use crate::netlink::{DESTROY_ON_DISCONNECT, DISCONNECT_ON_CLOSE, Netlink, Setup};
use crate::server::{Server, Transport};
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![test!(all_at_once).limit_seconds(200)]
}

const LENGTH: Duration = Duration::from_secs(12);

/// Where the machine is so slow that little has happened by then.
const GREATEST_LENGTH: Duration = Duration::from_secs(90);

const INDICES: u32 = 4;
const MIB: u64 = 1 << 20;

/// How often what succeeded.
#[derive(Debug, Default)]
struct Tally {
    connected: u32,
    reconfigured: u32,
    disconnected: u32,
    read: u32,
    statuses: u32,
    unloaded: u32,
}

impl Tally {
    /// Whether all have had their turn.
    fn is_enough(&self) -> bool {
        let counts = [
            self.connected,
            self.reconfigured,
            self.disconnected,
            self.read,
            self.statuses,
            self.unloaded,
        ];
        counts.iter().all(|count| *count >= 3)
    }
}

struct Race {
    began: Instant,
    tally: Mutex<Tally>,
}

impl Race {
    /// One of those who take part: does something again and again, with random pauses.
    fn run(&self, seed: u64, longest_pause_ms: u64, step: impl Fn(&mut Rng)) {
        let mut random = Rng::with_seed(seed);
        while self.goes_on() {
            step(&mut random);
            thread::sleep(Duration::from_millis(random.u64(..=longest_pause_ms)));
        }
    }

    fn goes_on(&self) -> bool {
        let elapsed = self.began.elapsed();
        elapsed < LENGTH || elapsed < GREATEST_LENGTH && !self.tally.lock().unwrap().is_enough()
    }

    fn count(&self, what: impl FnOnce(&mut Tally) -> &mut u32) {
        *what(&mut self.tally.lock().unwrap()) += 1;
    }

    /// Connects a device, and mostly does something to it.
    fn connect(&self, random: &mut Rng) {
        let Ok(netlink) = Netlink::try_open() else {
            return;
        };
        let server = Server::new();
        let close = random.u64(..2) * DISCONNECT_ON_CLOSE;
        let destroy = random.u64(..2) * DESTROY_ON_DISCONNECT;
        let index = random.u32(..INDICES);
        let setup = Setup::new(MIB)
            .index(index)
            .client_flags(close | destroy)
            .timeout(1)
            .dead_timeout(random.u64(..2))
            .sockets([server.connect(Transport::Unix)]);
        match netlink.connect(&setup) {
            Ok(index) => {
                self.count(|tally| &mut tally.connected);
                self.torment(random, &netlink, &server, index);
                let _ = netlink.disconnect(index);
            }
            // In use, going, not quite gone, or no driver any more.
            Err(Errno::BUSY | Errno::INVAL | Errno::EXIST | Errno::NOENT | Errno::NODEV) => {}
            Err(errno) => crate::harness::complain(format!("CONNECT: {errno}")),
        }
    }

    fn torment(&self, random: &mut Rng, netlink: &Netlink, server: &Server, index: u32) {
        match random.u8(..4) {
            0 => self.read(random, index),
            1 => server.kill(),
            2 => {
                server.kill();
                self.reconfigure(random, netlink, server, index);
                self.read(random, index);
            }
            _ => {}
        }
    }

    fn reconfigure(&self, random: &mut Rng, netlink: &Netlink, server: &Server, index: u32) {
        let setup = Setup::change(index)
            .size(MIB << random.u32(..3))
            .client_flags(random.u64(..4))
            .sockets([server.connect(Transport::Unix)]);
        if netlink.reconfigure(&setup).is_ok() {
            self.count(|tally| &mut tally.reconfigured);
        }
    }

    /// Somebody else's device, perhaps.
    fn change(&self, random: &mut Rng) {
        let Ok(netlink) = Netlink::try_open() else {
            return;
        };
        let index = random.u32(..INDICES);
        if random.bool() {
            self.reconfigure(random, &netlink, &Server::new(), index);
        } else if netlink.disconnect(index).is_ok() {
            self.count(|tally| &mut tally.disconnected);
        }
    }

    /// Opens a device and reads, and stays for a moment.
    fn read(&self, random: &mut Rng, index: u32) {
        let Ok(direct) = device::open(index, libc::O_DIRECT) else {
            return;
        };
        if direct
            .read_at(&mut Buffer::new(4096), 0)
            .is_ok_and(|len| len > 0)
        {
            self.count(|tally| &mut tally.read);
        }
        thread::sleep(Duration::from_millis(random.u64(..10)));
    }

    fn look(&self) {
        if let Ok(netlink) = Netlink::try_open() {
            if netlink.try_status(None).is_ok() {
                self.count(|tally| &mut tally.statuses);
            }
        }
        for index in 0..INDICES {
            for path in [
                format!("/sys/block/nbd{index}/pid"),
                format!("/sys/block/nbd{index}/backend"),
                format!("/sys/block/nbd{index}/size"),
                format!("/sys/kernel/debug/nbd/nbd{index}/tasks"),
                format!("/sys/kernel/debug/nbd/nbd{index}/flags"),
                format!("/sys/kernel/debug/nbd/nbd{index}/connections"),
            ] {
                let _ = fs::read_to_string(path);
            }
        }
    }

    /// Whenever it is possible; but the others are to have their time.
    fn unload(&self, random: &mut Rng, guest: &Guest) {
        if guest.driver.try_unload().is_ok() {
            self.count(|tally| &mut tally.unloaded);
            guest.driver.load("nbds_max=2").expect("to load it again");
            thread::sleep(Duration::from_millis(random.u64(..1500)));
        }
    }
}

fn all_at_once(guest: &Guest) {
    let seed = seed();
    let race = Race {
        began: Instant::now(),
        tally: Mutex::default(),
    };
    // Nobody but us loads the module.
    without_modprobe(|| {
        thread::scope(|scope| {
            let race = &race;
            for worker in [1, 2] {
                scope.spawn(move || race.run(seed + worker, 10, |random| race.connect(random)));
            }
            for worker in [3, 4] {
                scope.spawn(move || {
                    race.run(seed + worker, 15, |random| {
                        let index = random.u32(..INDICES);
                        race.read(random, index);
                    });
                });
            }
            scope.spawn(move || race.run(seed + 5, 20, |random| race.change(random)));
            scope.spawn(move || race.run(seed + 6, 10, |_| race.look()));
            scope.spawn(move || race.run(seed + 7, 3, |random| race.unload(random, guest)));
        });
    });
    let netlink = Netlink::open();
    for (index, _) in netlink.status(None) {
        let _ = netlink.disconnect(index);
    }
    let tally = race.tally.lock().unwrap();
    say(&format!("{tally:?}"));
    assert!(tally.is_enough(), "too little has happened");
}
