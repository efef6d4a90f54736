// SPDX-License-Identifier: GPL-2.0

//! A tree of 200 MB goes to a file system on the device and comes back the same; on the debug kernel
//! a smaller one.

use std::fs;
use std::thread;
use std::time::Duration;

use super::user_space::{Client, serve};
use crate::debug_kernel::enough;
use crate::device::{self, SOON};
use crate::harness::{Guest, Test, wait_until};
use crate::programs::{Daemon, sh, try_sh};
use crate::test;
use crate::tree::Manifest;

pub fn tests() -> Vec<Test> {
    vec![
        test!(tree_on_a_qcow2_image).limit_seconds(400),
        test!(tree_while_the_server_is_killed).limit_seconds(400),
    ]
}

/// What is copied: the guest's own programs and libraries.
fn trees() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
    #[cfg(target_arch = "aarch64")]
    const LIBRARIES: &str = "/usr/lib/aarch64-linux-gnu";
    enough(&["/usr/bin", LIBRARIES, "/usr/sbin"], &["/usr/sbin"])
}

fn least_bytes() -> u64 {
    enough(200_000_000, 10_000_000)
}

/// Mounts the device after all else that was cached of it is forgotten, and compares.
fn assert_copy_is_the_same() {
    sh("umount /tmp/mnt && mount /dev/nbd0 /tmp/mnt");
    // Few large reads are quicker where a switch between tasks takes long.
    fs::write("/sys/block/nbd0/queue/read_ahead_kb", "4096").unwrap();
    let original = Manifest::of("", trees());
    assert!(
        original.total >= least_bytes(),
        "only {} bytes",
        original.total
    );
    original.assert_same(&Manifest::of("/tmp/mnt", trees()));
    sh("umount /tmp/mnt && fsck.ext4 -fn /dev/nbd0");
}

fn tree_on_a_qcow2_image(_: &Guest) {
    sh("qemu-img create -q -f qcow2 /tmp/tree.qcow2 1G
        qemu-nbd -f qcow2 --discard=unmap -c /dev/nbd0 /tmp/tree.qcow2");
    let connected = wait_until(SOON, || device::sysfs(0, "size") == (1 << 21).to_string());
    assert!(connected.is_ok(), "qemu-nbd -c does not connect");
    sh(&format!(
        "mkfs.ext4 -q /dev/nbd0
        mkdir -p /tmp/mnt
        mount /dev/nbd0 /tmp/mnt
        cp -a --parents {} /tmp/mnt",
        trees().join(" ")
    ));
    assert_copy_is_the_same();
    sh("qemu-nbd -d /dev/nbd0");
    let gone = wait_until(SOON, || device::pid(0).is_none());
    assert!(gone.is_ok());
    sh("qemu-img check -q /tmp/tree.qcow2 && rm /tmp/tree.qcow2");
}

/// A server that is now and then killed, and what hangs on it.
struct Mounted {
    server: Daemon,
    client: Client,
}

impl Mounted {
    const SOCKET: &str = "/tmp/tree.sock";

    fn connect() -> Self {
        let _ = fs::remove_file(Self::SOCKET);
        let command = format!("nbdkit -f -U {} file /tmp/tree.img", Self::SOCKET);
        let server = serve(&command, Self::SOCKET);
        let client = Client::connect(&format!("-C 2 -t 10 -unix {}", Self::SOCKET));
        Self { server, client }
    }

    /// After the server's death: takes everything down, and sets it up anew.
    fn recover(&mut self) {
        self.client.0.wait(SOON);
        sh("umount /tmp/mnt");
        *self = Self::connect();
        sh("mount /dev/nbd0 /tmp/mnt");
    }

    /// Copies one of the trees; true if that went well and it is stored.
    fn copy(&mut self, tree: &str, kill_after: Option<Duration>) -> bool {
        let script =
            format!("rm -rf /tmp/mnt{tree} && cp -a --parents {tree} /tmp/mnt && sync -f /tmp/mnt");
        match kill_after {
            None => try_sh(&script).is_ok(),
            Some(delay) => thread::scope(|scope| {
                let copy = scope.spawn(|| try_sh(&script).is_ok());
                thread::sleep(delay);
                self.server.kill();
                copy.join().unwrap()
            }),
        }
    }
}

fn tree_while_the_server_is_killed(_: &Guest) {
    fs::File::create("/tmp/tree.img")
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let mut mounted = Mounted::connect();
    sh("mkfs.ext4 -q /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt");
    for tree in trees() {
        // Each is interrupted, and then copied again.
        mounted.copy(tree, Some(Duration::from_millis(1500)));
        mounted.recover();
        assert!(mounted.copy(tree, None), "could not copy {tree}");
    }
    assert_copy_is_the_same();
    mounted.client.disconnect();
    fs::remove_file("/tmp/tree.img").unwrap();
}
