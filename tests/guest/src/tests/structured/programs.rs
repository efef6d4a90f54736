// SPDX-License-Identifier: GPL-2.0

//! Real servers that have agreed on structured replies.

use std::fs;
use std::io;
use std::time::Instant;

use super::super::user_space::{fio, serve};
use crate::harness::{Guest, Test, say};
use crate::negotiate::{Export, dial, dial_for_structured_replies};
use crate::netlink::{Netlink, Setup};
use crate::programs::{Daemon, sh};
use crate::proto::SEND_DF;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(fio_verifies_qemu_nbd),
        test!(fio_verifies_nbdkit),
        test!(words_of_nbdkit),
        test!(a_sparse_image),
        test!(a_sparse_image_of_2_gib)
            .limit_seconds(600)
            .on_request(),
    ]
}

const ADDRESS: &str = "127.0.0.1:10809";

fn nbdkit(options: &str) -> Daemon {
    serve(
        &format!("nbdkit -f -p 10809 -i 127.0.0.1 {options}"),
        ADDRESS,
    )
}

fn qemu_nbd(options: &str) -> Daemon {
    serve(
        &format!("qemu-nbd -t -e 8 -b 127.0.0.1 -p 10809 {options}"),
        ADDRESS,
    )
}

/// Device 0, connected to the server. It is disconnected in the end.
struct Connected(Netlink);

impl Connected {
    fn new(export: io::Result<Export>) -> Self {
        let export = export.expect("a server");
        let setup = Setup::new(export.size).index(0).flags(export.flags);
        let netlink = Netlink::open();
        assert_eq!(netlink.connect(&setup.sockets([export.socket])), Ok(0));
        Self(netlink)
    }

    fn structured() -> Self {
        let export = dial_for_structured_replies(ADDRESS);
        let flags = export.as_ref().map_or(0, |export| export.flags);
        assert_eq!(flags & SEND_DF, SEND_DF, "the server's flags: {flags:#x}");
        Self::new(export)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let _ = self.0.disconnect(0);
        self.0.wait_free(0);
    }
}

fn verify() {
    let _connected = Connected::structured();
    fio("--rw=randwrite --bs=4k --ioengine=io_uring --iodepth=32");
    fio("--rw=randrw --bsrange=512-256k --ioengine=libaio --iodepth=16");
}

fn fio_verifies_qemu_nbd(_: &Guest) {
    sh("qemu-img create -q -f qcow2 /tmp/structured.qcow2 64M");
    let server = qemu_nbd("-f qcow2 --discard=unmap /tmp/structured.qcow2");
    verify();
    drop(server);
    sh("qemu-img check -q /tmp/structured.qcow2; rm /tmp/structured.qcow2");
}

fn fio_verifies_nbdkit(_: &Guest) {
    let _server = nbdkit("memory 64M");
    verify();
}

/// nbdkit says nothing but the number's name.
fn words_of_nbdkit(guest: &Guest) {
    let _server = nbdkit("--filter=error memory 64M error-pread=EPERM error-pread-rate=100%");
    let connected = Connected::structured();
    sh("! dd if=/dev/nbd0 of=/dev/null bs=64k count=1 iflag=direct status=none");
    guest.expect_logged("", "server returned error 1 for ");
    drop(connected);
}

/// What the loopback device has received, in bytes.
fn received() -> u64 {
    let text = fs::read_to_string("/sys/class/net/lo/statistics/rx_bytes").unwrap();
    text.trim().parse().expect("a number")
}

/// How many bytes a read of the whole device brings over the network, and what it has read.
fn read_all(connect: impl Fn() -> Connected) -> (u64, String) {
    let _connected = connect();
    let (before, began) = (received(), Instant::now());
    let sum = sh("dd if=/dev/nbd0 bs=1M iflag=direct status=none | sha1sum");
    let bytes = received() - before;
    say(&format!(
        "{bytes} bytes in {:.1} s",
        began.elapsed().as_secs_f32()
    ));
    (bytes, sum)
}

/// An image of which a 32nd is data, in 16 places.
fn read_sparse(mib: u64) {
    let piece = mib / 16;
    // In units of 64 KiB.
    let place = |number: u64| {
        format!(
            "dd if=/dev/urandom of=/tmp/sparse.raw bs=64k count={} seek={} conv=notrunc status=none\n",
            piece / 2,
            (number * piece + piece / 3) * 16,
        )
    };
    let places: String = (0..16).map(place).collect();
    sh(&format!(
        "truncate -s {mib}M /tmp/sparse.raw\n{places}
        qemu-img convert -f raw -O qcow2 /tmp/sparse.raw /tmp/sparse.qcow2 && rm /tmp/sparse.raw"
    ));
    let server = qemu_nbd("-r -f qcow2 /tmp/sparse.qcow2");
    let (with, sum) = read_all(Connected::structured);
    let (without, same) = read_all(|| Connected::new(dial(ADDRESS)));
    drop(server);
    sh("rm /tmp/sparse.qcow2");
    assert_eq!(sum, same, "the data differs");
    assert!(without > mib << 20, "{without}");
    assert!(with * 20 < without, "{with} with and {without} without");
}

fn a_sparse_image(_: &Guest) {
    read_sparse(256);
}

fn a_sparse_image_of_2_gib(_: &Guest) {
    read_sparse(2048);
}
