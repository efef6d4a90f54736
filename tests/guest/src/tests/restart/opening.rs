// SPDX-License-Identifier: GPL-2.0

//! Opening a device that has no server.

use std::fs::{self, File};
use std::thread;
use std::time::Instant;

use rustix::io::Errno;

use super::{
    SIZE, can_be_restarted, disconnect, kill_server, lost_device, pass_socket, persistent,
};
use crate::device::{self, SOON, assert_usable};
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::proto::{BLKRRPART, DISCONNECT, DO_IT, SET_BLKSIZE, SET_SIZE};
use crate::server::Server;
use crate::sys::ioctl_number;
use crate::test;
use crate::tests::geometry::{partitioned_server, partitioned_server_of_few, serve_few};
use crate::uevents::Uevents;

pub fn tests() -> Vec<Test> {
    vec![
        test!(an_open_does_not_wait).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(the_partition_table_is_read_later).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(reading_the_partition_table_holds_up_no_close)
            .parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(the_partition_table_is_read_again).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(the_device_is_free_after_the_close).parameters("nbds_max=4 dead_conn_timeout=60"),
        test!(an_open_of_a_dead_device_reads_nothing),
    ]
}

/// The client has to open the device to start it again. If that read the partition table, it would wait for
/// the client itself.
fn an_open_does_not_wait(_: &Guest) {
    let (rig, direct) = lost_device(&persistent(SIZE));
    for _ in 0..3 {
        let began = Instant::now();
        drop(rig.open_to_read());
        let took = began.elapsed();
        assert!(took < SOON, "{took:?}");
    }
    drop(direct);
    assert_usable(0);
}

/// After a change of the size the next open reads the partition table, but not without a connection.
fn the_partition_table_is_read_later(guest: &Guest) {
    const SIZE: u64 = 8 << 20;
    if !can_be_restarted(guest) {
        return;
    }
    let partitioned = partitioned_server();
    let mut rig = persistent(SIZE).attach();
    let direct = rig.direct();
    assert_eq!(ioctl_number(&direct, SET_SIZE, 2 * SIZE), Ok(0));
    kill_server(&mut rig);
    let began = Instant::now();
    drop(rig.open_to_read());
    let took = began.elapsed();
    assert!(took < SOON, "{took:?}");
    let mut client = persistent(2 * SIZE).start(&partitioned);
    let there = wait_until(SOON, || fs::exists("/sys/block/nbd0/nbd0p1").unwrap());
    assert!(there.is_ok());
    disconnect(&direct, &mut client);
    drop(direct);
    assert_usable(0);
}

/// Returns the open device, which nobody else has open.
fn lost_while_the_partition_table_is_read(server: &Server) -> File {
    let device = device::open(0, 0).expect("the device");
    pass_socket(&device, server).expect("NBD_SET_SOCK");
    assert_eq!(ioctl_number(&device, SET_BLKSIZE, 512), Ok(0));
    assert_eq!(ioctl_number(&device, SET_SIZE, 8 << 20), Ok(0));
    assert_eq!(ioctl_number(&device, DO_IT, 0), Err(Errno::PIPE));
    device
}

/// The server is lost while the driver reads the partition table. The same program brings another one.
fn the_partition_table_is_read_again(guest: &Guest) {
    if !can_be_restarted(guest) {
        return;
    }
    for another_has_it_open in [false, true] {
        let server = partitioned_server_of_few(1);
        let another = another_has_it_open.then(|| device::open(0, 0).expect("the device"));
        let began = Instant::now();
        let mut device = lost_while_the_partition_table_is_read(&server);
        if another_has_it_open {
            // As nbd-client -persist does.
            drop(device);
            device = device::open(0, 0).expect("the device");
        }
        let took = began.elapsed();
        assert!(took < SOON, "{took:?}; another: {another_has_it_open}");
        let next = Server::new();
        next.poke(0, &server.peek(0, 8 << 20));
        let mut uevents = Uevents::listen();
        pass_socket(&device, &next).expect("NBD_SET_SOCK");
        thread::scope(|scope| {
            let runs = scope.spawn(|| ioctl_number(&device, DO_IT, 0));
            let there = wait_until(SOON, || fs::exists("/sys/block/nbd0/nbd0p1").unwrap());
            ioctl_number(&device, DISCONNECT, 0).expect("NBD_DISCONNECT");
            assert_eq!(runs.join().unwrap(), Ok(0));
            assert!(
                there.is_ok(),
                "no partitions; another: {another_has_it_open}"
            );
        });
        let heard = uevents.rest();
        let added = |event: &&String| event.contains("ACTION=add") && event.contains("nbd0p1");
        assert_eq!(heard.iter().filter(added).count(), 1, "{heard:?}");
        drop((another, device));
        assert_usable(0);
    }
}

/// The server is lost while the driver reads the partition table. When the only program that has the device
/// open has closed it, anybody can use it for another image.
fn the_device_is_free_after_the_close(guest: &Guest) {
    if !can_be_restarted(guest) {
        return;
    }
    let image = partitioned_server().peek(0, 8 << 20);
    for _ in 0..60 {
        let server = Server::new();
        server.poke(0, &image);
        serve_few(&server, 1);
        drop(lost_while_the_partition_table_is_read(&server));
        let device = device::open(0, 0).expect("the device");
        assert_eq!(device::sysfs(0, "size"), "0");
        assert_eq!(pass_socket(&device, &Server::new()), Ok(0));
    }
    assert_usable(0);
}

/// The server is lost while the driver reads the partition table. The program that has connected the device
/// and closes it does not wait for another server: nobody else uses the device.
fn reading_the_partition_table_holds_up_no_close(guest: &Guest) {
    if !can_be_restarted(guest) {
        return;
    }
    let server = partitioned_server_of_few(1);
    let began = Instant::now();
    drop(lost_while_the_partition_table_is_read(&server));
    let took = began.elapsed();
    assert!(took < SOON, "{took:?}");
    assert_usable(0);
}

/// The number of lines that the kernel has logged about reads that failed.
fn read_errors(guest: &Guest) -> usize {
    let words = [
        "I/O error, dev nbd0",
        "on dev nbd0",
        "Disk read failed",
        "unable to read",
    ];
    let about = |line: &&String| words.iter().any(|words| line.contains(words));
    guest.log().iter().filter(about).count()
}

fn an_open_of_a_dead_device_reads_nothing(guest: &Guest) {
    for lost in [true, false] {
        let mut rig = persistent(SIZE).attach();
        let direct = rig.direct();
        if lost {
            kill_server(&mut rig);
        } else {
            ioctl_number(&direct, DISCONNECT, 0).expect("NBD_DISCONNECT");
            assert_eq!(rig.client.wait(), Ok(0));
        }
        // BLKRRPART does read, and returns the error.
        let reread = ioctl_number(rig.open_to_read(), BLKRRPART, 0);
        assert_eq!(reread, Err(Errno::IO));
        let before = read_errors(guest);
        for _ in 0..5 {
            drop(rig.open_to_read());
        }
        let errors = read_errors(guest) - before;
        match guest.expected("an-open-of-a-dead-device-reads-nothing") {
            Driver::Nbd => assert!(errors > 0),
            Driver::Rnbd => assert_eq!(errors, 0),
        }
        drop(direct);
    }
    assert_usable(0);
}
