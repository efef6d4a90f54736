// SPDX-License-Identifier: GPL-2.0

//! Many restarts while data is written and read.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use super::{SIZE, can_be_restarted, persistent};
use crate::device::{self, SOON, assert_pattern, assert_usable, pattern};
use crate::harness::{Guest, Test, say, wait_until};
use crate::programs::{Daemon, sh};
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;
use crate::tests::user_space::serve;

pub fn tests() -> Vec<Test> {
    vec![
        test!(again_and_again_under_load)
            .parameters("nbds_max=4 dead_conn_timeout=60")
            .limit_seconds(300),
        test!(a_mounted_file_system_under_nbd_client_persist)
            .parameters("nbds_max=4 dead_conn_timeout=60")
            .limit_seconds(400),
    ]
}

/// A writer sees no error, and what it has written is there.
fn again_and_again_under_load(guest: &Guest) {
    if !can_be_restarted(guest) {
        return;
    }
    let plan = persistent(SIZE).transport(Transport::Tcp4);
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

/// A mounted file system, nbdkit as the server and nbd-client as the client, as users have it.
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
    if !can_be_restarted(guest) {
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
            // nbd-client ends if a server accepts its connection and dies before they have negotiated.
            fs::remove_file("/tmp/restart.sock").expect("the socket");
            if round % 2 == 0 {
                server.kill();
            } else {
                // After SIGTERM it answers with ESHUTDOWN.
                server.terminate();
                assert!(server.wait(SOON), "{}", server.said());
            }
            let before = written.load(Ordering::Relaxed);
            server = revive();
            // One write may have been complete already when the server was killed.
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

/// Writes file number `n` of the mounted file system through to the server, and reads it back from there.
fn write_and_read(n: u64) {
    let path = format!("/tmp/restart/{}", n % 16);
    let data = Buffer::filled(256 << 10, |data| pattern(n, 0, data));
    let mut file = File::create(&path).expect("to create a file");
    file.write_all(&data).expect("to write");
    file.sync_all().expect("to flush");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("fadvise");
    assert_pattern(n, 0, &fs::read(&path).expect("to read"));
}
