// SPDX-License-Identifier: GPL-2.0

//! The programs that people use, as they use them.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::device::{self, Plan, SOON, assert_usable};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::programs::{Daemon, sh, try_sh};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(nbd_client_with_nbd_server).limit_seconds(160),
        test!(nbd_client_with_nbdkit),
        test!(nbd_client_with_nbdkit_over_a_unix_socket),
        test!(nbd_client_with_several_connections),
        test!(nbd_client_lists_and_checks),
        test!(nbd_client_over_netlink),
        test!(nbd_client_persist_connects_again),
        test!(nbd_client_started_again_with_the_server),
        test!(qemu_nbd_connects_a_qcow2_image),
        test!(qemu_nbd_is_killed),
        test!(block_device_tools),
        test!(parted_makes_partitions),
        test!(fio_verifies_random_writes),
        test!(fio_verifies_with_several_connections),
        test!(ext4_on_nbdkit),
        test!(xfs_on_nbdkit),
        test!(btrfs_on_nbdkit),
        test!(swap_under_memory_pressure).limit_seconds(300),
        test!(ext4_survives_the_death_of_the_server),
    ]
}

/// A server program, once it listens on `socket`: a path, a TCP port of 127.0.0.1, or an address
/// with a port.
pub fn serve(command: &str, socket: &str) -> Daemon {
    let server = Daemon::start(command);
    wait_for(&server, socket);
    server
}

fn wait_for(server: &Daemon, socket: &str) {
    let listens = wait_until(SOON * 6, || {
        if let Ok(port) = socket.parse::<u16>() {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        } else if let Ok(address) = socket.parse::<SocketAddr>() {
            TcpStream::connect(address).is_ok()
        } else {
            UnixStream::connect(socket).is_ok()
        }
    });
    assert!(
        listens.is_ok(),
        "no server listens on {socket}: {}",
        server.said()
    );
}

fn nbdkit_tcp() -> Daemon {
    serve("nbdkit -f -p 10809 -i 127.0.0.1 memory 128M", "10809")
}

fn nbdkit_unix() -> Daemon {
    nbdkit("memory 128M")
}

/// nbdkit on a UNIX socket.
fn nbdkit(options: &str) -> Daemon {
    let _ = fs::remove_file("/tmp/nbdkit.sock");
    let command = format!("nbdkit -f -U /tmp/nbdkit.sock {options}");
    serve(&command, "/tmp/nbdkit.sock")
}

/// nbd-client in the foreground, until it is disconnected.
pub struct Client(pub Daemon);

impl Client {
    pub fn connect(arguments: &str) -> Self {
        let client = Daemon::start(&format!("nbd-client -L -n {arguments} /dev/nbd0"));
        let connected = wait_until(SOON * 6, || {
            device::pid(0).is_some() && device::sysfs(0, "size") != "0"
        });
        assert!(
            connected.is_ok(),
            "nbd-client {arguments} does not connect: {}",
            client.said()
        );
        assert_eq!(device::pid(0), Some(client.id() as i32));
        Self(client)
    }

    pub fn disconnect(mut self) {
        sh("nbd-client -L -d /dev/nbd0");
        self.wait_ended();
        assert_eq!(device::sysfs(0, "size"), "0");
    }

    /// Waits until it has ended, and the process that it has look for partitions.
    fn wait_ended(&mut self) {
        assert!(
            self.0.wait(SOON),
            "nbd-client is not content: {}",
            self.0.said()
        );
        let gone = wait_until(SOON, || device::pid(0).is_none());
        assert!(gone.is_ok());
    }
}

/// Writes and reads a little through the page cache and around it.
pub fn use_device() {
    sh("dd if=/dev/urandom of=/tmp/data bs=1M count=4 status=none
        dd if=/tmp/data of=/dev/nbd0 bs=64k oflag=direct status=none
        dd if=/tmp/data of=/dev/nbd0 bs=1M seek=8 conv=fsync status=none
        blockdev --flushbufs /dev/nbd0
        cmp -n 4194304 /tmp/data /dev/nbd0
        dd if=/dev/nbd0 bs=1M skip=8 count=4 iflag=direct status=none | cmp - /tmp/data
        rm /tmp/data");
}

/// nbd-server on a TCP port or on a UNIX socket: it does either.
fn nbd_server(name: &str, listen: &str, socket: &str) -> Daemon {
    fs::File::create(format!("/tmp/{name}.img"))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let config = format!(
        "[generic]\nuser = root\ngroup = root\n{listen} = {socket}\n\
         [export]\nexportname = /tmp/{name}.img\nflush = true\nfua = true\ntrim = true\n"
    );
    let path = format!("/tmp/{name}.conf");
    fs::write(&path, config).unwrap();
    Daemon::start(&format!("nbd-server -n -C {path}"))
}

fn nbd_client_with_nbd_server(_: &Guest) {
    // Each computes for seconds before it answers.
    let _ = fs::remove_file("/tmp/nbd-server.sock");
    let mut servers = [
        nbd_server("tcp", "listenaddr = 127.0.0.1\nport", "10810"),
        nbd_server("unix", "unixsock", "/tmp/nbd-server.sock"),
    ];
    for (server, socket, address) in [
        (0, "10810", "127.0.0.1 10810"),
        (1, "/tmp/nbd-server.sock", "-unix /tmp/nbd-server.sock"),
    ] {
        wait_for(&servers[server], socket);
        let client = Client::connect(&format!("-N export {address}"));
        assert_eq!(device::sysfs(0, "size"), "131072");
        assert_eq!(device::sysfs(0, "queue/write_cache"), "write back");
        use_device();
        client.disconnect();
        servers[server].kill();
    }
}

fn nbd_client_with_nbdkit(_: &Guest) {
    let _server = nbdkit_tcp();
    let client = Client::connect("-b 4096 127.0.0.1 10809");
    assert_eq!(device::sysfs(0, "queue/logical_block_size"), "4096");
    use_device();
    sh("blkdiscard /dev/nbd0 && blkdiscard -z -o 4096 -l 65536 /dev/nbd0");
    client.disconnect();
}

fn nbd_client_with_nbdkit_over_a_unix_socket(_: &Guest) {
    let _server = nbdkit_unix();
    let client = Client::connect("-t 30 -unix /tmp/nbdkit.sock");
    assert_eq!(device::sysfs(0, "queue/io_timeout"), "30000");
    use_device();
    client.disconnect();
}

fn nbd_client_with_several_connections(_: &Guest) {
    let _server = nbdkit_unix();
    let client = Client::connect("-C 3 -unix /tmp/nbdkit.sock");
    let queues = fs::read_dir("/sys/block/nbd0/mq").unwrap().count();
    assert_eq!(queues, 2, "no more than processors");
    use_device();
    client.disconnect();
}

fn nbd_client_lists_and_checks(_: &Guest) {
    let _server = nbdkit_unix();
    assert!(
        try_sh("nbd-client -c /dev/nbd0").is_err(),
        "not connected yet"
    );
    let client = Client::connect("-unix /tmp/nbdkit.sock");
    let said = sh("nbd-client -c /dev/nbd0");
    assert_eq!(said.trim(), device::pid(0).unwrap().to_string());
    client.disconnect();
}

fn nbd_client_over_netlink(_: &Guest) {
    let _server = nbdkit_unix();
    assert!(try_sh("nbd-client -c /dev/nbd0").is_err());
    for options in ["-C 1 -b 512", "-C 4 -b 4096 -t 30"] {
        // Returns when the device is connected.
        sh(&format!(
            "nbd-client {options} -unix /tmp/nbdkit.sock /dev/nbd0"
        ));
        assert_eq!(device::sysfs(0, "size"), (128 << 11).to_string());
        let said = sh("nbd-client -c /dev/nbd0");
        assert_eq!(said.trim(), device::pid(0).unwrap().to_string());
        let queues = fs::read_dir("/sys/block/nbd0/mq").unwrap().count();
        assert_eq!(queues, if options.contains("-C 4") { 2 } else { 1 });
        sh("dd if=/dev/urandom of=/tmp/data bs=1M count=4 status=none
            dd if=/tmp/data of=/dev/nbd0 bs=64k oflag=direct status=none
            dd if=/dev/nbd0 bs=1M count=4 iflag=direct status=none | cmp - /tmp/data
            rm /tmp/data");
        sh("nbd-client -d /dev/nbd0");
        let gone = wait_until(SOON, || device::pid(0).is_none());
        assert!(gone.is_ok());
        assert_eq!(device::sysfs(0, "size"), "0");
    }
    // Over TCP, and at the index that the driver chooses.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let port = port.to_string();
    let _server = serve(
        &format!("nbdkit -f -p {port} -i 127.0.0.1 memory 16M"),
        &port,
    );
    sh(&format!("nbd-client 127.0.0.1 {port} /dev/nbd1"));
    assert_eq!(device::sysfs(1, "size"), (16 << 11).to_string());
    sh("nbd-client -d /dev/nbd1");
    let gone = wait_until(SOON, || device::pid(1).is_none());
    assert!(gone.is_ok());
}

/// With -persist nbd-client 3.26 connects again when NBD_DO_IT fails. (Where netlink is used it does
/// not stay at all.) See `restart` for a device that is in use.
fn nbd_client_persist_connects_again(guest: &Guest) {
    let mut server = nbdkit_unix();
    let mut client = Client::connect("-p -unix /tmp/nbdkit.sock");
    server.kill();
    if guest.expected("an-unasked-end-is-epipe") == Driver::Nbd {
        client.wait_ended();
        let said = client.0.said();
        assert!(said.contains("Kernel call returned"), "{said}");
        assert!(!said.contains("Reconnecting"), "{said}");
    } else {
        let gone = wait_until(SOON, || device::pid(0).is_none());
        assert!(gone.is_ok(), "{}", client.0.said());
        let _server = nbdkit_unix();
        let back = wait_until(SOON, || {
            device::pid(0).is_some() && device::sysfs(0, "size") != "0"
        });
        assert!(back.is_ok(), "{}", client.0.said());
        use_device();
        client.disconnect();
    }
    assert_usable(0);
}

/// What a service manager does.
fn nbd_client_started_again_with_the_server(_: &Guest) {
    for _ in 0..4 {
        let mut server = nbdkit_unix();
        let mut client = Client::connect("-C 2 -unix /tmp/nbdkit.sock");
        use_device();
        server.kill();
        client.wait_ended();
        assert!(try_sh("nbd-client -c /dev/nbd0").is_err());
    }
}

fn qemu_nbd_connects_a_qcow2_image(_: &Guest) {
    sh("qemu-img create -q -f qcow2 /tmp/disk.qcow2 256M
        qemu-nbd -f qcow2 -c /dev/nbd0 /tmp/disk.qcow2");
    let connected = wait_until(SOON, || device::sysfs(0, "size") == (256 << 11).to_string());
    assert!(connected.is_ok(), "qemu-nbd -c does not connect");
    use_device();
    sh("qemu-nbd -d /dev/nbd0");
    let gone = wait_until(SOON, || device::pid(0).is_none());
    assert!(gone.is_ok());
    sh("qemu-img check -q /tmp/disk.qcow2 && rm /tmp/disk.qcow2");
    assert_usable(0);
}

fn qemu_nbd_is_killed(_: &Guest) {
    sh("qemu-img create -q -f qcow2 /tmp/disk.qcow2 64M");
    for _ in 0..3 {
        // Only with -v it stays the process that was started.
        let mut daemon = Daemon::start("qemu-nbd -v -f qcow2 -c /dev/nbd0 /tmp/disk.qcow2");
        let connected = wait_until(SOON, || device::sysfs(0, "size") == (64 << 11).to_string());
        assert!(connected.is_ok(), "{}", daemon.said());
        let mut writer = Daemon::start("dd if=/dev/zero of=/dev/nbd0 bs=64k oflag=direct");
        std::thread::sleep(Duration::from_millis(200));
        daemon.kill();
        assert!(!writer.wait(SOON), "it wrote to nobody: {}", writer.said());
        let gone = wait_until(SOON, || device::pid(0).is_none());
        assert!(gone.is_ok());
    }
    sh("qemu-img check -q /tmp/disk.qcow2 && rm /tmp/disk.qcow2");
    assert_usable(0);
}

fn block_device_tools(_: &Guest) {
    let rig = Plan::new(64 << 20).block_size(4096).attach();
    assert_eq!(
        sh("blockdev --getsize64 /dev/nbd0").trim(),
        (64 << 20).to_string()
    );
    assert_eq!(sh("blockdev --getss /dev/nbd0").trim(), "4096");
    assert_eq!(sh("blockdev --getpbsz /dev/nbd0").trim(), "4096");
    assert_eq!(sh("blockdev --getro /dev/nbd0").trim(), "0");
    assert_eq!(sh("blockdev --getiomin /dev/nbd0").trim(), "4096");
    assert_eq!(sh("blockdev --getioopt /dev/nbd0").trim(), "131072");
    sh("blockdev --flushbufs /dev/nbd0
        blockdev --rereadpt /dev/nbd0
        blockdev --setro /dev/nbd0
        test $(blockdev --getro /dev/nbd0) = 1
        blockdev --setrw /dev/nbd0");
    assert_eq!(
        sh("lsblk -dnbo NAME,MAJ:MIN,SIZE,RO,TYPE /dev/nbd0")
            .split_whitespace()
            .collect::<Vec<_>>(),
        ["nbd0", "43:0", "67108864", "0", "disk"]
    );
    drop(rig);
}

fn parted_makes_partitions(_: &Guest) {
    let rig = Plan::new(64 << 20).attach();
    sh("parted -s /dev/nbd0 mklabel gpt mkpart a 1MiB 16MiB mkpart b 16MiB 48MiB");
    let there = wait_until(SOON, || Path::new("/dev/nbd0p2").exists());
    assert!(there.is_ok());
    assert_eq!(
        sh("blockdev --getsize64 /dev/nbd0p2").trim(),
        (32 << 20).to_string()
    );
    let partition = fs::OpenOptions::new()
        .write(true)
        .open("/dev/nbd0p2")
        .unwrap();
    partition.write_all_at(b"here", 0).unwrap();
    partition.sync_all().unwrap();
    assert_eq!(rig.server.peek(16 << 20, 4), b"here");
    drop(partition);
    sh("parted -s /dev/nbd0 rm 2 && partprobe /dev/nbd0");
    assert!(!Path::new("/dev/nbd0p2").exists());
}

/// A short verifying job; fio fails when what it reads is not what it wrote.
pub fn fio(options: &str) {
    sh(&format!(
        "cd /tmp && fio --name=verify --filename=/dev/nbd0 --direct=1 --size=8M --verify=crc32c \
         --verify_fatal=1 --do_verify=1 --output=/tmp/fio.txt {options} || (cat /tmp/fio.txt; false)"
    ));
}

fn fio_verifies_random_writes(_: &Guest) {
    let _server = nbdkit_unix();
    let client = Client::connect("-unix /tmp/nbdkit.sock");
    fio("--rw=randwrite --bs=4k --ioengine=io_uring --iodepth=32");
    fio("--rw=randrw --bsrange=512-256k --ioengine=libaio --iodepth=16");
    client.disconnect();
}

fn fio_verifies_with_several_connections(_: &Guest) {
    let _server = nbdkit_tcp();
    let client = Client::connect("-C 2 127.0.0.1 10809");
    fio("--rw=randwrite --bsrange=4k-64k --ioengine=libaio --iodepth=16");
    client.disconnect();
}

/// Makes, fills, checks, remounts and checks a file system.
fn try_filesystem(mkfs: &str, fsck: &str) {
    let _server = nbdkit_unix();
    let client = Client::connect("-unix /tmp/nbdkit.sock");
    sh(&format!(
        "{mkfs} /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt
        cp -a /usr/bin/[a-c]* /tmp/mnt/
        umount /tmp/mnt && {fsck} /dev/nbd0
        mount /dev/nbd0 /tmp/mnt
        for file in /usr/bin/[a-c]*; do
            test -L $file || cmp $file /tmp/mnt/${{file##*/}}
        done
        rm /tmp/mnt/[ab]* && fstrim /tmp/mnt
        umount /tmp/mnt && {fsck} /dev/nbd0"
    ));
    client.disconnect();
}

fn ext4_on_nbdkit(_: &Guest) {
    try_filesystem("mkfs.ext4 -q", "fsck.ext4 -fn");
}

fn xfs_on_nbdkit(_: &Guest) {
    // 128 MiB are too few for mkfs.xfs, but for tests.
    try_filesystem("mkfs.xfs -q --unsupported", "xfs_repair -n");
}

fn btrfs_on_nbdkit(_: &Guest) {
    try_filesystem("mkfs.btrfs -q --mixed", "btrfs check -p");
}

/// More than a control group should have goes to the device and comes back. The server is not in that
/// group, and keeps what it has in memory. It is slowed down beyond its share, not killed, which the
/// kernel does to those beyond `memory.max` where a device is slow.
fn swap_under_memory_pressure(_: &Guest) {
    let _server = nbdkit("--swap memory 256M");
    let client = Client::connect("-swap -unix /tmp/nbdkit.sock");
    sh("mkswap -q /dev/nbd0 && swapon /dev/nbd0
        mkdir -p /tmp/cgroup && mount -t cgroup2 none /tmp/cgroup
        echo +memory > /tmp/cgroup/cgroup.subtree_control
        mkdir -p /tmp/cgroup/tight
        echo 32M > /tmp/cgroup/tight/memory.high");
    let outcome = try_sh(
        "echo $$ > /tmp/cgroup/tight/cgroup.procs
        exec /proc/$PPID/exe helper fill 80",
    );
    let statistics = device::sysfs(0, "stat");
    sh("swapoff /dev/nbd0
        rmdir /tmp/cgroup/tight && umount /tmp/cgroup");
    client.disconnect();
    outcome.unwrap_or_else(|said| panic!("{said}"));
    let sectors: Vec<u64> = statistics
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    let least = (40 << 20) / 512;
    assert!(sectors[2] > least && sectors[6] > least, "{statistics}");
}

fn ext4_survives_the_death_of_the_server(_: &Guest) {
    let storage = "/tmp/storage.img";
    fs::File::create(storage)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let command = format!("nbdkit -f -U /tmp/nbdkit.sock file {storage}");
    let _ = fs::remove_file("/tmp/nbdkit.sock");
    let mut server = serve(&command, "/tmp/nbdkit.sock");
    let mut client = Client::connect("-unix /tmp/nbdkit.sock");
    sh(
        "mkfs.ext4 -q /dev/nbd0 && mkdir -p /tmp/mnt && mount /dev/nbd0 /tmp/mnt
        cp /usr/bin/[a-c]* /tmp/mnt/ && sync -f /tmp/mnt",
    );
    let mut writer = Daemon::start("cp -r /usr/share/perl5 /tmp/mnt/");
    std::thread::sleep(Duration::from_millis(300));
    server.kill();
    client.0.wait(SOON);
    writer.wait(Duration::from_secs(30));
    sh("umount /tmp/mnt");

    let _ = fs::remove_file("/tmp/nbdkit.sock");
    let _server = serve(&command, "/tmp/nbdkit.sock");
    let client = Client::connect("-unix /tmp/nbdkit.sock");
    // The journal brings it in order; what was synced is there.
    sh("mount /dev/nbd0 /tmp/mnt
        for file in /usr/bin/[a-c]*; do
            cmp $file /tmp/mnt/${file##*/}
        done
        umount /tmp/mnt && fsck.ext4 -fn /dev/nbd0");
    client.disconnect();
    fs::remove_file(storage).unwrap();
}
