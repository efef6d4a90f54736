// SPDX-License-Identifier: GPL-2.0

//! Processes that are killed, or frozen, in the middle of something.

use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::super::user_space::{Client, serve};
use super::{Load, MIB, move_data};
use crate::device::{self, Plan, SOON, assert_usable, pattern};
use crate::harness::{Guest, Test, say, seed, wait_until};
use crate::programs::Daemon;
use crate::proto::Command;
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(writer_of_much_that_the_server_does_not_read).limit_seconds(400),
        test!(writer_of_much_and_then_the_server),
        test!(nbd_client_under_load),
        test!(server_under_load),
    ]
}

fn kill(daemon: &Daemon) {
    let pid = Pid::from_raw(daemon.id() as i32).expect("a process");
    kill_process(pid, Signal::KILL).expect("to kill");
}

/// A device whose server does not read further than the header of a write, until told to; and a
/// process that is killed while it writes 32 MiB there in one call.
fn kill_writer(transport: Transport, send_buffer: Option<usize>, after: impl FnOnce(&Stuck)) {
    let mut plan = Plan::new(64 * MIB).transport(transport);
    if let Some(bytes) = send_buffer {
        plan = plan.send_buffer(bytes);
    }
    let mut rig = plan.attach();
    // So that the writer itself sends.
    fs::write("/sys/block/nbd0/queue/scheduler", "none").unwrap();
    let go_on = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&go_on);
    rig.server.script(move |conn, request| {
        while !told.load(Ordering::Relaxed) {
            if conn.is_ended() {
                return conn.close();
            }
            thread::sleep(Duration::from_millis(5));
        }
        conn.serve(request)
    });
    let mut writer =
        Daemon::start("dd if=/dev/zero of=/dev/nbd0 bs=32M count=1 oflag=direct conv=notrunc");
    rig.server.wait_for_command(Command::Write);
    thread::sleep(Duration::from_millis(100));
    kill(&writer);
    thread::sleep(Duration::from_millis(50));
    let stuck = Stuck { rig, go_on };
    after(&stuck);
    // nbd.ko sends a page with each call, and waits for room between them: 32 MiB through a small buffer
    // of TCP's take 15 s and more.
    let progress = || stuck.rig.server.received_bytes();
    assert!(!writer.wait_while(SOON, progress), "it was killed");
    rig = stuck.rig;
    if stuck.go_on.load(Ordering::Relaxed) {
        rig.server.be_honest();
        move_data(0, 23);
        assert_eq!(rig.disconnect(), Ok(0));
    } else {
        rig.client.wait_lost();
    }
}

struct Stuck {
    rig: device::Rig,
    go_on: Arc<AtomicBool>,
}

/// What it had begun to send is sent to its end: others send on the same connection.
fn writer_of_much_that_the_server_does_not_read(_: &Guest) {
    use std::os::unix::fs::FileExt;
    for (transport, send_buffer) in [
        (Transport::Tcp4, None),
        (Transport::Unix, None),
        (Transport::Tcp4, Some(4096)),
        (Transport::Unix, Some(4096)),
    ] {
        kill_writer(transport, send_buffer, |stuck| {
            let at = 48 * MIB;
            thread::scope(|scope| {
                let direct = stuck.rig.direct();
                let other = scope.spawn(move || {
                    let data = Buffer::filled(256 << 10, |data| pattern(29, at, data));
                    direct.write_all_at(&data, at)
                });
                thread::sleep(Duration::from_millis(50));
                stuck.go_on.store(true, Ordering::Relaxed);
                let written = other.join().expect("the other writer");
                written.expect("to write");
            });
            let mut expected = vec![0; 256 << 10];
            pattern(29, at, &mut expected);
            assert!(stuck.rig.server.peek(at, expected.len()) == expected);
        });
    }
}

fn writer_of_much_and_then_the_server(_: &Guest) {
    for transport in [Transport::Tcp4, Transport::Unix] {
        kill_writer(transport, None, |stuck| stuck.rig.server.kill());
    }
    assert_usable(0);
}

const STORAGE: &str = "/tmp/storage.img";
const SOCKET: &str = "/tmp/kills.sock";

fn nbdkit(transport: Transport) -> Daemon {
    let _ = fs::remove_file(SOCKET);
    let (listen, waiting) = match transport {
        Transport::Unix => (format!("-U {SOCKET}"), SOCKET),
        _ => ("-p 10809 -i 127.0.0.1".to_owned(), "10809"),
    };
    serve(&format!("nbdkit -f {listen} file {STORAGE}"), waiting)
}

fn client(transport: Transport, connections: u32) -> Client {
    let address = match transport {
        Transport::Unix => format!("-unix {SOCKET}"),
        _ => "127.0.0.1 10809".to_owned(),
    };
    Client::connect(&format!("-C {connections} -t 3 {address}"))
}

/// Has `kill` end a session again and again while data moves. Nobody hangs, and what was
/// acknowledged is there.
fn again_and_again(kill: impl Fn(&mut Daemon, &mut Daemon)) {
    let seed = seed();
    File::create(STORAGE).unwrap().set_len(Load::BYTES).unwrap();
    let mut load = Load::new(0, seed);
    for round in 0..4 {
        let transport = [Transport::Unix, Transport::Tcp4][round % 2];
        let mut server = nbdkit(transport);
        let mut client = client(transport, 1 + round as u32 % 3);
        let ((), tally) = load.run(true, |tally| {
            let moves = wait_until(SOON, || tally.done() > 30 + 20 * round as u64);
            assert!(moves.is_ok(), "nothing moves in round {round}");
            kill(&mut server, &mut client.0);
            // All writers fail.
            let stopped = wait_until(SOON, || tally.failed() == Load::WRITERS);
            assert!(
                stopped.is_ok(),
                "somebody hangs in round {round}: {tally:?}"
            );
        });
        say(&format!("round {round}: {tally:?}"));
        client.0.wait(SOON);
        let gone = wait_until(SOON, || device::pid(0).is_none());
        assert!(gone.is_ok(), "the device is not free in round {round}");
        server.kill();
        load.verify_in(&File::open(STORAGE).unwrap());
    }
    fs::remove_file(STORAGE).unwrap();
    assert_usable(0);
}

fn nbd_client_under_load(_: &Guest) {
    again_and_again(|_, client| kill(client));
}

fn server_under_load(_: &Guest) {
    again_and_again(|server, _| server.kill());
}
