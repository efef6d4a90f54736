// SPDX-License-Identifier: GPL-2.0

//! Programs that ask for anything, that hand over descriptors of anything, and that meddle with the
//! socket that a device uses. What they ask for wrongly is refused; a device that others use, and
//! whatever comes afterwards, is not harmed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, connect_unspec, socket};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::debug_kernel::{self, patient};
use crate::device::{self, Plan, assert_pattern, assert_usable, pattern};
use crate::driver::devices;
use crate::harness::{Guest, Test, complain, say, seed, skip, wait_until};
use crate::netlink::{self, Link, Netlink, Setup};
use crate::proto::{CAN_MULTI_CONN, DO_IT, SET_SIZE, SET_SOCK};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult, ioctl_compat, ioctl_number, set_socket_option};
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
        test!(listening_sockets),
        test!(a_connection_that_begins_to_listen),
        test!(meddling_with_the_socket),
    ]
}

const DEVICES: &str = "nbds_max=8";
const MIB: u64 = 1 << 20;

/// The device that somebody else uses meanwhile: one bit that falls over makes none of the others it.
const BYSTANDER: u32 = 6;

/// What the privileged ask for.
const VICTIMS: [u32; 2] = [0, 1];

/// Uses the bystander's device as long as `act` runs, and finds it unharmed.
fn beside_a_bystander(act: impl FnOnce()) {
    let mut rig = Plan::new(MIB).index(BYSTANDER).connections(2).attach();
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

/// Says so when it goes, also after a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
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

/// Numbers at the edges of what types and devices can hold.
const EDGES: [u64; 22] = [
    0,
    1,
    2,
    511,
    512,
    513,
    1024,
    4096,
    4097,
    65536,
    MIB,
    i32::MAX as u64,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    (1 << 32) + 512,
    1 << 53,
    i64::MAX as u64 - 511,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

fn number(random: &mut Rng) -> u64 {
    match random.u8(..4) {
        0 => random.u64(..) >> random.u32(..64),
        _ => EDGES[random.usize(..EDGES.len())],
    }
}

/// Descriptors of everything, some of which will do. Whoever holds it may let go of some.
struct Pool {
    files: Mutex<Vec<OwnedFd>>,
    server: Server,
}

impl Pool {
    fn new() -> Self {
        let pool = Self {
            files: Mutex::default(),
            server: Server::new(),
        };
        pool.refill();
        pool
    }

    fn refill(&self) {
        let mut files = strange_files();
        files.extend([Transport::Tcp4, Transport::Unix].map(|kind| self.server.connect(kind)));
        // The other end is closed already.
        files.push(UnixStream::pair().unwrap().0.into());
        *self.files.lock().unwrap() = files;
    }

    /// A descriptor's number, that of a file or any. It may be closed by the time that it is used.
    fn descriptor(&self, random: &mut Rng) -> u64 {
        let mut files = self.files.lock().unwrap();
        match random.u8(..20) {
            0 => number(random),
            1 if files.len() > 4 => {
                let at = random.usize(..files.len());
                let closed = files.swap_remove(at);
                closed.as_raw_fd() as u64
            }
            2..12 => files.last().map_or(0, |file| file.as_raw_fd() as u64),
            _ => {
                let file = random.choice(files.iter());
                file.map_or(0, |file| file.as_raw_fd() as u64)
            }
        }
    }
}

/// No connected streams.
fn strange_files() -> Vec<OwnedFd> {
    let (reads, writes) = rustix::pipe::pipe().unwrap();
    let raw = |family, kind| socket(family, kind, None).unwrap();
    vec![
        reads,
        writes,
        File::open("/dev/null").unwrap().into(),
        File::open("/proc/self/exe").unwrap().into(),
        epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
        eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        memfd_create("file", MemfdFlags::CLOEXEC).unwrap(),
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().into(),
        UnixDatagram::unbound().unwrap().into(),
        raw(AddressFamily::UNIX, SocketType::SEQPACKET),
        raw(AddressFamily::NETLINK, SocketType::RAW),
        raw(AddressFamily::INET, SocketType::STREAM),
        raw(AddressFamily::INET6, SocketType::STREAM),
        raw(AddressFamily::UNIX, SocketType::STREAM),
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().into(),
    ]
}

/// Makes any ioctl; which one, and the answer.
fn any_ioctl(device: &File, pool: &Pool, random: &mut Rng) -> (u32, SysResult) {
    let request = match random.u8(..16) {
        0 => 0xab00 | random.u32(..256),
        // The same numbers with a direction and a size, and what is nobody's.
        1 => 0xab00 | random.u32(..16) | (random.u32(..) << 16),
        2 => 0xac00 | random.u32(..256),
        _ => 0xab00 | random.u32(..11),
    };
    let argument = match request {
        SET_SOCK => pool.descriptor(random),
        SET_SIZE if random.bool() => MIB,
        _ => number(random),
    };
    let answer = if random.u8(..4) == 0 {
        ioctl_compat(device, request, argument as u32)
    } else {
        ioctl_number(device, request, argument)
    };
    (request, answer)
}

fn put(bytes: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    bytes.extend((payload.len() as u16 + 4).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn any_bytes(random: &mut Rng) -> Vec<u8> {
    let longest = 1 << random.u32(..11);
    (0..random.usize(..longest))
        .map(|_| random.u8(..))
        .collect()
}

/// A list of sockets, or what might be taken for one.
fn any_sockets(pool: &Pool, random: &mut Rng) -> Vec<u8> {
    let mut list = Vec::new();
    for _ in 0..random.u8(..4) {
        let mut item = Vec::new();
        let descriptor = pool.descriptor(random);
        match random.u8(..8) {
            0 => item = any_bytes(random),
            1 => put(&mut item, netlink::SOCK_FD, &descriptor.to_ne_bytes()),
            2 => put(
                &mut item,
                random.u16(..),
                &(descriptor as u32).to_ne_bytes(),
            ),
            3 => {}
            _ => put(
                &mut item,
                netlink::SOCK_FD,
                &(descriptor as u32).to_ne_bytes(),
            ),
        }
        let kind = if random.u8(..8) == 0 {
            random.u16(..4)
        } else {
            netlink::SOCK_ITEM
        };
        put(&mut list, kind | (random.u16(..2) << 15), &item);
    }
    list
}

fn any_attribute(bytes: &mut Vec<u8>, pool: &Pool, random: &mut Rng) {
    let kind = match random.u8(..16) {
        0 => random.u16(..),
        1 => random.u16(11..16),
        _ => random.u16(..11),
    };
    let payload = match (kind, random.u8(..6)) {
        (_, 0) => any_bytes(random),
        (netlink::SOCKETS, _) => any_sockets(pool, random),
        (netlink::INDEX, _) => vec![random.u8(..2), 0, 0, 0],
        (netlink::SIZE_BYTES, 1..4) => MIB.to_ne_bytes().into(),
        (netlink::BACKEND_IDENTIFIER, 1..4) => b"backend\0".into(),
        (_, 1) => (number(random) as u32).to_ne_bytes().into(),
        _ => number(random).to_ne_bytes().into(),
    };
    put(bytes, kind, &payload);
    // A wrong length now and then.
    let start = bytes.len() - payload.len().next_multiple_of(4) - 4;
    if random.u8(..24) == 0 {
        bytes[start] ^= 1 << random.u8(..8);
    }
}

/// A message to the family, which is more or less one.
fn any_message(family: u16, command: u8, pool: &Pool, random: &mut Rng) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes.extend([command, 1, 0, 0]);
    // The device that is meant, so that most are about one that there is.
    if random.u8(..8) > 0 {
        put(&mut bytes, netlink::INDEX, &[random.u8(..2), 0, 0, 0]);
    }
    if command == netlink::CONNECT && random.bool() {
        put(&mut bytes, netlink::SIZE_BYTES, &MIB.to_ne_bytes());
        put(&mut bytes, netlink::SOCKETS, &any_sockets(pool, random));
    }
    for _ in 0..random.u8(..6) {
        any_attribute(&mut bytes, pool, random);
    }
    if random.u8(..16) == 0 {
        bytes.truncate(random.usize(16..=bytes.len()));
    }
    let flags = if random.u8(..16) == 0 {
        random.u16(..)
    } else {
        5
    }; // NLM_F_REQUEST | NLM_F_ACK
    let len = bytes.len() as u32;
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..6].copy_from_slice(&family.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(flags | 5).to_ne_bytes());
    bytes
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
    let netlink = Netlink::open();
    for (index, _) in netlink.status(None) {
        let _ = netlink.disconnect(index);
    }
    VICTIMS.map(assert_can_be_connected);
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
    link.disconnect().unwrap();
    link.wait_free();
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
            self.pool.server.kill();
            self.pool.refill();
        }
        // Sets free who is in NBD_DO_IT, or waits for a server.
        let netlink = Netlink::open();
        while self.working.load(Ordering::Relaxed) > 0 {
            self.pool.server.kill();
            let _ = VICTIMS.map(|index| netlink.disconnect(index));
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Through netlink; the ioctl has its own test.
fn descriptors_of_anything(guest: &Guest) {
    let netlink = Netlink::open();
    let device = Setup::new(MIB).index(1).attach();
    device.kill_server();
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
    device.disconnect().unwrap();
    device.wait_free();
    assert_usable(0);
    assert_usable(1);
}

fn is_stream(file: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_type(file) == Ok(SocketType::STREAM)
}

/// A socket that listens is no connection. Those that come in on it are somebody else's, whatever the
/// driver does with the one that listens.
fn listening_sockets(_: &Guest) {
    let accepted = AtomicU64::new(0);
    for round in 0..40 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| connect_till_refused(address, &over));
            }
            scope.spawn(|| accept_till_over(&listener, &over, &accepted));
            thread::sleep(Duration::from_millis(round % 8));
            // It may begin, and ends at once.
            let _over = Over(&over);
            let _ = start_with(&listener);
        });
    }
    say(&format!("{} connections accepted", accepted.into_inner()));
    let path = format!("/tmp/listener-{}", std::process::id());
    let _ = start_with(UnixListener::bind(&path).unwrap());
    std::fs::remove_file(&path).unwrap();
    assert_usable(0);
}

fn start_with(socket: impl AsFd) -> SysResult {
    let device = device::open(0, 0).unwrap();
    ioctl_number(&device, SET_SOCK, socket.as_fd().as_raw_fd() as u64)?;
    ioctl_number(&device, SET_SIZE, MIB)?;
    ioctl_number(&device, DO_IT, 0)
}

fn connect_till_refused(address: SocketAddr, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let Ok(mut client) = TcpStream::connect(address) else {
            return;
        };
        // When whoever accepts it waits for that.
        thread::sleep(Duration::from_millis(3));
        let _ = client.write_all(b"x");
    }
}

fn accept_till_over(listener: &TcpListener, over: &AtomicBool, accepted: &AtomicU64) {
    while !over.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((socket, _)) => {
                assert_receives(socket);
                accepted.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => thread::sleep(Duration::from_micros(200)),
        }
    }
}

/// The same with one that was a connection when the device was given it.
fn a_connection_that_begins_to_listen(_: &Guest) {
    let mut heard = 0;
    for _ in 0..30 {
        let server = Server::new();
        let ours = server.connect(Transport::Tcp4);
        let netlink = Netlink::open();
        let setup = Setup::new(MIB)
            .index(0)
            .sockets([ours.try_clone().unwrap()]);
        let index = netlink.connect(&setup).expect("to connect");
        let _link = Link {
            server,
            netlink,
            index,
        };
        connect_unspec(&ours).expect("to undo the connection");
        // Where the driver was quicker, the socket is shut down and cannot.
        if rustix::net::listen(&ours, 4).is_ok() {
            let listener = TcpListener::from(ours);
            let port = listener.local_addr().unwrap().port();
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            heard += u32::from(hears_of(&listener, address));
        }
    }
    say(&format!("{heard} times something came in on it"));
    assert_usable(0);
}

/// Connects to a socket that may not listen any more. Whether that went well.
fn hears_of(listener: &TcpListener, address: SocketAddr) -> bool {
    listener.set_nonblocking(true).unwrap();
    let Ok(mut client) = TcpStream::connect(address) else {
        return false;
    };
    let Ok((accepted, _)) = listener.accept() else {
        return false;
    };
    let _ = client.write_all(b"x");
    assert_receives(accepted);
    true
}

/// It is told what is sent to it, or that the connection is over.
fn assert_receives(mut socket: TcpStream) {
    let limit = Some(patient(device::SOON));
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(limit).unwrap();
    if let Err(error) = socket.read(&mut [0]) {
        let kind = error.kind();
        assert_eq!(
            kind,
            ErrorKind::ConnectionReset,
            "a connection that hears nothing"
        );
    }
}

/// One who keeps the descriptor of a socket can do to it what he likes.
fn meddling_with_the_socket(_: &Guest) {
    if debug_kernel::runs() {
        // Its calls look at user's memory with the socket locked; lockdep is right, and then off.
        skip("who uses a device's socket can wait for memory that the device must write out");
    }
    let mut random = Rng::with_seed(seed());
    for round in 0..9 {
        let kind = [Transport::Tcp4, Transport::Tcp6, Transport::Unix][round % 3];
        meddle(kind, &mut random);
    }
    assert_usable(0);
}

fn meddle(kind: Transport, random: &mut Rng) {
    let server = Server::new();
    let sockets = [server.connect(kind), server.connect(kind)];
    let netlink = Netlink::open();
    let setup = Setup::new(MIB)
        .index(0)
        .timeout(1)
        .flags(device::USUAL_FLAGS | CAN_MULTI_CONN);
    let copies = sockets.iter().map(|socket| socket.try_clone().unwrap());
    let index = netlink.connect(&setup.sockets(copies)).expect("to connect");
    let device = device::open(index, libc::O_DIRECT).unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // With an error, or not; but it ends.
                let _ = device.read_at(&mut Buffer::new(4096), 0);
                let _ = device.write_at(&Buffer::new(64 << 10), 65536);
            }
        });
        for _ in 0..12 {
            thread::sleep(Duration::from_millis(random.u64(..6)));
            torment(&sockets[random.usize(..2)], random);
        }
        over.store(true, Ordering::Relaxed);
        // Who has lost a part of a reply to us waits for its timeout.
    });
    drop(device);
    netlink.disconnect(index).expect("to disconnect");
    let free = wait_until(device::SOON, || {
        netlink.status(Some(index)) == [(index, false)]
    });
    assert!(free.is_ok(), "the device is still in use");
}

fn torment(socket: &OwnedFd, random: &mut Rng) {
    use rustix::net::{RecvFlags, Shutdown, recv, shutdown, sockopt};
    const TCP_ULP: i32 = 31;
    const IPV6_ADDRFORM: i32 = 1;
    match random.u8(..10) {
        0 => drop(recv(socket, &mut [0; 100][..], RecvFlags::DONTWAIT)),
        1 => drop(sockopt::set_socket_send_buffer_size(
            socket,
            1 << random.u32(..20),
        )),
        2 => drop(sockopt::set_socket_recv_buffer_size(
            socket,
            1 << random.u32(..20),
        )),
        3 => drop(set_socket_option(
            socket,
            libc::IPPROTO_TCP,
            TCP_ULP,
            b"tls\0",
        )),
        4 => drop(set_socket_option(
            socket,
            libc::IPPROTO_IPV6,
            IPV6_ADDRFORM,
            &libc::AF_INET.to_ne_bytes(),
        )),
        5 => drop(sockopt::set_socket_linger(socket, Some(Duration::ZERO))),
        6 => drop(sockopt::set_tcp_cork(socket, random.bool())),
        7 => drop(sockopt::set_tcp_user_timeout(socket, random.u32(..100))),
        8 if random.u8(..3) == 0 => drop(shutdown(socket, Shutdown::Both)),
        9 if random.u8(..3) == 0 => {
            // It is no connection any more, and then it listens.
            let _ = connect_unspec(socket);
            let _ = rustix::net::listen(socket, 1);
        }
        _ => {}
    }
}
