// SPDX-License-Identifier: GPL-2.0

//! Threads that ask for anything, with privilege and without, beside a device that somebody uses.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::io::Errno;
use rustix::net::SocketType;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::nonsense::{Pool, any_ioctl, any_message, strange_files};
use super::{MIB, OUT_OF_REACH, Over};
use crate::device::{self, Plan, assert_pattern, assert_usable, pattern};
use crate::driver::devices;
use crate::harness::{Guest, Test, complain, say, seed, wait_until};
use crate::netlink::{self, Netlink, Setup};
use crate::server::Server;
use crate::sys::{Buffer, SysResult};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(without_privilege).parameters(DEVICES),
        test!(with_privilege).parameters(DEVICES),
        test!(for_long)
            .parameters(DEVICES)
            .limit_seconds(3000)
            .on_request(),
        test!(descriptors_of_anything),
    ]
}

const DEVICES: &str = "nbds_max=8";

/// The device that somebody else uses meanwhile: one bit that falls over makes none of the others it.
const BYSTANDER: u32 = 6;

/// What the privileged ask for.
const VICTIMS: [u32; 2] = [0, 1];

/// Uses the bystander's device as long as `act` runs, and finds it unharmed.
fn beside_a_bystander(act: impl FnOnce()) {
    let plan = Plan::new(MIB).index(BYSTANDER).connections(2);
    let mut rig = plan.attach_to(Server::with_descriptors_from(OUT_OF_REACH));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let direct = rig.direct();
        let over = &over;
        scope.spawn(move || {
            for round in 0.. {
                let offset = round % 64 * 4096;
                let data = Buffer::filled(4096, |data| pattern(round, offset, data));
                direct
                    .write_all_at(&data, offset)
                    .expect("the bystander to write");
                let mut back = Buffer::new(4096);
                direct
                    .read_exact_at(&mut back, offset)
                    .expect("the bystander to read");
                assert_pattern(round, offset, &back);
                if over.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(Duration::from_millis(2));
            }
        });
        let _over = Over(over);
        act();
    });
    assert_eq!(rig.server.living(), 2, "the bystander's connections");
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Gives up all capabilities of this thread.
fn drop_privilege() {
    let mut sets = capabilities(None).unwrap();
    sets.effective = CapabilitySet::empty();
    sets.permitted = CapabilitySet::empty();
    set_capabilities(None, sets).unwrap();
}

/// How often what was answered.
#[derive(Default)]
struct Answers(Mutex<BTreeMap<String, u64>>);

impl Answers {
    fn count(&self, call: &str, answer: SysResult<()>) {
        // As in errno.h; 0 is yes.
        let errno = answer.map_or_else(Errno::raw_os_error, |()| 0);
        let mut answers = self.0.lock().unwrap();
        *answers.entry(format!("{call} {errno}")).or_default() += 1;
    }

    fn say(&self) {
        let answers = self.0.lock().unwrap();
        let total: u64 = answers.values().sum();
        say(&format!("{total} calls: {answers:?}"));
    }
}

/// Lines of the driver's in the kernel's log.
fn said(guest: &Guest) -> usize {
    let log = guest.log();
    log.iter().filter(|line| line.contains("nbd")).count()
}

fn without_privilege(guest: &Guest) {
    let seed = seed();
    let answers = Answers::default();
    let pool = Pool::new();
    beside_a_bystander(|| {
        let before = said(guest);
        thread::scope(|scope| {
            for thread in 0..2 {
                let (answers, pool) = (&answers, &pool);
                scope.spawn(move || {
                    let mut random = Rng::with_seed(seed + thread);
                    let files = [0, 1, BYSTANDER].map(|index| device::open(index, 0).unwrap());
                    let netlink = Netlink::open();
                    drop_privilege();
                    for _ in 0..500 {
                        let device = &files[random.usize(..files.len())];
                        let (request, answer) = any_ioctl(device, pool, &mut random);
                        assert_eq!(answer, Err(Errno::PERM), "{request:#x}");
                        answers.count("ioctl", Err(Errno::PERM));
                        message_without_privilege(&netlink, pool, &mut random, answers);
                    }
                });
            }
        });
        assert_eq!(
            said(guest) - before,
            0,
            "lines of the log that anybody can cause"
        );
    });
    answers.say();
    assert_eq!(devices().len(), 8, "devices");
}

fn message_without_privilege(netlink: &Netlink, pool: &Pool, random: &mut Rng, answers: &Answers) {
    let command = random.u8(..7);
    let mut message = any_message(netlink.family.id, command, pool, random);
    // The first device's number is the attribute that comes first.
    if message.len() > 28 && message[22..24] == netlink::INDEX.to_ne_bytes() && random.bool() {
        message[24] = BYSTANDER as u8;
    }
    for errno in netlink.send_bytes(&message) {
        let answer = to_result(errno);
        answers.count("netlink", answer);
        let harmless = command == netlink::STATUS || answer.is_err();
        assert!(harmless, "command {command} without privilege: {message:?}");
    }
}

fn to_result(errno: i32) -> SysResult<()> {
    match errno {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// What may be said to a program that asks for nonsense.
fn is_sensible(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::PERM
            | Errno::INVAL
            | Errno::NOTTY
            | Errno::BUSY
            | Errno::BADF
            | Errno::NOTSOCK
            | Errno::NOTCONN
            | Errno::NODEV
            | Errno::NOENT
            | Errno::NOSPC
            | Errno::EXIST
            | Errno::RANGE
            | Errno::OPNOTSUPP
            // The end of NBD_DO_IT.
            | Errno::PIPE
    )
}

fn with_privilege(_: &Guest) {
    ask_for_anything(Duration::from_secs(12));
}

/// `SECONDS` in the environment: how long.
fn for_long(_: &Guest) {
    let asked = std::env::var("SECONDS").ok();
    let seconds = asked.map_or(300, |text| text.parse().expect("SECONDS is a number"));
    ask_for_anything(Duration::from_secs(seconds));
}

/// Threads make any ioctls and send any messages, with descriptors that come and go.
fn ask_for_anything(length: Duration) {
    let seed = seed();
    let asking = Asking {
        ends: Instant::now() + length,
        working: AtomicUsize::new(6),
        answers: Answers::default(),
        pool: Pool::new(),
    };
    let connected = Connected;
    beside_a_bystander(|| {
        thread::scope(|scope| {
            let asking = &asking;
            for thread in 0..3 {
                let random = Rng::with_seed(seed + thread);
                let other = Rng::with_seed(seed + 10 + thread);
                scope.spawn(move || asking.work(|asking| asking.make_ioctls(random)));
                scope.spawn(move || asking.work(|asking| asking.send_messages(other)));
            }
            scope.spawn(move || asking.change_the_pool());
        });
    });
    asking.answers.say();
    drop(connected);
    VICTIMS.map(assert_can_be_connected);
}

/// What was connected is disconnected when this goes, also after a panic.
struct Connected;

impl Drop for Connected {
    fn drop(&mut self) {
        let Ok(netlink) = Netlink::try_open() else {
            return;
        };
        for (index, _) in netlink.try_status(None).unwrap_or_default() {
            let _ = netlink.disconnect(index);
        }
    }
}

/// It may have been asked to go when it is disconnected, and then comes again.
fn assert_can_be_connected(index: u32) {
    let setup = Setup::new(MIB).index(index).client_flags(0);
    let mut link = Err(Errno::NODEV);
    let connected = wait_until(device::SOON, || {
        link = setup.try_attach();
        link.is_ok()
    });
    assert!(connected.is_ok(), "nbd{index}: {:?}", link.err());
    let link = link.unwrap().settle();
    link.disconnect_and_wait();
    drop(link);
    assert_usable(index);
}

/// One less when it goes, also after a panic.
struct Working<'a>(&'a AtomicUsize);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Asking {
    ends: Instant,
    /// Threads that have not ended yet.
    working: AtomicUsize,
    answers: Answers,
    pool: Pool,
}

impl Asking {
    fn goes_on(&self) -> bool {
        Instant::now() < self.ends
    }

    fn work(&self, work: impl FnOnce(&Self)) {
        let _working = Working(&self.working);
        work(self);
    }

    fn make_ioctls(&self, mut random: Rng) {
        while self.goes_on() {
            let victim = VICTIMS[random.usize(..2)];
            let Ok(device) = device::open(victim, 0) else {
                continue;
            };
            for _ in 0..random.u8(1..12) {
                let (request, answer) = any_ioctl(&device, &self.pool, &mut random);
                let answer = answer.map(drop);
                self.answers.count("ioctl", answer);
                if answer.is_err_and(|errno| !is_sensible(errno)) {
                    complain(format!("ioctl {request:#x}: {answer:?}"));
                }
            }
        }
    }

    fn send_messages(&self, mut random: Rng) {
        let netlink = Netlink::open();
        while self.goes_on() {
            let command = match random.u8(..8) {
                0 => random.u8(..),
                _ => random.u8(1..6),
            };
            let mut message = any_message(netlink.family.id, command, &self.pool, &mut random);
            if message.len() > 16 && random.u8(..4) == 0 {
                // Not in the header: another family is another test.
                let at = random.usize(16..message.len());
                message[at] ^= 1 << random.u8(..8);
            }
            for errno in netlink.send_bytes(&message) {
                let answer = to_result(errno);
                self.answers.count("netlink", answer);
                if answer.is_err_and(|errno| !is_sensible(errno)) {
                    complain(format!(
                        "netlink command {command}: {answer:?}: {message:?}"
                    ));
                }
            }
        }
    }

    /// Closes descriptors, and the other ends of sockets.
    fn change_the_pool(&self) {
        while self.goes_on() {
            thread::sleep(Duration::from_millis(100));
            self.pool.refill();
        }
        // Sets free who is in NBD_DO_IT, or waits for a server.
        let netlink = Netlink::open();
        while self.working.load(Ordering::Relaxed) > 0 {
            self.pool.kill_server();
            let _ = VICTIMS.map(|index| netlink.disconnect(index));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Through netlink; the ioctl has its own test.
fn descriptors_of_anything(guest: &Guest) {
    let netlink = Netlink::open();
    let device = Setup::new(MIB).index(1).attach().settle();
    let direct = device.direct();
    device.kill_server();
    // All has been logged when this fails.
    assert!(direct.read_at(&mut Buffer::new(512), 0).is_err());
    drop(direct);
    for file in strange_files() {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let before = said(guest);
        let numbers = [file.as_raw_fd()];
        let answer = netlink.connect(&Setup::new(MIB).index(0).descriptors(&numbers));
        let again = netlink.reconfigure(&Setup::change(1).descriptors(&numbers));
        for answer in [answer.map(drop), again] {
            let refused = answer.is_err_and(is_sensible);
            // Whether it is connected is found out later, but for one that listens.
            let stream = is_stream(&file);
            assert!(refused || stream, "{}: {answer:?}", kind.display());
        }
        let _ = netlink.disconnect(0);
        if answer.is_err() && again.is_err() {
            let lines = said(guest) - before;
            assert!(lines <= 2, "{}: {lines} lines in the log", kind.display());
        }
    }
    device.revive().expect("a good socket to be taken");
    for number in [-1, i32::MIN, i32::MAX, 9999] {
        let setup = Setup::new(MIB).index(0).descriptors(&[number]);
        let answer = netlink.connect(&setup).map(drop);
        assert!(answer.is_err_and(is_sensible), "{number}: {answer:?}");
    }
    device.disconnect_and_wait();
    assert_usable(0);
    assert_usable(1);
}

fn is_stream(file: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_type(file) == Ok(SocketType::STREAM)
}
