// SPDX-License-Identifier: GPL-2.0

//! `rnbd-guest helper ...`: parts of tests that need a process of their own.

use std::fs::OpenOptions;

use rustix::io::Errno;

use crate::device::{assert_pattern, pattern};
use crate::netlink::{DISCONNECT_ON_RELEASE, Netlink, Setup};
use crate::proto;
use crate::sys::{self, Buffer, MIB, ioctl_number};

pub fn main(arguments: &[String]) {
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["fill", mib] => fill(mib.parse().expect("a number of MiB")),
        ["attach", device, size] => attach(device, size.parse().expect("a size")),
        ["own", index, size] => own(
            index.parse().expect("an index"),
            size.parse().expect("a size"),
        ),
        ["probe", device, _] => probe(device),
        ["attach-once", device, size] => {
            sys::handle_and_ignore(libc::SIGUSR1, false);
            attach(device, size.parse().expect("a size"));
        }
        _ => panic!("helper: {arguments:?}?"),
    }
}

/// Connects `device` to the socket on standard input, without ever cleaning up.
fn attach(device: &str, size: u64) {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .expect("the device");
    for (request, argument) in [
        (proto::SET_BLKSIZE, 512),
        (proto::SET_SIZE, size),
        (proto::SET_FLAGS, crate::device::USUAL_FLAGS),
        (proto::SET_SOCK, 0),
    ] {
        ioctl_number(&device, request, argument).expect("an ioctl");
    }
    match ioctl_number(&device, proto::DO_IT, 0) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => panic!("NBD_DO_IT: {error}"),
    }
}

/// Passes the socket on standard input to `device`, and ends with the errno.
fn probe(device: &str) {
    let device = OpenOptions::new().read(true).write(true).open(device);
    let passed = ioctl_number(device.expect("the device"), proto::SET_SOCK, 0);
    std::process::exit(passed.map_or_else(|errno| errno.raw_os_error(), |_| 0));
}

/// Connects device `index` by netlink to the socket on standard input, as its owner, and stays.
fn own(index: u32, size: u64) {
    let netlink = Netlink::open();
    let setup = Setup::new(size)
        .index(index)
        .client_flags(DISCONNECT_ON_RELEASE);
    netlink
        .connect(&setup.descriptors(&[0]))
        .expect("to connect");
    loop {
        std::thread::park();
    }
}

/// Fills so much memory, and finds it unchanged.
fn fill(mib: usize) {
    let mut memory = Buffer::new(mib * MIB);
    for (at, part) in (0..).step_by(MIB).zip(memory.chunks_mut(MIB)) {
        pattern(1, at, part);
    }
    for (at, part) in (0..).step_by(MIB).zip(memory.chunks(MIB)) {
        assert_pattern(1, at, part);
    }
}
