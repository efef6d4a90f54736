// SPDX-License-Identifier: GPL-2.0

//! Which device a command is meant for: DISCONNECT with the name of an image that the device no longer has,
//! and CONNECT of a device that programs have open.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, RwLock};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use rustix::io::Errno;

use super::{MIB, assert_ioctls_are_refused, move_data, sysfs_exists, try_connect, wait_destroyed};
use crate::debug_kernel::enough;
use crate::device::{self, Plan, SOON, USUAL_FLAGS, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, say, seed, wait_until};
use crate::netlink::{
    DESTROY_ON_DISCONNECT, DISCONNECT_ON_CLOSE, Link, Netlink, Setup, descriptor,
};
use crate::programs::{sh, try_sh};
use crate::proto::{self, CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY};
use crate::server::{Server, Transport};
use crate::sys::{Buffer, ioctl_number};
use crate::test;
use crate::tests::user_space::serve;

pub fn tests() -> Vec<Test> {
    vec![
        test!(disconnect_names_the_image),
        test!(disconnect_names_an_image_where_there_is_none),
        test!(disconnect_of_the_one_before),
        test!(nbd_client_disconnects_an_image_with_a_name),
        test!(connect_a_device_that_is_merely_open),
        test!(connect_a_device_that_is_being_set_up),
        test!(closes_of_opens_from_before),
        test!(destroyed_after_the_close_of_an_open_from_before),
        test!(a_failed_connect_leaves_an_open_device_alone),
        test!(connect_while_others_open_and_close),
        test!(connect_against_ioctls),
        test!(nbd_client_connects_a_device_that_is_merely_open),
    ]
}

/// The number of lines that the kernel has logged about refused disconnects.
fn refused_disconnects(guest: &Guest) -> usize {
    let ours = |line: &&String| line.contains("nbd0: not disconnected");
    guest.log().iter().filter(ours).count()
}

/// Whether the device is still connected: after a disconnect a read fails, or finds a size of 0.
fn is_connected(device: &File) -> bool {
    let read = device.read_at(&mut Buffer::new(4096), 0);
    read.is_ok_and(|len| len == 4096)
}

fn disconnect_names_the_image(guest: &Guest) {
    let netlink = Netlink::open();
    netlink.request_ext_ack();
    for name in [b"image-7".as_slice(), b"\xff\xfe", b"\0"] {
        let link = Setup::new(MIB)
            .index(0)
            .backend_bytes(name)
            .attach()
            .settle();
        let others = [
            b"image-8".as_slice(),
            b"image-",
            b"image-77",
            b"\xff",
            b"\0x",
        ];
        for (refused, other) in others.iter().enumerate() {
            let before = refused_disconnects(guest);
            let answer = netlink.disconnect_backend(0, other);
            if guest.expected("disconnect-is-for-the-image") == Driver::Nbd {
                assert_eq!(answer, Ok(()), "{other:x?}: the name is ignored");
                return;
            }
            assert_eq!(answer, Err(Errno::INVAL), "{other:x?} of {name:x?}");
            let explanation = netlink.ext_ack();
            assert_eq!(
                explanation.as_deref(),
                Some("the device has another backend")
            );
            let after = refused_disconnects(guest);
            assert_eq!(after, before + 1, "a line for number {refused}");
        }
        move_data(&link.direct(), 0, 1);
        assert_eq!(link.server.living(), 1);
        // Zero bytes at the end do not belong to the name.
        let right = [name, b"\0\0"].concat();
        assert_eq!(netlink.disconnect_backend(0, &right), Ok(()));
        link.wait_free();
    }
}

/// A device without an image name is not the one that is meant.
fn disconnect_names_an_image_where_there_is_none(guest: &Guest) {
    let netlink = Netlink::open();
    let answer = match guest.expected("disconnect-is-for-the-image") {
        Driver::Nbd => Ok(()),
        Driver::Rnbd => Err(Errno::INVAL),
    };
    assert_eq!(netlink.disconnect_backend(0, b"image-7"), answer, "free");
    let open = device::open(0, 0).unwrap();
    assert_eq!(netlink.disconnect_backend(0, b"image-7"), answer, "open");
    drop(open);
    let rig = Plan::new(MIB).attach();
    assert_eq!(netlink.disconnect_backend(0, b"image-7"), answer, "ioctl");
    assert_eq!(is_connected(&rig.direct()), answer.is_err());
    drop(rig);
    let link = Setup::new(MIB).index(0).attach().settle();
    for name in [b"image-7".as_slice(), b"\0"] {
        assert_eq!(netlink.disconnect_backend(0, name), answer, "no name");
    }
    assert_eq!(is_connected(&link.direct()), answer.is_err());
    // A DISCONNECT without a name needs no more than the index.
    link.disconnect_and_wait();
}

/// Two programs have used the same index one after the other.
fn disconnect_of_the_one_before(guest: &Guest) {
    let setup = Setup::new(MIB).index(0);
    let first = setup.clone().backend("image of A").attach();
    first.disconnect_and_wait();
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    let second = setup.backend("image of B").sockets([socket]);
    let netlink = Netlink::open();
    assert_eq!(netlink.connect(&second), Ok(0));
    // The first program disconnects "its" device too late.
    let answer = netlink.disconnect_backend(0, b"image of A");
    let open = device::open(0, libc::O_DIRECT).unwrap();
    match guest.expected("disconnect-is-for-the-image") {
        Driver::Nbd => {
            assert_eq!(answer, Ok(()));
            assert!(!is_connected(&open), "the second program's device");
        }
        Driver::Rnbd => {
            assert_eq!(answer, Err(Errno::INVAL));
            assert!(is_connected(&open));
            // A device that is open keeps its name after the disconnect, until the last close.
            assert_eq!(netlink.disconnect_backend(0, b"image of B"), Ok(()));
            assert_eq!(netlink.disconnect_backend(0, b"image of B"), Ok(()));
            assert!(!is_connected(&open));
            drop(open);
            first.wait_free();
        }
    }
}

/// `nbd-client -d` sends no image name.
fn nbd_client_disconnects_an_image_with_a_name(_: &Guest) {
    let link = Setup::new(MIB).index(0).backend("image-7").attach();
    sh("nbd-client -d /dev/nbd0");
    link.wait_free();
}

/// Connects a device that programs have open. Returns `None` with nbd.ko, which refuses that.
fn attach_open(guest: &Guest, setup: &Setup) -> Option<Link> {
    let link = setup.try_attach();
    match guest.expected("connect-takes-an-open-device") {
        Driver::Nbd => {
            assert_eq!(link.map(drop), Err(Errno::BUSY), "open");
            None
        }
        Driver::Rnbd => Some(link.expect("to connect an open device")),
    }
}

/// udev, blkid or a shell may have the device open, for a moment or for long.
fn connect_a_device_that_is_merely_open(guest: &Guest) {
    let open = device::open(0, libc::O_DIRECT).unwrap();
    let second = device::open(0, 0).unwrap();
    let setup = Setup::new(MIB).index(0);
    let Some(link) = attach_open(guest, &setup) else {
        return;
    };
    assert_eq!(device::sysfs(0, "size"), "2048");
    move_data(&open, 0, 1);
    move_data(&link.direct(), 128 << 10, 2);
    assert_ioctls_are_refused(&open);
    drop((second, open));
    assert_eq!(link.netlink.status(Some(0)), [(0, true)]);
    move_data(&link.direct(), 0, 3);
    // A device that was connected, and has been open since, cannot be connected.
    let open = link.direct();
    assert_eq!(link.disconnect(), Ok(()));
    assert_eq!(try_connect(&setup), Err(Errno::BUSY));
    drop(open);
    link.wait_free();
    // A disconnect of an unconnected device has no effect on a later connection.
    let open = device::open(0, libc::O_DIRECT).unwrap();
    assert_eq!(link.netlink.disconnect(0), Ok(()));
    assert_eq!(ioctl_number(&open, proto::DISCONNECT, 0), Ok(0));
    let news = Netlink::listen();
    let link = setup.dead_timeout(10).attach();
    assert_eq!(read_page(&open, 0), Ok(()));
    link.server.kill();
    assert_eq!(news.expect_dead_link(), 0);
    assert_eq!(link.revive(), Ok(()));
    assert_eq!(read_page(&open, 0), Ok(()));
}

fn connect_a_device_that_is_being_set_up(guest: &Guest) {
    let server = Server::new();
    let socket = server.connect(Transport::Unix);
    let number = descriptor(&socket) as u64;
    let setup = Setup::new(MIB).index(0);
    for (request, argument) in [
        (proto::SET_SOCK, number),
        (proto::SET_BLKSIZE, 4096),
        (proto::SET_SIZE, MIB),
        (proto::SET_SIZE_BLOCKS, 1024),
        (proto::SET_TIMEOUT, 20),
        (proto::SET_FLAGS, HAS_FLAGS),
    ] {
        let open = device::open(0, 0).unwrap();
        assert_eq!(ioctl_number(&open, request, argument), Ok(0));
        assert_eq!(try_connect(&setup), Err(Errno::BUSY), "{request:#x}");
        assert_eq!(
            ioctl_number(&open, request, argument),
            Ok(0),
            "the program that has set it up"
        );
    }
    // These ioctls set nothing up.
    for (request, argument, answer) in [
        (proto::CLEAR_SOCK, 0, Ok(0)),
        (proto::CLEAR_QUE, 0, Ok(0)),
        (proto::PRINT_DEBUG, 0, Ok(0)),
        (proto::DISCONNECT, 0, Ok(0)),
        (proto::SET_BLKSIZE, 3000, Err(Errno::INVAL)),
        (proto::SET_SOCK, 9999, Err(Errno::BADF)),
        (proto::DO_IT, 0, Err(Errno::INVAL)),
    ] {
        let open = device::open(0, 0).unwrap();
        let answered = ioctl_number(&open, request, argument);
        assert_eq!(answered, answer, "{request:#x}");
        let link = attach_open(guest, &setup);
        drop(open);
        if let Some(link) = link {
            assert_eq!(read_page(&link.direct(), 0), Ok(()), "{request:#x}");
            link.disconnect_and_wait();
        }
    }
}

/// With DISCONNECT_ON_CLOSE the last close disconnects the device. The close of a program that opened the
/// device before the connect does not, unless others have opened it since.
fn closes_of_opens_from_before(guest: &Guest) {
    let setup = Setup::new(MIB).index(0).client_flags(DISCONNECT_ON_CLOSE);
    let old = device::open(0, 0).unwrap();
    let Some(link) = attach_open(guest, &setup) else {
        return;
    };
    drop(old);
    assert_eq!(link.netlink.status(Some(0)), [(0, true)]);
    let direct = link.direct();
    assert_eq!(read_page(&direct, 0), Ok(()));
    drop(direct);
    link.wait_free();
    // Another program has opened and closed the device since, so the last close disconnects it.
    let old = device::open(0, libc::O_DIRECT).unwrap();
    let link = setup.attach();
    drop(link.direct());
    assert_eq!(read_page(&old, 0), Ok(()));
    drop(old);
    link.wait_free();
}

fn destroyed_after_the_close_of_an_open_from_before(guest: &Guest) {
    let setup = Setup::new(MIB).index(1).client_flags(DESTROY_ON_DISCONNECT);
    let old = device::open(1, 0).unwrap();
    let Some(link) = attach_open(guest, &setup) else {
        return;
    };
    move_data(&link.direct(), 0, 1);
    assert_eq!(link.disconnect(), Ok(()));
    assert!(sysfs_exists(1));
    drop(old);
    wait_destroyed(1);
}

fn a_failed_connect_leaves_an_open_device_alone(guest: &Guest) {
    let server = Server::new();
    let netlink = Netlink::open();
    let taken = server.connect(Transport::Unix);
    let numbers = [descriptor(&taken)];
    let other = Setup::new(MIB).index(1).descriptors(&numbers);
    assert_eq!(netlink.connect(&other), Ok(1));
    let sockets = |count| (0..count).map(|_| server.connect(Transport::Unix));
    let right = Setup::new(MIB).index(0);
    let setup = right
        .clone()
        .backend("image")
        .timeout(7)
        .client_flags(DESTROY_ON_DISCONNECT | DISCONNECT_ON_CLOSE);
    let driver = guest.expected("connect-takes-an-open-device");
    for again_by_ioctl in [false, true] {
        let open = device::open(0, libc::O_DIRECT).unwrap();
        for (setup, errno) in [
            (setup.clone().descriptors(&[9999]), Errno::BADF),
            (
                setup.clone().size(u64::MAX).sockets(sockets(1)),
                Errno::INVAL,
            ),
            (
                setup.clone().block_size(3000).sockets(sockets(1)),
                Errno::INVAL,
            ),
            (setup.clone().sockets(sockets(2)), Errno::INVAL),
            // This fails late: when the driver takes the sockets over.
            (setup.clone().descriptors(&numbers), Errno::BUSY),
        ] {
            let answer = netlink.connect(&setup);
            if driver == Driver::Nbd {
                assert_eq!(answer, Err(Errno::BUSY), "open");
                continue;
            }
            assert_eq!(answer, Err(errno));
            assert_eq!(device::sysfs(0, "size"), "0");
            assert_eq!(device::sysfs(0, "queue/io_timeout"), "30000");
            assert_eq!(device::pid(0), None);
            assert!(!Path::new("/sys/block/nbd0/backend").exists());
        }
        if again_by_ioctl {
            let mut rig = Plan::new(MIB).attach();
            assert_eq!(read_page(&open, 0), Ok(()));
            assert_eq!(rig.disconnect(), Ok(0));
        } else if let Some(link) = attach_open(guest, &right) {
            assert_eq!(read_page(&open, 0), Ok(()));
            assert_eq!(link.disconnect(), Ok(()));
        }
        drop(open);
        // It was not destroyed, either.
        netlink.wait_free(0);
    }
    netlink.disconnect(1).unwrap();
}

/// Right after loading the module, udev opens every device, and closes it again.
fn connect_while_others_open_and_close(guest: &Guest) {
    let driver = guest.expected("connect-takes-an-open-device");
    let (done, seed) = (AtomicBool::new(false), seed());
    // The write lock keeps the others from opening the device until it is free: a program that opened it while
    // it was connected has to close it first.
    let gate = RwLock::new(());
    let server = Server::new();
    let netlink = Netlink::open();
    let taken = server.connect(Transport::Unix);
    let taken = Setup::new(MIB).sockets([taken]);
    assert_eq!(netlink.connect(&taken.clone().index(1)), Ok(1));
    thread::scope(|scope| {
        let until_done = Until(&done);
        for worker in 0..3 {
            let (done, gate) = (&done, &gate);
            let mut random = Rng::with_seed(seed + worker);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let pass = gate.read().unwrap();
                    let open = device::open(0, libc::O_DIRECT).unwrap();
                    if random.bool() {
                        thread::sleep(Duration::from_micros(random.u64(..300)));
                    }
                    // There may be nothing to read yet.
                    let _ = open.read_at(&mut Buffer::new(4096), 0);
                    drop((open, pass));
                    thread::sleep(Duration::from_micros(random.u64(..500)));
                }
            });
        }
        for round in 0..enough(150, 30) {
            // This fails when the driver takes the socket over. nbd.ko would accept the socket.
            if round % 3 == 0 && driver == Driver::Rnbd {
                let answer = netlink.connect(&taken.clone().index(0));
                assert_eq!(answer, Err(Errno::BUSY), "a socket of another device");
            }
            // The number of hardware queues changes from round to round, which takes a while.
            let sockets = (0..=round % 2).map(|_| server.connect(Transport::Unix));
            let setup = Setup::new(MIB)
                .index(0)
                .flags(USUAL_FLAGS | CAN_MULTI_CONN)
                .sockets(sockets);
            let answer = netlink.connect(&setup);
            match driver {
                Driver::Nbd => assert!(matches!(answer, Ok(0) | Err(Errno::BUSY)), "{answer:?}"),
                Driver::Rnbd => assert_eq!(answer, Ok(0), "round {round}"),
            }
            if answer.is_ok() {
                thread::sleep(Duration::from_millis(2));
                let open = device::open(0, libc::O_DIRECT).unwrap();
                assert_eq!(
                    read_page(&open, 0),
                    Ok(()),
                    "another program's close has disconnected it"
                );
            }
            let _closed = gate.write().unwrap();
            netlink.disconnect(0).unwrap();
            netlink.wait_free(0);
        }
        drop(until_done);
    });
    netlink.disconnect(1).unwrap();
}

/// Two programs set a device up, one by ioctl, one by netlink. One of them gets the whole device.
fn connect_against_ioctls(guest: &Guest) {
    let mut random = Rng::with_seed(seed());
    let server = Server::new();
    let netlink = Netlink::open();
    let mut connected = 0;
    let rounds = enough(400, 60);
    for _ in 0..rounds {
        let open = device::open(0, 0).unwrap();
        let setup = Setup::new(MIB)
            .index(0)
            .sockets([server.connect(Transport::Unix)]);
        let barrier = Barrier::new(2);
        let pause = Duration::from_micros(random.u64(..400));
        let (answer, set) = thread::scope(|scope| {
            let connector = scope.spawn(|| {
                let netlink = Netlink::open();
                barrier.wait();
                netlink.connect(&setup)
            });
            barrier.wait();
            thread::sleep(pause);
            let set = [
                (proto::SET_BLKSIZE, 4096),
                (proto::SET_SIZE, 2 * MIB),
                (proto::SET_FLAGS, HAS_FLAGS | READ_ONLY),
                (proto::SET_TIMEOUT, 5),
            ];
            let set = set.map(|(request, argument)| ioctl_number(&open, request, argument));
            (connector.join().unwrap(), set)
        });
        match answer {
            Ok(index) => {
                connected += 1;
                assert_eq!(index, 0);
                assert_eq!(set, [Err(Errno::INVAL); 4]);
                assert_eq!(device::sysfs(0, "size"), "2048");
                assert_eq!(device::sysfs(0, "queue/logical_block_size"), "512");
                assert_eq!(device::sysfs(0, "queue/io_timeout"), "30000");
                move_data(&device::open(0, libc::O_DIRECT).unwrap(), 0, 1);
            }
            Err(errno) => assert_eq!((errno, set), (Errno::BUSY, [Ok(0); 4])),
        }
        netlink.disconnect(0).unwrap();
        drop(open);
        netlink.wait_free(0);
    }
    say(&format!("{connected} of {rounds} connected"));
    match guest.expected("connect-takes-an-open-device") {
        Driver::Nbd => assert_eq!(connected, 0, "open"),
        Driver::Rnbd => assert!(connected > 0),
    }
}

fn nbd_client_connects_a_device_that_is_merely_open(guest: &Guest) {
    let _ = fs::remove_file("/tmp/nbdkit.sock");
    let _server = serve(
        "nbdkit -f -U /tmp/nbdkit.sock memory 1M",
        "/tmp/nbdkit.sock",
    );
    let open = File::open("/dev/nbd0").unwrap();
    let connected = try_sh("nbd-client -unix /tmp/nbdkit.sock /dev/nbd0");
    if guest.expected("connect-takes-an-open-device") == Driver::Nbd {
        assert!(connected.is_err());
        return;
    }
    connected.unwrap();
    drop(open);
    sh("dd if=/dev/nbd0 of=/dev/null bs=64k status=none
        nbd-client -d /dev/nbd0");
    let gone = wait_until(SOON, || device::pid(0).is_none());
    assert!(gone.is_ok());
}
