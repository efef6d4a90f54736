// SPDX-License-Identifier: GPL-2.0

//! Ends of connections while there is work to do: whoever ends them, nobody hangs, nothing that
//! was acknowledged is lost, and the device can be connected again.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::process::{Pid, Signal, kill_process};

use crate::debug_kernel::patient;
use crate::device::{self, Plan, Rig, SOON, assert_pattern, assert_usable, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{CLEAR_SOCK, Command, DISCONNECT};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(disconnect_with_requests_in_flight),
        test!(disconnect_that_the_server_ignores),
        test!(disconnect_twice),
        test!(clear_sock_with_requests_in_flight),
        test!(client_is_killed),
        test!(client_is_killed_with_requests_in_flight),
        test!(client_is_killed_while_a_write_is_stuck),
        test!(client_is_stopped_and_goes_on),
        test!(client_leaves_after_a_signal),
        test!(nobody_waits_for_room_in_a_socket),
        test!(server_stops_reading_while_a_write_waits_for_room),
        test!(server_ends_where_credentials_are_wanted),
        test!(server_dies_with_dirty_pages),
        test!(server_dies_under_load_again_and_again),
        test!(disconnect_races_with_requests),
        test!(everybody_opens_and_closes_meanwhile),
    ]
}

/// Reads in a thread what will never be answered; true when that has ended, with EIO.
struct DoomedReads(Vec<thread::JoinHandle<Result<(), Errno>>>);

impl DoomedReads {
    fn start(server: &Server, index: u32, count: usize) -> Self {
        let before = server.requests_of(Command::Read).len();
        let threads = (0..count as u64)
            .map(|block| {
                let direct = device::open(index, libc::O_DIRECT).unwrap();
                thread::spawn(move || {
                    errno(direct.read_exact_at(&mut Buffer::new(4096), block * 8192))
                })
            })
            .collect();
        server.wait_for("all the reads", |requests| {
            requests
                .iter()
                .filter(|request| request.command == Command::Read)
                .count()
                >= before + count
        });
        Self(threads)
    }

    fn assert_failed(self) {
        for thread in self.0 {
            let ended = wait_until(SOON, || thread.is_finished());
            assert!(ended.is_ok(), "a read hangs");
            assert_eq!(thread.join().unwrap(), Err(Errno::IO));
        }
    }
}

/// A device whose server takes requests and never answers.
fn silent() -> Rig {
    let rig = Plan::new(1 << 20).attach();
    rig.server.script(|_, _| Ok(()));
    rig
}

fn disconnect_with_requests_in_flight(_: &Guest) {
    let mut rig = silent();
    let reads = DoomedReads::start(&rig.server, 0, 8);
    // The server ends the connection when it is told goodbye.
    assert_eq!(rig.disconnect(), Ok(0));
    reads.assert_failed();
    assert_usable(0);
}

fn disconnect_that_the_server_ignores(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    rig.server.script(|conn, _| conn.stall());
    let reads = DoomedReads::start(&rig.server, 0, 1);
    // As nbd-client -d does it. (Who opens a disconnected device has its partitions looked for.)
    let device = rig.open_to_read();
    assert_eq!(ioctl_number(&device, DISCONNECT, 0), Ok(0));
    assert!(
        rig.client.still_runs_after(Duration::from_millis(500)),
        "it waits for the server"
    );
    assert_eq!(ioctl_number(&device, CLEAR_SOCK, 0), Ok(0));
    drop(device);
    assert_eq!(rig.client.wait(), Ok(0));
    reads.assert_failed();
    assert_usable(0);
}

fn disconnect_twice(_: &Guest) {
    let mut rig = Plan::new(1 << 20).hold().attach();
    let other = rig.open();
    for _ in 0..2 {
        assert_eq!(ioctl_number(&other, DISCONNECT, 0), Ok(0));
    }
    assert_eq!(rig.client.wait(), Ok(0));
    assert_eq!(
        ioctl_number(&other, DISCONNECT, 0),
        Ok(0),
        "after NBD_DO_IT has returned"
    );
    assert_eq!(ioctl_number(&other, CLEAR_SOCK, 0), Ok(0));
    rig.client.go_on();
    drop(other);
    assert_usable(0);
}

fn clear_sock_with_requests_in_flight(_: &Guest) {
    let mut rig = silent();
    let reads = DoomedReads::start(&rig.server, 0, 8);
    assert_eq!(ioctl_number(rig.open_to_read(), CLEAR_SOCK, 0), Ok(0));
    assert_eq!(rig.client.wait(), Ok(0));
    reads.assert_failed();
    assert_usable(0);
}

/// A client that is a process of its own.
struct ClientProcess(Child);

impl ClientProcess {
    fn start(server: &Server, transport: Transport, size: u64) -> Self {
        Self::start_as("attach", server, transport, size)
    }

    fn start_as(helper: &str, server: &Server, transport: Transport, size: u64) -> Self {
        let socket = server.connect(transport);
        let child = Process::new("/proc/self/exe")
            .args(["helper", helper, "/dev/nbd0", &size.to_string()])
            .stdin(Stdio::from(socket))
            .spawn();
        let client = Self(child.expect("a child"));
        device::wait_connected(0, Pid::from_child(&client.0), size);
        server.forget_requests();
        client
    }

    fn signal(&mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn assert_dies(&mut self) {
        let dead = wait_until(SOON, || self.0.try_wait().unwrap().is_some());
        assert!(dead.is_ok(), "the client does not die");
    }

    /// Somebody else has the device open.
    fn assert_dies_with_session(&mut self, server: &Server, direct: &File) {
        self.assert_dies();
        let ended = wait_until(SOON, || server.living() == 0);
        assert!(ended.is_ok(), "the session has not ended with it");
        let read = errno(direct.read_exact_at(&mut Buffer::new(4096), 0));
        assert_eq!(read, Err(Errno::IO));
    }
}

impl Drop for ClientProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn client_is_killed(_: &Guest) {
    for (signal, transport) in [
        (Signal::KILL, Transport::Unix),
        (Signal::TERM, Transport::Tcp4),
        (Signal::INT, Transport::Tcp6),
    ] {
        let server = Server::new();
        let mut client = ClientProcess::start(&server, transport, 1 << 20);
        client.signal(signal);
        client.assert_dies();
        let gone = wait_until(SOON, || device::pid(0).is_none());
        assert!(gone.is_ok(), "{signal:?}");
        assert_eq!(device::sysfs(0, "size"), "0");
        let ended = wait_until(SOON, || server.living() == 0);
        assert!(ended.is_ok(), "the server was not told");
    }
    assert_usable(0);
}

fn client_is_killed_with_requests_in_flight(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let server = Server::new();
        let mut client = ClientProcess::start(&server, transport, 1 << 20);
        server.script(|_, _| Ok(()));
        let reads = DoomedReads::start(&server, 0, 8);
        client.signal(Signal::KILL);
        client.assert_dies();
        reads.assert_failed();
    }
    assert_usable(0);
}

fn client_is_killed_while_a_write_is_stuck(guest: &Guest) {
    let server = Server::new();
    let mut client = ClientProcess::start(&server, Transport::Unix, 16 << 20);
    server.script(|conn, _| conn.stall());
    thread::scope(|scope| {
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        let write = scope.spawn(move || errno(direct.write_all_at(&Buffer::new(8 << 20), 0)));
        server.wait_for_command(Command::Write);
        thread::sleep(Duration::from_millis(200));
        client.signal(Signal::KILL);
        let ended = wait_until(Duration::from_secs(3), || write.is_finished()).is_ok();
        match guest.expected("killed-clients-free-stuck-writes") {
            Driver::Nbd => {
                assert!(!ended);
                assert!(
                    client.0.try_wait().unwrap().is_none(),
                    "the client has died"
                );
            }
            Driver::Rnbd => {
                assert!(ended, "the write hangs");
                client.assert_dies();
            }
        }
        server.kill();
        assert_eq!(write.join().unwrap(), Err(Errno::IO));
    });
    client.assert_dies();
    assert_usable(0);
}

/// Job control, debuggers and the freezer stop a process and let it go on.
fn client_is_stopped_and_goes_on(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let server = Server::new();
        let mut client = ClientProcess::start(&server, transport, 1 << 20);
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        client.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", Pid::from_child(&client.0));
        let stopped = wait_until(SOON, || fs::read_to_string(&stat).unwrap().contains(") T "));
        assert!(stopped.is_ok(), "it does not stop");
        client.signal(Signal::CONT);
        let running = wait_until(SOON, || {
            !fs::read_to_string(&stat).unwrap().contains(") T ")
        });
        assert!(running.is_ok(), "it does not go on");
        let read = errno(direct.read_exact_at(&mut Buffer::new(4096), 0));
        match guest.expected("signals-leave-the-session") {
            Driver::Nbd => assert_eq!(read, Err(Errno::IO)),
            Driver::Rnbd => {
                assert_eq!(read, Ok(()));
                assert!(client.0.try_wait().unwrap().is_none(), "it has ended");
                // It still is the one that waits.
                client.signal(Signal::KILL);
            }
        }
        client.assert_dies_with_session(&server, &direct);
    }
    assert_usable(0);
}

/// A signal has interrupted NBD_DO_IT, and the process ends without calling it again.
fn client_leaves_after_a_signal(_: &Guest) {
    let server = Server::new();
    let mut client = ClientProcess::start_as("attach-once", &server, Transport::Unix, 1 << 20);
    let direct = device::open(0, libc::O_DIRECT).unwrap();
    client.signal(Signal::USR1);
    client.assert_dies_with_session(&server, &direct);
    drop(direct);
    assert_usable(0);
}

/// A worker that waits for one server is missing for the devices of all others.
fn nobody_waits_for_room_in_a_socket(guest: &Guest) {
    let mut rig = Plan::new(16 << 20).attach();
    rig.server.script(|conn, _| conn.stall());
    thread::scope(|scope| {
        let direct = rig.direct();
        let write = scope.spawn(move || errno(direct.write_all_at(&Buffer::new(8 << 20), 0)));
        rig.server.wait_for_command(Command::Write);
        let waits = wait_until(Duration::from_secs(2), || {
            is_in_a_stack("sock_alloc_send_pskb")
        });
        match guest.expected("sending-does-not-wait") {
            Driver::Nbd => assert!(waits.is_ok()),
            Driver::Rnbd => assert!(waits.is_err()),
        }
        rig.server.kill();
        assert_eq!(write.join().unwrap(), Err(Errno::IO));
    });
    let _ = rig.client.wait();
}

/// Nothing more can be sent then, and no room is ever reported.
fn server_stops_reading_while_a_write_waits_for_room(_: &Guest) {
    let mut rig = Plan::new(16 << 20).attach();
    let let_go = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&let_go);
    rig.server.script(move |conn, _| {
        // The socket is full by then.
        thread::sleep(Duration::from_millis(500));
        conn.stop_reading()?;
        let _ = wait_until(patient(SOON) * 2, || told.load(Ordering::Relaxed));
        conn.close()
    });
    let direct = rig.direct();
    let write = thread::spawn(move || errno(direct.write_all_at(&Buffer::new(8 << 20), 0)));
    let ended = wait_until(patient(SOON), || write.is_finished());
    let_go.store(true, Ordering::Relaxed);
    assert!(ended.is_ok(), "the write hangs");
    assert_eq!(write.join().unwrap(), Err(Errno::IO));
    let _ = rig.client.wait();
}

/// The kernel then says at the end of the stream, too, that there was no room for what comes along with it.
fn server_ends_where_credentials_are_wanted(_: &Guest) {
    const SIZE: u64 = 1 << 20;
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    set_socket_passcred(&socket, true).expect("SO_PASSCRED");
    let mut client = Plan::new(SIZE).start_over(vec![socket]);
    client.wait_ready(SIZE);
    let direct = device::open(0, libc::O_DIRECT).unwrap();
    errno(direct.read_exact_at(&mut Buffer::new(4096), 0)).expect("a read");
    drop(direct);
    server.kill();
    client.wait_lost();
    assert_usable(0);
}

/// Whether a task of the system waits in this function of the kernel.
fn is_in_a_stack(function: &str) -> bool {
    let tasks = fs::read_dir("/proc").expect("/proc").flatten();
    let threads =
        tasks.flat_map(|task| fs::read_dir(task.path().join("task")).into_iter().flatten());
    threads.flatten().any(|thread| {
        let stack = fs::read_to_string(thread.path().join("stack")).unwrap_or_default();
        stack.contains(function)
    })
}

fn server_dies_with_dirty_pages(_: &Guest) {
    let mut rig = Plan::new(4 << 20).attach();
    let buffered = rig.open();
    buffered.write_all_at(&vec![7; 1 << 20], 0).unwrap();
    rig.server.kill();
    rig.client.wait_lost();
    assert_eq!(errno(buffered.sync_all()), Err(Errno::IO));
    buffered.write_all_at(&[8; 4096], 0).unwrap();
    drop(buffered);
    let rig = Plan::new(4 << 20).attach();
    let mut back = [1; 4096];
    rig.open().read_exact_at(&mut back, 0).unwrap();
    assert_eq!(back, [0; 4096], "what could not be written is forgotten");
}

fn server_dies_under_load_again_and_again(_: &Guest) {
    const BLOCK: usize = 8 << 10;
    const BLOCKS: u64 = 64;
    const THREADS: u64 = 4;
    // What each block of each thread was last acknowledged to hold.
    let acknowledged: Vec<AtomicU64> = (0..BLOCKS * THREADS).map(|_| AtomicU64::new(0)).collect();
    let mut storage = vec![0; BLOCKS as usize * THREADS as usize * BLOCK];
    for session in 0..10 {
        let plan = Plan::new(storage.len() as u64)
            .transport(if session % 2 == 0 {
                Transport::Tcp4
            } else {
                Transport::Unix
            })
            .connections(1 + session % 3)
            .timeout(5);
        let mut rig = plan.attach();
        rig.server.poke(0, &storage);
        let maybe: Vec<AtomicU64> = (0..BLOCKS * THREADS).map(|_| AtomicU64::new(0)).collect();
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (direct, acknowledged, maybe) = (rig.direct(), &acknowledged, &maybe);
                scope.spawn(move || {
                    let mut data = Buffer::new(BLOCK);
                    for round in 0.. {
                        let block = thread * BLOCKS + (round * 7) % BLOCKS;
                        let (index, offset) = (block as usize, block * BLOCK as u64);
                        let version = session as u64 * 1_000_000 + round + 1;
                        pattern(version, offset, &mut data);
                        maybe[index].store(version, Ordering::Relaxed);
                        if direct.write_all_at(&data, offset).is_err() {
                            return;
                        }
                        acknowledged[index].store(version, Ordering::Relaxed);
                    }
                });
            }
            thread::sleep(Duration::from_millis(150 + 40 * session as u64));
            rig.server.kill();
        });
        rig.client.wait_lost();
        let ended = wait_until(SOON, || rig.server.living() == 0);
        assert!(ended.is_ok(), "the server's connections live on");
        storage = rig.server.peek(0, storage.len());
        for (index, version) in acknowledged.iter().enumerate() {
            let offset = (index * BLOCK) as u64;
            let data = &storage[index * BLOCK..][..BLOCK];
            // A write that failed may have been done all the same.
            let last_try = maybe[index].load(Ordering::Relaxed);
            let mut attempted = vec![0; BLOCK];
            pattern(last_try, offset, &mut attempted);
            if data == attempted {
                version.store(last_try, Ordering::Relaxed);
            } else if version.load(Ordering::Relaxed) != 0 {
                assert_pattern(version.load(Ordering::Relaxed), offset, data);
            }
        }
    }
}

fn disconnect_races_with_requests(_: &Guest) {
    for round in 0..15 {
        let mut rig = Plan::new(1 << 20).connections(1 + round % 2).attach();
        thread::scope(|scope| {
            for thread in 0..3 {
                let direct = rig.direct();
                scope.spawn(move || {
                    let mut data = Buffer::new(4096);
                    for at in 0.. {
                        let offset = (thread * 64 + at % 64) * 4096;
                        let answer = if at % 2 == 0 {
                            direct.write_all_at(&data, offset)
                        } else {
                            direct.read_exact_at(&mut data, offset)
                        };
                        match errno(answer) {
                            Ok(()) => {}
                            Err(answer) => return assert_eq!(answer, Errno::IO),
                        }
                    }
                });
            }
            thread::sleep(Duration::from_millis(20 + round as u64 * 5));
            let ending = if round % 3 == 0 {
                CLEAR_SOCK
            } else {
                DISCONNECT
            };
            assert_eq!(ioctl_number(rig.open_to_read(), ending, 0), Ok(0));
        });
        assert_eq!(rig.client.wait(), Ok(0), "round {round}");
    }
    assert_usable(0);
}

fn everybody_opens_and_closes_meanwhile(_: &Guest) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let _ = device::open(0, 0).map(|device| device.read_at(&mut [0; 512], 0));
                }
            });
        }
        // An opener in the wrong moment holds the old session, and connecting is refused: that is
        // what nbd-client meets, too. Here it must only do no harm.
        let mut connected = 0;
        for _ in 0..60 {
            let server = Server::new();
            let socket = server.connect(Transport::Unix);
            connected += u32::from(try_connection(&server, socket));
        }
        done.store(true, Ordering::Relaxed);
        assert!(connected > 0, "not once");
    });
    assert_usable(0);
}

/// Connects for a moment, if the device lets us.
fn try_connection(server: &Server, socket: std::os::fd::OwnedFd) -> bool {
    use crate::proto::{DO_IT, SET_SIZE, SET_SOCK};
    use std::os::fd::AsRawFd;
    let device = device::open(0, 0).unwrap();
    let number = socket.as_raw_fd() as u64;
    if ioctl_number(&device, SET_SIZE, 1 << 20).is_err()
        || ioctl_number(&device, SET_SOCK, number).is_err()
    {
        return false;
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(15));
            server.kill();
        });
        let answer = ioctl_number(&device, DO_IT, 0);
        let _ = ioctl_number(&device, CLEAR_SOCK, 0);
        answer == device::lost()
    })
}
