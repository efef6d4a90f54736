// SPDX-License-Identifier: GPL-2.0

//! A device that was configured by ioctl, and that has lost its server, is started again with new
//! sockets while programs have it open.

mod accepted;
mod opening;
mod refused;
mod under_load;
mod waiting;

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

use crate::device::{self, Plan, Rig, SOON};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{DISCONNECT, SET_SOCK};
use crate::server::{Server, Transport};
use crate::sys::ioctl_number;

pub fn tests() -> Vec<Test> {
    [
        accepted::tests(),
        refused::tests(),
        waiting::tests(),
        opening::tests(),
        under_load::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const SIZE: u64 = 1 << 20;

/// As of nbd-client -persist.
fn plan_of(size: u64) -> Plan {
    Plan::new(size).persist()
}

/// Passes new sockets to the device as nbd-client does, and starts it. Where the device cannot be
/// started again, that fails.
fn start_again(guest: &Guest, plan: &Plan, server: &Server) -> Option<device::Client> {
    if guest.expected("a-lost-device-starts-again") == Driver::Nbd {
        let device = device::open(0, 0).expect("the device");
        let socket = server.connect(Transport::Unix);
        let passed = ioctl_number(&device, SET_SOCK, socket.as_raw_fd() as u64);
        assert_eq!(passed, Err(Errno::BUSY));
        return None;
    }
    let client = plan.start(server);
    let started = wait_until(SOON, || {
        device::pid(0) == Some(client.tid.as_raw_nonzero().get())
    });
    assert!(started.is_ok(), "not started again: {:?}", device::pid(0));
    Some(client)
}

/// As nbd-client -d, which the client takes for an end that was asked for.
fn disconnect(device: &File, client: &mut device::Client) {
    ioctl_number(device, DISCONNECT, 0).expect("NBD_DISCONNECT");
    assert_eq!(client.wait(), Ok(0));
}

/// A device that has lost its server and is still open.
fn lose(rig: &mut Rig) {
    rig.server.kill();
    // See do_it.rs.
    let _ = rig.client.wait();
}
