// SPDX-License-Identifier: GPL-2.0

//! The ioctls of linux/nbd.h: what they take and what they refuse.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::debug_kernel::patient;
use crate::device::{self, Plan, Rig, USUAL_FLAGS, assert_usable, largest_block};
use crate::harness::{Guest, Test, skip};
use crate::proto::{
    CAN_MULTI_CONN, CLEAR_QUE, CLEAR_SOCK, DISCONNECT, DO_IT, PRINT_DEBUG, SET_BLKSIZE, SET_FLAGS,
    SET_SIZE, SET_SIZE_BLOCKS, SET_SOCK, SET_TIMEOUT,
};
use crate::server::{Server, Transport};
use crate::sys::{SysResult, ioctl_compat, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(need_cap_sys_admin),
        test!(unknown_numbers),
        test!(set_sock_refuses_what_is_no_stream_socket),
        test!(set_sock_takes_tcp_and_unix),
        test!(block_sizes),
        test!(sizes),
        test!(sizes_in_blocks),
        test!(any_timeout_and_flags),
        test!(do_it_needs_a_socket),
        test!(several_sockets_need_multi_conn),
        test!(a_second_task_may_not_add_sockets),
        test!(clear_sock_lets_another_task_begin),
        test!(a_running_device_takes_no_socket_and_no_second_do_it),
        test!(relics_do_nothing),
        test!(disconnect_and_clear_sock_without_a_connection),
        test!(clear_sock_shuts_down_the_sockets),
        test!(closing_the_device_drops_the_sockets),
        test!(a_device_opened_read_only_can_be_set_up),
        test!(compat_numbers_and_errnos),
        test!(compat_connection),
    ]
}

const ALL: [u32; 11] = [
    SET_SOCK,
    SET_BLKSIZE,
    SET_SIZE,
    DO_IT,
    CLEAR_SOCK,
    CLEAR_QUE,
    PRINT_DEBUG,
    SET_SIZE_BLOCKS,
    DISCONNECT,
    SET_TIMEOUT,
    SET_FLAGS,
];

fn device() -> File {
    device::open(0, 0).unwrap()
}

/// NBD_SET_SOCK with a socket of this process.
fn set_sock(device: &File, socket: impl AsFd) -> SysResult {
    ioctl_number(device, SET_SOCK, socket.as_fd().as_raw_fd() as u64)
}

fn need_cap_sys_admin(_: &Guest) {
    // Capabilities belong to a thread.
    let thread = thread::spawn(|| {
        let device = device();
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        set_capabilities(None, sets).unwrap();
        for request in ALL.into_iter().chain([0xab0b, 0xac00]) {
            assert_eq!(
                ioctl_number(&device, request, 0),
                Err(Errno::PERM),
                "{request:#x}"
            );
        }
    });
    thread.join().unwrap();
}

fn unknown_numbers(_: &Guest) {
    let device = device();
    assert_eq!(ioctl_number(&device, 0xab0b, 0), Err(Errno::NOTTY));
    assert_eq!(ioctl_number(&device, 0xabff, 0), Err(Errno::NOTTY));
    assert_eq!(
        ioctl_number(&device, 0xac00, 0),
        Err(Errno::INVAL),
        "not NBD's letter"
    );
    // The same number with a direction and a size is another ioctl.
    assert_eq!(ioctl_number(&device, 0x4004_ab01, 512), Err(Errno::NOTTY));
}

fn set_sock_refuses_what_is_no_stream_socket(_: &Guest) {
    let device = device();
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let (packets, _other) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let raw = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None).unwrap();
    assert_eq!(set_sock(&device, &udp), Err(Errno::INVAL), "UDP");
    assert_eq!(
        set_sock(&device, &datagram),
        Err(Errno::INVAL),
        "a UNIX datagram socket"
    );
    assert_eq!(
        set_sock(&device, &packets),
        Err(Errno::INVAL),
        "a UNIX packet socket"
    );
    assert_eq!(
        set_sock(&device, &raw),
        Err(Errno::INVAL),
        "a netlink socket"
    );
    assert_eq!(
        set_sock(&device, File::open("/dev/null").unwrap()),
        Err(Errno::NOTSOCK)
    );
    assert_eq!(set_sock(&device, &device), Err(Errno::NOTSOCK));
    assert_eq!(
        ioctl_number(&device, SET_SOCK, 9999),
        Err(Errno::BADF),
        "no such descriptor"
    );
    assert_eq!(
        ioctl_number(&device, SET_SOCK, i32::MAX as u64),
        Err(Errno::BADF)
    );
    assert_eq!(
        ioctl_number(&device, SET_SOCK, 1 << 31),
        Err(Errno::INVAL),
        "beyond an int"
    );
    assert_eq!(
        ioctl_number(&device, SET_SOCK, 1 << 32),
        Err(Errno::INVAL),
        "beyond an int"
    );
    assert_eq!(
        ioctl_number(&device, SET_SOCK, u64::MAX),
        Err(Errno::INVAL),
        "-1"
    );
    // None of them counts.
    assert_eq!(ioctl_number(&device, DO_IT, 0), Err(Errno::INVAL));
    drop(device);
    assert_usable(0);
}

fn set_sock_takes_tcp_and_unix(_: &Guest) {
    let server = Server::new();
    for transport in [Transport::Tcp4, Transport::Tcp6, Transport::Unix] {
        let device = device();
        assert_eq!(
            set_sock(&device, server.connect(transport)),
            Ok(0),
            "{transport:?}"
        );
    }
    assert_usable(0);
}

fn block_sizes(_: &Guest) {
    let device = device();
    let powers = (9..=16).map(|power| 1 << power);
    for size in powers.chain([0]) {
        let answer = if size <= largest_block() {
            Ok(0)
        } else {
            Err(Errno::INVAL)
        };
        assert_eq!(ioctl_number(&device, SET_BLKSIZE, size), answer, "{size}");
    }
    for size in [
        1,
        256,
        511,
        513,
        1000,
        4097,
        131_072,
        1 << 31,
        1 << 32,
        (1 << 32) + 512,
        1 << 63,
        u64::MAX,
    ] {
        assert_eq!(
            ioctl_number(&device, SET_BLKSIZE, size),
            Err(Errno::INVAL),
            "{size}"
        );
    }
    // 0 meant 1024: that many blocks of 1 KiB fit, and no more.
    assert_eq!(ioctl_number(&device, SET_SIZE_BLOCKS, (1 << 53) - 1), Ok(0));
    assert_eq!(
        ioctl_number(&device, SET_SIZE_BLOCKS, 1 << 53),
        Err(Errno::INVAL)
    );
}

fn sizes(_: &Guest) {
    let device = device();
    for size in [0, 1, 511, 512, 1 << 20, 1 << 40, i64::MAX as u64] {
        assert_eq!(ioctl_number(&device, SET_SIZE, size), Ok(0), "{size}");
    }
    for size in [1 << 63, u64::MAX] {
        assert_eq!(
            ioctl_number(&device, SET_SIZE, size),
            Err(Errno::INVAL),
            "{size}"
        );
    }
    assert_eq!(
        device::sysfs(0, "size"),
        "0",
        "nothing is to be seen before NBD_DO_IT"
    );
}

fn sizes_in_blocks(_: &Guest) {
    let device = device();
    assert_eq!(ioctl_number(&device, SET_BLKSIZE, 4096), Ok(0));
    for blocks in [0, 1, 1 << 20, (1 << 51) - 1] {
        assert_eq!(
            ioctl_number(&device, SET_SIZE_BLOCKS, blocks),
            Ok(0),
            "{blocks}"
        );
    }
    for blocks in [1 << 51, 1 << 52, 1 << 63, u64::MAX] {
        assert_eq!(
            ioctl_number(&device, SET_SIZE_BLOCKS, blocks),
            Err(Errno::INVAL),
            "{blocks}"
        );
    }
}

fn any_timeout_and_flags(_: &Guest) {
    let device = device();
    for value in [0, 1, 30, 1 << 20] {
        assert_eq!(ioctl_number(&device, SET_TIMEOUT, value), Ok(0), "{value}");
    }
    for value in [0, USUAL_FLAGS, 0xffff_ffff, u64::MAX] {
        assert_eq!(ioctl_number(&device, SET_FLAGS, value), Ok(0), "{value:#x}");
    }
}

fn do_it_needs_a_socket(_: &Guest) {
    assert_eq!(ioctl_number(device(), DO_IT, 0), Err(Errno::INVAL));
}

fn several_sockets_need_multi_conn(guest: &Guest) {
    let server = Server::new();
    let device = device();
    for _ in 0..2 {
        assert_eq!(set_sock(&device, server.connect(Transport::Unix)), Ok(0));
    }
    assert_eq!(ioctl_number(&device, SET_FLAGS, USUAL_FLAGS), Ok(0));
    assert_eq!(ioctl_number(&device, DO_IT, 0), Err(Errno::INVAL));
    guest.expect_logged(
        "does not support multiple connections",
        "does not support several connections",
    );
    // With the flag, the same two will do: NBD_DO_IT comes back when they are closed.
    assert_eq!(
        ioctl_number(&device, SET_FLAGS, USUAL_FLAGS | CAN_MULTI_CONN),
        Ok(0)
    );
    server.kill();
    assert_eq!(ioctl_number(&device, DO_IT, 0), device::lost());
}

fn a_second_task_may_not_add_sockets(_: &Guest) {
    let server = Server::new();
    let device = device();
    assert_eq!(set_sock(&device, server.connect(Transport::Unix)), Ok(0));
    thread::scope(|scope| {
        let socket = server.connect(Transport::Unix);
        let second = scope.spawn(|| set_sock(&device, socket));
        assert_eq!(second.join().unwrap(), Err(Errno::BUSY));
    });
    assert_eq!(ioctl_number(&device, SET_FLAGS, CAN_MULTI_CONN), Ok(0));
    assert_eq!(
        set_sock(&device, server.connect(Transport::Unix)),
        Ok(0),
        "but the first may"
    );
}

fn clear_sock_lets_another_task_begin(_: &Guest) {
    let server = Server::new();
    let device = device();
    assert_eq!(set_sock(&device, server.connect(Transport::Unix)), Ok(0));
    assert_eq!(ioctl_number(&device, CLEAR_SOCK, 0), Ok(0));
    thread::scope(|scope| {
        let socket = server.connect(Transport::Unix);
        let second = scope.spawn(|| set_sock(&device, socket));
        assert_eq!(second.join().unwrap(), Ok(0));
    });
}

fn a_running_device_takes_no_socket_and_no_second_do_it(_: &Guest) {
    let mut rig = Plan::new(1 << 20).hold().attach();
    let other = rig.open();
    let assert_busy = |rig: &Rig| {
        assert_eq!(
            set_sock(&other, rig.server.connect(Transport::Unix)),
            Err(Errno::BUSY)
        );
        assert_eq!(ioctl_number(&other, DO_IT, 0), Err(Errno::BUSY));
    };
    assert_busy(&rig);
    assert!(rig.client.still_runs_after(Duration::from_millis(100)));
    // Nor one that was disconnected, but was not closed since. (See `restart` for one that was lost.)
    assert_eq!(rig.disconnect(), Ok(0));
    assert_busy(&rig);
    rig.client.go_on();
    drop(other);
    assert_usable(0);
}

fn relics_do_nothing(_: &Guest) {
    let assert_nothing = |device: &File| {
        for argument in [0, 1, u64::MAX] {
            assert_eq!(ioctl_number(device, CLEAR_QUE, argument), Ok(0));
            assert_eq!(ioctl_number(device, PRINT_DEBUG, argument), Ok(0));
        }
    };
    assert_nothing(&device());
    let mut rig = Plan::new(1 << 20).attach();
    assert_nothing(&rig.open());
    assert_eq!(rig.disconnect(), Ok(0));
}

fn disconnect_and_clear_sock_without_a_connection(_: &Guest) {
    let device = device();
    for _ in 0..2 {
        assert_eq!(ioctl_number(&device, DISCONNECT, 0), Ok(0));
        assert_eq!(ioctl_number(&device, CLEAR_SOCK, 0), Ok(0));
    }
    drop(device);
    assert_usable(0);
}

/// Reads to the end of `socket`, which must come soon.
fn assert_ends(mut socket: UnixStream) {
    socket
        .set_read_timeout(Some(patient(device::SOON)))
        .unwrap();
    let mut rest = Vec::new();
    socket
        .read_to_end(&mut rest)
        .expect("the end of the connection");
}

fn clear_sock_shuts_down_the_sockets(_: &Guest) {
    let device = device();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    assert_eq!(set_sock(&device, &theirs), Ok(0));
    assert_eq!(ioctl_number(&device, CLEAR_SOCK, 0), Ok(0));
    // Although we still have the descriptor.
    assert_ends(ours);
    drop(device);
    assert_usable(0);
}

fn closing_the_device_drops_the_sockets(_: &Guest) {
    let device = device();
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(set_sock(&device, &theirs), Ok(0));
    drop(theirs);
    drop(device);
    assert_ends(ours);
    assert_usable(0);
}

fn a_device_opened_read_only_can_be_set_up(_: &Guest) {
    let device = File::open("/dev/nbd0").unwrap();
    assert_eq!(ioctl_number(&device, SET_BLKSIZE, 4096), Ok(0));
    assert_eq!(ioctl_number(&device, SET_SIZE_BLOCKS, 256), Ok(0));
}

/// Skips the test where 64-bit processes cannot make 32-bit calls.
fn need_compat() {
    if cfg!(not(target_arch = "x86_64")) {
        skip("a 64-bit process can make 32-bit calls on x86-64 only");
    }
}

fn compat_numbers_and_errnos(_: &Guest) {
    need_compat();
    let device = device();
    assert_eq!(ioctl_compat(&device, SET_BLKSIZE, 4096), Ok(0));
    assert_eq!(ioctl_compat(&device, SET_BLKSIZE, 513), Err(Errno::INVAL));
    assert_eq!(
        ioctl_compat(&device, SET_SIZE, u32::MAX),
        Ok(0),
        "not -1: it is unsigned"
    );
    assert_eq!(ioctl_compat(&device, SET_SIZE_BLOCKS, u32::MAX), Ok(0));
    assert_eq!(ioctl_compat(&device, SET_SOCK, u32::MAX), Err(Errno::INVAL));
    assert_eq!(ioctl_compat(&device, SET_SOCK, 9999), Err(Errno::BADF));
    assert_eq!(ioctl_compat(&device, DO_IT, 0), Err(Errno::INVAL));
    assert_eq!(ioctl_compat(&device, CLEAR_QUE, 0), Ok(0));
    assert_eq!(ioctl_compat(&device, 0xab0b, 0), Err(Errno::NOTTY));
    assert_eq!(ioctl_compat(&device, 0xac00, 0), Err(Errno::INVAL));
}

fn compat_connection(_: &Guest) {
    need_compat();
    let mut rig = Plan::new(1 << 20)
        .block_size(1024)
        .timeout(30)
        .compat()
        .attach();
    assert_eq!(rig.sysfs("queue/logical_block_size"), "1024");
    assert_eq!(ioctl_compat(rig.open(), DISCONNECT, 0), Ok(0));
    assert_eq!(rig.client.wait(), Ok(0));
}
