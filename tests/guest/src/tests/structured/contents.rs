// SPDX-License-Identifier: GPL-2.0

//! What chunks carry comes where it belongs, whatever their sizes and their order.

use std::os::unix::fs::FileExt;
use std::{fs, thread};

use fastrand::Rng;

use super::super::user_space::fio;
use super::{FLAGS, KIB, MIB, SIZE, plan, setup, store_with_zeroes};
use crate::device::{self, Plan, pattern};
use crate::front::Session;
use crate::harness::{Guest, Test, say, seed};
use crate::programs::sh;
use crate::proto::{BLKZEROOUT, Command, Request};
use crate::server::{Server, Transport, chunks};
use crate::sys::{Buffer, ioctl_pointer};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(over_each_transport),
        test!(through_the_page_cache),
        test!(in_orders_of_every_kind),
        test!(a_long_hole),
        test!(fio_verifies),
    ]
}

const THREADS: u64 = 4;

/// The part of the device that a thread has for itself.
const AREA: usize = SIZE as usize / THREADS as usize;

/// Device 0 with two connections, by each of the front ends.
const SESSIONS: [fn(Transport) -> Session; 2] = [
    |kind| Session::Ioctl(plan().transport(kind).connections(2).attach()),
    |kind| Session::Netlink(setup().attach_over(&[kind; 2]).settle()),
];

fn over_each_transport(_: &Guest) {
    sh("modprobe vsock_loopback");
    let seed = seed();
    for kind in [
        Transport::Tcp4,
        Transport::Unix,
        Transport::Tls,
        Transport::Tls13,
        Transport::Vsock,
    ] {
        for start in SESSIONS {
            let session = start(kind);
            session.server().serve_in_chunks(seed);
            use_at_random(session.server(), seed, 25);
            session.end();
        }
        say(&format!("{kind:?}"));
    }
}

/// Several threads read, write and clear what is theirs.
fn use_at_random(server: &Server, seed: u64, rounds: u64) {
    thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                let first = thread * AREA as u64;
                let mut random = Rng::with_seed(seed.wrapping_add(thread));
                let expected = use_area(first, &mut random, rounds);
                assert!(server.peek(first, AREA) == expected, "what is stored");
            });
        }
    });
}

/// Answers what is to be there in the end.
fn use_area(first: u64, random: &mut Rng, rounds: u64) -> Vec<u8> {
    const LONGEST: usize = 256 << 10;
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    let mut expected = vec![0; AREA];
    let mut room = Buffer::new(LONGEST);
    for round in 0..rounds {
        let most = if random.u8(..4) == 0 {
            LONGEST / 512
        } else {
            32
        };
        let len = random.usize(1..=most) * 512;
        let at = random.usize(..=(AREA - len) / 512) * 512;
        let (offset, expected, room) = (
            first + at as u64,
            &mut expected[at..at + len],
            &mut room[..len],
        );
        match random.u8(..8) {
            0 | 1 => {
                pattern(round, offset, room);
                direct.write_all_at(room, offset).expect("to write");
                expected.copy_from_slice(room);
            }
            2 => {
                ioctl_pointer(&direct, BLKZEROOUT, &mut [offset, len as u64]).expect("to clear");
                expected.fill(0);
            }
            _ => {
                room.fill(0xa5);
                direct.read_exact_at(room, offset).expect("to read");
                assert!(room == expected, "{len} bytes at {offset} are wrong");
            }
        }
    }
    expected
}

fn through_the_page_cache(_: &Guest) {
    let server = Server::new();
    store_with_zeroes(&server);
    let mut rig = plan().connections(2).attach_to(server);
    rig.server.serve_in_chunks(seed());
    let device = rig.open_to_read();
    let mut back = vec![0xa5; SIZE as usize];
    for (index, piece) in back.chunks_mut(100 * KIB).enumerate() {
        device
            .read_exact_at(piece, (index * 100 * KIB) as u64)
            .expect("to read");
    }
    assert!(rig.server.peek(0, back.len()) == back);
    drop(device);
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Cuts a reply into pieces of `len` bytes, and sends them in this order.
fn in_order(
    request: &Request,
    data: &[u8],
    len: usize,
    order: impl Fn(usize) -> Vec<usize>,
) -> Vec<u8> {
    let pieces: Vec<&[u8]> = data.chunks(len).collect();
    let piece = |index: usize| {
        let offset = request.offset + (index * len) as u64;
        chunks::data(0, request.cookie, offset, pieces[index])
    };
    let mut reply: Vec<u8> = order(pieces.len()).into_iter().flat_map(piece).collect();
    reply.extend(chunks::none(chunks::DONE, request.cookie));
    reply
}

fn in_orders_of_every_kind(_: &Guest) {
    let mut rig = plan().attach();
    store_with_zeroes(&rig.server);
    let direct = rig.direct();
    let ascending = |all: usize| (0..all).collect();
    let descending = |all: usize| (0..all).rev().collect();
    let from_the_middle = |all: usize| (all / 2..all).chain((0..all / 2).rev()).collect();
    // The quarters in turn: four intervals grow, and are joined at the end.
    let by_quarters = |all: usize| {
        let quarter = all.div_ceil(4);
        let at = |index: usize| (0..4).map(move |part| part * quarter + index);
        (0..quarter).flat_map(at).filter(|at| *at < all).collect()
    };
    let orders: [fn(usize) -> Vec<usize>; 4] =
        [ascending, descending, from_the_middle, by_quarters];
    for order in orders {
        for (len, piece) in [
            (512, 1),
            (4096, 3),
            (20 * KIB, 1000),
            (128 * KIB, 4096),
            (128 * KIB, 4097),
        ] {
            rig.server.script(move |conn, request| {
                if request.command != Command::Read {
                    return conn.serve(request);
                }
                let data = conn.stored(request);
                conn.send(&in_order(request, &data, piece, order))
            });
            let mut back = Buffer::filled(len, |data| data.fill(0xa5));
            direct.read_exact_at(&mut back, 8192).expect("to read");
            assert!(rig.server.peek(8192, len) == *back, "{len} by {piece}");
        }
    }
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
}

/// There is nothing behind it that would have the driver look again.
fn a_long_hole(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let plan = Plan::new(64 << 20).flags(FLAGS).transport(transport);
        let mut rig = plan.timeout(5).attach();
        fs::write("/sys/block/nbd0/queue/max_sectors_kb", "32768").unwrap();
        rig.server.script(|conn, request| {
            conn.send(&chunks::hole(
                chunks::DONE,
                request.cookie,
                request.offset,
                request.len,
            ))
        });
        let direct = rig.direct();
        for len in [16 * KIB, 32 * KIB, 36 * KIB, MIB, 32 * MIB] {
            let mut data = Buffer::huge(len);
            data.fill(0xa5);
            direct.read_exact_at(&mut data, 16 << 20).expect("to read");
            assert!(*data == *vec![0; len], "{len}");
        }
        drop(direct);
        assert_eq!(rig.disconnect(), Ok(0));
    }
}

fn fio_verifies(_: &Guest) {
    let link = setup().attach_over(&[Transport::Tcp4; 2]).settle();
    link.server.serve_in_chunks(seed());
    fio("--rw=randrw --bsrange=512-256k --ioengine=libaio --iodepth=16");
    link.disconnect_and_wait();
}
