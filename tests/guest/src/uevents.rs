// SPDX-License-Identifier: GPL-2.0

//! What the kernel tells udev.

use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::harness::wait_until;

fn has_lines(event: &str, lines: &[&str]) -> bool {
    lines
        .iter()
        .all(|line| event.lines().any(|have| have == *line))
}

/// Whether `device` was added once and was never removed, by these events.
pub fn added_once(events: &[String], device: &str) -> bool {
    let name = format!("DEVNAME={device}");
    let count = |action: &str| {
        let of_device = events
            .iter()
            .filter(|event| has_lines(event, &[action, &name]));
        of_device.count()
    };
    count("ACTION=add") == 1 && count("ACTION=remove") == 0
}

/// Hears every uevent from its creation on.
pub struct Uevents {
    socket: std::os::fd::OwnedFd,
    heard: Vec<String>,
}

impl Uevents {
    pub fn listen() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = Some(KOBJECT_UEVENT);
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol);
        let socket = socket.expect("a netlink socket");
        bind(&socket, &SocketAddrNetlink::new(0, 1)).expect("bind");
        Self {
            socket,
            heard: Vec::new(),
        }
    }

    /// Waits for an event that has all of `lines`, such as "ACTION=change", and forgets all that
    /// came with and before it.
    pub fn expect(&mut self, lines: &[&str]) {
        let mut all = Vec::new();
        let found = wait_until(Duration::from_secs(5), || {
            self.hear();
            let position = self.heard.iter().position(|event| has_lines(event, lines));
            all.extend(
                self.heard
                    .drain(..position.map_or(self.heard.len(), |at| at + 1)),
            );
            position.is_some()
        });
        assert!(found.is_ok(), "no uevent with {lines:?} among {all:#?}");
    }

    /// All that came until now, and were not expected yet.
    pub fn rest(&mut self) -> Vec<String> {
        self.hear();
        std::mem::take(&mut self.heard)
    }

    fn hear(&mut self) {
        let mut buffer = [0; 8192];
        loop {
            match recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((_, len)) => {
                    let text = String::from_utf8_lossy(&buffer[..len]).replace('\0', "\n");
                    self.heard.push(text);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::NOBUFS) => {}
                Err(errno) => panic!("uevents: {errno}"),
            }
        }
    }
}
