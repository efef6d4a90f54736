// SPDX-License-Identifier: GPL-2.0

//! The netlink front end.

use std::collections::HashSet;
use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CpuSet, capabilities, gettid, sched_setaffinity, set_capabilities,
};

use super::user_space::serve;
use crate::device::{self, Plan, SOON, USUAL_FLAGS, assert_pattern, assert_usable, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{
    DESTROY_ON_DISCONNECT, DISCONNECT_ON_CLOSE, INDEX, Link, Netlink, SIZE_BYTES, SOCK_FD,
    SOCK_ITEM, SOCKETS, Setup, attr, descriptor, nested,
};
use crate::programs::{sh, try_sh};
use crate::proto::{self, CAN_MULTI_CONN, Command, READ_ONLY};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, SysResult, ioctl_number};
use crate::test;

const MIB: u64 = 1 << 20;

pub fn tests() -> Vec<Test> {
    vec![
        test!(family_and_group),
        test!(connect_at_an_index),
        test!(connect_at_the_first_free_index),
        test!(connected_devices_carry_data),
        test!(connected_devices_look_as_asked),
        test!(status_of_all_and_of_one),
        test!(disconnect),
        test!(disconnect_an_open_device),
        test!(disconnect_with_requests_in_flight),
        test!(connected_devices_hold_the_module),
        test!(connect_without_what_it_needs),
        test!(connect_at_impossible_indices),
        test!(connect_a_device_in_use),
        test!(connect_bad_sockets),
        test!(connect_several_sockets_without_multi_conn),
        test!(connect_with_bad_sizes),
        test!(malformed_messages),
        test!(commands_need_cap_sys_admin),
        test!(ioctls_on_a_connected_device),
        test!(clear_sock_frees_a_connected_device),
        test!(devices_are_made_and_destroyed),
        test!(a_device_that_is_open_is_destroyed_later),
        test!(reconfigure_decides_whether_to_destroy),
        test!(disconnect_on_close),
        test!(backend_identifier),
        test!(reconfigure_what_is_not_there),
        test!(reconfigure_size_and_timeout),
        test!(reconfigure_needs_no_more_sockets),
        test!(news_of_dead_connections),
        test!(reconfigure_revives_a_device),
        test!(reads_wait_for_a_new_connection),
        test!(requests_in_flight_are_sent_again),
        test!(requests_wait_no_longer_than_told),
        test!(disconnect_ends_waiting),
        test!(one_of_two_connections_comes_back),
        test!(connections_come_and_go_under_load),
        test!(debugfs_files),
        test!(commands_at_the_same_time),
        test!(nbd_client),
    ]
}

fn sysfs_exists(index: u32) -> bool {
    Path::new(&format!("/sys/block/nbd{index}")).exists()
}

fn wait_destroyed(index: u32) {
    let gone = wait_until(SOON, || !sysfs_exists(index));
    assert!(gone.is_ok(), "nbd{index} is still there");
}

/// Connects with one socket, and undoes it at once if that works.
fn try_connect(setup: &Setup) -> SysResult<()> {
    setup.try_attach()?.disconnect()
}

fn read_one(device: &File, offset: u64) -> SysResult<()> {
    errno(device.read_exact_at(&mut Buffer::new(4096), offset))
}

/// Writes and reads a little, at `offset`.
fn move_data(direct: &File, offset: u64, seed: u64) {
    let data = Buffer::filled(64 << 10, |data| pattern(seed, offset, data));
    direct.write_all_at(&data, offset).unwrap();
    let mut back = Buffer::new(data.len());
    direct.read_exact_at(&mut back, offset).unwrap();
    assert_pattern(seed, offset, &back);
}

fn family_and_group(_: &Guest) {
    let netlink = Netlink::open();
    assert_eq!(netlink.family.version, 1);
    assert_eq!(netlink.family.groups.len(), 1);
    assert_eq!(netlink.family.groups[0].0, "nbd_mc_group");
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

fn connected_devices_carry_data(_: &Guest) {
    for transport in [Transport::Unix, Transport::Tcp4, Transport::Tcp6] {
        let link = Setup::new(MIB).attach_over(&[transport]).settle();
        let direct = link.direct();
        move_data(&direct, 128 << 10, 3);
        direct.sync_all().unwrap();
        assert_eq!(link.server.requests_of(Command::Flush).len(), 1);
        drop(direct);
        link.disconnect().unwrap();
        link.wait_free();
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
    link.disconnect().unwrap();
    link.wait_free();
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

fn disconnect(_: &Guest) {
    let netlink = Netlink::open();
    assert_eq!(netlink.disconnect(0), Ok(()), "not connected");
    assert_eq!(netlink.disconnect(17), Err(Errno::INVAL), "no such device");
    let setup = Setup::new(MIB).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    assert_eq!(link.disconnect(), Ok(()));
    let said_goodbye = |requests: &[proto::Request]| {
        let goodbyes = requests
            .iter()
            .filter(|request| request.command == Command::Disconnect);
        let connections: HashSet<usize> = goodbyes.map(|request| request.connection).collect();
        connections.len() == 2
    };
    link.server.wait_for("two goodbyes", said_goodbye);
    let ended = wait_until(SOON, || link.server.living() == 0);
    assert!(ended.is_ok());
    assert_eq!(link.disconnect(), Ok(()), "not connected any more");
    assert_usable(link.index);
}

fn disconnect_an_open_device(_: &Guest) {
    let link = Setup::new(MIB).attach();
    let direct = link.direct();
    assert_eq!(read_one(&direct, 0), Ok(()));
    assert_eq!(link.disconnect(), Ok(()));
    assert_eq!(read_one(&direct, 0), Err(Errno::IO));
    assert_eq!(link.netlink.status(Some(0)), [(0, true)]);
    assert_eq!(link.revive(), Err(Errno::INVAL));
    assert_eq!(
        try_connect(&Setup::new(MIB).index(0)),
        Err(Errno::BUSY),
        "still open"
    );
    assert_eq!(link.disconnect(), Ok(()));
    drop(direct);
    link.wait_free();
    assert_eq!(try_connect(&Setup::new(MIB).index(0)), Ok(()));
}

fn disconnect_with_requests_in_flight(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    link.server.script(|conn, _| conn.stall());
    let direct = link.direct();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_one(&direct, 0));
        link.server.wait_for_command(Command::Read);
        assert_eq!(link.disconnect(), Ok(()));
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    drop(direct);
    link.wait_free();
}

fn connected_devices_hold_the_module(guest: &Guest) {
    let link = Setup::new(MIB).attach();
    assert_eq!(guest.driver.try_unload(), Err(Errno::WOULDBLOCK));
    link.disconnect().unwrap();
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

fn connect_a_device_in_use(_: &Guest) {
    let link = Setup::new(MIB).index(0).attach();
    let mut rig = Plan::new(MIB).index(1).attach();
    for index in [0, 1] {
        let answer = try_connect(&Setup::new(MIB).index(index));
        assert_eq!(answer, Err(Errno::BUSY), "{index}");
    }
    assert_eq!(read_one(&link.direct(), 0), Ok(()));
    assert_eq!(read_one(&rig.direct(), 0), Ok(()));
    assert_eq!(rig.disconnect(), Ok(0));
    let _open = device::open(1, 0).unwrap();
    let answer = try_connect(&Setup::new(MIB).index(1));
    assert_eq!(answer, Err(Errno::BUSY), "open");
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
    assert_eq!(read_one(&link.direct(), 0), Ok(()));
}

fn ioctls_on_a_connected_device(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    let open = device::open(link.index, 0).unwrap();
    for request in [
        proto::SET_SOCK,
        proto::SET_BLKSIZE,
        proto::SET_SIZE,
        proto::SET_SIZE_BLOCKS,
        proto::SET_TIMEOUT,
        proto::SET_FLAGS,
        proto::DO_IT,
        proto::CLEAR_QUE,
        proto::PRINT_DEBUG,
        0xab0b,
    ] {
        let answer = ioctl_number(&open, request, 0);
        assert_eq!(answer, Err(Errno::INVAL), "{request:#x}");
    }
    assert_eq!(read_one(&link.direct(), 0), Ok(()));
    assert_eq!(ioctl_number(&open, proto::DISCONNECT, 0), Ok(0));
    link.server.wait_for_command(Command::Disconnect);
    let ended = wait_until(SOON, || link.server.living() == 0);
    assert!(ended.is_ok());
    assert_eq!(read_one(&link.direct(), 0), Err(Errno::IO));
    drop(open);
    // Netlink still holds it.
    assert_eq!(link.netlink.status(Some(0)), [(0, true)]);
    assert_eq!(link.disconnect(), Ok(()));
    link.wait_free();
}

fn clear_sock_frees_a_connected_device(_: &Guest) {
    let link = Setup::new(MIB).attach();
    let open = device::open(link.index, 0).unwrap();
    assert_eq!(ioctl_number(&open, proto::CLEAR_SOCK, 0), Ok(0));
    assert_eq!(device::sysfs(link.index, "size"), "0");
    drop(open);
    link.wait_free();
    assert_usable(link.index);
}

/// The index is in use for a moment after the disk has gone.
fn attach_again(setup: &Setup) -> Link {
    let mut link = None;
    let attached = wait_until(SOON, || match setup.try_attach() {
        Ok(attached) => {
            link = Some(attached);
            true
        }
        Err(Errno::INVAL | Errno::EXIST) => false,
        Err(errno) => panic!("to connect again: {errno}"),
    });
    assert!(attached.is_ok(), "the index cannot be used again");
    link.unwrap()
}

fn devices_are_made_and_destroyed(_: &Guest) {
    // The last is one of those that the module made.
    for index in [7, 20_000, 1] {
        let keep = Setup::new(MIB).index(index);
        let setup = keep.clone().client_flags(DESTROY_ON_DISCONNECT);
        for _ in 0..3 {
            let link = setup.attach();
            assert!(sysfs_exists(index));
            move_data(&link.direct(), 0, 4);
            assert_eq!(link.disconnect(), Ok(()));
            wait_destroyed(index);
            let dev = format!("/dev/nbd{index}");
            assert!(wait_until(SOON, || !Path::new(&dev).exists()).is_ok());
            let forgotten = wait_until(SOON, || link.netlink.status(Some(index)).is_empty());
            assert!(forgotten.is_ok());
        }
        let link = attach_again(&keep);
        move_data(&link.direct(), 0, 5);
        assert_eq!(link.disconnect(), Ok(()));
        link.wait_free();
        assert!(sysfs_exists(index), "it was not to be destroyed");
    }
}

fn a_device_that_is_open_is_destroyed_later(_: &Guest) {
    let setup = Setup::new(MIB).index(7).client_flags(DESTROY_ON_DISCONNECT);
    let link = setup.attach();
    let direct = link.direct();
    assert_eq!(link.disconnect(), Ok(()));
    assert_eq!(read_one(&direct, 0), Err(Errno::IO));
    assert!(sysfs_exists(7));
    assert_eq!(try_connect(&setup), Err(Errno::INVAL), "it is going");
    drop(direct);
    wait_destroyed(7);
    drop(attach_again(&setup));
    wait_destroyed(7);
}

fn reconfigure_decides_whether_to_destroy(_: &Guest) {
    let link = Setup::new(MIB).index(7).attach();
    let destroy = |yes| {
        let flags = if yes { DESTROY_ON_DISCONNECT } else { 0 };
        link.netlink
            .reconfigure(&Setup::change(7).client_flags(flags))
    };
    assert_eq!(destroy(true), Ok(()));
    assert_eq!(destroy(true), Ok(()));
    assert_eq!(destroy(false), Ok(()));
    assert_eq!(link.disconnect(), Ok(()));
    link.wait_free();
    assert!(sysfs_exists(7));
    let link = Setup::new(MIB).index(7).attach();
    let destroy = Setup::change(7).client_flags(DESTROY_ON_DISCONNECT);
    assert_eq!(link.netlink.reconfigure(&destroy), Ok(()));
    assert_eq!(link.disconnect(), Ok(()));
    wait_destroyed(7);
}

fn disconnect_on_close(_: &Guest) {
    let link = Setup::new(MIB).client_flags(DISCONNECT_ON_CLOSE).attach();
    let direct = link.direct();
    let second = link.direct();
    drop(second);
    assert_eq!(read_one(&direct, 0), Ok(()), "one is left");
    drop(direct);
    link.wait_free();
    let ended = wait_until(SOON, || link.server.living() == 0);
    assert!(ended.is_ok());
    // And both flags together; the second close is the last.
    let flags = DISCONNECT_ON_CLOSE | DESTROY_ON_DISCONNECT;
    let link = Setup::new(MIB).index(7).client_flags(flags).attach();
    drop(link.direct());
    wait_destroyed(7);
    // It can be taken back.
    let link = Setup::new(MIB).client_flags(DISCONNECT_ON_CLOSE).attach();
    let stay = Setup::change(link.index).client_flags(0);
    assert_eq!(link.netlink.reconfigure(&stay), Ok(()));
    drop(link.direct());
    assert_eq!(read_one(&link.direct(), 0), Ok(()));
}

fn backend_identifier(_: &Guest) {
    let link = Setup::new(MIB).backend("image-7").attach();
    assert_eq!(device::sysfs(link.index, "backend"), "image-7");
    let size = |size| Setup::change(link.index).size(size);
    for wrong in [
        size(2 * MIB),
        size(2 * MIB).backend("image-8"),
        size(2 * MIB).backend("image-77"),
        size(2 * MIB).backend("image"),
        size(2 * MIB).backend(""),
    ] {
        assert_eq!(link.netlink.reconfigure(&wrong), Err(Errno::INVAL));
        assert_eq!(device::sysfs(link.index, "size"), "2048");
    }
    let right = size(2 * MIB).backend("image-7");
    assert_eq!(link.netlink.reconfigure(&right), Ok(()));
    assert_eq!(device::sysfs(link.index, "size"), "4096");
    link.disconnect().unwrap();
    link.wait_free();
    // It is forgotten; and where there is none, any is right.
    let link = Setup::new(MIB).attach();
    assert_eq!(device::sysfs(link.index, "backend"), "");
    let any = Setup::change(link.index).size(2 * MIB).backend("image-8");
    assert_eq!(link.netlink.reconfigure(&any), Ok(()));
    assert_eq!(device::sysfs(link.index, "backend"), "");
}

fn reconfigure_what_is_not_there(_: &Guest) {
    let netlink = Netlink::open();
    for index in [0, 17] {
        let answer = netlink.reconfigure(&Setup::change(index).size(MIB));
        assert_eq!(answer, Err(Errno::INVAL), "{index}");
    }
    let answer = netlink.reconfigure(&Setup::default().size(MIB));
    assert_eq!(answer, Err(Errno::INVAL), "without an index");
    // What ioctls have connected is theirs.
    let mut rig = Plan::new(MIB).attach();
    let answer = netlink.reconfigure(&Setup::change(0).size(2 * MIB));
    assert_eq!(answer, Err(Errno::INVAL));
    assert_eq!(rig.sysfs("size"), "2048");
    assert_eq!(rig.disconnect(), Ok(0));
}

fn reconfigure_size_and_timeout(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    let change = || Setup::change(link.index);
    let reconfigure = |setup: Setup| link.netlink.reconfigure(&setup);
    let direct = link.direct();
    assert_eq!(reconfigure(change().size(4 * MIB).timeout(9)), Ok(()));
    assert_eq!(device::sysfs(link.index, "size"), "8192");
    assert_eq!(device::sysfs(link.index, "queue/io_timeout"), "9000");
    move_data(&direct, 3 * MIB, 6);
    assert_eq!(reconfigure(change().timeout(0)), Ok(()));
    assert_eq!(device::sysfs(link.index, "queue/io_timeout"), "30000");
    assert_eq!(reconfigure(change().block_size(4096)), Ok(()));
    assert_eq!(
        device::sysfs(link.index, "queue/logical_block_size"),
        "4096"
    );
    assert_eq!(reconfigure(change().block_size(3000)), Err(Errno::INVAL));
    assert_eq!(reconfigure(change()), Ok(()), "nothing at all");
    assert_eq!(device::sysfs(link.index, "size"), "8192");
    move_data(&direct, 0, 7);
}

fn reconfigure_needs_no_more_sockets(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    assert_eq!(link.revive(), Ok(()), "no place for it, which is no error");
    let let_go = wait_until(SOON, || link.server.living() == 1);
    assert!(let_go.is_ok(), "a socket without use is kept");
    let reconfigure = |number| {
        link.netlink
            .reconfigure(&Setup::change(link.index).descriptors(&[number]))
    };
    assert_eq!(reconfigure(9999), Err(Errno::BADF));
    assert_eq!(reconfigure(-1), Err(Errno::BADF));
    let file = File::open("/dev/null").unwrap();
    assert_eq!(reconfigure(descriptor(&file)), Err(Errno::NOTSOCK));
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_eq!(reconfigure(descriptor(&datagrams)), Err(Errno::INVAL));
    assert_eq!(read_one(&link.direct(), 0), Ok(()));
}

fn news_of_dead_connections(_: &Guest) {
    let news = Netlink::listen();
    let link = Setup::new(MIB).attach().settle();
    link.disconnect().unwrap();
    link.wait_free();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(news.dead_link(), None, "it was asked to end");
    let setup = Setup::new(MIB).index(1).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    for victim in [1, 0] {
        link.server.kill_connection(victim);
        assert_eq!(news.expect_dead_link(), 1);
    }
    thread::sleep(Duration::from_millis(200));
    assert_eq!(news.dead_link(), None, "one each");
    // Ioctls make no difference.
    let rig = Plan::new(MIB).attach();
    rig.server.kill();
    assert_eq!(news.expect_dead_link(), 0);
}

fn reconfigure_revives_a_device(_: &Guest) {
    let link = Setup::new(MIB).attach().settle();
    let direct = link.direct();
    for round in 0..3 {
        move_data(&direct, round << 18, round);
        link.kill_server();
        assert_eq!(read_one(&direct, 0), Err(Errno::IO));
        assert_eq!(link.revive(), Ok(()));
    }
    move_data(&direct, 0, 9);
    let mut back = Buffer::new(64 << 10);
    direct.read_exact_at(&mut back, 2 << 18).unwrap();
    assert_pattern(2, 2 << 18, &back);
}

fn reads_wait_for_a_new_connection(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    let mut stored = vec![0; 4096];
    pattern(1, 0, &mut stored);
    link.server.poke(0, &stored);
    let direct = link.direct();
    for _ in 0..3 {
        link.kill_server();
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut back = Buffer::new(4096);
                direct.read_exact_at(&mut back, 0).unwrap();
                assert_pattern(1, 0, &back);
            });
            thread::sleep(Duration::from_millis(400));
            assert!(!reader.is_finished(), "it was to wait");
            let began = Instant::now();
            assert_eq!(link.revive(), Ok(()));
            reader.join().unwrap();
            assert!(began.elapsed() < Duration::from_secs(5));
        });
    }
}

fn requests_in_flight_are_sent_again(_: &Guest) {
    const LEN: usize = 32 << 10;
    // With gaps between them, or the block layer makes one of two.
    let offsets = [0, 1, 2, 3].map(|n| n * 2 * LEN as u64);
    // nbd.ko sends them again when their time is up.
    let setup = Setup::new(MIB).dead_timeout(20).timeout(2);
    let link = setup.attach().settle();
    for offset in offsets {
        let mut stored = vec![0; LEN];
        pattern(1, offset, &mut stored);
        link.server.poke(offset, &stored);
    }
    link.server.script(|conn, request| {
        if request.command == Command::Write {
            conn.read_data(request)?;
        }
        Ok(())
    });
    let direct = link.direct();
    thread::scope(|scope| {
        for offset in offsets {
            let direct = &direct;
            scope.spawn(move || {
                let mut back = Buffer::new(LEN);
                direct.read_exact_at(&mut back, offset).unwrap();
                assert_pattern(1, offset, &back);
            });
            let offset = offset + MIB / 2;
            scope.spawn(move || {
                let data = Buffer::filled(LEN, |data| pattern(2, offset, data));
                direct.write_all_at(&data, offset).unwrap();
            });
        }
        link.server
            .wait_for("all requests", |requests| requests.len() == 8);
        link.kill_server();
        link.server.be_honest();
        thread::sleep(Duration::from_millis(200));
        assert_eq!(link.revive(), Ok(()));
    });
    for offset in offsets.map(|offset| MIB / 2 + offset) {
        assert_pattern(2, offset, &link.server.peek(offset, LEN));
    }
    let sent_again = link.server.requests();
    let sent_again = sent_again.iter().filter(|request| request.connection == 1);
    assert_eq!(sent_again.count(), 8);
}

fn requests_wait_no_longer_than_told(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(1).attach().settle();
    let direct = link.direct();
    link.kill_server();
    let began = Instant::now();
    assert_eq!(read_one(&direct, 0), Err(Errno::IO));
    let took = began.elapsed().as_secs_f32();
    assert!((0.8..6.0).contains(&took), "{took} s");
    let began = Instant::now();
    assert_eq!(read_one(&direct, 0), Err(Errno::IO));
    let took = began.elapsed().as_secs_f32();
    assert!(took < 0.7, "there is nothing left to wait for: {took} s");
    // It is not too late for the device.
    assert_eq!(link.revive(), Ok(()));
    move_data(&direct, 0, 1);
    // The time can be changed.
    let change = Setup::change(link.index).dead_timeout(0);
    assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    link.kill_server();
    let began = Instant::now();
    assert_eq!(read_one(&direct, 0), Err(Errno::IO));
    let took = began.elapsed().as_secs_f32();
    assert!(took < 0.7, "{took} s");
}

fn disconnect_ends_waiting(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    let direct = link.direct();
    link.kill_server();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_one(&direct, 0));
        thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished());
        assert_eq!(link.disconnect(), Ok(()));
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    drop(direct);
    link.wait_free();
}

/// The connections that requests of all processors come by.
fn used_connections(link: &Link, direct: &File) -> HashSet<usize> {
    link.server.forget_requests();
    for processor in 0..thread::available_parallelism().unwrap().get() {
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut set = CpuSet::new();
                set.set(processor);
                sched_setaffinity(None, &set).unwrap();
                read_one(direct, 0).unwrap();
            });
        });
    }
    let requests = link.server.requests();
    requests.iter().map(|request| request.connection).collect()
}

fn one_of_two_connections_comes_back(guest: &Guest) {
    let setup = Setup::new(MIB).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix, Transport::Unix]);
    let link = link.settle();
    let news = Netlink::listen();
    let direct = link.direct();
    assert_eq!(used_connections(&link, &direct), HashSet::from([0, 1]));
    for (victim, other, new) in [(0, 1, 2), (1, 2, 3), (2, 3, 4)] {
        link.server.kill_connection(victim);
        assert_eq!(news.expect_dead_link(), link.index);
        assert_eq!(used_connections(&link, &direct), HashSet::from([other]));
        assert_eq!(link.revive(), Ok(()));
        let used = used_connections(&link, &direct);
        assert_eq!(used, HashSet::from([other, new]));
    }
    if guest.expected("debugfs-shows-connections") == Driver::Rnbd {
        let path = format!("/sys/kernel/debug/nbd/nbd{}/connections", link.index);
        let shown = fs::read_to_string(path).unwrap();
        let reconnects: Vec<&str> = shown
            .lines()
            .filter_map(|line| line.split(" reconnects=").nth(1))
            .collect();
        assert_eq!(reconnects, ["2", "1"], "{shown}");
    }
}

fn connections_come_and_go_under_load(_: &Guest) {
    let setup = Setup::new(16 * MIB)
        .flags(USUAL_FLAGS | CAN_MULTI_CONN)
        .timeout(2)
        .dead_timeout(30);
    let link = setup.attach_over(&[Transport::Unix, Transport::Tcp4]);
    let link = link.settle();
    let news = Netlink::listen();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for worker in 0..4 {
            let (direct, done) = (link.direct(), &done);
            scope.spawn(move || {
                let mut round = 0;
                while !done.load(Ordering::Relaxed) {
                    move_data(&direct, worker * 4 * MIB + ((round % 32) << 16), round);
                    round += 1;
                }
            });
        }
        // The server numbers connections in the order in which they are made.
        let kill = |connection| {
            link.server.kill_connection(connection);
            assert_eq!(news.expect_dead_link(), link.index);
        };
        for connection in 0..3 {
            thread::sleep(Duration::from_millis(200));
            kill(connection);
            assert_eq!(link.revive(), Ok(()));
        }
        thread::sleep(Duration::from_millis(200));
        // For a moment there is none.
        kill(3);
        kill(4);
        thread::sleep(Duration::from_millis(100));
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(link.revive(), Ok(()));
        thread::sleep(Duration::from_millis(300));
        done.store(true, Ordering::Relaxed);
    });
}

fn debugfs_files(guest: &Guest) {
    let setup = Setup::new(3 * MIB)
        .block_size(4096)
        .timeout(3)
        .flags(USUAL_FLAGS);
    let link = setup.attach();
    let dir = format!("/sys/kernel/debug/nbd/nbd{}", link.index);
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
        }
    }
    let change = Setup::change(link.index).size(4 * MIB);
    assert_eq!(link.netlink.reconfigure(&change), Ok(()));
    assert_eq!(read("size_bytes").trim(), (4 * MIB).to_string());
    // Somebody who reads it may keep a file open.
    let open = File::open(format!("{dir}/tasks")).unwrap();
    assert_eq!(link.disconnect(), Ok(()));
    link.wait_free();
    assert!(!Path::new(&dir).exists());
    drop(open);
}

fn commands_at_the_same_time(_: &Guest) {
    let until = Instant::now() + Duration::from_secs(2);
    thread::scope(|scope| {
        for worker in 0..4_u32 {
            scope.spawn(move || {
                let server = Server::new();
                let netlink = Netlink::open();
                let mut connected = 0;
                let mut round = worker;
                while Instant::now() < until || connected == 0 {
                    round += 1;
                    let socket = server.connect(Transport::Unix);
                    let mut setup = Setup::new(MIB).sockets([socket]);
                    if round % 2 == 0 {
                        setup = setup.index(round % 5);
                    }
                    let destroy = u64::from(round % 3 == 0);
                    setup = setup.client_flags(destroy * DESTROY_ON_DISCONNECT);
                    match netlink.connect(&setup) {
                        Ok(index) => {
                            connected += 1;
                            // Somebody else may have disconnected it already.
                            if let Ok(direct) = device::open(index, libc::O_DIRECT) {
                                let _ = direct.read_at(&mut Buffer::new(4096), 0);
                            }
                            let change = Setup::change(index).size(2 * MIB);
                            let _ = netlink.reconfigure(&change);
                            let _ = netlink.disconnect(index);
                        }
                        // In use, going, or not quite gone.
                        Err(Errno::BUSY | Errno::INVAL | Errno::EXIST) => {}
                        Err(errno) => panic!("CONNECT: {errno}"),
                    }
                    netlink.status(None);
                    let _ = netlink.disconnect(round % 5);
                }
            });
        }
    });
    let netlink = Netlink::open();
    for (index, _) in netlink.status(None) {
        let _ = netlink.disconnect(index);
    }
}

fn nbd_client(_: &Guest) {
    let _ = fs::remove_file("/tmp/nbdkit.sock");
    let _server = serve(
        "nbdkit -f -U /tmp/nbdkit.sock memory 128M",
        "/tmp/nbdkit.sock",
    );
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
