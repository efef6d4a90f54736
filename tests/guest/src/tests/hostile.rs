// SPDX-License-Identifier: GPL-2.0

//! Servers that lie (`liar`), under programs that read, write, flush and trim. Whatever they say, each
//! I/O ends in time, a read that succeeds has what was sent for it, and the device can be connected
//! again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::io::Errno;

use crate::debug_kernel::patient;
use crate::device::{self, Plan, USUAL_FLAGS, assert_usable, errno};
use crate::driver::devices;
use crate::harness::{Guest, Test, complain, say, seed, wait_until};
use crate::klog::Klog;
use crate::liar::{
    AREA, Brought, Counts, Mischief, POISON, READ_AT, SIZE, TRIM_AT, WRITE_AT, ZERO_AT, to_write,
};
use crate::netlink::{Link, Netlink, Setup};
use crate::proto::{self, BLKDISCARD, BLKZEROOUT, CAN_MULTI_CONN, SEND_DF};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult, ioctl_number, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(one_connection).parameters(FEW_DEVICES),
        test!(several_connections).parameters(FEW_DEVICES),
        test!(connections_that_are_replaced).parameters(FEW_DEVICES),
        test!(a_hundred_thousand_replies)
            .parameters("nbds_max=8")
            .limit_seconds(5400)
            .on_request(),
    ]
}

pub const SHORT: Duration = Duration::from_secs(30);
pub const HOURS: Duration = Duration::from_secs(5000);

pub const FEW_DEVICES: &str = "nbds_max=4";

fn one_connection(_: &Guest) {
    torment(400, SHORT, |_| Session::by_ioctls(1));
}

fn several_connections(_: &Guest) {
    torment(800, SHORT, |random| Session::by_ioctls(random.usize(2..=4)));
}

fn connections_that_are_replaced(_: &Guest) {
    torment(2000, SHORT, |random| {
        Session::by_netlink(random.usize(1..=4))
    });
}

/// A hundred thousand; `REPLIES` in the environment: how many really.
pub fn many() -> u64 {
    let asked = std::env::var("REPLIES").ok();
    asked.map_or(100_000, |text| text.parse().expect("REPLIES is a number"))
}

fn a_hundred_thousand_replies(_: &Guest) {
    torment(many(), HOURS, |random| match random.u8(..8) {
        0 => Session::by_ioctls(1),
        1 => Session::by_ioctls(random.usize(2..=4)),
        _ => Session::by_netlink(random.usize(1..=4)),
    });
}

/// Programs that use the device at the same time.
const PROGRAMS: u64 = 6;

/// I/Os of each program in a session, if it lives that long.
const IOS: u64 = 150;

/// And if it does not last longer: it may be slow for many good reasons.
const LONGEST_SESSION: Duration = Duration::from_secs(20);

/// The device's timeout.
const TIMEOUT_SECONDS: u64 = 1;

/// What an I/O may take: it may be given to several connections that say nothing, one after the other.
const LONGEST_IO: Duration = Duration::from_secs(15);

/// The longest I/O.
const LONGEST_BYTES: usize = 384 << 10;

/// What has come of it. Said at the end, however that comes.
struct Outcome {
    began: Instant,
    counts: Arc<Counts>,
    sessions: AtomicU64,
    reconnects: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
    /// Reads that brought something else than what is stored, which was sent for them.
    deceived: AtomicU64,
    longest_io: Mutex<Duration>,
    broken_promises: AtomicU64,
}

impl Outcome {
    fn new() -> Self {
        Self {
            began: Instant::now(),
            counts: Arc::default(),
            sessions: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            succeeded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            deceived: AtomicU64::new(0),
            longest_io: Mutex::default(),
            broken_promises: AtomicU64::new(0),
        }
    }

    /// The driver has done what it must not. The first ones are told in detail.
    fn broken(&self, what: String) {
        if self.broken_promises.fetch_add(1, Ordering::Relaxed) < 10 {
            say(&what);
            complain(what);
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        write!(
            f,
            "{} replies, {} sessions, {} connections replaced; {} I/Os succeeded, {} of them with a lie, {} failed; \
             the longest took {:.1} s; {} promises broken; {:.0} s",
            self.counts.replies(),
            of(&self.sessions),
            of(&self.reconnects),
            of(&self.succeeded),
            of(&self.deceived),
            of(&self.failed),
            self.longest_io.lock().unwrap().as_secs_f32(),
            of(&self.broken_promises),
            self.began.elapsed().as_secs_f32(),
        )
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        say(&self.to_string());
        say(&self.counts.to_string());
    }
}

/// Has sessions on all devices at once, since who is lied to waits a lot, until there were so many
/// replies; where the machine is slow, fewer.
pub fn torment(replies: u64, length: Duration, session: impl Fn(&mut Rng) -> Session + Sync) {
    let seed = seed();
    let outcome = Outcome::new();
    let goes_on =
        || outcome.counts.replies() < replies && outcome.began.elapsed() < patient(length);
    thread::scope(|scope| {
        for index in devices() {
            let (session, outcome, goes_on) = (&session, &outcome, &goes_on);
            scope.spawn(move || {
                let mut random = Rng::with_seed(seed.wrapping_add(u64::from(index) << 32));
                while goes_on() {
                    session(&mut random).run(index, random.u64(..), outcome);
                    let sessions = outcome.sessions.fetch_add(1, Ordering::Relaxed);
                    if sessions % 100 == 99 {
                        say(&outcome.to_string());
                    }
                }
                assert_usable(index);
            });
        }
    });
    let enough = outcome.counts.replies() > replies / 8;
    assert!(enough, "too little has happened");
}

/// How a device is connected, and through what.
pub struct Session {
    connections: usize,
    by_netlink: bool,
    structured: bool,
}

impl Session {
    pub fn by_ioctls(connections: usize) -> Self {
        Self {
            connections,
            by_netlink: false,
            structured: false,
        }
    }

    pub fn by_netlink(connections: usize) -> Self {
        Self {
            connections,
            by_netlink: true,
            structured: false,
        }
    }

    /// The driver is told that replies may be structured, and lied to about chunks.
    pub fn structured(self) -> Self {
        Self {
            structured: true,
            ..self
        }
    }

    fn flags(&self) -> u64 {
        match self.structured {
            true => USUAL_FLAGS | SEND_DF,
            false => USUAL_FLAGS,
        }
    }

    fn run(&self, index: u32, seed: u64, outcome: &Outcome) {
        let mischief = Arc::new(Mischief::new(
            seed,
            Arc::clone(&outcome.counts),
            self.structured,
        ));
        let table = Table {
            index,
            seed,
            mischief,
            outcome,
        };
        let mut random = Rng::with_seed(seed);
        let transport = [Transport::Tcp4, Transport::Unix][random.usize(..2)];
        if random.u8(..4) == 0 {
            // Whatever was said in the session before.
            assert_usable(index);
        }
        if self.by_netlink {
            self.run_replacing(transport, &table);
        } else {
            self.run_till_they_end(transport, &table, random.bool());
        }
    }

    fn run_till_they_end(&self, transport: Transport, table: &Table<'_>, politely: bool) {
        let mut rig = Plan::new(SIZE)
            .index(table.index)
            .flags(self.flags())
            .connections(self.connections)
            .transport(transport)
            .timeout(TIMEOUT_SECONDS)
            .attach();
        table.use_device(&rig.server, |_| {});
        if politely {
            let mut log = Klog::from_now();
            ioctl_number(rig.open_to_read(), proto::DISCONNECT, 0).expect("NBD_DISCONNECT");
            let answer = rig.client.wait();
            // A connection that the server has begun to leave may still have been there.
            let wish = format!("nbd{}: disconnected by user request", table.index);
            let expected = match log.read().contains(&wish) {
                true => Ok(0),
                false => device::lost(),
            };
            assert_eq!(answer, expected);
        } else {
            rig.server.kill();
            rig.client.wait_lost();
        }
    }

    fn run_replacing(&self, transport: Transport, table: &Table<'_>) {
        let server = Server::new();
        let sockets = (0..self.connections).map(|_| server.connect(transport));
        let netlink = Netlink::open();
        let setup = Setup::new(SIZE)
            .index(table.index)
            .flags(self.flags() | CAN_MULTI_CONN)
            .timeout(TIMEOUT_SECONDS)
            .dead_timeout(5)
            .sockets(sockets);
        let index = netlink.connect(&setup).expect("to connect");
        let link = Link {
            server,
            netlink,
            index,
        };
        let link = link.settle();
        table.use_device(&link.server, |over| {
            table.replace_connections(&link.server, transport, over);
        });
        link.server.kill();
        link.disconnect_and_wait();
    }
}

/// What everybody in a session knows.
struct Table<'a> {
    index: u32,
    seed: u64,
    mischief: Arc<Mischief>,
    outcome: &'a Outcome,
}

impl Table<'_> {
    /// Puts new connections in the place of those that have died.
    fn replace_connections(&self, server: &Server, transport: Transport, over: &AtomicBool) {
        let news = Netlink::listen();
        let netlink = Netlink::open();
        let mut looked = Instant::now();
        while !over.load(Ordering::Relaxed) {
            // News may be lost.
            let dead = news.dead_link() == Some(self.index)
                || looked.elapsed() > Duration::from_millis(300);
            if !dead {
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            looked = Instant::now();
            let socket = server.connect(transport);
            match netlink.reconfigure(&Setup::change(self.index).sockets([socket])) {
                Ok(()) => drop(self.outcome.reconnects.fetch_add(1, Ordering::Relaxed)),
                Err(errno) => self.outcome.broken(format!("RECONFIGURE: {errno}")),
            }
        }
    }

    /// Lets programs use the device until they have done enough or no connection is left. `meanwhile`
    /// ends when it is told that this is over.
    fn use_device(&self, server: &Server, meanwhile: impl FnOnce(&AtomicBool) + Send) {
        let mischief = Arc::clone(&self.mischief);
        server.script(move |conn, first| mischief.serve(conn, first));
        let (done, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            for number in 0..PROGRAMS {
                let program = Program {
                    device: device::open(self.index, libc::O_DIRECT).expect("the device"),
                    data: Buffer::new(LONGEST_BYTES),
                    random: Rng::with_seed(self.seed.wrapping_add(number + 1)),
                    mischief: &self.mischief,
                    outcome: self.outcome,
                };
                let (done, over) = (&done, &over);
                scope.spawn(move || {
                    program.run(|| server.living() == 0 || over.load(Ordering::Relaxed));
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
            scope.spawn(|| meanwhile(&over));
            let all_done = || done.load(Ordering::Relaxed) == PROGRAMS as usize;
            // A slow machine makes each of them slow; this is where one hangs.
            if wait_until(LONGEST_IO * 6, all_done).is_err() {
                self.outcome.broken("an I/O does not end".into());
                over.store(true, Ordering::Relaxed);
                server.kill();
                let _ = wait_until(LONGEST_IO, all_done);
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}

/// Who uses the device.
struct Program<'a> {
    device: File,
    data: Buffer,
    random: Rng,
    mischief: &'a Mischief,
    outcome: &'a Outcome,
}

impl Program<'_> {
    fn run(mut self, is_over: impl Fn() -> bool) {
        let mut failed_in_a_row = 0;
        let session_began = Instant::now();
        for _ in 0..IOS {
            let began = Instant::now();
            if session_began.elapsed() > LONGEST_SESSION {
                return;
            }
            let result = self.act();
            let took = began.elapsed();
            let mut longest = self.outcome.longest_io.lock().unwrap();
            *longest = took.max(*longest);
            drop(longest);
            if took > patient(LONGEST_IO) {
                self.outcome.broken(format!(
                    "an I/O took {:.0} s: {result:?}",
                    took.as_secs_f32()
                ));
            }
            if self.has_succeeded(result) {
                failed_in_a_row = 0;
                continue;
            }
            failed_in_a_row += 1;
            if failed_in_a_row > 2 && is_over() {
                return;
            }
        }
    }

    fn has_succeeded(&self, result: SysResult<()>) -> bool {
        match result {
            Ok(()) => {
                self.outcome.succeeded.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            // What servers say, and what is said of a device that has no connection or no size.
            Err(
                Errno::IO
                | Errno::NOSPC
                | Errno::REMOTEIO
                | Errno::OPNOTSUPP
                | Errno::INVAL
                | Errno::NODATA,
            ) => {}
            Err(errno) => self.outcome.broken(format!("an I/O failed with {errno}")),
        }
        self.outcome.failed.fetch_add(1, Ordering::Relaxed);
        false
    }

    fn act(&mut self) -> SysResult<()> {
        let (at, len) = self.draw_range();
        match self.random.u8(..20) {
            0 => errno(self.device.sync_data()),
            1 => ioctl_pointer(&self.device, BLKDISCARD, &mut [TRIM_AT + at, len as u64]).map(drop),
            2 => ioctl_pointer(&self.device, BLKZEROOUT, &mut [ZERO_AT + at, len as u64]).map(drop),
            3..9 => self.write(WRITE_AT + at, len),
            _ => self.read(READ_AT + at, len),
        }
    }

    fn draw_range(&mut self) -> (u64, usize) {
        let len = match self.random.u8(..16) {
            0 => 512 * self.random.usize(64..=LONGEST_BYTES / 512),
            1..4 => 512 * self.random.usize(1..=128),
            4..8 => 512,
            _ => 4096,
        };
        let at = self.random.u64(..=(AREA - len as u64) / 512) * 512;
        (at, len)
    }

    fn write(&mut self, offset: u64, len: usize) -> SysResult<()> {
        let data = &mut self.data[..len];
        to_write(offset, data);
        let result = errno(self.device.write_all_at(data, offset));
        // Were it still being sent, the server would see it.
        data.fill(POISON);
        result
    }

    fn read(&mut self, offset: u64, len: usize) -> SysResult<()> {
        let data = &mut self.data[..len];
        data.fill(POISON);
        let got = errno(self.device.read_at(data, offset))?;
        if got == 0 {
            return Err(Errno::NODATA);
        }
        match self.mischief.judge(offset, &data[..got]) {
            Brought::Stored => {}
            Brought::Lie => drop(self.outcome.deceived.fetch_add(1, Ordering::Relaxed)),
            Brought::Impossible(why) => {
                let what = format!("a read of {len} bytes at {offset} succeeded and {why}");
                self.outcome.broken(what);
            }
        }
        Ok(())
    }
}
