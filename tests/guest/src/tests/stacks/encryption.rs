// SPDX-License-Identifier: GPL-2.0

//! Encryption (dm-crypt) and checksums (dm-integrity).

use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{MIB, Stack, Written, direct, interrupt, link, run, try_run, under_writers};
use crate::device::{assert_pattern, errno, pattern};
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::Link;
use crate::proto::Command;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(crypt_without_discards),
        test!(crypt_with_discards),
        test!(integrity),
    ]
}

const SIZE: u64 = 24 * MIB;

/// Of what is encrypted on the device.
const HEADER: u64 = MIB;
const CRYPT: &str = "/dev/mapper/secret";

fn open_crypt(stack: &mut Stack, options: &str) {
    stack.up(
        &format!("printf password | cryptsetup open {options} --key-file=- /dev/nbd0 secret"),
        "cryptsetup close secret",
    );
}

/// Where the server has this text, if it has.
fn find(link: &Link, text: &[u8]) -> Option<u64> {
    let stored = link.server.peek(0, SIZE as usize);
    let found = stored.windows(text.len()).position(|part| part == text);
    found.map(|at| at as u64)
}

/// Formats the device, and uses it while connections are lost.
fn crypt(options: &str) -> (Link, Stack, Written) {
    run("modprobe dm-crypt");
    let link = link(SIZE);
    // A weak derivation of the key takes no seconds.
    run(&format!(
        "printf password | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 \
         --pbkdf-force-iterations 1000 --luks2-metadata-size 16k --luks2-keyslots-size 256k \
         --offset {} --key-file=- /dev/nbd0",
        HEADER / 512
    ));
    let mut stack = Stack::new();
    open_crypt(&mut stack, options);
    // What was never written is no zeroes there.
    run(&format!(
        "blkdiscard --zeroout --length {} {CRYPT}",
        Written::END
    ));
    let written = under_writers(CRYPT, |progress| interrupt(&link, progress));
    written.verify(CRYPT);
    // Anew, from what the server has.
    stack.down();
    open_crypt(&mut stack, options);
    written.verify(CRYPT);
    (link, stack, written)
}

fn crypt_without_discards(_: &Guest) {
    let (link, stack, _) = crypt("");
    let text = [b'x'; 4096];
    let data = Buffer::filled(4096, |data| data.copy_from_slice(&text));
    let device = direct(CRYPT);
    device.write_all_at(&data, Written::END).unwrap();
    assert_eq!(find(&link, &text[..16]), None, "it is not encrypted");
    assert!(try_run(&format!("blkdiscard {CRYPT}")).is_err());
    assert_eq!(link.server.requests_of(Command::Trim).len(), 0);
    drop(device);
    stack.take_down();
}

fn crypt_with_discards(_: &Guest) {
    let (link, stack, written) = crypt("--allow-discards");
    let device = direct(CRYPT);
    let data = Buffer::filled(MIB as usize, |data| data.fill(b'x'));
    device.write_all_at(&data, Written::END).unwrap();
    let stored = |at, len| link.server.peek(HEADER + Written::END + at, len as usize);
    assert!(stored(0, MIB).chunks(16).all(|block| block != [0; 16]));
    run(&format!(
        "blkdiscard -o {} -l {} {CRYPT}",
        Written::END,
        MIB / 2
    ));
    // The server's zeroes are the place where they belong.
    assert!(stored(0, MIB / 2).iter().all(|byte| *byte == 0));
    assert!(stored(MIB / 2, MIB / 2).iter().any(|byte| *byte != 0));
    for trim in link.server.requests_of(Command::Trim) {
        assert!(trim.offset >= HEADER + Written::END, "{trim:?}");
    }
    let mut kept = Buffer::new(MIB as usize / 2);
    device
        .read_exact_at(&mut kept, Written::END + MIB / 2)
        .unwrap();
    assert!(kept.iter().all(|byte| *byte == b'x'));
    written.verify(CRYPT);
    drop(device);
    stack.take_down();
}

/// A journal on the device has data and checksums change together; what changes behind its back is found.
fn integrity(_: &Guest) {
    const DEVICE: &str = "/dev/mapper/checked";
    run("modprobe dm-integrity");
    let link = link(SIZE);
    run("integritysetup format -q --no-wipe --sector-size 4096 /dev/nbd0");
    let mut stack = Stack::new();
    let (open, close) = (
        "integritysetup open /dev/nbd0 checked",
        "integritysetup close checked",
    );
    stack.up(open, close);
    // What has no checksum yet cannot be read.
    run(&format!(
        "dd if=/dev/zero of={DEVICE} bs=1M count={} oflag=direct status=none",
        Written::END / MIB
    ));
    let written = under_writers(DEVICE, |progress| interrupt(&link, progress));
    written.verify(DEVICE);
    let data = Buffer::filled(4096, |data| pattern(1, Written::END, data));
    direct(DEVICE).write_all_at(&data, Written::END).unwrap();
    stack.down();
    stack.up(open, close);
    written.verify(DEVICE);

    let device = direct(DEVICE);
    let mut read = Buffer::new(4096);
    device.read_exact_at(&mut read, Written::END).unwrap();
    assert_pattern(1, Written::END, &read);
    // Replayed from the journal, it may be there twice: the last one is in its place.
    let replayed = wait_until(crate::device::SOON, || find(&link, &data[..64]).is_some());
    assert!(replayed.is_ok());
    let mut stored = link.server.peek(0, SIZE as usize);
    for at in (0..SIZE as usize).step_by(512) {
        if stored[at..].starts_with(&data[..64]) {
            stored[at] ^= 1;
            link.server.poke(at as u64, &stored[at..=at]);
        }
    }
    let read = errno(device.read_exact_at(&mut read, Written::END));
    assert_eq!(read, Err(Errno::ILSEQ));
    written.verify(DEVICE);
    drop(device);
    stack.take_down();
}
