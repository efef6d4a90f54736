// SPDX-License-Identifier: GPL-2.0

//! The generic netlink family "rnbd", which lists devices and connections.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use neli::attr::Attribute;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, gettid, set_capabilities};

use crate::device::{self, Plan, SOON, USUAL_FLAGS, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, run_on, skip, wait_until};
use crate::netlink::{Attr, Netlink, Setup, attr, find, number, text};
use crate::proto::{CAN_MULTI_CONN, CLEAR_SOCK, Command, READ_ONLY};
use crate::server::Transport;
use crate::sys::ioctl_number;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(tells_that_rnbd_is_loaded),
        test!(devices),
        test!(states_of_devices),
        test!(connections),
        test!(the_oldest_request),
        test!(addresses),
        test!(one_device),
        test!(without_privilege),
        test!(many_devices).parameters("nbds_max=300"),
        test!(many_connections),
        test!(long_backend),
        test!(times_without_end),
        test!(refuses_what_it_does_not_know),
        test!(a_list_that_is_not_read_to_its_end),
        test!(beside_sessions_that_come_and_go).limit_seconds(120),
    ]
}

const MIB: u64 = 1 << 20;

/// More connections than a part of a list has room for.
const MANY: usize = 250;

const DEVICE_GET: u8 = 1;
const CONNECTION_GET: u8 = 2;

/// Attributes of a device.
const INDEX: u16 = 1;
const STATE: u16 = 2;
const INTERFACE: u16 = 3;
const PID: u16 = 4;
const BACKEND: u16 = 5;
const SIZE: u16 = 6;
const BLOCK_SIZE: u16 = 7;
const FLAGS: u16 = 8;
const CONNECTIONS: u16 = 9;
const ALIVE: u16 = 10;
const TIMEOUT: u16 = 11;
const DEAD_CONN_TIMEOUT: u16 = 12;

/// States of a device.
const UNUSED: u32 = 0;
const CONNECTED: u32 = 1;
const LOST: u32 = 2;
const ENDED: u32 = 3;

/// Attributes of a connection.
mod conn {
    pub const DEVICE: u16 = 1;
    pub const INDEX: u16 = 2;
    pub const STATE: u16 = 3;
    pub const PEER: u16 = 4;
    pub const LOCAL: u16 = 5;
    pub const PROTOCOL: u16 = 6;
    pub const ULP: u16 = 7;
    pub const IN_FLIGHT: u16 = 8;
    pub const REQUESTS: u16 = 9;
    pub const REPLIES: u16 = 10;
    pub const ERRORS: u16 = 11;
    pub const BYTES_SENT: u16 = 12;
    pub const BYTES_RECEIVED: u16 = 13;
    pub const RECONNECTS: u16 = 14;
    pub const SILENT: u16 = 16;
    pub const OLDEST: u16 = 17;
}

/// A socket to talk to the family with.
fn open(guest: &Guest) -> Netlink {
    if guest.driver == Driver::Nbd {
        skip("the family is rnbd's");
    }
    Netlink::try_open_family("rnbd").expect("the family rnbd")
}

fn list_devices(rnbd: &Netlink) -> Vec<Vec<Attr>> {
    rnbd.list(DEVICE_GET, vec![]).expect("a list")
}

fn list_connections(rnbd: &Netlink, index: u32) -> Vec<Vec<Attr>> {
    let device = attr(conn::DEVICE, index);
    rnbd.list(CONNECTION_GET, vec![device]).expect("a list")
}

fn state(rnbd: &Netlink, index: u32) -> u32 {
    let devices = list_devices(rnbd);
    let ours = |attrs: &&Vec<Attr>| number::<u32>(attrs, INDEX) == Some(index);
    let device = devices.iter().find(ours).expect("the device");
    number(device, STATE).expect("a state")
}

fn tells_that_rnbd_is_loaded(guest: &Guest) {
    let family = Netlink::try_open_family("rnbd").map(|netlink| netlink.family.version);
    match guest.expected("family-rnbd") {
        Driver::Nbd => assert_eq!(family, Err(Errno::NOENT)),
        Driver::Rnbd => assert_eq!(family, Ok(1)),
    }
}

fn devices(guest: &Guest) {
    let rnbd = open(guest);
    let flags = USUAL_FLAGS | CAN_MULTI_CONN | READ_ONLY;
    let setup = Setup::new(3 * MIB).index(1).block_size(4096).flags(flags);
    let setup = setup.timeout(7).dead_timeout(11).backend("an image");
    let link = setup.attach_over(&[Transport::Tcp4, Transport::Unix]);
    let devices = list_devices(&rnbd);
    let numbers = |kind| devices.iter().map(|d| number::<u32>(d, kind)).collect();
    let indices: Vec<_> = numbers(INDEX);
    assert_eq!(indices, [Some(0), Some(1)]);
    let states: Vec<_> = numbers(STATE);
    assert_eq!(states, [Some(UNUSED), Some(CONNECTED)]);
    assert_eq!(devices[0].len(), 2, "{:?}", devices[0]);
    let device = &devices[1];
    assert_eq!(number::<u32>(device, INTERFACE), Some(1));
    let tid = gettid().as_raw_nonzero().get() as u32;
    assert_eq!(number::<u32>(device, PID), Some(tid));
    assert_eq!(text(device, BACKEND).as_deref(), Some("an image"));
    assert_eq!(number::<u64>(device, SIZE), Some(3 * MIB));
    assert_eq!(number::<u32>(device, BLOCK_SIZE), Some(4096));
    assert_eq!(number::<u64>(device, FLAGS), Some(flags));
    assert_eq!(number::<u32>(device, CONNECTIONS), Some(2));
    assert_eq!(number::<u32>(device, ALIVE), Some(2));
    assert_eq!(number::<u64>(device, TIMEOUT), Some(7000));
    assert_eq!(number::<u64>(device, DEAD_CONN_TIMEOUT), Some(11_000));

    let change = Setup::change(1).backend("an image").size(5 * MIB);
    assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    assert_eq!(number::<u64>(&list_devices(&rnbd)[1], SIZE), Some(5 * MIB));
    link.disconnect_and_wait();
    assert_eq!(list_devices(&rnbd)[1].len(), 2);
}

fn states_of_devices(guest: &Guest) {
    let rnbd = open(guest);
    let link = Setup::new(MIB).index(0).dead_timeout(20).attach().settle();
    link.kill_server();
    assert_eq!(state(&rnbd, 0), LOST);
    assert_eq!(link.revive(), Ok(()));
    assert_eq!(state(&rnbd, 0), CONNECTED);
    let open = File::open("/dev/nbd0").expect("to open it");
    assert_eq!(link.disconnect(), Ok(()));
    assert_eq!(state(&rnbd, 0), ENDED);
    drop(open);
    link.wait_free();
    assert_eq!(state(&rnbd, 0), UNUSED);

    // Requests do not wait here, but a new connection can be provided.
    let link = Setup::new(MIB).index(0).attach().settle();
    link.kill_server();
    assert_eq!(read_page(&link.direct(), 0), Err(Errno::IO));
    assert_eq!(state(&rnbd, 0), LOST);
    assert_eq!(link.revive(), Ok(()));
    assert_eq!(state(&rnbd, 0), CONNECTED);
    link.disconnect_and_wait();

    let device = Plan::new(MIB).attach();
    let devices = list_devices(&rnbd);
    let entry = &devices[device.index as usize];
    assert_eq!(number::<u32>(entry, INTERFACE), Some(0));
    assert_eq!(state(&rnbd, device.index), CONNECTED);
    let open = device.open_to_read();
    assert_eq!(ioctl_number(&open, CLEAR_SOCK, 0), Ok(0));
    assert_eq!(state(&rnbd, device.index), ENDED);
}

fn connections(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.dead_timeout(20);
    let link = link
        .attach_over(&[Transport::Unix, Transport::Unix])
        .settle();
    let direct = link.direct();
    let before = sum(&list_connections(&rnbd, 0), conn::REQUESTS);
    for page in 0..8 {
        assert_eq!(read_page(&direct, page * 4096), Ok(()));
    }
    link.server.script(|conn, request| match request.command {
        Command::Read => conn.refuse(request, 5),
        _ => conn.serve(request),
    });
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    link.server.be_honest();
    let seen = list_connections(&rnbd, 0);
    assert_eq!(sum(&seen, conn::REQUESTS), before + 9);
    assert_eq!(sum(&seen, conn::REPLIES), before + 9);
    assert_eq!(sum(&seen, conn::ERRORS), 1);
    assert_eq!(sum(&seen, conn::IN_FLIGHT), 0);
    assert_eq!(sum(&seen, conn::SILENT), 0);
    assert_eq!(sum(&seen, conn::OLDEST), 0);
    assert_eq!(sum(&seen, conn::BYTES_SENT), (before + 9) * 28);
    assert!(sum(&seen, conn::BYTES_RECEIVED) >= 8 * 4096 + 9 * 16);

    link.server.kill_connection(1);
    let dead = || number::<u32>(&list_connections(&rnbd, 0)[1], conn::STATE) == Some(2);
    assert!(wait_until(SOON, dead).is_ok(), "its death is not shown");
    assert_eq!(number::<u32>(&list_devices(&rnbd)[0], ALIVE), Some(1));
    assert_eq!(link.revive(), Ok(()));
    let seen = list_connections(&rnbd, 0);
    let shown = |kind| seen.iter().map(|c| number::<u32>(c, kind)).collect();
    let indices: Vec<_> = shown(conn::INDEX);
    assert_eq!(indices, [Some(0), Some(1)]);
    let states: Vec<_> = shown(conn::STATE);
    assert_eq!(states, [Some(0), Some(0)]);
    let reconnects: Vec<_> = shown(conn::RECONNECTS);
    assert_eq!(reconnects, [Some(0), Some(1)]);
}

/// The sum of a counter of all connections.
fn sum(connections: &[Vec<Attr>], kind: u16) -> u64 {
    let counts = connections.iter().map(|c| number::<u64>(c, kind));
    counts.map(|count| count.expect("a counter")).sum()
}

/// It ages while others are answered, and also where the block layer takes no time stamps.
fn the_oldest_request(guest: &Guest) {
    const AGE: Duration = Duration::from_millis(600);
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup
        .attach_over(&[Transport::Unix, Transport::Unix])
        .settle();
    let direct = link.direct();
    let oldest = || {
        let seen = list_connections(&rnbd, 0);
        let ages = seen.iter().map(|c| number::<u64>(c, conn::OLDEST));
        ages.map(|age| age.expect("an age")).collect::<Vec<u64>>()
    };
    // The jiffies of a machine that is busy may be late by as much.
    for (stamps, late) in [("1", 10), ("0", 2000)] {
        fs::write("/sys/block/nbd0/queue/iostats", stamps).expect("iostats");
        assert_eq!(oldest(), [0, 0]);
        link.server.forget_requests();
        // The first block is answered when the last one is asked for.
        link.server.script(|conn, request| match request.offset {
            0 => {
                let first = request.clone();
                loop {
                    let next = conn.next_request()?;
                    conn.serve(&next)?;
                    if next.offset == MIB - 4096 {
                        return conn.serve(&first);
                    }
                }
            }
            _ => conn.serve(request),
        });
        thread::scope(|scope| {
            // Both use the connection of this processor.
            run_on(0);
            let began = Instant::now();
            let first = scope.spawn(|| read_page(&direct, 0));
            link.server.wait_for_command(Command::Read);
            while began.elapsed() < AGE {
                assert_eq!(read_page(&direct, 8192), Ok(()));
            }
            let ages = oldest();
            let passed = began.elapsed().as_millis() as u64;
            let age = ages.iter().sum::<u64>();
            // The thread may have begun late.
            let right = (400..=passed + late).contains(&age);
            assert!(right, "{ages:?} after {passed} ms, iostats {stamps}");
            assert!(ages.contains(&0), "{ages:?}");
            let seen = list_connections(&rnbd, 0);
            assert_eq!(sum(&seen, conn::IN_FLIGHT), 1);
            assert!(sum(&seen, conn::SILENT) < 300, "the others are answered");
            assert_eq!(read_page(&direct, MIB - 4096), Ok(()));
            assert_eq!(first.join().unwrap(), Ok(()));
        });
        assert_eq!(oldest(), [0, 0]);
        link.server.be_honest();
    }
}

fn addresses(guest: &Guest) {
    let rnbd = open(guest);
    for (transport, family, len, protocol) in [
        (Transport::Tcp4, libc::AF_INET, 16, libc::IPPROTO_TCP),
        (Transport::Tcp6, libc::AF_INET6, 28, libc::IPPROTO_TCP),
        (Transport::Unix, libc::AF_UNIX, 2, 0),
    ] {
        let link = Setup::new(MIB).index(0).attach_over(&[transport]);
        let seen = list_connections(&rnbd, 0);
        let [connection] = &seen[..] else {
            panic!("{seen:?}");
        };
        let protocol = Some(protocol as u32);
        assert_eq!(number::<u32>(connection, conn::PROTOCOL), protocol);
        assert!(find(connection, conn::ULP).is_none());
        for kind in [conn::PEER, conn::LOCAL] {
            let address = find(connection, kind).expect("an address");
            let address = address.payload().as_ref();
            assert_eq!(address.len(), len, "{transport:?}");
            assert_eq!(address[..2], (family as u16).to_ne_bytes());
            if transport == Transport::Tcp4 {
                assert_eq!(address[4..8], [127, 0, 0, 1]);
            }
        }
        // Which server it was is to be seen when it is gone.
        link.server.kill();
        let dead = || number::<u32>(&list_connections(&rnbd, 0)[0], conn::STATE) == Some(2);
        assert!(wait_until(SOON, dead).is_ok(), "its death is not shown");
        assert!(find(&list_connections(&rnbd, 0)[0], conn::PEER).is_some());
        link.disconnect_and_wait();
    }
}

fn one_device(guest: &Guest) {
    let rnbd = open(guest);
    let links = [0, 1].map(|index| Setup::new(MIB).index(index).attach());
    let all = rnbd.list(CONNECTION_GET, vec![]).expect("a list");
    let devices: Vec<_> = all.iter().map(|c| number::<u32>(c, conn::DEVICE)).collect();
    assert_eq!(devices, [Some(0), Some(1)]);
    let one = list_connections(&rnbd, 1);
    assert_eq!(one.len(), 1);
    assert_eq!(number::<u32>(&one[0], conn::DEVICE), Some(1));
    let device = rnbd.list(DEVICE_GET, vec![attr(INDEX, 1u32)]).expect("it");
    assert_eq!(device.len(), 1);
    assert_eq!(number::<u32>(&device[0], INDEX), Some(1));
    let missing = rnbd.list(DEVICE_GET, vec![attr(INDEX, 77u32)]);
    assert_eq!(missing.err(), Some(Errno::NODEV));
    let missing = rnbd.list(CONNECTION_GET, vec![attr(conn::DEVICE, 77u32)]);
    assert_eq!(missing.err(), Some(Errno::NODEV));
    drop(links);
}

fn without_privilege(guest: &Guest) {
    drop(open(guest));
    let link = Setup::new(MIB).index(0).attach_over(&[Transport::Tcp4]);
    // Capabilities belong to a thread.
    let thread = thread::spawn(|| {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        let rnbd = Netlink::try_open_family("rnbd").expect("the family");
        let devices = list_devices(&rnbd);
        assert_eq!(number::<u64>(&devices[0], SIZE), Some(MIB));
        // debugfs shows connections to root only, too.
        let connections = rnbd.list(CONNECTION_GET, vec![]);
        assert_eq!(connections.err(), Some(Errno::PERM));
    });
    thread.join().unwrap();
    drop(link);
}

/// The list needs several parts.
fn many_devices(guest: &Guest) {
    let rnbd = open(guest);
    let link = Setup::new(MIB).index(299).attach();
    let devices = list_devices(&rnbd);
    let indices: Vec<u32> = devices.iter().filter_map(|d| number(d, INDEX)).collect();
    assert_eq!(indices, (0..300).collect::<Vec<u32>>());
    assert_eq!(number::<u32>(&devices[299], STATE), Some(CONNECTED));
    drop(link);
}

fn many_connections(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Tcp6; 60]);
    let other = Setup::new(MIB).index(1).attach();
    let seen = rnbd.list(CONNECTION_GET, vec![]).expect("a list");
    let places: Vec<_> = seen
        .iter()
        .map(|c| (number(c, conn::DEVICE), number(c, conn::INDEX)))
        .collect();
    let mut wanted: Vec<_> = (0..60).map(|index| (Some(0u32), Some(index))).collect();
    wanted.push((Some(1), Some(0u32)));
    assert_eq!(places, wanted);
    assert_eq!(list_connections(&rnbd, 0).len(), 60);
    drop((link, other));
}

/// It does not keep what comes after it out of the list.
fn long_backend(guest: &Guest) {
    let rnbd = open(guest);
    let name = "x".repeat(20_000);
    let link = Setup::new(MIB).index(0).backend(&name).attach();
    let devices = list_devices(&rnbd);
    assert_eq!(devices.len(), 2);
    let told = text(&devices[0], BACKEND).expect("a backend");
    assert_eq!(told, name[..2048]);
    drop(link);
}

fn times_without_end(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).timeout(u64::MAX);
    let link = setup.dead_timeout(u64::MAX).attach();
    let devices = list_devices(&rnbd);
    for kind in [TIMEOUT, DEAD_CONN_TIMEOUT] {
        let milliseconds = number::<u64>(&devices[0], kind);
        assert!(milliseconds > Some(1 << 30), "{milliseconds:?}");
    }
    drop(link);
}

fn refuses_what_it_does_not_know(guest: &Guest) {
    let rnbd = open(guest);
    rnbd.request_ext_ack();
    assert_eq!(rnbd.ask(DEVICE_GET, vec![]).err(), Some(Errno::OPNOTSUPP));
    assert_eq!(rnbd.ask(77, vec![]).err(), Some(Errno::OPNOTSUPP));
    let unknown = rnbd.list(DEVICE_GET, vec![attr(9, 1u32)]);
    assert_eq!(unknown.err(), Some(Errno::INVAL));
    let short = rnbd.list(CONNECTION_GET, vec![attr(conn::DEVICE, 1u8)]);
    assert_eq!(short.err(), Some(Errno::INVAL));
}

/// It keeps the driver from being unloaded, and nothing else from anything.
fn a_list_that_is_not_read_to_its_end(guest: &Guest) {
    let rnbd = open(guest);
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix; MANY]);
    rnbd.begin_list(CONNECTION_GET, vec![]);
    let mut entries = Vec::new();
    assert_eq!(rnbd.receive_part(&mut entries), Ok(false));
    assert!((1..MANY).contains(&entries.len()), "{}", entries.len());
    // What comes next is of other sessions.
    link.disconnect_and_wait();
    drop(link);
    let again = Setup::new(MIB).index(0).attach();
    drop(again);
    assert!(guest.driver.try_unload().is_err(), "it is in use");
    while !rnbd.receive_part(&mut entries).expect("the next part") {}
    let indices: Vec<u32> = entries
        .iter()
        .filter_map(|c| number(c, conn::INDEX))
        .collect();
    assert!(indices.is_sorted(), "{indices:?}");

    rnbd.begin_list(DEVICE_GET, vec![]);
    drop(rnbd);
    let unloaded = wait_until(SOON, || guest.driver.try_unload().is_ok());
    assert!(unloaded.is_ok(), "a socket that was closed keeps it");
    guest.driver.load("nbds_max=2").expect("to load it again");
}

fn beside_sessions_that_come_and_go(guest: &Guest) {
    let rnbd = open(guest);
    let flags = USUAL_FLAGS | CAN_MULTI_CONN;
    thread::scope(|scope| {
        let sessions = scope.spawn(|| {
            for round in 0..60 {
                let setup = Setup::new(MIB).index(0).flags(flags).backend("b");
                let link = setup.dead_timeout(10).attach_over(&[Transport::Unix; 3]);
                if round % 3 == 0 {
                    link.server.kill_connection(0);
                    thread::sleep(Duration::from_millis(5));
                    let socket = link.server.connect(Transport::Unix);
                    let change = Setup::change(0).backend("b").sockets([socket]);
                    let _ = link.netlink.reconfigure(&change);
                }
                link.disconnect_and_wait();
            }
        });
        while !sessions.is_finished() {
            let devices = list_devices(&rnbd);
            assert_eq!(devices.len(), 2);
            assert_eq!(number::<u32>(&devices[1], STATE), Some(UNUSED));
            assert!(list_connections(&rnbd, 0).len() <= 3);
        }
    });
    assert_eq!(device::pid(0), None);
}
