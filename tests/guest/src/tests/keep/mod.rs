// SPDX-License-Identifier: GPL-2.0

//! `rnbdctl keep`, which reconnects devices, as their only helper; and the commands that do parts of that.
//!
//! - `blue_green`: planned handovers, by the command
//! - `encrypted`: servers with TLS
//! - `restarts`: servers that are restarted under load
//! - `lives`: what `keep` does from its start to its end, and what it refuses to do
//! - `anew`: the driver is loaded anew, or the device connected anew
//! - `commands`: handover, reconnect, events

mod anew;
mod blue_green;
mod commands;
mod encrypted;
mod lives;
mod restarts;

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;

use crate::device::{self, SOON};
use crate::driver::Driver;
use crate::harness::{Guest, Test, complain, skip, wait_until};
use crate::netlink::Netlink;
use crate::programs::Daemon;
use crate::sys::Buffer;

use super::rnbdctl::tool::ok;

pub fn tests() -> Vec<Test> {
    [
        restarts::tests(),
        encrypted::tests(),
        lives::tests(),
        commands::tests(),
        blue_green::tests(),
        anew::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const CONFIG: &str = "/tmp/kept.toml";
const NOTES: &str = "/tmp/kept.notify";

const BLUE: &str = "nbd+unix:///?socket=/tmp/blue.sock";
const GREEN: &str = "nbd+unix:///?socket=/tmp/green.sock";

/// What most tests want to have kept: an nbdkit that listens at `/tmp/NAME.sock`.
fn config(names: &[&str], more: &str) -> String {
    let uris: Vec<String> = names
        .iter()
        .map(|name| format!("\"nbd+unix:///?socket=/tmp/{name}.sock\""))
        .collect();
    format!(
        "uris = [{}]\ndevice = \"/dev/nbd0\"\nmax-retry-delay = 0.5\ndead-conn-timeout = 60\n{more}\n",
        uris.join(", ")
    )
}

/// A running `rnbdctl keep`, and what it tells the service manager.
struct Kept {
    daemon: Daemon,
    notes: UnixDatagram,
    heard: String,
}

impl Kept {
    /// Starts it, and waits until the device is connected.
    fn start(config: &str, options: &str) -> Self {
        let mut kept = Self::begin(config, options);
        kept.expect_note("READY=1");
        kept
    }

    /// Only starts it.
    fn begin(config: &str, options: &str) -> Self {
        fs::write(CONFIG, config).unwrap();
        let _ = fs::remove_file(NOTES);
        let notes = UnixDatagram::bind(NOTES).unwrap();
        notes.set_nonblocking(true).unwrap();
        let daemon = Daemon::start(&format!(
            "env NOTIFY_SOCKET={NOTES} /rnbd/rnbdctl keep {options} {CONFIG}"
        ));
        Self {
            daemon,
            notes,
            heard: String::new(),
        }
    }

    fn read_notes(&mut self) {
        let mut bytes = [0; 4096];
        while let Ok(len) = self.notes.recv(&mut bytes) {
            self.heard += &format!("{}\n", String::from_utf8_lossy(&bytes[..len]));
        }
    }

    /// Waits until it fails, without having said that it is ready: whoever waits for that would mount the device.
    fn expect_failure(&mut self) {
        assert!(!self.daemon.wait(SOON), "{}", self.daemon.said());
        self.read_notes();
        assert!(!self.heard.contains("READY=1"), "{}", self.heard);
    }

    /// Waits until it has told this, and forgets what it has told before. Nobody reads otherwise, so that its messages
    /// soon find no room: that must not hold it up.
    fn expect_note(&mut self, note: &str) {
        let told = wait_until(SOON * 6, || {
            self.read_notes();
            self.heard.contains(note)
        });
        let heard = std::mem::take(&mut self.heard);
        assert!(
            told.is_ok(),
            "{note} was not told, but {heard}: {}",
            self.daemon.said()
        );
    }

    /// Waits until it has said this so often.
    fn expect_said(&self, words: &str, times: usize) {
        let said = wait_until(SOON * 3, || {
            self.daemon.said().matches(words).count() >= times
        });
        assert!(said.is_ok(), "{words:?} is missing: {}", self.daemon.said());
    }

    /// Waits until it has replaced so many connections, all in all. nbd.ko does not tell how many were dead: all
    /// that it is offered.
    fn expect_replaced(&self, times: usize) {
        let count = || {
            let said = self.daemon.said();
            let lines = said.lines().filter_map(|line| {
                let (_, rest) = line
                    .split_once(": replaced ")
                    .or_else(|| line.split_once(": offered "))?;
                rest.split(' ').next()?.parse::<usize>().ok()
            });
            lines.sum::<usize>()
        };
        let replaced = wait_until(SOON * 6, || count() >= times);
        assert!(
            replaced.is_ok(),
            "{} of {times}: {}",
            count(),
            self.daemon.said()
        );
    }
}

impl Drop for Kept {
    /// What is still connected when a test ends is disconnected before its servers end.
    fn drop(&mut self) {
        self.daemon.kill();
        let Ok(netlink) = Netlink::try_open() else {
            return;
        };
        let _ = netlink.disconnect(0);
        let free = wait_until(SOON, || netlink.status(Some(0)) == [(0, false)]);
        if free.is_err() {
            complain(format!("nbd0 is still in use: {}", self.daemon.said()));
        }
    }
}

/// What is still connected when a test ends is disconnected before its servers end.
struct Connected(Netlink);

impl Connected {
    fn to(options: &str) -> Self {
        ok(&format!("connect {options} nbd0"));
        Self(Netlink::open())
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let _ = self.0.disconnect_backend(0, b"image");
        self.0.wait_free(0);
    }
}

/// nbd.ko has neither events nor handovers.
fn only_rnbd(guest: &Guest) {
    if guest.driver == Driver::Nbd {
        skip("the family is rnbd's");
    }
}

fn read_direct() -> std::io::Result<()> {
    let direct = device::open(0, libc::O_DIRECT)?;
    direct.read_exact_at(&mut Buffer::new(4096), 0)
}

/// Waits until the server at `/tmp/NAME.sock` has so many connections.
fn expect_connections(name: &str, number: usize) {
    let path = format!("/tmp/{name}.sock");
    // Its own ends have its path. The one with this flag only listens.
    const LISTENS: &str = "00010000";
    let accepted = |line: &&str| line.ends_with(&path) && !line.contains(LISTENS);
    let mut found = 0;
    let right = wait_until(SOON * 2, || {
        let sockets = fs::read_to_string("/proc/net/unix").expect("/proc/net/unix");
        found = sockets.lines().filter(accepted).count();
        found == number
    });
    assert!(right.is_ok(), "{found} connections, not {number}");
}

/// Waits until the device has so many connections that are alive.
fn expect_alive(number: usize) {
    let expected = format!("\"alive\": {number},");
    let right = wait_until(SOON * 2, || ok("show nbd0 --json").contains(&expected));
    assert!(right.is_ok(), "{}", ok("show nbd0 --json"));
}
