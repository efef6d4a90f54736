// SPDX-License-Identifier: GPL-2.0

//! A tree of 200 MB goes to a file system on the device and comes back the same.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::user_space::{Client, serve};
use crate::device::{self, SOON};
use crate::harness::{Guest, Test, wait_until};
use crate::programs::{Daemon, sh, try_sh};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(tree_on_a_qcow2_image).limit_seconds(400),
        test!(tree_while_the_server_is_killed).limit_seconds(400),
    ]
}

/// What is copied: the guest's own programs and libraries.
const TREES: [&str; 3] = ["/usr/lib", "/usr/bin", "/usr/sbin"];
const TREE_BYTES: u64 = 200_000_000;

/// Kind, permissions, length and checksum of every file below a directory.
type Manifest = BTreeMap<String, (bool, u32, u64, u64)>;

fn manifest(prefix: &str) -> Manifest {
    let mut manifest = Manifest::new();
    let mut buffer = vec![0; 1 << 20];
    for tree in TREES {
        note(
            Path::new(&format!("{prefix}{tree}")),
            prefix,
            &mut manifest,
            &mut buffer,
        );
    }
    manifest
}

fn note(path: &Path, prefix: &str, manifest: &mut Manifest, buffer: &mut [u8]) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let (mut len, mut checksum) = (0, 0);
    if metadata.is_symlink() {
        checksum = add(
            0,
            fs::read_link(path).unwrap().as_os_str().as_encoded_bytes(),
        );
    } else if metadata.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            note(&entry.unwrap().path(), prefix, manifest, buffer);
        }
    } else {
        let mut file = fs::File::open(path).unwrap();
        loop {
            // Whole buffers, so that the same contents have the same checksum.
            let mut filled = 0;
            while filled < buffer.len() {
                match file.read(&mut buffer[filled..]).unwrap() {
                    0 => break,
                    more => filled += more,
                }
            }
            len += filled as u64;
            checksum = add(checksum, &buffer[..filled]);
            if filled < buffer.len() {
                break;
            }
        }
    }
    let name = path.to_string_lossy()[prefix.len()..].to_owned();
    manifest.insert(
        name,
        (
            metadata.is_symlink(),
            metadata.permissions().mode(),
            len,
            checksum,
        ),
    );
}

/// A checksum that is quick even where every instruction is emulated.
fn add(checksum: u64, data: &[u8]) -> u64 {
    let mix = |sum: u64, word: u64| {
        (sum ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(31)
    };
    let words = data.chunks_exact(8);
    let rest = words
        .remainder()
        .iter()
        .fold(0, |word, byte| word << 8 | u64::from(*byte));
    let sum = words.fold(checksum, |sum, word| {
        mix(sum, u64::from_le_bytes(word.try_into().unwrap()))
    });
    mix(mix(sum, rest), data.len() as u64)
}

fn assert_same_as_original() {
    let (original, copy) = (manifest(""), manifest("/tmp/mnt"));
    let total: u64 = original.values().map(|(_, _, len, _)| len).sum();
    assert!(total >= TREE_BYTES, "only {total} bytes");
    let differs = original
        .iter()
        .find(|(path, file)| copy.get(*path) != Some(*file));
    assert_eq!(differs, None, "is not the same in the copy");
    assert_eq!(copy.len(), original.len());
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
        cp -a --parents {} /tmp/mnt
        umount /tmp/mnt
        mount /dev/nbd0 /tmp/mnt",
        TREES.join(" ")
    ));
    assert_same_as_original();
    sh("umount /tmp/mnt
        fsck.ext4 -fn /dev/nbd0
        qemu-nbd -d /dev/nbd0");
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

    /// Copies one part of the trees; true if that went well and it is stored.
    fn copy(&mut self, part: &Path, kill_after: Option<Duration>) -> bool {
        let from = part.display();
        let script =
            format!("rm -rf /tmp/mnt{from} && cp -a --parents {from} /tmp/mnt && sync -f /tmp/mnt");
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

/// The trees in parts: what is directly below them, and the loose files as the first part.
fn parts() -> Vec<PathBuf> {
    let mut parts: Vec<PathBuf> = fs::read_dir("/usr/lib")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .chain(["/usr/bin".into(), "/usr/sbin".into()])
        .collect();
    parts.sort();
    parts
}

fn tree_while_the_server_is_killed(_: &Guest) {
    fs::File::create("/tmp/tree.img")
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let mut mounted = Mounted::connect();
    sh("mkfs.ext4 -q /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt");
    let mut deaths = 0;
    for (number, part) in parts().iter().enumerate() {
        // The large parts, and some of the others, are interrupted.
        let large = ["/usr/bin", "/usr/lib/x86_64-linux-gnu"]
            .iter()
            .any(|large| part == Path::new(large));
        if large || number == 7 {
            let delay = if large { 2500 } else { 100 };
            mounted.copy(part, Some(Duration::from_millis(delay)));
            deaths += 1;
            mounted.recover();
        }
        assert!(
            mounted.copy(part, None),
            "could not copy {}",
            part.display()
        );
    }
    assert_eq!(deaths, 3);
    sh("umount /tmp/mnt && fsck.ext4 -fn /dev/nbd0 && mount /dev/nbd0 /tmp/mnt");
    assert_same_as_original();
    sh("umount /tmp/mnt");
    mounted.client.disconnect();
    fs::remove_file("/tmp/tree.img").unwrap();
}
