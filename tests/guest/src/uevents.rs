// SPDX-License-Identifier: GPL-2.0

//! What the kernel tells udev.

use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::harness::wait_until;

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
            let fits = |event: &String| {
                lines
                    .iter()
                    .all(|line| event.lines().any(|have| have == *line))
            };
            let position = self.heard.iter().position(fits);
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
