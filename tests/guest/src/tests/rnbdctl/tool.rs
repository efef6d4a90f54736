// SPDX-License-Identifier: GPL-2.0

//! Runs the tool, and servers for it.

use std::fs;
use std::process::Command;

use super::super::user_space::{serve, use_device};
use crate::device::{self, SOON};
use crate::harness::wait_until;
use crate::netlink::Netlink;
use crate::programs::Daemon;

pub const MIB: u64 = 1 << 20;
pub const SOCKET: &str = "/tmp/rnbdctl.sock";
pub const URI: &str = "nbd+unix:///?socket=/tmp/rnbdctl.sock";

/// What the tool has said, and how it has ended.
#[derive(Debug)]
pub struct Said {
    pub status: i32,
    pub out: String,
    pub err: String,
}

pub fn run(program: &str, arguments: &[&str]) -> Said {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("rnbdctl");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said {
        status: output.status.code().expect("a status"),
        out: text(&output.stdout),
        err: text(&output.stderr),
    }
}

pub fn rnbdctl(arguments: &str) -> Said {
    run(
        "/rnbd/rnbdctl",
        &arguments.split_whitespace().collect::<Vec<_>>(),
    )
}

/// Runs the tool, which must succeed.
pub fn ok(arguments: &str) -> String {
    let said = rnbdctl(arguments);
    assert_eq!(said.status, 0, "{arguments}: {said:?}");
    said.out
}

/// Runs the tool, which must fail in this way and say this.
pub fn fails(arguments: &str, status: i32, words: &[&str]) {
    let said = rnbdctl(arguments);
    assert_eq!(said.status, status, "{arguments}: {said:?}");
    for words in words {
        assert!(said.err.contains(words), "{words:?} is not in {said:?}");
    }
    assert_eq!(said.out, "", "{arguments}");
}

/// A server. What is still connected when a test ends, as one does that fails, is disconnected before it
/// ends.
pub struct Server(pub Daemon);

impl Server {
    /// Starts a server that listens on `socket`; see [`serve`].
    pub fn start(command: &str, socket: &str) -> Self {
        Self(serve(command, socket))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(netlink) = Netlink::try_open() {
            for index in [0, 1] {
                let _ = netlink.disconnect(index);
            }
        }
    }
}

/// nbdkit on a UNIX socket.
pub fn nbdkit(options: &str) -> Server {
    let _ = fs::remove_file(SOCKET);
    Server::start(&format!("nbdkit -f -U {SOCKET} {options}"), SOCKET)
}

/// Uses device 0, which is connected, and disconnects it.
pub fn use_and_disconnect(size: u64) {
    assert_eq!(device::sysfs(0, "size"), (size / 512).to_string());
    use_device();
    disconnect("disconnect /dev/nbd0");
}

pub fn disconnect(arguments: &str) {
    assert_eq!(ok(arguments), "");
    let free = wait_until(SOON, || {
        device::pid(0).is_none() && device::sysfs(0, "size") == "0"
    });
    assert!(free.is_ok(), "nbd0 is still connected");
}

/// Waits until the server on the UNIX socket has this many connections.
pub fn expect_connections(number: usize) {
    // Its own ends have its path. The one with this flag only listens.
    const LISTENS: &str = "00010000";
    let accepted = |line: &&str| line.ends_with(SOCKET) && !line.contains(LISTENS);
    let mut found = 0;
    let right = wait_until(SOON, || {
        let sockets = fs::read_to_string("/proc/net/unix").expect("/proc/net/unix");
        found = sockets.lines().filter(accepted).count();
        found == number
    });
    assert!(right.is_ok(), "{found} connections, not {number}");
}

/// Whether the driver has the family "rnbd".
pub fn tells_more(json: &str) -> bool {
    json.contains("\"not_known\": null")
}
