// SPDX-License-Identifier: GPL-2.0

//! NBD_DO_IT: what it answers, and what is to be seen while it runs and afterwards.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::io::Errno;

use crate::debug_kernel::enough;
use crate::device::{self, Plan, SOON, assert_usable};
use crate::driver::Driver;
use crate::harness::{Guest, Test, run_on, say, seed, wait_until};
use crate::netlink::Netlink;
use crate::proto::{
    CAN_MULTI_CONN, CLEAR_SOCK, Command, DISCONNECT, DO_IT, SET_BLKSIZE, SET_FLAGS, SET_SIZE,
    SET_SOCK,
};
use crate::server::{Server, Transport};
use crate::sys::{self, Buffer, SysResult, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(answers_0_after_a_disconnect),
        test!(answers_epipe_when_the_server_closes),
        test!(answers_epipe_when_the_server_resets),
        test!(answers_0_after_clear_sock),
        test!(answers_eintr_after_a_signal),
        test!(answers_eintr_after_a_signal_that_cuts_a_disconnect_short),
        test!(goes_on_when_a_signal_restarts_it),
        test!(goes_on_when_it_is_called_again_after_a_signal),
        test!(pid_is_the_task_that_called_it),
        test!(two_at_the_same_time),
        test!(says_goodbye_on_every_connection),
        test!(leaves_the_device_empty),
        test!(leaves_the_size_to_others_who_have_it_open),
        test!(clear_sock_leaves_the_size_to_others_who_have_it_open),
        test!(an_open_device_fails_requests_afterwards),
        test!(the_device_can_be_connected_again_and_again),
    ]
}

fn answers_0_after_a_disconnect(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Tcp6, Transport::Unix] {
        let mut rig = Plan::new(1 << 20).transport(transport).attach();
        assert_eq!(rig.disconnect(), Ok(0), "{transport:?}");
    }
    guest.expect_logged("block nbd0: NBD_DISCONNECT", "nbd0: NBD_DISCONNECT");
}

/// As kernels did before 4.10. Later nbd.ko answers 0.
fn answers_epipe_when_the_server_closes(guest: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        let mut rig = Plan::new(1 << 20).transport(transport).attach();
        rig.server.kill();
        assert_eq!(rig.client.wait(), lost(guest), "{transport:?}");
    }
    assert_usable(0);
}

fn answers_epipe_when_the_server_resets(guest: &Guest) {
    let mut rig = Plan::new(1 << 20).transport(Transport::Tcp4).attach();
    rig.server.script(|conn, _| conn.reset());
    let direct = rig.direct();
    let read = direct.read_exact_at(&mut Buffer::new(4096), 0);
    assert_eq!(device::errno(read), Err(Errno::IO));
    drop(direct);
    assert_eq!(rig.client.wait(), lost(guest));
    assert_usable(0);
}

/// The answer when the server is gone.
pub fn lost(guest: &Guest) -> SysResult {
    match guest.expected("an-unasked-end-is-epipe") {
        Driver::Nbd => Ok(0),
        Driver::Rnbd => Err(Errno::PIPE),
    }
}

fn answers_0_after_clear_sock(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    assert_eq!(ioctl_number(rig.open(), CLEAR_SOCK, 0), Ok(0));
    assert_eq!(rig.client.wait(), Ok(0));
    assert_usable(0);
}

fn answers_eintr_after_a_signal(_: &Guest) {
    sys::handle_and_ignore(libc::SIGUSR1, false);
    let mut rig = Plan::new(1 << 20).attach();
    sys::signal_thread(rig.client.tid, libc::SIGUSR1);
    assert_eq!(rig.client.wait(), Err(Errno::INTR));
    assert_usable(0);
}

fn answers_eintr_after_a_signal_that_cuts_a_disconnect_short(_: &Guest) {
    sys::handle_and_ignore(libc::SIGUSR1, false);
    let mut rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    // It does not come to read the disconnect.
    rig.server.script(|conn, _| conn.stall());
    thread::scope(|scope| {
        let reader = scope.spawn(|| direct.read_exact_at(&mut Buffer::new(4096), 0));
        rig.server.wait_for_command(Command::Read);
        assert_eq!(ioctl_number(rig.open(), DISCONNECT, 0), Ok(0));
        assert!(rig.client.still_runs_after(Duration::from_millis(100)));
        sys::signal_thread(rig.client.tid, libc::SIGUSR1);
        assert_eq!(rig.client.wait(), Err(Errno::INTR));
        assert_eq!(device::errno(reader.join().unwrap()), Err(Errno::IO));
    });
    drop(direct);
    assert_usable(0);
}

fn goes_on_when_a_signal_restarts_it(guest: &Guest) {
    sys::handle_and_ignore(libc::SIGUSR2, true);
    let mut rig = Plan::new(1 << 20).attach();
    sys::signal_thread(rig.client.tid, libc::SIGUSR2);
    match guest.expected("signals-leave-the-session") {
        // The signal ended the connection; the second call finds the device still set up.
        Driver::Nbd => assert_eq!(rig.client.wait(), Err(Errno::BUSY)),
        Driver::Rnbd => {
            assert!(rig.client.still_runs_after(Duration::from_millis(200)));
            rig.direct()
                .read_exact_at(&mut Buffer::new(4096), 0)
                .unwrap();
            assert_eq!(rig.disconnect(), Ok(0));
        }
    }
    assert_usable(0);
}

fn goes_on_when_it_is_called_again_after_a_signal(guest: &Guest) {
    sys::handle_and_ignore(libc::SIGUSR1, false);
    let mut rig = Plan::new(1 << 20).hold().attach();
    sys::signal_thread(rig.client.tid, libc::SIGUSR1);
    assert_eq!(rig.client.wait(), Err(Errno::INTR));
    let direct = rig.direct();
    let again = thread::spawn(|| ioctl_number(device::open(0, 0).unwrap(), DO_IT, 0));
    match guest.expected("signals-leave-the-session") {
        Driver::Nbd => assert_eq!(again.join().unwrap(), Err(Errno::BUSY)),
        Driver::Rnbd => {
            direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
            thread::sleep(Duration::from_millis(200));
            assert!(!again.is_finished());
            // Whoever has not been interrupted is refused as before.
            let third = ioctl_number(rig.open(), DO_IT, 0);
            assert_eq!(third, Err(Errno::BUSY));
            assert_eq!(ioctl_number(rig.open(), DISCONNECT, 0), Ok(0));
            assert_eq!(again.join().unwrap(), Ok(0));
        }
    }
    drop(direct);
    rig.client.go_on();
    assert_usable(0);
}

fn pid_is_the_task_that_called_it(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    assert_eq!(device::pid(0), Some(rig.client.tid.as_raw_nonzero().get()));
    let mode = fs::metadata("/sys/block/nbd0/pid").unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777,
        0o444
    );
    assert_eq!(rig.disconnect(), Ok(0));
    assert_eq!(device::pid(0), None);
}

fn says_goodbye_on_every_connection(_: &Guest) {
    let mut rig = Plan::new(1 << 20).connections(3).attach();
    assert_eq!(rig.disconnect(), Ok(0));
    let goodbyes = rig.server.requests_of(Command::Disconnect);
    let mut connections: Vec<usize> = goodbyes.iter().map(|request| request.connection).collect();
    connections.sort_unstable();
    assert_eq!(connections, [0, 1, 2]);
    for goodbye in goodbyes {
        assert_eq!(
            (goodbye.flags, goodbye.cookie, goodbye.offset, goodbye.len),
            (0, 0, 0, 0)
        );
    }
}

fn leaves_the_device_empty(_: &Guest) {
    let mut rig = Plan::new(1 << 20).hold().attach();
    assert_eq!(rig.sysfs("size"), "2048");
    // A task that uses NBD_DISCONNECT has the device open, too, perhaps for longer than NBD_DO_IT takes to
    // return, and the size then stays.
    assert_eq!(Netlink::open().disconnect(0), Ok(()));
    assert_eq!(rig.client.wait(), Ok(0));
    assert_eq!(
        rig.sysfs("size"),
        "0",
        "although the client still has it open"
    );
    assert!(device::pid(0).is_some(), "until the client closes it");
    rig.client.go_on();
    let gone = wait_until(SOON, || device::pid(0).is_none());
    assert!(gone.is_ok());
}

fn leaves_the_size_to_others_who_have_it_open(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    let other = rig.open();
    rig.server.kill();
    rig.client.wait_lost();
    let size = rig.sysfs("size");
    drop(other);
    assert_eq!(size, "2048");
    assert_eq!(rig.sysfs("size"), "0");
    assert_usable(0);
}

fn an_open_device_fails_requests_afterwards(_: &Guest) {
    let mut rig = Plan::new(1 << 20).attach();
    let direct = rig.direct();
    direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
    assert_eq!(ioctl_number(&direct, DISCONNECT, 0), Ok(0));
    assert_eq!(rig.client.wait(), Ok(0));
    for _ in 0..3 {
        let mut buffer = Buffer::new(4096);
        assert_eq!(
            device::errno(direct.read_exact_at(&mut buffer, 0)),
            Err(Errno::IO)
        );
        assert_eq!(
            device::errno(direct.write_all_at(&buffer, 4096)),
            Err(Errno::IO)
        );
    }
    drop(direct);
    assert_usable(0);
}

fn the_device_can_be_connected_again_and_again(_: &Guest) {
    for round in 0..10 {
        let size = (1 << 20) + round * 4096;
        let mut rig = Plan::new(size).attach();
        assert_eq!(rig.sysfs("size"), (size / 512).to_string());
        assert!(rig.client.still_runs_after(Duration::from_millis(1)));
        assert_eq!(rig.disconnect(), Ok(0), "round {round}");
    }
}

/// Whoever is in NBD_DO_IT counts as one of them while NBD_CLEAR_SOCK runs.
fn clear_sock_leaves_the_size_to_others_who_have_it_open(_: &Guest) {
    for _ in 0..20 {
        let mut rig = Plan::new(1 << 20).attach();
        let other = rig.open_to_read();
        assert_eq!(ioctl_number(&other, CLEAR_SOCK, 0), Ok(0));
        assert_eq!(rig.client.wait(), Ok(0));
        assert_eq!(rig.sysfs("size"), "2048");
    }
    assert_usable(0);
}

/// One task starts a device with two sockets; another one clears them meanwhile, and starts it with one
/// of its own. Whichever wins, there are as many hardware queues as the session knows of.
fn two_at_the_same_time(_: &Guest) {
    let mut random = Rng::with_seed(seed());
    let mut met = 0;
    for _ in 0..enough(250, 50) {
        let server = Server::new();
        let device = device::open(0, 0).unwrap();
        let ioctl = |request, argument| ioctl_number(&device, request, argument);
        let set_sock = |socket: &OwnedFd| ioctl(SET_SOCK, socket.as_raw_fd() as u64);
        ioctl(SET_BLKSIZE, 4096).unwrap();
        ioctl(SET_SIZE, 1 << 20).unwrap();
        ioctl(SET_FLAGS, CAN_MULTI_CONN).unwrap();
        let sockets = [(); 3].map(|()| server.connect(Transport::Unix));
        let begin = Barrier::new(2);
        let delays = [(); 2].map(|()| Duration::from_micros(random.u64(..300)));
        let mut reads = Vec::new();
        thread::scope(|scope| {
            let first = scope.spawn(|| {
                set_sock(&sockets[0]).unwrap();
                set_sock(&sockets[1]).unwrap();
                begin.wait();
                thread::sleep(delays[0]);
                ioctl(DO_IT, 0)
            });
            begin.wait();
            thread::sleep(delays[1]);
            ioctl(CLEAR_SOCK, 0).unwrap();
            let second = set_sock(&sockets[2]).map(|_| scope.spawn(|| ioctl(DO_IT, 0)));
            if let Ok(second) = second {
                // One of them runs the session, the other one is refused.
                let decided = wait_until(SOON, || first.is_finished() || second.is_finished());
                assert!(decided.is_ok());
                let runs = wait_until(SOON, || device::sysfs(0, "size") == "2048");
                assert!(runs.is_ok());
                met += 1;
                for processor in [0, 1] {
                    let reader = scope.spawn(move || {
                        run_on(processor);
                        let direct = device::open(0, libc::O_DIRECT).unwrap();
                        device::errno(direct.read_exact_at(&mut Buffer::new(4096), 0))
                    });
                    reads.push(reader.join().unwrap());
                }
            }
            server.kill();
            let _ = ioctl(CLEAR_SOCK, 0);
        });
        assert!(reads.iter().all(|read| *read == Ok(())), "{reads:?}");
    }
    say(&format!("{met} met"));
    assert_usable(0);
}
