// SPDX-License-Identifier: GPL-2.0

//! A device that ioctls have configured and that has lost its server is started again, with new sockets,
//! while programs have it open.
//!
//! - `accepted`: what the programs that have it open notice, and how the new server may differ
//! - `refused`: after what, and with what, the device cannot be started again
//! - `waiting`: requests, and data in the page cache, wait for the new server
//! - `opening`: opening a device that has no server
//! - `under_load`: many restarts

mod accepted;
mod opening;
mod refused;
mod under_load;
mod waiting;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::device::{self, Plan, Rig, SOON};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{DISCONNECT, SET_SOCK};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult, ioctl_number};

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

/// How `nbd-client -persist` connects a device.
fn persistent(size: u64) -> Plan {
    Plan::new(size).persist()
}

/// Whether the running test is to expect that a device which has lost its server can be started again.
fn can_be_restarted(guest: &Guest) -> bool {
    guest.expected("a-lost-device-starts-again") == Driver::Rnbd
}

/// Connects the device as `plan` says, opens it, and kills its server.
fn lost_device(plan: &Plan) -> (Rig, File) {
    let mut rig = plan.attach();
    let direct = rig.direct();
    kill_server(&mut rig);
    (rig, direct)
}

/// Kills the server, and waits until NBD_DO_IT has returned.
fn kill_server(rig: &mut Rig) {
    rig.server.kill();
    // The tests of `do_it` check what it returns.
    let _ = rig.client.wait();
}

/// NBD_SET_SOCK with a new connection to `server`.
fn pass_socket(device: &File, server: &Server) -> SysResult {
    let socket = server.connect(Transport::Unix);
    ioctl_number(device, SET_SOCK, socket.as_raw_fd() as u64)
}

/// Passes new sockets to the device as nbd-client does, and starts it. Returns `None` if it cannot be
/// restarted; the driver then has to refuse the socket.
fn start_again(guest: &Guest, plan: &Plan, server: &Server) -> Option<device::Client> {
    if !can_be_restarted(guest) {
        let device = device::open(0, 0).expect("the device");
        assert_eq!(pass_socket(&device, server), Err(Errno::BUSY));
        return None;
    }
    let client = plan.start(server);
    let started = wait_until(SOON, || {
        device::pid(0) == Some(client.tid.as_raw_nonzero().get())
    });
    assert!(started.is_ok(), "not started again: {:?}", device::pid(0));
    Some(client)
}

/// Asserts that the device can be started again and then be read, where [`can_be_restarted`].
fn assert_restarts(guest: &Guest, plan: &Plan, direct: &File) {
    let server = Server::new();
    if let Some(mut client) = start_again(guest, plan, &server) {
        assert_eq!(device::sysfs(0, "size"), (SIZE / 512).to_string());
        // One block, also if another block size was set in between.
        let read = direct.read_exact_at(&mut Buffer::new(512), 512);
        read.expect("to read");
        disconnect(direct, &mut client);
    }
}

/// Waits until the device, which somebody else is starting, can be read.
fn wait_readable(direct: &File) {
    let mut page = Buffer::new(4096);
    // With nbd.ko the size is 0 until it is started: the read then ends early, without an errno.
    let readable = wait_until(SOON, || direct.read_exact_at(&mut page, 0).is_ok());
    assert!(readable.is_ok(), "nothing can be read");
}

/// Disconnects as `nbd-client -d` does. NBD_DO_IT then returns 0, so a persistent client ends.
fn disconnect(device: &File, client: &mut device::Client) {
    ioctl_number(device, DISCONNECT, 0).expect("NBD_DISCONNECT");
    assert_eq!(client.wait(), Ok(0));
}
