// SPDX-License-Identifier: GPL-2.0

//! A device that the kernel offers to others: as a namespace of its NVMe target, as a disk of its SCSI target.
//! Both have a driver that makes a disk of that on the same machine.

use std::fs::{self, File};

use super::{MIB, Stack, Written, interrupt, link, run, sysfs, under_writers, wait_for_file};
use crate::device::SOON;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{Link, Setup};
use crate::proto::Command;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![test!(nvme), test!(scsi)]
}

const SIZE: u64 = 16 * MIB;

/// Where targets are configured.
pub fn mount_configfs() {
    run("modprobe configfs
        mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config");
}

/// Waits for the one disk with this vendor.
pub fn scsi_disk(vendor: &str) -> String {
    let mut found = None;
    // It is there before it can be opened, and can be opened only with a medium in it.
    let there = wait_until(3 * SOON, || {
        let disks = fs::read_dir("/sys/block").expect("/sys/block").flatten();
        let names = disks.filter_map(|disk| disk.file_name().into_string().ok());
        found = names.into_iter().find(|name| {
            let has = fs::read_to_string(format!("/sys/block/{name}/device/vendor"));
            has.is_ok_and(|has| has.trim() == vendor)
        });
        found
            .as_ref()
            .is_some_and(|name| File::open(format!("/dev/{name}")).is_ok())
    });
    assert!(there.is_ok(), "no disk of {vendor}: {found:?}");
    found.unwrap()
}

/// Uses a disk behind which the device is, and of which the device is to have everything.
fn use_disk(link: &Link, name: &str) {
    let path = format!("/dev/{name}");
    let written = under_writers(&path, |progress| interrupt(link, progress));
    written.verify(&path);
    written.verify("/dev/nbd0");

    link.server.forget_requests();
    run(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=1 status=none
        dd if=/tmp/data of={path} bs=64k oflag=seek_bytes seek={} conv=fsync status=none",
        Written::END
    ));
    let data = fs::read("/tmp/data").unwrap();
    let stored = |len: u64| link.server.peek(Written::END, len as usize);
    assert!(stored(MIB) == data, "the server has something else");
    assert!(
        !link.server.requests_of(Command::Flush).is_empty(),
        "nothing was flushed"
    );

    run(&format!(
        "blkdiscard -o {} -l {} {path}",
        Written::END,
        MIB / 2
    ));
    assert!(
        !link.server.requests_of(Command::Trim).is_empty(),
        "nothing was discarded"
    );
    assert!(stored(MIB / 2).iter().all(|byte| *byte == 0));
    assert!(stored(MIB)[MIB as usize / 2..] == data[MIB as usize / 2..]);
    run(&format!(
        "blkdiscard -z -o {} -l {MIB} {path}",
        Written::END
    ));
    assert!(stored(MIB).iter().all(|byte| *byte == 0));
    written.verify(&path);
}

/// Lets the device grow, and waits until a disk has grown too, by `tell`.
fn grow(link: &Link, name: &str, tell: &str) {
    let grown = Setup::change(0).size(2 * SIZE);
    assert_eq!(link.netlink.reconfigure(&grown), Ok(()));
    run(tell);
    let size = || sysfs(&format!("/sys/block/{name}/size"));
    let sectors = (2 * SIZE / 512).to_string();
    let grown = wait_until(SOON, || size() == sectors);
    assert!(grown.is_ok(), "it still has {} sectors", size());
}

fn nvme(_: &Guest) {
    const TARGET: &str = "/sys/kernel/config/nvmet";
    mount_configfs();
    run("modprobe nvme-loop");
    let link = link(SIZE);
    let mut stack = Stack::new();
    let subsystem = format!("{TARGET}/subsystems/stack");
    let namespace = format!("{subsystem}/namespaces/1");
    let port = format!("{TARGET}/ports/1");
    stack.up(&format!("mkdir {subsystem}"), &format!("rmdir {subsystem}"));
    run(&format!("echo 1 > {subsystem}/attr_allow_any_host"));
    stack.up(&format!("mkdir {namespace}"), &format!("rmdir {namespace}"));
    stack.up(
        &format!(
            "printf /dev/nbd0 > {namespace}/device_path
            echo 1 > {namespace}/enable"
        ),
        &format!("echo 0 > {namespace}/enable"),
    );
    stack.up(&format!("mkdir {port}"), &format!("rmdir {port}"));
    run(&format!("echo loop > {port}/addr_trtype"));
    stack.up(
        &format!("ln -s {subsystem} {port}/subsystems/stack"),
        &format!("rm {port}/subsystems/stack"),
    );
    // A machine that has much to do may be late with keeping alive.
    stack.up(
        "echo transport=loop,nqn=stack,keep_alive_tmo=0 > /dev/nvme-fabrics",
        "echo 1 > /sys/class/nvme/nvme0/delete_controller",
    );
    wait_for_file("/dev/nvme0n1");
    use_disk(&link, "nvme0n1");
    grow(
        &link,
        "nvme0n1",
        &format!("echo 1 > {namespace}/revalidate_size"),
    );
    stack.take_down();
}

fn scsi(_: &Guest) {
    const TARGET: &str = "/sys/kernel/config/target";
    mount_configfs();
    run("modprobe target_core_iblock
        modprobe tcm_loop
        modprobe sd_mod");
    let link = link(SIZE);
    let mut stack = Stack::new();
    let adapter = format!("{TARGET}/core/iblock_0");
    let backend = format!("{adapter}/stack");
    let host = format!("{TARGET}/loopback/naa.5001234500000001");
    let group = format!("{host}/tpgt_1");
    let unit = format!("{group}/lun/lun_0");
    stack.up(&format!("mkdir {adapter}"), &format!("rmdir {adapter}"));
    stack.up(&format!("mkdir {backend}"), &format!("rmdir {backend}"));
    run(&format!(
        "printf udev_path=/dev/nbd0 > {backend}/control
        echo 1 > {backend}/enable
        echo 1 > {backend}/attrib/emulate_tpu
        echo 1 > {backend}/attrib/emulate_tpws"
    ));
    stack.up(
        &format!("mkdir -p {group}"),
        &format!("rmdir {group} {host} {TARGET}/loopback"),
    );
    run(&format!("echo naa.5001234500000002 > {group}/nexus"));
    stack.up(&format!("mkdir {unit}"), &format!("rmdir {unit}"));
    stack.up(
        &format!("ln -s {backend} {unit}/port"),
        &format!("rm {unit}/port"),
    );
    let name = scsi_disk("LIO-ORG");
    use_disk(&link, &name);
    grow(
        &link,
        &name,
        &format!("echo 1 > /sys/block/{name}/device/rescan"),
    );
    stack.take_down();
}
