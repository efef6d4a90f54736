// SPDX-License-Identifier: GPL-2.0

//! A device that was configured by ioctl, and that has lost its server, is started again with new
//! sockets while programs have it open.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::do_it::lost;
use super::geometry::partitioned_server;
use super::user_space::serve;
use crate::device::{self, Plan, Rig, SOON, assert_pattern, assert_usable, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, say, wait_until};
use crate::programs::{Daemon, sh};
use crate::proto::{
    CAN_MULTI_CONN, CLEAR_SOCK, Command, DISCONNECT, DO_IT, SEND_FLUSH, SET_BLKSIZE, SET_SIZE,
    SET_SOCK,
};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(while_a_program_has_it_open),
        test!(by_the_task_that_has_it_open),
        test!(requests_wait_for_it).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(requests_wait_no_longer_than_told).parameters("nbds_max=4 dead_conn_timeout=2"),
        test!(a_disconnect_ends_the_wait).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(an_open_does_not_wait).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(the_partition_table_is_read_later).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(an_open_of_a_dead_device_reads_nothing),
        test!(not_after_its_client_was_killed).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(not_after_its_client_has_cleared_it).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(not_by_a_program_that_looks_for_a_free_device),
        test!(nothing_is_lost_silently),
        test!(not_after_it_was_ended),
        test!(not_with_another_block_size),
        test!(not_with_sockets_that_cannot_be_used),
        test!(with_fewer_and_with_more_connections),
        test!(not_with_another_size),
        test!(with_other_flags),
        test!(again_and_again_under_load)
            .parameters("nbds_max=4 dead_conn_timeout=60")
            .limit_seconds(300),
        test!(a_mounted_file_system_under_nbd_client_persist)
            .parameters("nbds_max=4 dead_conn_timeout=60")
            .limit_seconds(400),
    ]
}

const SIZE: u64 = 1 << 20;
const BLKRRPART: u32 = 0x125f;

/// As of nbd-client -persist.
fn plan_of(size: u64) -> Plan {
    Plan::new(size).persist()
}

/// Passes new sockets to the device as nbd-client does, and starts it. Where the device cannot be
/// started again, that fails.
fn start_again(guest: &Guest, plan: &Plan, server: &Server) -> Option<device::Client> {
    if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
        let device = device::open(0, 0).expect("the device");
        let socket = server.connect(Transport::Unix);
        let passed = ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64);
        assert_eq!(passed, Err(Errno::BUSY));
        return None;
    }
    let client = plan.start(server);
    let started = wait_until(SOON, || {
        device::pid(0) == Some(client.tid.as_raw_nonzero().get())
    });
    assert!(started.is_ok(), "not started again: {:?}", device::pid(0));
    Some(client)
}

/// As nbd-client -d, which the client takes for an end that was asked for.
fn disconnect(device: &File, client: &mut device::Client) {
    ioctl_number(device, DISCONNECT, 0).expect("NBD_DISCONNECT");
    assert_eq!(client.wait(), Ok(0));
}

/// A device that has lost its server and is still open.
fn lose(rig: &mut Rig) {
    rig.server.kill();
    // See do_it.rs.
    let _ = rig.client.wait();
}

fn while_a_program_has_it_open(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let plan = plan_of(SIZE).transport(transport);
        let mut rig = plan.attach();
        let direct = rig.direct();
        lose(&mut rig);
        let failed = direct.read_exact_at(&mut Buffer::new(4096), 0);
        assert_eq!(device::errno(failed), Err(Errno::IO));

        let server = Server::new();
        let Some(mut client) = start_again(guest, &plan, &server) else {
            return;
        };
        // Those who have it open find it as it was.
        let written = Buffer::filled(64 << 10, |data| pattern(3, 0, data));
        direct.write_all_at(&written, 4096).expect("to write");
        direct.sync_all().expect("to flush");
        assert_eq!(server.peek(4096, written.len()), *written);
        let mut read = Buffer::new(written.len());
        direct.read_exact_at(&mut read, 4096).expect("to read");
        assert!(*read == *written);
        assert_eq!(device::sysfs(0, "size"), (SIZE / 512).to_string());

        disconnect(&direct, &mut client);
        drop(direct);
        assert_usable(0);
    }
}

/// Programs that do not close the device in between.
fn by_the_task_that_has_it_open(guest: &Guest) {
    let device = device::open(0, 0).expect("the device");
    for round in 0..5 {
        let server = Server::new();
        let socket = server.connect(Transport::Unix);
        if round == 0 {
            ioctl_number(&device, SET_BLKSIZE, 512).expect("NBD_SET_BLKSIZE");
            ioctl_number(&device, SET_SIZE, SIZE).expect("NBD_SET_SIZE");
        }
        let passed = ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64);
        if round > 0 && guest.expected("a-lost-device-starts-again") == Driver::Nbd {
            assert_eq!(passed, Err(Errno::BUSY));
            break;
        }
        assert_eq!(passed, Ok(0));
        let answer = thread::scope(|scope| {
            let runs = scope.spawn(|| ioctl_number(&device, DO_IT, 0));
            let direct = device::open(0, libc::O_DIRECT).expect("the device");
            let read = wait_until(SOON, || {
                direct.read_exact_at(&mut Buffer::new(4096), 0).is_ok()
            });
            assert!(read.is_ok(), "round {round}: nothing can be read");
            drop(direct);
            server.kill();
            runs.join().unwrap()
        });
        assert_eq!(answer, lost(guest), "round {round}");
    }
    drop(device);
    assert_usable(0);
}

fn requests_wait_for_it(guest: &Guest) {
    let plan = plan_of(SIZE).connections(2);
    let mut rig = plan.attach();
    let direct = rig.direct();
    let written = Buffer::filled(64 << 10, |data| pattern(5, 0, data));
    thread::scope(|scope| {
        rig.server.script(|conn, _| conn.close());
        let writes = scope.spawn(|| {
            direct.write_all_at(&written, 0)?;
            direct.sync_all()
        });
        assert_eq!(rig.client.wait(), lost(guest));
        if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
            assert_eq!(device::errno(writes.join().unwrap()), Err(Errno::IO));
            return;
        }
        thread::sleep(Duration::from_millis(300));
        assert!(!writes.is_finished());
        let server = Server::new();
        let client = start_again(guest, &plan, &server);
        writes.join().unwrap().expect("to write");
        assert_eq!(server.peek(0, written.len()), *written);
        ioctl_number(&direct, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert_eq!(client.unwrap().wait(), Ok(0));
    });
    drop(direct);
    assert_usable(0);
}

fn requests_wait_no_longer_than_told(guest: &Guest) {
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    let began = Instant::now();
    let failed = direct.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(device::errno(failed), Err(Errno::IO));
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let waited = began.elapsed();
        assert!(waited >= Duration::from_millis(1900), "{waited:?}");
        let log = guest.log();
        let line = "nbd0: no connection left, I/O fails until the device is reconnected";
        assert!(log.iter().any(|l| l.contains(line)), "{log:?}");
    }
    // That is not too late for it.
    let server = Server::new();
    if let Some(mut client) = start_again(guest, &plan, &server) {
        direct
            .read_exact_at(&mut Buffer::new(4096), 0)
            .expect("to read");
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

/// `nbd-client -d`, `qemu-nbd -d`
fn a_disconnect_ends_the_wait(guest: &Guest) {
    let mut rig = plan_of(SIZE).attach();
    let direct = rig.direct();
    lose(&mut rig);
    thread::scope(|scope| {
        let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
        if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
            thread::sleep(Duration::from_millis(300));
            assert!(!reader.is_finished());
        }
        let device = device::open(0, 0).expect("the device");
        ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
        ioctl_number(&device, CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
        assert_eq!(device::errno(reader.join().unwrap()), Err(Errno::IO));
    });
    drop(direct);
    assert_usable(0);
}

/// The client itself has to open the device. Looking for partitions then would wait for the client.
fn an_open_does_not_wait(_: &Guest) {
    let mut rig = plan_of(SIZE).attach();
    let direct = rig.direct();
    lose(&mut rig);
    for _ in 0..3 {
        let began = Instant::now();
        drop(rig.open_to_read());
        let took = began.elapsed();
        assert!(took < SOON, "{took:?}");
    }
    drop(direct);
    assert_usable(0);
}

/// A size that was set makes the next open read the partition table, if there is a connection.
fn the_partition_table_is_read_later(guest: &Guest) {
    const SIZE: u64 = 8 << 20;
    if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
        return;
    }
    let partitioned = partitioned_server();
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    assert_eq!(ioctl_number(&direct, SET_SIZE, 2 * SIZE), Ok(0));
    lose(&mut rig);
    let began = Instant::now();
    drop(rig.open_to_read());
    let took = began.elapsed();
    assert!(took < SOON, "{took:?}");
    let mut client = plan_of(2 * SIZE).start(&partitioned);
    let there = wait_until(SOON, || fs::exists("/sys/block/nbd0/nbd0p1").unwrap());
    assert!(there.is_ok());
    disconnect(&direct, &mut client);
    drop(direct);
    assert_usable(0);
}

/// Counts the messages of the kernel about reads that failed.
fn read_errors(guest: &Guest) -> usize {
    let words = [
        "I/O error, dev nbd0",
        "on dev nbd0",
        "Disk read failed",
        "unable to read",
    ];
    let about = |line: &&String| words.iter().any(|words| line.contains(words));
    guest.log().iter().filter(about).count()
}

fn an_open_of_a_dead_device_reads_nothing(guest: &Guest) {
    for lost in [true, false] {
        let mut rig = plan_of(SIZE).attach();
        let direct = rig.direct();
        if lost {
            lose(&mut rig);
        } else {
            ioctl_number(&direct, DISCONNECT, 0).expect("NBD_DISCONNECT");
            assert_eq!(rig.client.wait(), Ok(0));
        }
        // But for whoever asks for it, who is told.
        let reread = ioctl_number(rig.open_to_read(), BLKRRPART, 0);
        assert_eq!(reread, Err(Errno::IO));
        let before = read_errors(guest);
        for _ in 0..5 {
            drop(rig.open_to_read());
        }
        let errors = read_errors(guest) - before;
        match guest.expected("an-open-of-a-dead-device-reads-nothing") {
            Driver::Nbd => assert!(errors > 0),
            Driver::Rnbd => assert_eq!(errors, 0),
        }
        drop(direct);
    }
    assert_usable(0);
}

/// The end of the process is the end of its session.
fn not_after_its_client_was_killed(_: &Guest) {
    let server = Server::new();
    let mut killed = helper("attach", server.connect(Transport::Unix));
    let connected = wait_until(SOON, || {
        device::sysfs(0, "size") == (SIZE / 512).to_string()
    });
    assert!(connected.is_ok());
    let direct = device::open(0, libc::O_DIRECT).expect("the device");
    killed.kill().expect("to kill it");
    killed.wait().expect("it to end");
    let failed = direct.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(device::errno(failed), Err(Errno::IO));
    let socket = Server::new().connect(Transport::Unix);
    ioctl_number(&direct, SET_SIZE, SIZE).expect("NBD_SET_SIZE");
    let passed = ioctl_number(&direct, SET_SOCK, socket.as_raw_fd() as u64);
    assert_eq!(passed, Err(Errno::BUSY));
    drop(direct);
    assert_usable(0);
}

/// A process of its own that uses nbd0 and `socket`; see helper.rs.
fn helper(what: &str, socket: OwnedFd) -> std::process::Child {
    std::process::Command::new("/proc/self/exe")
        .args(["helper", what, "/dev/nbd0", &SIZE.to_string()])
        .stdin(socket)
        .spawn()
        .expect("a process")
}

/// A program that looks for a free device by passing each its socket must not get one that is in use,
/// whose users would go on with another image.
fn not_by_a_program_that_looks_for_a_free_device(guest: &Guest) {
    let mut rig = plan_of(SIZE).attach();
    let direct = rig.direct();
    lose(&mut rig);
    let server = Server::new();
    let mut other = helper("probe", server.connect(Transport::Unix));
    assert_eq!(
        other.wait().expect("it to end").code(),
        Some(Errno::BUSY.raw_os_error())
    );
    // One that sets the size first means this device.
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let mut other = helper("attach", server.connect(Transport::Unix));
        let served = wait_until(SOON, || {
            direct.read_exact_at(&mut Buffer::new(4096), 0).is_ok()
        });
        assert!(served.is_ok());
        ioctl_number(&direct, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert!(other.wait().expect("it to end").success());
    }
    // The program that was refused has left a connection.
    server.kill();
    let gone = wait_until(SOON, || server.living() == 0);
    assert!(gone.is_ok());
    drop(direct);
    assert_usable(0);
}

/// A client that ends, and does not come back: nbd-client without -persist, qemu-nbd.
fn not_after_its_client_has_cleared_it(_: &Guest) {
    let mut rig = Plan::new(SIZE).hold().attach();
    let direct = rig.direct();
    rig.server.kill();
    rig.client.wait_lost();
    thread::scope(|scope| {
        let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
        thread::sleep(Duration::from_millis(100));
        // NBD_CLEAR_SOCK, and a close.
        rig.client.go_on();
        assert_eq!(device::errno(reader.join().unwrap()), Err(Errno::IO));
    });
    let socket = Server::new().connect(Transport::Unix);
    let passed = ioctl_number(&direct, SET_SOCK, socket.as_raw_fd() as u64);
    assert_eq!(passed, Err(Errno::BUSY));
    drop(direct);
    assert_usable(0);
}

/// What was written, and was not sent when the server was lost, is sent to the next one, or whoever
/// flushes it is told.
fn nothing_is_lost_silently(guest: &Guest) {
    let plan = plan_of(SIZE);
    for others in [true, false] {
        let mut rig = plan.clone().hold().attach();
        let other = others.then(|| rig.open());
        let written = Buffer::filled(256 << 10, |data| pattern(9, 0, data));
        rig.open().write_all_at(&written, 0).expect("to write");
        rig.server.kill();
        rig.client.wait_lost();
        rustix::fs::sync();
        if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
            rig.client.go_on();
            continue;
        }
        let server = Server::new();
        let device = device::open(0, 0).expect("the device");
        let socket = server.connect(Transport::Unix);
        ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64).expect("NBD_SET_SOCK");
        thread::scope(|scope| {
            let runs = scope.spawn(|| ioctl_number(&device, DO_IT, 0));
            let served = wait_until(SOON, || {
                rig.direct()
                    .read_exact_at(&mut Buffer::new(4096), SIZE - 4096)
                    .is_ok()
            });
            assert!(served.is_ok());
            let flushed = rig.open().sync_all();
            let there = server.peek(0, written.len()) == *written;
            assert!(there || flushed.is_err(), "others: {others}");
            ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
            assert_eq!(runs.join().unwrap(), Ok(0));
        });
        drop((device, other));
        rig.client.go_on();
    }
    assert_usable(0);
}

/// Who has disconnected it, or has dropped its sockets, wants no other server to take its place.
fn not_after_it_was_ended(_: &Guest) {
    for end in [DISCONNECT, CLEAR_SOCK] {
        let mut rig = plan_of(SIZE).attach();
        let direct = rig.direct();
        assert_eq!(ioctl_number(&direct, end, 0), Ok(0));
        assert_eq!(rig.client.wait(), Ok(0));
        let server = Server::new();
        let socket = server.connect(Transport::Unix);
        let passed = ioctl_number(&direct, SET_SOCK, socket.as_raw_fd() as u64);
        assert_eq!(passed, Err(Errno::BUSY));
        assert_eq!(ioctl_number(&direct, DO_IT, 0), Err(Errno::BUSY));
        drop(direct);
        assert_usable(0);
    }
}

/// Passes `sockets` to a lost device, and answers what NBD_DO_IT does.
fn pass_and_start(sockets: &[OwnedFd]) -> SysResult {
    let device = device::open(0, 0).expect("the device");
    for socket in sockets {
        ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64)?;
    }
    ioctl_number(&device, DO_IT, 0)
}

fn not_with_another_block_size(guest: &Guest) {
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let server = Server::new();
        assert_eq!(ioctl_number(&direct, SET_BLKSIZE, 4096), Ok(0));
        assert_eq!(
            pass_and_start(&[server.connect(Transport::Unix)]),
            Err(Errno::INVAL)
        );
        let line = "nbd0: cannot be started again with 1048576 bytes in blocks of 4096";
        assert!(guest.log().iter().any(|l| l.contains(line)));
        assert!(server.is_deserted());
    }
    // A client that sets another one in between, as old ones do, is not stopped.
    let server = Server::new();
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        assert_eq!(ioctl_number(&direct, SET_BLKSIZE, 4096), Ok(0));
    }
    if let Some(mut client) = start_again(guest, &plan, &server) {
        direct
            .read_exact_at(&mut Buffer::new(512), 512)
            .expect("to read");
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

fn not_with_sockets_that_cannot_be_used(guest: &Guest) {
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    let server = Server::new();
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        // In use by another device.
        let taken = server.connect(Transport::Unix);
        let copy = taken.try_clone().expect("dup");
        let other = plan_of(SIZE).index(1);
        let mut other_client = other.start_over(vec![copy]);
        other_client.wait_ready(SIZE);
        assert_eq!(pass_and_start(&[taken]), Err(Errno::BUSY));
        // It was not started, so there are no sockets.
        assert_eq!(pass_and_start(&[]), Err(Errno::BUSY));
        // Several, which the server does not allow.
        let several = [(); 2].map(|()| server.connect(Transport::Unix));
        assert_eq!(pass_and_start(&several), Err(Errno::INVAL));
        let device = device::open(1, 0).expect("the device");
        ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
        assert_eq!(other_client.wait(), Ok(0));
    }
    if let Some(mut client) = start_again(guest, &plan, &server) {
        direct
            .read_exact_at(&mut Buffer::new(4096), 0)
            .expect("to read");
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

fn with_fewer_and_with_more_connections(guest: &Guest) {
    let plan = plan_of(SIZE).connections(2);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    for connections in [1, 3, 2] {
        let server = Server::new();
        let plan = plan_of(SIZE)
            .flags(device::USUAL_FLAGS | CAN_MULTI_CONN)
            .connections(connections);
        let Some(mut client) = start_again(guest, &plan, &server) else {
            break;
        };
        for _ in 0..8 {
            direct
                .read_exact_at(&mut Buffer::new(4096), 0)
                .expect("to read");
        }
        let uses = wait_until(SOON, || server.living() == connections.min(2));
        assert!(uses.is_ok(), "{connections}: {}", server.living());
        server.kill();
        assert_eq!(client.wait(), Err(Errno::PIPE), "{connections}");
    }
    drop(direct);
    assert_usable(0);
}

fn not_with_another_size(guest: &Guest) {
    let plan = plan_of(SIZE);
    let mut rig = plan.attach();
    let direct = rig.direct();
    lose(&mut rig);
    if guest.expected("a-lost-device-starts-again") == Driver::Rnbd {
        let server = Server::new();
        assert_eq!(ioctl_number(&direct, SET_SIZE, 2 * SIZE), Ok(0));
        assert_eq!(
            pass_and_start(&[server.connect(Transport::Unix)]),
            Err(Errno::INVAL)
        );
    }
    if let Some(mut client) = start_again(guest, &plan, &Server::new()) {
        assert_eq!(device::sysfs(0, "size"), (SIZE / 512).to_string());
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

/// A server that cannot do less than the first one cannot surprise those who have it open.
fn with_other_flags(guest: &Guest) {
    let mut rig = plan_of(SIZE).attach();
    let direct = rig.direct();
    lose(&mut rig);
    let server = Server::new();
    let plan = plan_of(SIZE).flags(SEND_FLUSH);
    if let Some(mut client) = start_again(guest, &plan, &server) {
        let line = "nbd0: the server's flags were";
        assert!(guest.log().iter().any(|l| l.contains(line)));
        // What the first server could do is still asked for.
        direct
            .write_all_at(&Buffer::new(4096), 0)
            .expect("to write");
        direct.sync_all().expect("to flush");
        assert_eq!(server.requests_of(Command::Flush).len(), 1);
        sh("blkdiscard -l 65536 /dev/nbd0");
        assert_eq!(server.requests_of(Command::Trim).len(), 1);
        // And after a change of the size, too.
        assert_eq!(ioctl_number(&direct, SET_SIZE, 2 * SIZE), Ok(0));
        sh("blkdiscard -l 65536 /dev/nbd0");
        assert_eq!(server.requests_of(Command::Trim).len(), 2);
        disconnect(&direct, &mut client);
    }
    drop(direct);
    assert_usable(0);
}

/// A writer sees no error, and what it has written is there.
fn again_and_again_under_load(guest: &Guest) {
    if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
        return;
    }
    let plan = plan_of(SIZE).transport(Transport::Tcp4);
    let mut rig = plan.attach();
    let direct = rig.direct();
    let storage = &rig.server;
    let done = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                for at in (0..SIZE).step_by(64 << 10) {
                    let written = Buffer::filled(64 << 10, |data| pattern(rounds, at, data));
                    direct.write_all_at(&written, at).expect("to write");
                    let mut read = Buffer::new(64 << 10);
                    direct.read_exact_at(&mut read, at).expect("to read");
                    assert_pattern(rounds, at, &read);
                }
                rounds += 1;
            }
            rounds
        });
        for round in 0..20 {
            thread::sleep(Duration::from_millis(100));
            for connection in 0..100 {
                storage.kill_connection(connection);
            }
            assert_eq!(rig.client.wait(), Err(Errno::PIPE), "round {round}");
            rig.client = plan.start(storage);
        }
        done.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    say(&format!("{rounds} times written and read"));
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
    assert_usable(0);
}

/// The whole thing, as users do it.
fn a_mounted_file_system_under_nbd_client_persist(guest: &Guest) {
    const RESTARTS: usize = 20;
    let revive = || {
        let _ = fs::remove_file("/tmp/restart.sock");
        serve(
            "nbdkit -f -U /tmp/restart.sock file /tmp/restart.img",
            "/tmp/restart.sock",
        )
    };
    sh("rm -f /tmp/restart.img; truncate -s 64M /tmp/restart.img; mkfs.ext4 -q /tmp/restart.img");
    let mut server = revive();
    let mut client = Daemon::start("nbd-client -L -n -p -unix /tmp/restart.sock /dev/nbd0");
    let connected = wait_until(SOON * 6, || {
        device::pid(0).is_some() && device::sysfs(0, "size") != "0"
    });
    assert!(connected.is_ok(), "{}", client.said());
    sh("mkdir -p /tmp/restart && mount /dev/nbd0 /tmp/restart");
    if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
        server.kill();
        assert!(client.wait(SOON), "{}", client.said());
        sh("umount /tmp/restart");
        return;
    }
    let (done, written) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                write_and_read(written.load(Ordering::Relaxed));
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
        for round in 0..RESTARTS {
            thread::sleep(Duration::from_millis(200));
            // nbd-client ends if a server accepts it and dies before it has negotiated.
            fs::remove_file("/tmp/restart.sock").expect("the socket");
            if round % 2 == 0 {
                server.kill();
            } else {
                // Then it answers with ESHUTDOWN.
                server.terminate();
                assert!(server.wait(SOON), "{}", server.said());
            }
            let before = written.load(Ordering::Relaxed);
            server = revive();
            // The first of them may have been complete when the server was killed.
            let goes_on = wait_until(SOON * 3, || {
                load.is_finished() || written.load(Ordering::Relaxed) > before + 1
            });
            assert!(
                goes_on.is_ok() && !load.is_finished(),
                "round {round}: {}",
                client.said()
            );
        }
        done.store(true, Ordering::Relaxed);
    });
    say(&format!("{} files written", written.into_inner()));
    assert!(client.said().contains("Reconnecting"), "{}", client.said());
    sh("umount /tmp/restart");
    sh("nbd-client -L -d /dev/nbd0");
    assert!(client.wait(SOON), "{}", client.said());
    sh("fsck.ext4 -fn /tmp/restart.img && rm /tmp/restart.img");
}

/// Writes file number `n` of the mounted file system to the server, and reads it from there.
fn write_and_read(n: u64) {
    let path = format!("/tmp/restart/{}", n % 16);
    let data = Buffer::filled(256 << 10, |data| pattern(n, 0, data));
    let mut file = File::create(&path).expect("to create a file");
    file.write_all(&data).expect("to write");
    file.sync_all().expect("to flush");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("fadvise");
    assert_pattern(n, 0, &fs::read(&path).expect("to read"));
}
