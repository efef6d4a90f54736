// SPDX-License-Identifier: GPL-2.0

//! The device as a USB disk, as controllers offer a machine an image that is somewhere else. The USB cable is a pair
//! of sockets (usbip), and both of its ends are here.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::targets::scsi_disk;
use super::{MIB, Stack, link, run, sysfs};
use crate::device::{SOON, pattern};
use crate::harness::{Guest, Test, wait_until};
use crate::programs::{Daemon, sh};
use crate::sys::ioctl_number;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![test!(a_usb_disk)]
}

const SIZE: u64 = 24 * MIB;
const GADGET: &str = "/sys/devices/platform/usbip-vudc.0";
const HOST: &str = "/sys/devices/platform/vhci_hcd.0";

/// scsi/scsi_ioctl.h and linux/cdrom.h
const SCSI_IOCTL_DOORUNLOCK: u32 = 0x5381;
const CDROMEJECT: u32 = 0x5309;

/// Plugs the gadget into the host's first port.
fn plug(stack: &mut Stack) {
    const HIGH_SPEED: u32 = 3;
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    fs::write(
        format!("{GADGET}/usbip_sockfd"),
        ours.as_raw_fd().to_string(),
    )
    .expect("the gadget's end");
    stack.up("true", &format!("echo -1 > {GADGET}/usbip_sockfd || true"));
    let attach = format!("0 {} 1 {HIGH_SPEED}", theirs.as_raw_fd());
    fs::write(format!("{HOST}/attach"), attach).expect("the host's end");
    stack.up("true", &format!("echo 0 > {HOST}/detach"));
}

/// Where the gadget has the name of its image.
fn lun() -> String {
    run(&format!("ls {GADGET}/gadget*/lun0/file"))
        .trim()
        .to_owned()
}

fn eject(name: &str) {
    let disk = File::open(format!("/dev/{name}")).expect("the disk");
    ioctl_number(&disk, SCSI_IOCTL_DOORUNLOCK, 0).expect("to unlock");
    ioctl_number(&disk, CDROMEJECT, 0).expect("to eject");
}

fn a_usb_disk(_: &Guest) {
    run("modprobe usb-storage
        modprobe sd_mod
        modprobe vhci-hcd");
    let first = link(SIZE);
    run("mkfs.ext4 -q /dev/nbd0");
    let mut stack = Stack::new();
    stack.up("modprobe usbip-vudc num=1", "modprobe -r usbip-vudc");
    stack.up(
        "modprobe g_mass_storage file=/dev/nbd0 removable=1",
        "modprobe -r g_mass_storage",
    );
    plug(&mut stack);
    let name = scsi_disk("Linux");
    let size = || sysfs(&format!("/sys/block/{name}/size"));
    assert_eq!(size(), (SIZE / 512).to_string());
    let mount = format!("mkdir -p /tmp/mnt && mount /dev/{name} /tmp/mnt");

    let mut mounted = Stack::new();
    mounted.up(&mount, "umount /tmp/mnt");
    sh("cp /usr/bin/[a-b]* /tmp/mnt/ && sync -f /tmp/mnt");
    // The server is lost, twice, while somebody copies.
    let mut writer = Daemon::start("cp -r /usr/share/perl5 /tmp/mnt/");
    for _ in 0..2 {
        let before = first.server.received_bytes();
        let _ = wait_until(SOON / 4, || first.server.received_bytes() > before);
        first.kill_server();
        assert_eq!(first.revive(), Ok(()));
    }
    assert!(writer.wait(6 * SOON), "{}", writer.said());
    sh("sync -f /tmp/mnt");
    mounted.take_down();

    eject(&name);
    let lun = lun();
    assert_eq!(sysfs(&lun), "", "the image is still there");
    // What was written through the USB disk is in the image.
    let mut image = Stack::new();
    image.up("mount -o ro /dev/nbd0 /tmp/mnt", "umount /tmp/mnt");
    sh("for file in /usr/bin/[a-b]*; do
            test -L $file || cmp $file /tmp/mnt/${file##*/}
        done
        diff -r /usr/share/perl5 /tmp/mnt/perl5");
    image.take_down();
    run("fsck.ext4 -fn /dev/nbd0");

    // Another image, in the same drive.
    first.disconnect_and_wait();
    drop(first);
    let second = link(SIZE / 2);
    let mut data = vec![0; MIB as usize];
    pattern(2, 0, &mut data);
    second.server.poke(0, &data);
    run(&format!("echo /dev/nbd0 > {lun}"));
    let there = wait_until(2 * SOON, || {
        // Opening the disk has the kernel look.
        drop(File::open(format!("/dev/{name}")));
        size() == (SIZE / 2 / 512).to_string()
    });
    assert!(there.is_ok(), "it has {} sectors", size());
    run(&format!(
        "dd if=/dev/{name} of=/tmp/read bs=1M count=1 status=none"
    ));
    assert!(fs::read("/tmp/read").unwrap() == data, "another image");
    fs::remove_file("/tmp/read").unwrap();
    stack.take_down();
    drop(second);
}
