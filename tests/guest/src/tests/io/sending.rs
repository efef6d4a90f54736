// SPDX-License-Identifier: GPL-2.0

//! Many requests at once, and sockets that take no more for a while.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::net::sockopt::{set_socket_send_buffer_size, set_tcp_nodelay, tcp_nodelay};

use super::{KIB, MIB, written};
use crate::debug_kernel::enough;
use crate::device::{self, Plan, assert_pattern, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, run_on, say, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::proto::{self, Command};
use crate::server::{Server, Transport};
use crate::stacks;
use crate::sys::{Buffer, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(requests_are_in_flight_together),
        test!(more_at_once_than_one_call_sends),
        test!(more_than_one_turn_sends),
        test!(what_is_queued_last_is_sent),
        test!(nothing_is_kept_back),
        test!(programs_that_forget_tcp_nodelay),
    ]
}

fn requests_are_in_flight_together(_: &Guest) {
    const COUNT: usize = 24;
    let rig = Plan::new(1 << 20).attach();
    // Answers only when all have come, so fewer in flight would never be answered.
    rig.server.script(|conn, request| {
        conn.defer(request)?;
        while conn.deferred() < COUNT {
            let next = conn.next_request()?;
            conn.defer(&next)?;
        }
        conn.send_deferred()
    });
    thread::scope(|scope| {
        for index in 0..COUNT as u64 {
            let direct = rig.direct();
            // Far apart, so that they are not merged.
            scope.spawn(move || {
                direct
                    .read_exact_at(&mut Buffer::new(512), index * 8192)
                    .unwrap()
            });
        }
    });
    rig.server.be_honest();
}

/// So many requests wait for a socket that takes nothing that they are not all sent by one call.
fn more_at_once_than_one_call_sends(_: &Guest) {
    const READS: u64 = 100;
    let rig = Plan::new(16 << 20).send_buffer(16 * KIB).attach();
    fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
    let go_on = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&go_on);
    rig.server.script(move |conn, request| {
        while !told.load(Ordering::Relaxed) && !conn.is_ended() {
            thread::sleep(Duration::from_millis(5));
        }
        conn.serve(request)
    });
    let direct = rig.direct();
    thread::scope(|scope| {
        let _go_on = Until(&go_on);
        scope.spawn(|| {
            let data = Buffer::new(MIB);
            direct.write_all_at(&data, 0).expect("to write");
        });
        rig.server.wait_for_command(Command::Write);
        for index in 0..READS {
            // Far apart, so that they are not merged.
            let offset = 2 * MIB as u64 + index * 8192;
            let direct = &direct;
            scope.spawn(move || {
                direct
                    .read_exact_at(&mut Buffer::new(512), offset)
                    .expect("to read");
            });
        }
        assert!(wait_until(device::SOON, stacks::others_wait).is_ok());
    });
    assert_eq!(rig.server.requests_of(Command::Read).len() as u64, READS);
}

/// There is room for all at once, after there was none: far more than a sender sends before it lets others
/// have a turn.
fn more_than_one_turn_sends(_: &Guest) {
    const LIMIT: &str = "/proc/sys/net/core/wmem_max";
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    let ours = socket.try_clone().unwrap();
    set_socket_send_buffer_size(&ours, 4096).expect("SO_SNDBUF");
    let netlink = Netlink::open();
    let index = netlink.connect(&Setup::new(64 << 20).sockets([socket]));
    let index = index.expect("to connect");
    let direct = device::open(index, libc::O_DIRECT).expect("the device");
    let reads = Arc::new(AtomicBool::new(false));
    let may_read = Arc::clone(&reads);
    server.script(move |conn, request| {
        while !may_read.load(Ordering::Relaxed) && !conn.is_ended() {
            thread::sleep(Duration::from_millis(10));
        }
        conn.serve(request)
    });
    let mut data = Buffer::scattered(32 * MIB);
    pattern(8, 0, &mut data);
    thread::scope(|scope| {
        let writer = scope.spawn(|| direct.write_all_at(&data, 0));
        server.wait_for_command(Command::Write);
        // By then the other requests of this write are queued, too.
        thread::sleep(enough(Duration::from_millis(500), Duration::from_secs(3)));
        let before = fs::read_to_string(LIMIT).unwrap();
        fs::write(LIMIT, (128 * MIB).to_string()).unwrap();
        set_socket_send_buffer_size(&ours, 64 * MIB).expect("SO_SNDBUF");
        fs::write(LIMIT, before).unwrap();
        reads.store(true, Ordering::Relaxed);
        writer.join().unwrap().expect("to write");
    });
    assert_pattern(8, 0, &server.peek(0, 32 * MIB));
    netlink.disconnect(index).expect("to disconnect");
}

/// Of two that queue a request at the same time one sends for both, and nothing comes afterwards that would
/// send what he has left.
fn what_is_queued_last_is_sent(_: &Guest) {
    // rnbd has a long read sent by whoever submits it.
    const LONG: usize = 64 * KIB;
    // More loops than the first one takes to send.
    const LATEST: usize = 4096;
    let rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    let (together, arrived) = (Barrier::new(2), AtomicUsize::new(0));
    let end = Instant::now() + enough(Duration::from_secs(10), Duration::from_secs(5));
    let over = AtomicBool::new(false);
    let rounds = |late: bool| {
        let mut buffer = Buffer::new(LONG);
        let mut random = Rng::new();
        for round in 1.. {
            if together.wait().is_leader() {
                over.store(Instant::now() > end, Ordering::Relaxed);
            }
            together.wait();
            if over.load(Ordering::Relaxed) {
                return round;
            }
            // Closer than any barrier brings two tasks together.
            arrived.fetch_add(1, Ordering::Relaxed);
            while arrived.load(Ordering::Relaxed) < 2 * round {
                std::hint::spin_loop();
            }
            if late {
                (0..random.usize(..LATEST)).for_each(|_| std::hint::spin_loop());
            }
            let at = u64::from(late) * LONG as u64;
            direct.read_exact_at(&mut buffer, at).unwrap();
        }
        unreachable!()
    };
    let rounds = &rounds;
    thread::scope(|scope| {
        let threads = [false, true].map(|late| {
            scope.spawn(move || {
                run_on(usize::from(late));
                rounds(late)
            })
        });
        let counts = threads.map(|thread| thread.join().unwrap());
        say(&format!("{} rounds", counts[0]));
    });
}

/// TCP would keep back for 200 ms what is sent with the promise that more follows.
fn nothing_is_kept_back(_: &Guest) {
    let rig = Plan::new(1 << 20).transport(Transport::Tcp4).attach();
    let direct = rig.direct();
    let shortest = |transfer: &dyn Fn()| {
        let times = (0..20).map(|_| {
            let began = Instant::now();
            transfer();
            began.elapsed()
        });
        times.min().unwrap()
    };
    let read = shortest(&|| direct.read_exact_at(&mut Buffer::new(512), 0).unwrap());
    let write = shortest(&|| direct.write_all_at(&Buffer::new(512), 0).unwrap());
    for took in [read, write] {
        assert!(took < Duration::from_millis(150), "{took:?} at least");
    }
}

/// A program dials, forgets the option, and hands the socket over.
fn programs_that_forget_tcp_nodelay(guest: &Guest) {
    let driver = guest.expected("tcp-nodelay-is-set");
    let set = driver == Driver::Rnbd;
    let nodelay = |socket: &OwnedFd| tcp_nodelay(socket).unwrap();
    let server = Server::new();
    let forgetful = |transport| {
        let socket = server.connect(transport);
        set_tcp_nodelay(&socket, false).unwrap();
        let kept = socket.try_clone().unwrap();
        (socket, kept)
    };
    for transport in [Transport::Tcp4, Transport::Tcp6, Transport::Tls] {
        // By ioctl.
        let (socket, kept) = forgetful(transport);
        let plan = Plan::new(MIB as u64);
        let mut client = plan.start_over(vec![socket]);
        client.wait_ready(MIB as u64);
        assert_eq!(nodelay(&kept), set, "{transport:?}");
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        direct.write_all_at(&written(1, 0, 4 * KIB), 0).unwrap();
        assert_eq!(ioctl_number(&direct, proto::DISCONNECT, 0), Ok(0));
        drop(direct);
        assert_eq!(client.wait(), Ok(0));
        assert_eq!(nodelay(&kept), set, "it stays");
        // By netlink: for a new device, and in the place of a dead connection.
        let (socket, kept) = forgetful(transport);
        let netlink = Netlink::open();
        let setup = Setup::new(MIB as u64).index(1).dead_timeout(5);
        assert_eq!(netlink.connect(&setup.sockets([socket])), Ok(1));
        assert_eq!(nodelay(&kept), set, "{transport:?}");
        let news = Netlink::listen();
        server.kill();
        assert_eq!(news.expect_dead_link(), 1);
        let (socket, kept) = forgetful(transport);
        assert!(!nodelay(&kept), "not yet");
        let change = Setup::change(1).sockets([socket]);
        assert_eq!(netlink.reconfigure(&change), Ok(()));
        assert_eq!(nodelay(&kept), set, "{transport:?}");
        let direct = device::open(1, libc::O_DIRECT).unwrap();
        direct.write_all_at(&written(2, 0, 4 * KIB), 0).unwrap();
        drop(direct);
        netlink.disconnect(1).unwrap();
        assert_eq!(nodelay(&kept), set, "it stays");
    }
}
