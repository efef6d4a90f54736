// SPDX-License-Identifier: GPL-2.0

//! The command `connect` of the family "rnbd".

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use neli::types::Buffer as Bytes;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::events::{Heard, Listener};
use crate::device::{self, SOON, USUAL_FLAGS, assert_usable, errno, largest_block, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, skip, wait_until};
use crate::netlink::{Attr, Link, Netlink, Setup, attr, number, text};
use crate::programs::sh;
use crate::proto::{CAN_MULTI_CONN, Command, HAS_FLAGS};
use crate::server::{Server, Transport, encrypt_sending, tcp_pair};
use crate::sys::{Buffer, SysResult};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(as_it_was_asked_for),
        test!(sizes_of_requests),
        test!(no_request_is_too_large),
        test!(partitions_are_not_looked_for),
        test!(a_device_ends_with_its_owner),
        test!(the_last_close_disconnects_and_removes),
        test!(only_over_tls),
        test!(refusals),
        test!(without_privilege),
    ]
}

const MIB: u64 = 1 << 20;
const KIB: u32 = 1 << 10;

/// Commands.
const DEVICE_GET: u8 = 1;
const HANDOVER: u8 = 8;
const CONNECT: u8 = 9;

/// Attributes of the command.
const DEVICE: u16 = 1;
const CONNECTION: u16 = 2;
const SOCKETS: u16 = 3;
const DRAIN: u16 = 4;
const BACKEND: u16 = 5;
const SIZE: u16 = 6;
pub const FLAGS: u16 = 7;
const TIMEOUT: u16 = 8;
const DEAD_CONN_TIMEOUT: u16 = 9;
const MINIMUM_BLOCK_SIZE: u16 = 10;
const PREFERRED_BLOCK_SIZE: u16 = 11;
const MAXIMUM_PAYLOAD: u16 = 12;
const NO_PARTITION_SCAN: u16 = 13;
const TLS: u16 = 14;
const OWNED: u16 = 15;
const DISCONNECT_ON_CLOSE: u16 = 16;
const DESTROY_ON_DISCONNECT: u16 = 17;

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

/// A socket to talk to the family with.
pub fn open(guest: &Guest) -> Netlink {
    if guest.driver == Driver::Nbd {
        skip("the family is rnbd's");
    }
    let rnbd = Netlink::try_open_family("rnbd").expect("the family rnbd");
    rnbd.request_ext_ack();
    rnbd
}

fn sockets_attr(sockets: &[OwnedFd]) -> Attr {
    let numbers = sockets.iter().map(|socket| socket.as_raw_fd());
    let numbers: Vec<u8> = numbers.flat_map(i32::to_ne_bytes).collect();
    attr(SOCKETS, Bytes::from(numbers))
}

fn flag(kind: u16) -> Attr {
    attr(kind, Bytes::new())
}

/// Connects nbd0 to a server.
pub fn connect_to(
    rnbd: &Netlink,
    server: Server,
    transports: &[Transport],
    more: &[Attr],
) -> SysResult<Link> {
    let sockets: Vec<OwnedFd> = transports.iter().map(|how| server.connect(*how)).collect();
    let mut attrs = vec![
        attr(DEVICE, 0_u32),
        sockets_attr(&sockets),
        attr(SIZE, 8 * MIB),
        attr(FLAGS, USUAL_FLAGS | CAN_MULTI_CONN),
    ];
    attrs.extend(more.iter().cloned());
    let answer = rnbd.ask(CONNECT, attrs)?.expect("a reply");
    assert_eq!(*answer.cmd(), CONNECT);
    assert_eq!(number(answer.attrs().as_ref(), DEVICE), Some(0_u32));
    Ok(Link {
        server,
        netlink: Netlink::open(),
        index: 0,
    })
}

/// Connects nbd0 to a new, honest server.
fn connect(rnbd: &Netlink, more: &[Attr]) -> Link {
    let connected = connect_to(rnbd, Server::new(), &[Transport::Unix], more);
    connected.unwrap_or_else(|errno| panic!("{errno}: {:?}", rnbd.ext_ack()))
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

/// Also connections that come later.
fn only_over_tls(guest: &Guest) {
    let rnbd = open(guest);
    sh("modprobe tls");
    let refused = |server: Server, socket: OwnedFd| {
        let sockets = [socket];
        let attrs = vec![
            attr(DEVICE, 0_u32),
            sockets_attr(&sockets),
            attr(SIZE, 8 * MIB),
            attr(FLAGS, HAS_FLAGS),
            flag(TLS),
        ];
        let nokey = Errno::from_raw_os_error(libc::ENOKEY);
        assert_eq!(rnbd.ask(CONNECT, attrs).map(drop), Err(nokey));
        let words = "a socket is not encrypted by TLS in the kernel";
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
        drop(server);
    };
    for transport in [Transport::Tcp4, Transport::Unix] {
        let server = Server::new();
        let socket = server.connect(transport);
        refused(server, socket);
    }
    let (half, served) = tcp_pair(([127, 0, 0, 1], 0).into());
    encrypt_sending(&half);
    refused(Server::new(), half);
    drop(served);

    for version in [Transport::Tls, Transport::Tls13] {
        let server = Server::new();
        let link = connect_to(&rnbd, server, &[version; 2], &[flag(TLS)]).expect("to connect");
        assert_eq!(device::read_page(&link.direct(), 0), Ok(()));
        link.server.kill_connection(0);
        let nokey = Errno::from_raw_os_error(libc::ENOKEY);
        assert_eq!(link.revive(), Err(nokey));
        let sockets: Vec<OwnedFd> = [(); 2]
            .map(|()| link.server.connect(Transport::Tcp4))
            .into();
        let attrs = vec![
            attr(DEVICE, 0_u32),
            sockets_attr(&sockets),
            attr(DRAIN, 100_u32),
        ];
        assert_eq!(rnbd.ask(HANDOVER, attrs).map(drop), Err(nokey));
        let words = "a socket is not encrypted by TLS, as the device's must be";
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
        let change = Setup::change(0).sockets([link.server.connect(version)]);
        assert_eq!(link.netlink.reconfigure(&change), Ok(()));
        assert_eq!(device::read_page(&link.direct(), 0), Ok(()));
        link.disconnect_and_wait();
    }
    // The next session may be without.
    connect(&rnbd, &[]).disconnect_and_wait();
}

/// Each leaves the device as it was.
fn refusals(guest: &Guest) {
    let rnbd = open(guest);
    let server = Server::new();
    let socket = || [server.connect(Transport::Unix)];
    let refused = |attrs: Vec<Attr>, errno: Errno, words: &str| {
        assert_eq!(rnbd.ask(CONNECT, attrs).map(drop), Err(errno), "{words}");
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
    };
    let with = |more: Vec<Attr>, errno: Errno, words: &str| {
        let sockets = socket();
        let mut attrs = vec![sockets_attr(&sockets), attr(SIZE, MIB)];
        attrs.extend(more);
        refused(attrs, errno, words);
    };
    let sockets = socket();
    refused(
        vec![attr(SIZE, MIB)],
        Errno::INVAL,
        "at least one socket is needed",
    );
    refused(
        vec![sockets_attr(&sockets)],
        Errno::INVAL,
        "a size in bytes is needed",
    );
    let too_large = vec![sockets_attr(&sockets), attr(SIZE, 1_u64 << 63)];
    refused(too_large, Errno::INVAL, "the size must be below 2^63 bytes");
    let index = vec![attr(DEVICE, u32::MAX)];
    with(index, Errno::INVAL, "no device can have such an index");
    with(
        vec![attr(FLAGS, 1_u64 << 32)],
        Errno::INVAL,
        "the flags must be below 2^32",
    );
    with(
        vec![attr(BACKEND, Bytes::from(&b"a\0b"[..]))],
        Errno::INVAL,
        "the identifier must not have a zero byte in it",
    );
    let words = "the command does not have this attribute";
    with(vec![attr(CONNECTION, 0_u32)], Errno::INVAL, words);
    with(vec![attr(DRAIN, 0_u32)], Errno::INVAL, words);
    let words =
        "the minimum block size must be a power of two that the kernel supports (512 to 65536)";
    for size in [0_u32, 256, 513, 1 << 17] {
        with(vec![attr(MINIMUM_BLOCK_SIZE, size)], Errno::INVAL, words);
    }
    let words =
        "the preferred block size must be a power of two between the minimum one and 32 MiB";
    for size in [0_u32, 256, 3000, 1 << 26] {
        with(vec![attr(PREFERRED_BLOCK_SIZE, size)], Errno::INVAL, words);
    }
    let sizes = vec![
        attr(MINIMUM_BLOCK_SIZE, 4096_u32),
        attr(PREFERRED_BLOCK_SIZE, 512_u32),
    ];
    with(sizes, Errno::INVAL, words);
    let words = "the maximum payload must be at least a page and the preferred block size";
    with(vec![attr(MAXIMUM_PAYLOAD, 4095_u32)], Errno::INVAL, words);
    let sizes = vec![
        attr(PREFERRED_BLOCK_SIZE, 65536_u32),
        attr(MAXIMUM_PAYLOAD, 65535_u32),
    ];
    with(sizes, Errno::INVAL, words);

    let several = [
        server.connect(Transport::Unix),
        server.connect(Transport::Unix),
    ];
    let words = "the server does not allow several connections (NBD_FLAG_CAN_MULTI_CONN)";
    refused(
        vec![sockets_attr(&several), attr(SIZE, MIB)],
        Errno::INVAL,
        words,
    );
    let raw = |numbers: &[i32]| {
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|number| number.to_ne_bytes())
            .collect();
        vec![attr(SOCKETS, Bytes::from(bytes)), attr(SIZE, MIB)]
    };
    refused(raw(&[-1]), Errno::BADF, "a file descriptor is not open");
    refused(raw(&[12345]), Errno::BADF, "a file descriptor is not open");
    refused(
        raw(&[]),
        Errno::INVAL,
        "the sockets must be numbers of 32 bits",
    );
    let file = File::open("/dev/null").expect("/dev/null");
    let words = "a file descriptor is not that of a socket";
    refused(raw(&[file.as_raw_fd()]), Errno::NOTSOCK, words);
    let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let words = "a socket must be TCP, MPTCP, vsock or UNIX";
    refused(raw(&[datagrams.as_raw_fd()]), Errno::INVAL, words);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a socket");
    refused(
        raw(&[listener.as_raw_fd()]),
        Errno::NOTCONN,
        "a socket is not connected",
    );

    let link = connect(&rnbd, &[]);
    with(
        vec![attr(DEVICE, 0_u32)],
        Errno::BUSY,
        "the device is in use",
    );
    link.disconnect_and_wait();
    assert_usable(0);
}

fn without_privilege(guest: &Guest) {
    drop(open(guest));
    // Capabilities belong to a thread.
    thread::scope(|scope| {
        let refused = scope.spawn(|| {
            let mut sets = capabilities(None).expect("capget()");
            sets.effective = CapabilitySet::all() - CapabilitySet::SYS_ADMIN;
            sets.effective &= sets.permitted;
            set_capabilities(None, sets).expect("capset()");
            let rnbd = Netlink::try_open_family("rnbd").expect("the family");
            rnbd.ask(CONNECT, Vec::new()).map(drop)
        });
        assert_eq!(refused.join().unwrap(), Err(Errno::PERM));
    });
}
