// SPDX-License-Identifier: GPL-2.0

//! Servers with TLS, which are restarted, or change their keys, under load.

mod rekeying;

use std::thread;
use std::time::{Duration, Instant};

use super::super::outages::{Host, STORAGE, Storage, under_fio};
use super::super::rnbdctl::encrypted::pki::Pki;
use super::super::user_space::serve;
use super::{Kept, expect_alive, only_rnbd};
use crate::harness::{Guest, Test, say};
use crate::test;
use rekeying::Rekeying;

pub fn tests() -> Vec<Test> {
    vec![
        test!(restarts),
        test!(restarts_200_times).limit_seconds(2400).on_request(),
        test!(key_updates),
        test!(key_updates_200_times)
            .limit_seconds(2400)
            .on_request(),
    ]
}

const PKI: &str = "/tmp/pki";

/// As `restarts::LIFE`.
const LIFE: Duration = Duration::from_millis(1100);

fn config(connections: usize) -> String {
    format!(
        "uris = [\"nbds://127.0.0.1/?tls-certificates={PKI}\"]\ndevice = \"/dev/nbd0\"\n\
         max-retry-delay = 0.5\ndead-conn-timeout = 60\nconnections = {connections}\n"
    )
}

/// Once, `keep` is killed and started again, too.
fn restart(guest: &Guest, restarts: usize) {
    only_rnbd(guest);
    let _pki = Pki::new(PKI);
    let _storage = Storage::new();
    let command = format!(
        "nbdkit -f -p 10809 -i 127.0.0.1 --tls=require --tls-certificates={PKI} file {STORAGE}"
    );
    let mut server = serve(&command, "10809");
    let config = config(1);
    // What is dropped disconnects the device.
    let mut killed = Vec::new();
    let mut kept = Kept::start(&config, "");
    let (mut longest, mut replaced) = (Duration::ZERO, 0);
    under_fio(|| {
        for restart in 1..=restarts {
            thread::sleep(LIFE);
            if restart == restarts.div_ceil(2) {
                kept.daemon.kill();
                killed.push(std::mem::replace(&mut kept, Kept::start(&config, "")));
                replaced = 0;
            }
            let began = Instant::now();
            server.kill();
            server = serve(&command, "10809");
            replaced += 1;
            kept.expect_replaced(replaced);
            longest = longest.max(began.elapsed());
        }
    });
    expect_alive(1);
    let longest = longest.as_millis();
    say(&format!(
        "{restarts} restarts; the longest time until a new connection was {longest} ms"
    ));
}

fn restarts(guest: &Guest) {
    restart(guest, 2);
}

fn restarts_200_times(guest: &Guest) {
    restart(guest, 200);
}

/// A server of 2^24 records for each key, but for the number. The connection that wants another key is replaced, and
/// the other one goes on meanwhile.
fn update_keys(guest: &Guest, updates: usize) {
    only_rnbd(guest);
    let _pki = Pki::new(PKI);
    let _storage = Storage::new();
    let _host = Host::local("plain");
    let server = Rekeying::start(PKI, "/tmp/plain.sock");
    let kept = Kept::start(&config(2), "");
    under_fio(|| {
        for update in 1..=updates {
            kept.expect_said("is dead (wants-rekeying)", update);
        }
        kept.expect_replaced(updates);
    });
    expect_alive(2);
    say(&format!("{} key updates", server.updates()));
}

fn key_updates(guest: &Guest) {
    update_keys(guest, 3);
}

fn key_updates_200_times(guest: &Guest) {
    update_keys(guest, 200);
}
