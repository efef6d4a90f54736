// SPDX-License-Identifier: GPL-2.0

//! What CONNECT takes and refuses, and what a connected device looks like.

use std::fs::{self, File};
use std::net::UdpSocket;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, gettid, set_capabilities};

use super::{MIB, assert_ioctls_are_refused, move_data, try_connect};
use crate::debug_kernel::enough;
use crate::device::{self, Plan, SOON, USUAL_FLAGS, assert_usable, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, seed, wait_until};
use crate::netlink::{
    CONNECT, DISCONNECT, INDEX, Link, Netlink, RECONFIGURE, SIZE_BYTES, SOCK_FD, SOCK_ITEM,
    SOCKETS, STATUS, Setup, attr, descriptor, nested,
};
use crate::programs::sh;
use crate::proto::{self, CAN_MULTI_CONN, Command, READ_ONLY};
use crate::server::{Server, Transport};
use crate::sys::ioctl_number;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(family_and_group),
        test!(genl_ctrl_list_sees_the_family),
        test!(connect_at_an_index),
        test!(connect_at_the_first_free_index),
        test!(connect_beside_programs_that_open_devices).parameters("nbds_max=4"),
        test!(connected_devices_carry_data),
        test!(connected_devices_look_as_asked),
        test!(debugfs_files),
        test!(status_of_all_and_of_one),
        test!(connect_without_what_it_needs),
        test!(connect_at_impossible_indices),
        test!(connect_a_device_in_use),
        test!(connect_bad_sockets),
        test!(connect_with_two_sockets_in_one_item),
        test!(connect_several_sockets_without_multi_conn),
        test!(connect_with_bad_sizes),
        test!(malformed_messages),
        test!(commands_need_cap_sys_admin),
        test!(ioctls_on_a_connected_device),
    ]
}

/// What the family of families tells of it.
fn family_and_group(_: &Guest) {
    /// GENL_CMD_CAP_DO, GENL_CMD_CAP_HASPOL
    const DO: u32 = 0x02;
    const HAS_POLICY: u32 = 0x08;
    let family = Netlink::open().family;
    assert_eq!(family.version, 1);
    assert_eq!(family.header_size, 0);
    assert_eq!(family.max_attr, 10);
    let command = |number: u8| (number.into(), DO | HAS_POLICY);
    let commands = [CONNECT, DISCONNECT, RECONFIGURE, STATUS].map(command);
    assert_eq!(family.ops, commands);
    assert_eq!(family.groups.len(), 1);
    assert_eq!(family.groups[0].0, "nbd_mc_group");
}

/// Another library's idea of generic netlink.
fn genl_ctrl_list_sees_the_family(_: &Guest) {
    let said = sh("genl-ctrl-list");
    let ours = |line: &&str| line.trim().ends_with(" nbd version 1");
    assert_eq!(said.lines().filter(ours).count(), 1, "{said}");
}

fn connect_at_an_index(_: &Guest) {
    for index in [1, 0] {
        let link = Setup::new(MIB).index(index).attach();
        assert_eq!(link.index, index);
        assert_eq!(device::sysfs(index, "size"), "2048");
    }
}

fn connect_at_the_first_free_index(_: &Guest) {
    let setup = Setup::new(MIB);
    let _fifth = setup.clone().index(5).attach();
    let links: Vec<Link> = (0..4).map(|_| setup.attach()).collect();
    let indices: Vec<u32> = links.iter().map(|link| link.index).collect();
    assert_eq!(indices, [0, 1, 2, 3], "as many as it takes");
    links[1].disconnect().unwrap();
    links[1].wait_free();
    assert_eq!(setup.attach().index, 1);
    // Who opens a device uses it.
    let _open = device::open(1, 0).unwrap();
    assert_eq!(setup.attach().index, 4);
}

/// Who asks for any device gets one, also where others use some of them for a moment.
fn connect_beside_programs_that_open_devices(_: &Guest) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let until_done = Until(&done);
        for index in [0, 0, 1, 2] {
            let done = &done;
            let mut random = Rng::with_seed(seed() + u64::from(index));
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    drop(device::open(index, 0));
                    thread::sleep(Duration::from_micros(random.u64(..500)));
                }
            });
        }
        let server = Server::new();
        let netlink = Netlink::open();
        let mut refused = 0;
        for _ in 0..enough(1000, 150) {
            let setup = Setup::new(MIB).sockets([server.connect(Transport::Unix)]);
            match netlink.connect(&setup) {
                Ok(index) => netlink.disconnect(index).unwrap(),
                Err(Errno::BUSY) => refused += 1,
                Err(errno) => panic!("CONNECT: {errno}"),
            }
        }
        drop(until_done);
        assert_eq!(refused, 0, "refused although there are free ones");
    });
}

fn connected_devices_carry_data(_: &Guest) {
    for transport in [Transport::Unix, Transport::Tcp4, Transport::Tcp6] {
        let link = Setup::new(MIB).attach_over(&[transport]).settle();
        let direct = link.direct();
        move_data(&direct, 128 << 10, 3);
        direct.sync_all().unwrap();
        assert_eq!(link.server.requests_of(Command::Flush).len(), 1);
        drop(direct);
        link.disconnect_and_wait();
    }
}

fn connected_devices_look_as_asked(guest: &Guest) {
    let setup = Setup::new(MIB)
        .block_size(4096)
        .timeout(7)
        .flags(READ_ONLY | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    let index = link.index;
    assert_eq!(device::pid(index), Some(gettid().as_raw_nonzero().get()));
    assert_eq!(device::sysfs(index, "backend"), "");
    assert_eq!(device::sysfs(index, "size"), "2048");
    assert_eq!(device::sysfs(index, "ro"), "1");
    assert_eq!(device::sysfs(index, "queue/logical_block_size"), "4096");
    assert_eq!(device::sysfs(index, "queue/io_timeout"), "7000");
    assert_eq!(device::sysfs(index, "queue/write_cache"), "write through");
    let queues = fs::read_dir(format!("/sys/block/nbd{index}/mq")).unwrap();
    assert_eq!(queues.count(), 2);
    link.disconnect_and_wait();
    assert_eq!(device::pid(index), None);
    assert!(!Path::new(&format!("/sys/block/nbd{index}/backend")).exists());
    assert_eq!(device::sysfs(index, "size"), "0");
    // The next one is asked for nothing of that.
    let link = Setup::default().size(2 * MIB).attach();
    assert_eq!(link.index, index);
    assert_eq!(device::sysfs(index, "ro"), "0");
    assert_eq!(device::sysfs(index, "queue/logical_block_size"), "1024");
    let milliseconds = match guest.expected("timeouts-end-with-the-connection") {
        Driver::Nbd => "7000",
        Driver::Rnbd => "30000",
    };
    assert_eq!(device::sysfs(index, "queue/io_timeout"), milliseconds);
}

fn debugfs_files(guest: &Guest) {
    let setup = Setup::new(3 * MIB)
        .block_size(4096)
        .timeout(3)
        .flags(USUAL_FLAGS);
    let link = setup.attach();
    if guest.expected("debugfs-comes-soon") == Driver::Nbd {
        let path = format!("/sys/kernel/debug/nbd/nbd{}/flags", link.index);
        assert!(Path::new(&path).exists());
    }
    let dir = device::debugfs(link.index);
    let read = |name: &str| {
        let path = format!("{dir}/{name}");
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    assert_eq!(read("size_bytes").trim(), (3 * MIB).to_string());
    assert_eq!(read("blocksize_bits").trim(), "12");
    let tid = gettid().as_raw_nonzero();
    assert_eq!(read("tasks"), format!("recv: {tid}\n"));
    let jiffies: u32 = read("timeout").trim().parse().unwrap();
    assert!(jiffies > 0 && jiffies % 3 == 0, "{jiffies}");
    let flags = read("flags");
    assert!(flags.starts_with("Hex: 0x0000006d\n"), "{flags}");
    for flag in ["HAS_FLAGS", "SEND_FLUSH", "SEND_FUA", "SEND_TRIM"] {
        let line = format!("NBD_FLAG_{flag}");
        assert!(flags.lines().any(|have| have == line), "{flags}");
    }
    assert!(!flags.contains("READ_ONLY"), "{flags}");
    match guest.expected("debugfs-shows-connections") {
        Driver::Nbd => assert!(!Path::new(&format!("{dir}/connections")).exists()),
        Driver::Rnbd => {
            let connections = read("connections");
            assert_eq!(connections.lines().count(), 1, "{connections}");
            assert!(connections.starts_with("0 "), "{connections}");
            move_data(&link.direct(), 0, 1);
            let connections = read("connections");
            let number = |name: &str| {
                let mut words = connections.split_whitespace();
                let number = words.find_map(|word| word.strip_prefix(&format!("{name}=")));
                number.and_then(|number| number.parse::<u64>().ok())
            };
            assert_eq!(number("awaited"), Some(0), "{connections}");
            let requests = link.server.requests().len() as u64;
            assert!(number("requests_sent") >= Some(requests), "{connections}");
            assert_eq!(number("replies"), number("requests_sent"), "{connections}");
        }
    }
    let change = Setup::change(link.index).size(4 * MIB);
    assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    assert_eq!(read("size_bytes").trim(), (4 * MIB).to_string());
    // Somebody who reads it may keep a file open.
    let open = File::open(format!("{dir}/tasks")).unwrap();
    link.disconnect_and_wait();
    assert!(!Path::new(&dir).exists());
    drop(open);
}

fn status_of_all_and_of_one(_: &Guest) {
    let netlink = Netlink::open();
    assert_eq!(netlink.status(None), [(0, false), (1, false)]);
    let link = Setup::new(MIB).index(1).attach();
    assert_eq!(netlink.status(None), [(0, false), (1, true)]);
    let _other = Setup::new(MIB).index(9).attach();
    assert_eq!(netlink.status(None), [(0, false), (1, true), (9, true)]);
    assert_eq!(netlink.status(Some(1)), [(1, true)]);
    assert_eq!(netlink.status(Some(0)), [(0, false)]);
    assert_eq!(netlink.status(Some(3)), [], "no such device");
    link.disconnect().unwrap();
    assert_eq!(netlink.status(Some(1)), [(1, false)]);
    let _open = device::open(0, 0).unwrap();
    assert_eq!(netlink.status(Some(0)), [(0, true)], "opened is in use");
}

fn connect_without_what_it_needs(_: &Guest) {
    let server = Server::new();
    let netlink = Netlink::open();
    let full = || Setup::new(MIB).sockets([server.connect(Transport::Unix)]);
    for lacking in [SOCKETS, SIZE_BYTES] {
        let answer = netlink.connect(&full().without(lacking));
        assert_eq!(answer, Err(Errno::INVAL), "without {lacking}");
    }
    let answer = netlink.connect(&Setup::new(MIB).sockets([]));
    assert_eq!(answer, Err(Errno::INVAL), "with an empty list");
    assert_eq!(netlink.status(None), [(0, false), (1, false)]);
    assert_usable(0);
}

fn connect_at_impossible_indices(_: &Guest) {
    // Twenty bits of minors; 31 partitions and the disk take five of them.
    for index in [1 << 15, 1 << 20, i32::MAX as u32, 1 << 31, u32::MAX] {
        let answer = try_connect(&Setup::new(MIB).index(index));
        assert_eq!(answer, Err(Errno::INVAL), "{index}");
    }
    let last = (1 << 15) - 1;
    assert_eq!(try_connect(&Setup::new(MIB).index(last)), Ok(()));
}

fn connect_a_device_in_use(guest: &Guest) {
    let link = Setup::new(MIB).index(0).attach();
    let mut rig = Plan::new(MIB).index(1).attach();
    for index in [0, 1] {
        let answer = try_connect(&Setup::new(MIB).index(index));
        assert_eq!(answer, Err(Errno::BUSY), "{index}");
    }
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
    assert_eq!(read_page(&rig.direct(), 0), Ok(()));
    assert_eq!(rig.disconnect(), Ok(0));
    let _open = device::open(1, 0).unwrap();
    let answer = try_connect(&Setup::new(MIB).index(1));
    match guest.expected("connect-takes-an-open-device") {
        Driver::Nbd => assert_eq!(answer, Err(Errno::BUSY), "open"),
        Driver::Rnbd => assert_eq!(answer, Ok(()), "merely open"),
    }
}

fn connect_bad_sockets(_: &Guest) {
    let netlink = Netlink::open();
    let connect = |number| netlink.connect(&Setup::new(MIB).index(0).descriptors(&[number]));
    assert_eq!(connect(9999), Err(Errno::BADF));
    assert_eq!(connect(-1), Err(Errno::INVAL));
    let file = File::open("/dev/null").unwrap();
    assert_eq!(connect(descriptor(&file)), Err(Errno::NOTSOCK));
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_eq!(connect(descriptor(&datagrams)), Err(Errno::INVAL));
    // A good one before it does not help, and is let go of.
    let server = Server::new();
    let good = server.connect(Transport::Unix);
    let numbers = [descriptor(&good), descriptor(&file)];
    let setup = Setup::new(MIB).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let answer = netlink.connect(&setup.descriptors(&numbers));
    assert_eq!(answer, Err(Errno::NOTSOCK));
    drop(good);
    let ended = wait_until(SOON, || server.living() == 0);
    assert!(ended.is_ok(), "a socket of a failed connect is kept");
    assert_usable(0);
}

/// Of one that is named twice in an item, the last counts.
fn connect_with_two_sockets_in_one_item(_: &Guest) {
    let server = Server::new();
    let netlink = Netlink::open();
    let socket = server.connect(Transport::Unix);
    let connect = |items: &[i32]| {
        let fds: Vec<_> = items.iter().map(|number| attr(SOCK_FD, *number)).collect();
        let list = nested(SOCKETS, &[nested(SOCK_ITEM, &fds)]);
        netlink.connect(&Setup::new(MIB).index(0).attr(list))
    };
    let good = descriptor(&socket);
    assert_eq!(connect(&[good, 9999]), Err(Errno::BADF));
    assert_eq!(connect(&[9999, good]), Ok(0));
    assert_eq!(
        read_page(&device::open(0, libc::O_DIRECT).unwrap(), 0),
        Ok(())
    );
    netlink.disconnect(0).unwrap();
}

fn connect_several_sockets_without_multi_conn(_: &Guest) {
    let server = Server::new();
    let netlink = Netlink::open();
    let sockets = [0, 1].map(|_| server.connect(Transport::Unix));
    let setup = Setup::new(MIB).index(0).sockets(sockets);
    assert_eq!(netlink.connect(&setup), Err(Errno::INVAL));
    assert_eq!(netlink.status(Some(0)), [(0, false)]);
    assert_usable(0);
}

fn connect_with_bad_sizes(_: &Guest) {
    for block_size in [1, 256, 3000, 1 << 30, u64::MAX, (1 << 32) | 4096] {
        let answer = try_connect(&Setup::new(MIB).index(0).block_size(block_size));
        assert_eq!(answer, Err(Errno::INVAL), "blocks of {block_size}");
    }
    for size in [1 << 63, u64::MAX] {
        let answer = try_connect(&Setup::new(size).index(0));
        assert_eq!(answer, Err(Errno::INVAL), "{size} bytes");
    }
    assert_eq!(try_connect(&Setup::new(0).index(0)), Ok(()));
    assert_usable(0);
}

fn malformed_messages(_: &Guest) {
    let netlink = Netlink::open();
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    let number = descriptor(&socket);
    let full = Setup::new(MIB).descriptors(&[number]);
    let short = full.clone().attr(attr(SIZE_BYTES, 5_u32));
    assert_eq!(netlink.connect(&short), Err(Errno::RANGE));
    let short = full.clone().attr(attr(INDEX, 0_u16));
    assert_eq!(netlink.connect(&short), Err(Errno::RANGE));
    let wrong_item = nested(SOCK_ITEM + 1, &[attr(SOCK_FD, number)]);
    let wrong = full.clone().attr(nested(SOCKETS, &[wrong_item]));
    assert_eq!(netlink.connect(&wrong), Err(Errno::INVAL));
    let short_item = nested(SOCK_ITEM, &[attr(SOCK_FD, 0_u16)]);
    let wrong = full.attr(nested(SOCKETS, &[short_item]));
    assert_eq!(netlink.connect(&wrong), Err(Errno::INVAL));
    for command in [0, 4, 6, 255] {
        assert!(
            matches!(netlink.ask(command, Vec::new()), Err(Errno::OPNOTSUPP)),
            "command {command}"
        );
    }
    assert_usable(0);
}

fn commands_need_cap_sys_admin(_: &Guest) {
    let link = Setup::new(MIB).index(0).attach();
    // Capabilities belong to a thread.
    let thread = thread::spawn(|| {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        set_capabilities(None, sets).unwrap();
        let netlink = Netlink::open();
        let connect = try_connect(&Setup::new(MIB).index(1));
        assert_eq!(connect, Err(Errno::PERM));
        assert_eq!(netlink.disconnect(0), Err(Errno::PERM));
        let reconfigure = netlink.reconfigure(&Setup::change(0).size(2 * MIB));
        assert_eq!(reconfigure, Err(Errno::PERM));
        assert_eq!(netlink.status(None), [(0, true), (1, false)]);
        // Nor does a socket help that somebody else has opened.
        netlink
    });
    let netlink = thread.join().unwrap();
    assert_eq!(netlink.disconnect(0), Err(Errno::PERM));
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
}

fn ioctls_on_a_connected_device(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    let open = device::open(link.index, 0).unwrap();
    assert_ioctls_are_refused(&open);
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
    assert_eq!(ioctl_number(&open, proto::DISCONNECT, 0), Ok(0));
    link.server.wait_for_command(Command::Disconnect);
    let ended = wait_until(SOON, || link.server.living() == 0);
    assert!(ended.is_ok());
    assert_eq!(read_page(&link.direct(), 0), Err(Errno::IO));
    drop(open);
    // Netlink still holds it.
    assert_eq!(link.netlink.status(Some(0)), [(0, true)]);
    link.disconnect_and_wait();
}
