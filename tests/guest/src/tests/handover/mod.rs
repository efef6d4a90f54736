// SPDX-License-Identifier: GPL-2.0

//! Connections that are handed over to new sockets while they are alive, by the family "rnbd".

mod draining;
mod losses;
mod refused;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use neli::types::Buffer as Bytes;
use rustix::io::Errno;

use super::outages::{Attached, Host, Storage, under_fio};
use crate::debug_kernel::patient;
use crate::device::{SOON, USUAL_FLAGS, assert_pattern, errno, pattern, store_pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, say, skip, wait_until};
use crate::netlink::{Attr, Link, Netlink, Setup, attr};
use crate::proto::{CAN_MULTI_CONN, Command};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult};
use crate::test;

pub fn tests() -> Vec<Test> {
    let under_load = vec![
        test!(one_connection_under_load).limit_seconds(120),
        test!(all_connections_under_load).limit_seconds(120),
        test!(at_once_under_load).limit_seconds(120),
        test!(blue_and_green).limit_seconds(300),
    ];
    [
        under_load,
        draining::tests(),
        losses::tests(),
        refused::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const MIB: u64 = 1 << 20;

const CONNECTION_GET: u8 = 2;
const HANDOVER: u8 = 8;

/// Attributes of the command.
const DEVICE: u16 = 1;
const CONNECTION: u16 = 2;
const SOCKETS: u16 = 3;
const DRAIN: u16 = 4;
const BACKEND: u16 = 5;

/// Attributes of a connection in a list, and its states.
const INDEX: u16 = 2;
const STATE: u16 = 3;
const IN_FLIGHT: u16 = 8;
const RECONNECTS: u16 = 14;
const ALIVE: u32 = 0;
const DRAINING: u32 = 1;

/// A handover needs a server that allows several connections.
const FLAGS: u64 = USUAL_FLAGS | CAN_MULTI_CONN;

fn setup(size: u64) -> Setup {
    Setup::new(size).index(0).flags(FLAGS)
}

/// A socket to talk to the family with.
fn open(guest: &Guest) -> Netlink {
    if guest.driver == Driver::Nbd {
        skip("the family is rnbd's");
    }
    let rnbd = Netlink::try_open_family("rnbd").expect("the family rnbd");
    rnbd.request_ext_ack();
    rnbd
}

fn sockets_attr(sockets: &[OwnedFd]) -> Attr {
    let numbers: Vec<u8> = sockets
        .iter()
        .flat_map(|socket| socket.as_raw_fd().to_ne_bytes())
        .collect();
    attr(SOCKETS, Bytes::from(numbers))
}

/// Hands connections of device 0 over: one of them, or all.
pub fn hand_over(
    rnbd: &Netlink,
    connection: Option<u32>,
    sockets: &[OwnedFd],
    drain_ms: u32,
) -> SysResult<()> {
    let mut attrs = vec![
        attr(DEVICE, 0u32),
        sockets_attr(sockets),
        attr(DRAIN, drain_ms),
    ];
    attrs.extend(connection.map(|connection| attr(CONNECTION, connection)));
    rnbd.ask(HANDOVER, attrs).map(drop)
}

/// The same, as soon as an earlier one has finished.
fn hand_over_soon(rnbd: &Netlink, connection: Option<u32>, sockets: &[OwnedFd], drain_ms: u32) {
    let mut answer = Err(Errno::BUSY);
    let _ = wait_until(SOON, || {
        answer = hand_over(rnbd, connection, sockets, drain_ms);
        answer != Err(Errno::BUSY)
    });
    assert_eq!(answer, Ok(()));
}

/// So many milliseconds on the stock kernel, and more on a slow one.
fn patient_ms(ms: u32) -> u32 {
    patient(Duration::from_millis(ms.into())).as_millis() as u32
}

fn connect(server: &Server, transport: Transport, count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| server.connect(transport)).collect()
}

/// Whether the last that came over a connection of the server is a goodbye.
fn has_said_goodbye(server: &Server, connection: usize) -> bool {
    let requests = server.requests();
    let last = requests.iter().rfind(|r| r.connection == connection);
    last.is_some_and(|request| request.command == Command::Disconnect)
}

fn commands_on(server: &Server, connection: usize) -> Vec<Command> {
    let requests = server.requests().into_iter();
    let ours = requests.filter(|request| request.connection == connection);
    ours.map(|request| request.command).collect()
}

fn wait_for_end(server: &Server, living: usize) {
    let ended = wait_until(SOON, || server.living() == living);
    assert!(ended.is_ok(), "{} connections are left", server.living());
}

/// What writers at the same place write.
#[derive(Clone, Copy, PartialEq)]
enum Contents {
    Different,
    /// A server that is cut off may execute a write late, so there must be no newer one that this could undo.
    Same,
}

/// Writes to a device and reads it back, each in its own part, while `act` runs. No operation may fail. `act` is
/// given a function that waits until some more were done.
fn under_load(link: &Link, contents: Contents, act: impl FnOnce(&dyn Fn())) {
    let server = &link.server;
    const PART: u64 = 2 * MIB;
    const LEN: usize = 64 << 10;
    let done = AtomicBool::new(false);
    let operations = AtomicU64::new(0);
    let longest = AtomicU64::new(0);
    thread::scope(|scope| {
        for worker in 0..3u64 {
            let direct = link.direct();
            let (done, operations, longest) = (&done, &operations, &longest);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(worker);
                let mut seed = worker << 32;
                while !done.load(Ordering::Relaxed) {
                    if contents == Contents::Different {
                        seed += 1;
                    }
                    let offset = worker * PART + random.u64(0..(PART - LEN as u64) / 4096) * 4096;
                    let data = Buffer::filled(LEN, |data| pattern(seed, offset, data));
                    let began = Instant::now();
                    direct.write_all_at(&data, offset).expect("to write");
                    let mut back = Buffer::new(LEN);
                    direct.read_exact_at(&mut back, offset).expect("to read");
                    let took = began.elapsed().as_millis() as u64;
                    longest.fetch_max(took, Ordering::Relaxed);
                    assert_pattern(seed, offset, &back);
                    assert_pattern(seed, offset, &server.peek(offset, LEN));
                    operations.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _done = Until(&done);
        act(&|| {
            let goal = operations.load(Ordering::Relaxed) + 3;
            let more = wait_until(SOON, || operations.load(Ordering::Relaxed) >= goal);
            assert!(more.is_ok(), "the load stands still");
        });
    });
    let operations = operations.into_inner();
    say(&format!(
        "{operations} operations, the longest took {} ms",
        longest.into_inner()
    ));
    assert!(operations > 3);
}

fn one_connection_under_load(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix, Transport::Tls] {
        let link = setup(8 * MIB).attach_over(&[transport; 2]).settle();
        let news = Netlink::listen();
        under_load(&link, Contents::Different, |some_more| {
            for round in 0..12 {
                let sockets = connect(&link.server, transport, 1);
                hand_over_soon(&rnbd, Some(round % 2), &sockets, patient_ms(5000));
                // The old one ends, and there are two again.
                wait_for_end(&link.server, 2);
                some_more();
            }
        });
        for connection in 0..12 {
            assert!(has_said_goodbye(&link.server, connection), "{connection}");
        }
        assert_eq!(news.dead_link(), None, "nobody need dial");
        link.disconnect_and_wait();
    }
}

fn all_connections_under_load(guest: &Guest) {
    let rnbd = open(guest);
    for (transport, count) in [(Transport::Tcp4, 1), (Transport::Unix, 4)] {
        let link = setup(8 * MIB).attach_over(&vec![transport; count]).settle();
        let news = Netlink::listen();
        under_load(&link, Contents::Different, |some_more| {
            for _ in 0..15 {
                let sockets = connect(&link.server, transport, count);
                hand_over_soon(&rnbd, None, &sockets, patient_ms(5000));
                wait_for_end(&link.server, count);
                some_more();
            }
        });
        for connection in 0..15 * count {
            assert!(has_said_goodbye(&link.server, connection), "{connection}");
        }
        assert_eq!(news.dead_link(), None, "nobody need dial");
        link.disconnect_and_wait();
    }
}

/// What is in flight is sent again.
fn at_once_under_load(guest: &Guest) {
    let rnbd = open(guest);
    for transport in [Transport::Tcp4, Transport::Unix, Transport::Tls] {
        let link = setup(8 * MIB).attach_over(&[transport; 2]).settle();
        let news = Netlink::listen();
        under_load(&link, Contents::Same, |some_more| {
            for _ in 0..25 {
                let sockets = connect(&link.server, transport, 2);
                hand_over_soon(&rnbd, None, &sockets, 0);
                some_more();
            }
        });
        wait_for_end(&link.server, 2);
        assert_eq!(news.dead_link(), None, "nobody need dial");
        link.disconnect_and_wait();
    }
}

/// Two nbdkits on one file, each of which is restarted while the other serves.
fn blue_and_green(guest: &Guest) {
    let rnbd = open(guest);
    let _storage = Storage::new();
    let mut hosts = ["blue", "green"].map(Host::local);
    let attached = Attached::to([&hosts[0], &hosts[0]]);
    under_fio(|| {
        for round in 0..20 {
            let (old, new) = (round % 2, (round + 1) % 2);
            let sockets = [hosts[new].dial().socket, hosts[new].dial().socket];
            hand_over_soon(&rnbd, None, &sockets, patient_ms(3000));
            // It ends when its clients have left it.
            hosts[old].shut_down();
            hosts[old].revive();
        }
    });
    assert_eq!(attached.news.dead_link(), None, "nobody need dial");
}

/// Reads 32 KiB in each of `count` threads, while `act` runs. They are in flight on connection 0 by then, and none
/// fails.
fn while_reading(link: &Link, count: u64, act: impl FnOnce()) {
    const LEN: usize = 32 << 10;
    for reader in 0..count {
        store_pattern(&link.server, 1, reader * 2 * LEN as u64, LEN);
    }
    let direct = link.direct();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..count)
            .map(|reader| {
                let direct = &direct;
                scope.spawn(move || {
                    let offset = reader * 2 * LEN as u64;
                    let mut back = Buffer::new(LEN);
                    errno(direct.read_exact_at(&mut back, offset))?;
                    assert_pattern(1, offset, &back);
                    Ok(())
                })
            })
            .collect();
        link.server
            .wait_for("all requests", |requests| requests.len() as u64 >= count);
        act();
        for reader in readers {
            let read: SysResult<()> = reader.join().unwrap();
            assert_eq!(read, Ok(()));
        }
    });
}

/// Connection 0 of the server answers nothing, and the others are honest.
fn first_is_silent(server: &Server) {
    server.script(|conn, request| match conn.index {
        0 if request.command == Command::Read => Ok(()),
        _ => conn.serve(request),
    });
}
