// SPDX-License-Identifier: GPL-2.0

//! What RECONFIGURE changes of a device that is connected.

use std::fs::{self, File};
use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{MIB, move_data, sysfs_exists, wait_destroyed};
use crate::debug_kernel::patient;
use crate::device::{self, Plan, SOON, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::netlink::{DESTROY_ON_DISCONNECT, Netlink, Setup, descriptor};
use crate::proto::Command;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(reconfigure_what_is_not_there),
        test!(reconfigure_size_and_timeout),
        test!(reconfigure_while_requests_wait),
        test!(reconfigure_while_a_limit_is_being_set),
        test!(reconfigure_needs_no_more_sockets),
        test!(reconfigure_decides_whether_to_destroy),
        test!(backend_identifier),
        test!(backend_identifiers_are_bytes),
    ]
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

/// Whoever changes a device, and everybody else who uses generic netlink, must not wait for a server
/// that is gone.
fn reconfigure_while_requests_wait(guest: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    let change = || Setup::change(link.index);
    let block_size = |size| link.netlink.reconfigure(&change().block_size(size));
    let direct = link.direct();
    link.kill_server();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished());
        let began = Instant::now();
        let resized = link.netlink.reconfigure(&change().size(2 * MIB));
        assert_eq!(resized, Ok(()));
        assert_eq!(device::sysfs(link.index, "size"), "4096");
        if guest.expected("changes-do-not-hang") == Driver::Nbd {
            assert!(began.elapsed() > Duration::from_secs(10));
            assert_eq!(reader.join().unwrap(), Err(Errno::IO));
            return;
        }
        assert!(began.elapsed() < patient(Duration::from_secs(3)));
        let other = scope.spawn(move || {
            thread::sleep(Duration::from_secs(1));
            let other_family = Instant::now();
            drop(Netlink::open());
            assert!(other_family.elapsed() < patient(Duration::from_secs(2)));
        });
        assert_eq!(block_size(4096), Err(Errno::BUSY));
        assert!((4..15).contains(&began.elapsed().as_secs()));
        other.join().unwrap();
        let shown = device::sysfs(link.index, "queue/logical_block_size");
        assert_eq!(shown, "512");
        assert!(!reader.is_finished());
        assert_eq!(link.revive(), Ok(()));
        assert_eq!(reader.join().unwrap(), Ok(()));
        assert_eq!(block_size(4096), Ok(()));
        move_data(&direct, MIB, 8);
    });
}

/// A program sets a limit in sysfs, which waits for a silent server and holds a lock of the disk
/// meanwhile. Who changes the device must not wait for that program without end, and who has to do with
/// another device not at all.
fn reconfigure_while_a_limit_is_being_set(_: &Guest) {
    let link = Setup::new(MIB).index(0).attach().settle();
    link.server.script(|conn, _| conn.stall());
    let direct = link.direct();
    let change = || Setup::change(0);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&direct, 0));
        link.server.wait_for_command(Command::Read);
        let setter =
            scope.spawn(|| fs::write("/sys/block/nbd0/queue/write_cache", "write through"));
        thread::sleep(Duration::from_millis(300));
        assert!(!setter.is_finished());
        let changer = scope.spawn(|| {
            let netlink = Netlink::open();
            let began = Instant::now();
            let resized = netlink.reconfigure(&change().size(2 * MIB));
            let limited = netlink.reconfigure(&change().block_size(4096));
            (resized, limited, began.elapsed())
        });
        thread::sleep(Duration::from_millis(300));
        let neighbour = scope.spawn(|| {
            let began = Instant::now();
            let other = Setup::new(MIB).index(1).attach();
            let status = other.netlink.status(None);
            other.netlink.reconfigure(&Setup::change(1).size(2 * MIB))?;
            other.disconnect()?;
            Ok::<_, Errno>((status, began.elapsed()))
        });
        let waited = wait_until(SOON, || neighbour.is_finished());
        let released = wait_until(SOON, || changer.is_finished());
        if waited.is_err() || released.is_err() {
            link.server.kill();
        }
        assert!(waited.is_ok(), "who uses another device waits");
        assert!(released.is_ok(), "RECONFIGURE waits for ever");
        let (status, took) = neighbour.join().unwrap().unwrap();
        assert_eq!(status, [(0, true), (1, true)]);
        assert!(took < patient(Duration::from_secs(3)), "{took:?}");
        let (resized, limited, took) = changer.join().unwrap();
        assert_eq!(resized, Ok(()));
        assert_eq!(limited, Err(Errno::BUSY));
        assert!(took < patient(Duration::from_secs(9)), "{took:?}");
        assert_eq!(device::sysfs(0, "size"), "4096");
        assert!(!setter.is_finished());
        assert!(!reader.is_finished());
        link.server.kill();
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
        setter.join().unwrap().unwrap();
    });
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
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
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
    link.disconnect_and_wait();
    assert!(sysfs_exists(7));
    let link = Setup::new(MIB).index(7).attach();
    let destroy = Setup::change(7).client_flags(DESTROY_ON_DISCONNECT);
    assert_eq!(link.netlink.reconfigure(&destroy), Ok(()));
    assert_eq!(link.disconnect(), Ok(()));
    wait_destroyed(7);
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
    link.disconnect_and_wait();
    // It is forgotten; and where there is none, any is right.
    let link = Setup::new(MIB).attach();
    assert_eq!(device::sysfs(link.index, "backend"), "");
    let any = Setup::change(link.index).size(2 * MIB).backend("image-8");
    assert_eq!(link.netlink.reconfigure(&any), Ok(()));
    assert_eq!(device::sysfs(link.index, "backend"), "");
}

/// Whatever they are: no text in any encoding is expected.
fn backend_identifiers_are_bytes(_: &Guest) {
    let netlink = Netlink::open();
    for name in ["Größe-図".as_bytes(), b"\xff\xfe\x80 \\x", b"new\nline"] {
        let link = Setup::new(MIB).index(0).backend_bytes(name).attach();
        let shown = fs::read("/sys/block/nbd0/backend").unwrap();
        assert_eq!(shown, [name, b"\n"].concat());
        let size = |size| Setup::change(0).size(size);
        let wrong = size(2 * MIB).backend_bytes(&name[1..]);
        assert_eq!(netlink.reconfigure(&wrong), Err(Errno::INVAL));
        let right = size(2 * MIB).backend_bytes(name);
        assert_eq!(netlink.reconfigure(&right), Ok(()), "{name:x?}");
        link.disconnect_and_wait();
    }
    // One that has a zero in it ends there, where it is kept, but not where it is compared.
    let link = Setup::new(MIB).index(0).backend_bytes(b"ab\0cd").attach();
    assert_eq!(fs::read("/sys/block/nbd0/backend").unwrap(), b"ab\n");
    for (name, answer) in [
        (b"ab".as_slice(), Ok(())),
        (b"ab\0\0", Ok(())),
        (b"ab\0cd", Err(Errno::INVAL)),
        (b"a", Err(Errno::INVAL)),
    ] {
        let change = Setup::change(0).backend_bytes(name);
        assert_eq!(netlink.reconfigure(&change), answer, "{name:x?}");
    }
    drop(link);
}
