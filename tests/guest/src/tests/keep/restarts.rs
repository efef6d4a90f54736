// SPDX-License-Identifier: GPL-2.0

//! Servers that are restarted again and again, with `rnbdctl keep` as the only helper.

use std::fs::{self, OpenOptions};
use std::thread;
use std::time::{Duration, Instant};

use super::super::journals::{EXT4, Kind, XFS};
use super::super::outages::{Host, SIZE, STORAGE, Storage, under_fio};
use super::super::user_space::serve;
use super::{Kept, config, expect_alive, expect_connections, only_rnbd, read_direct};
use crate::device::{self, SOON};
use crate::driver::Driver;
use crate::harness::{Guest, Test, say};
use crate::programs::{Daemon, sh};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(under_fio_with_verification).limit_seconds(200),
        test!(under_fio_200_times).limit_seconds(2400).on_request(),
        test!(several_connections_are_restored),
        test!(under_a_mounted_file_system),
        test!(under_a_mounted_xfs),
        test!(a_server_with_less_room),
        test!(of_each_server).limit_seconds(200),
    ]
}

/// How long a restarted server lives at least: what lives less long is dialled more and more slowly.
const LIFE: Duration = Duration::from_millis(1100);

/// nbd.ko has requests of a dead connection wait for their timeout.
fn timeout(guest: &Guest) -> &'static str {
    match guest.driver {
        Driver::Nbd => "timeout = 3",
        Driver::Rnbd => "",
    }
}

fn restart_under_fio(guest: &Guest, restarts: usize) {
    let _storage = Storage::new();
    let mut host = Host::local("kept");
    let kept = Kept::start(
        &config(&["kept"], &format!("connections = 1\n{}", timeout(guest))),
        "",
    );
    let began = Instant::now();
    let mut longest = Duration::ZERO;
    under_fio(|| {
        for restart in 1..=restarts {
            thread::sleep(LIFE);
            // After SIGTERM it answers with ESHUTDOWN, which is an error for nbd.ko.
            if restart % 2 == 0 && guest.driver == Driver::Rnbd {
                host.shut_down();
            } else {
                host.kill();
            }
            let killed = Instant::now();
            host.revive();
            kept.expect_replaced(restart);
            longest = longest.max(killed.elapsed());
        }
    });
    say(&format!(
        "{restarts} restarts in {:.0} s; the longest time until a new connection was {} ms",
        began.elapsed().as_secs_f32(),
        longest.as_millis()
    ));
}

fn under_fio_with_verification(guest: &Guest) {
    restart_under_fio(guest, 5);
}

fn under_fio_200_times(guest: &Guest) {
    restart_under_fio(guest, 200);
}

fn several_connections_are_restored(guest: &Guest) {
    let _storage = Storage::new();
    let mut host = Host::local("kept");
    let more = format!("connections = 3\n{}", timeout(guest));
    let kept = Kept::start(&config(&["kept"], &more), "");
    expect_connections("kept", 3);
    for round in 1..=2 {
        host.kill();
        host.revive();
        kept.expect_replaced(3 * round);
        expect_connections("kept", 3);
        read_direct().expect("to read");
    }
}

fn under_a_mounted_file_system(guest: &Guest) {
    let _storage = Storage::new();
    restart_under(guest, &EXT4);
}

fn under_a_mounted_xfs(guest: &Guest) {
    let _storage = Storage::new();
    restart_under(guest, &XFS);
}

fn restart_under(guest: &Guest, kind: &Kind) {
    let storage = OpenOptions::new().write(true).open(STORAGE).unwrap();
    storage.set_len(kind.size).unwrap();
    sh(&format!("{} {STORAGE}", kind.make));
    let mut host = Host::local("kept");
    let kept = Kept::start(
        &config(&["kept"], &format!("connections = 1\n{}", timeout(guest))),
        "",
    );
    sh("mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt");
    thread::scope(|scope| {
        let copy = scope.spawn(|| {
            for round in 0..6 {
                sh(&format!(
                    "rm -f /tmp/mnt/[0-9]; cp /usr/bin/fio /tmp/mnt/{round} && sync -f /tmp/mnt &&
                    echo 3 > /proc/sys/vm/drop_caches && cmp /usr/bin/fio /tmp/mnt/{round}"
                ));
            }
        });
        for restart in 1..=3 {
            thread::sleep(LIFE);
            host.kill();
            host.revive();
            kept.expect_replaced(restart);
        }
        copy.join().expect("to copy");
    });
    let check = kind.check;
    sh(&format!("umount /tmp/mnt && {check} /dev/nbd0"));
    drop(kept);
    sh(&format!("{check} {STORAGE}"));
}

/// It takes back one connection of two, and the other one when it has room again.
fn a_server_with_less_room(guest: &Guest) {
    only_rnbd(guest);
    let _storage = Storage::new();
    let mut host = Host::local("kept");
    let kept = Kept::start(&config(&["kept"], "connections = 2"), "");
    host.kill();
    let _ = fs::remove_file("/tmp/kept.sock");
    let server = format!("nbdkit -f -U /tmp/kept.sock --filter=limit file {STORAGE} limit=1");
    let full = serve(&server, "/tmp/kept.sock");
    kept.expect_said("replaced 1 connection, to /tmp/kept.sock", 1);
    expect_alive(1);
    read_direct().expect("to read");
    drop(full);
    host.revive();
    kept.expect_replaced(3);
    expect_alive(2);
}

/// Others than nbdkit.
fn of_each_server(guest: &Guest) {
    let _storage = Storage::new();
    fs::write(
        "/tmp/kept.conf",
        format!(
            "[generic]\nuser = root\ngroup = root\nunixsock = /tmp/kept.sock\n\
             [export]\nexportname = {STORAGE}\nflush = true\nfua = true\ntrim = true\n"
        ),
    )
    .unwrap();
    let qemu_nbd = format!("qemu-nbd -f raw -t -e 8 -k /tmp/kept.sock -x export {STORAGE}");
    // nbd-server computes for seconds before it answers.
    for (command, restarts) in [("nbd-server -n -C /tmp/kept.conf", 1), (&*qemu_nbd, 2)] {
        let start = || {
            let _ = fs::remove_file("/tmp/kept.sock");
            serve(command, "/tmp/kept.sock")
        };
        let mut server = start();
        let uri = "uris = [\"nbd+unix:///export?socket=/tmp/kept.sock\"]";
        let more = format!("device = \"nbd0\"\nconnections = 1\n{}", timeout(guest));
        let kept = Kept::start(&format!("{uri}\n{more}\nconnect-timeout = 60\n"), "");
        assert_eq!(device::sysfs(0, "size"), (SIZE / 512).to_string());
        // A child of nbd-server would go on after kill -9.
        let end = |mut server: Daemon| {
            server.terminate();
            let _ = server.wait(SOON * 2);
        };
        for restart in 1..=restarts {
            end(server);
            server = start();
            kept.expect_replaced(restart);
            read_direct().expect("to read");
        }
        drop(kept);
        end(server);
    }
}
