// SPDX-License-Identifier: GPL-2.0

//! Devices that are disconnected while the server shuts down, or for which no other connection can come.

use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{
    DIFFERENCE, ESHUTDOWN, MIB, commands_on, refuse_on_first, refuse_one_of_three,
    wait_for_goodbye, wait_for_three_requests, while_reading,
};
use crate::device::{Plan, Rig, SOON, assert_usable, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, complain, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::proto::{self, Command};
use crate::sys::{SysResult, ioctl_number};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(an_ioctl_session_ends),
        test!(a_disconnect_while_it_drains),
        test!(clear_sock_while_it_drains),
        test!(nbd_disconnect_while_it_drains),
        test!(after_a_disconnect),
    ]
}

/// No other connection can come, so the session ends.
fn an_ioctl_session_ends(guest: &Guest) {
    let mut rig = Plan::new(MIB).attach();
    let direct = rig.direct();
    rig.server.script(refuse_on_first(1));
    assert_eq!(read_page(&direct, 0), Err(Errno::IO));
    match guest.expected(DIFFERENCE) {
        Driver::Nbd => {
            rig.server.be_honest();
            assert_eq!(read_page(&direct, 0), Ok(()));
        }
        Driver::Rnbd => {
            wait_for_goodbye(&rig.server, 0);
            let _ = rig.client.wait();
            assert_eq!(read_page(&direct, 0), Err(Errno::IO));
            let seen = commands_on(&rig.server, 0);
            assert_eq!(seen, [Command::Read, Command::Disconnect]);
        }
    }
    drop((direct, rig));
    assert_usable(0);
}

fn a_disconnect_while_it_drains(_: &Guest) {
    let link = Setup::new(MIB).dead_timeout(20).attach().settle();
    refuse_one_of_three(&link.server);
    let results = while_reading(&link, 3, || {
        wait_for_three_requests(&link.server);
        thread::sleep(Duration::from_millis(200));
        let began = Instant::now();
        assert_eq!(link.disconnect(), Ok(()));
        assert!(began.elapsed() < Duration::from_secs(2), "it waited");
    });
    assert_eq!(results, [Err(Errno::IO); 3]);
    link.wait_free();
}

/// Calls `act` with a device that ioctls have connected, and that has three reads in flight of which the
/// first was refused. Returns the results of the reads.
fn while_a_session_drains(act: impl FnOnce(&mut Rig)) -> Vec<SysResult<()>> {
    let mut rig = Plan::new(MIB).attach();
    refuse_one_of_three(&rig.server);
    let results = thread::scope(|scope| {
        let readers = [0, 1, 2].map(|reader| {
            let direct = rig.direct();
            scope.spawn(move || read_page(&direct, reader * 65536))
        });
        wait_for_three_requests(&rig.server);
        let refused = wait_until(SOON, || readers.iter().any(|r| r.is_finished()));
        assert!(refused.is_ok(), "no read has failed");
        act(&mut rig);
        readers.map(|reader| reader.join().unwrap())
    });
    let _ = rig.client.wait();
    drop(rig);
    assert_usable(0);
    results.to_vec()
}

fn clear_sock_while_it_drains(_: &Guest) {
    let results = while_a_session_drains(|rig| {
        assert_eq!(
            ioctl_number(rig.open_to_read(), proto::CLEAR_SOCK, 0),
            Ok(0)
        );
    });
    assert_eq!(results, [Err(Errno::IO); 3]);
}

/// The goodbye is sent at once. A second NBD_DISCONNECT does no harm.
fn nbd_disconnect_while_it_drains(_: &Guest) {
    let results = while_a_session_drains(|rig| {
        for _ in 0..2 {
            let device = rig.open_to_read();
            assert_eq!(ioctl_number(device, proto::DISCONNECT, 0), Ok(0));
        }
        wait_for_goodbye(&rig.server, 0);
    });
    assert_eq!(results, [Err(Errno::IO); 3]);
}

/// nbdkit refuses the commands that are in flight when the goodbye comes.
fn after_a_disconnect(_: &Guest) {
    let news = Netlink::listen();
    let mut rig = Plan::new(MIB).attach();
    rig.server.script(|conn, request| {
        let goodbye = conn.next_request()?;
        assert_eq!(goodbye.command, Command::Disconnect);
        conn.refuse(request, ESHUTDOWN)?;
        if conn.readable_within(Duration::from_millis(200))? && conn.next_request().is_ok() {
            complain("something came after the goodbye".into());
        }
        conn.close()
    });
    thread::scope(|scope| {
        let direct = rig.direct();
        let reader = scope.spawn(move || read_page(&direct, 0));
        rig.server.wait_for_command(Command::Read);
        assert_eq!(rig.disconnect(), Ok(0));
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    assert_eq!(news.dead_link(), None, "it was asked to end");
    drop(rig);
    assert_usable(0);
}
