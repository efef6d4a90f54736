// SPDX-License-Identifier: GPL-2.0

//! Structured replies, as the tool agrees on them.

use std::fs;

use super::super::user_space::serve;
use super::tool::{MIB, SOCKET, URI, disconnect, fails, nbdkit, ok, use_and_disconnect};
use crate::device::SOON;
use crate::driver::Driver;
use crate::harness::{Guest, Test, wait_until};
use crate::programs::{Daemon, sh};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(on_and_off),
        test!(servers_without_them),
        test!(new_connections_are_alike),
        test!(what_a_server_says_is_told),
    ]
}

/// Whether the device's replies are structured, as JSON has it.
fn structured() -> String {
    let json = ok("show nbd0 --json");
    let line = json
        .lines()
        .find(|line| line.contains("\"structured_replies\""));
    let line = line.expect("the member").trim().trim_end_matches(',');
    line.rsplit(' ').next().unwrap_or_default().to_owned()
}

fn has_them(guest: &Guest) -> bool {
    guest.expected("speaks-structured-replies") == Driver::Rnbd
}

fn on_and_off(guest: &Guest) {
    let _server = nbdkit("memory 64M");
    if !has_them(guest) {
        let words = ["the driver does not have them"];
        fails(
            &format!("connect --structured-replies on {URI} nbd0"),
            1,
            &words,
        );
        ok(&format!("connect --structured-replies auto {URI} nbd0"));
        use_and_disconnect(64 * MIB);
        return;
    }
    for (choice, expected) in [("on", "true"), ("off", "false")] {
        ok(&format!("connect --structured-replies {choice} {URI} nbd0"));
        assert_eq!(structured(), expected, "{choice}");
        let flags = ok("show nbd0");
        assert_eq!(flags.contains(",df"), choice == "on", "{flags}");
        use_and_disconnect(64 * MIB);
    }
    assert!(ok(&format!("exports {URI} --json")).contains("\"structured_replies\": true"));
}

fn servers_without_them(guest: &Guest) {
    let _server = nbdkit("--no-sr memory 64M");
    assert!(ok(&format!("exports {URI} --json")).contains("\"structured_replies\": false"));
    if has_them(guest) {
        let words = ["option STRUCTURED_REPLY: the server does not have structured replies"];
        fails(
            &format!("connect --structured-replies on {URI} nbd0"),
            7,
            &words,
        );
    }
    ok(&format!("connect --structured-replies auto {URI} nbd0"));
    use_and_disconnect(64 * MIB);
}

/// A device keeps what it was connected with.
fn new_connections_are_alike(guest: &Guest) {
    if !has_them(guest) {
        return;
    }
    for (choice, is_on) in [("on", true), ("off", false)] {
        let mut server = nbdkit("memory 64M");
        ok(&format!(
            "connect --dead-conn-timeout 60 --structured-replies {choice} {URI} nbd0"
        ));
        ok(&format!("handover nbd0 {URI} --wait"));
        server.0.kill();
        let lost = wait_until(SOON, || ok("list").contains("lost"));
        assert!(lost.is_ok());
        if is_on {
            let _ = fs::remove_file(SOCKET);
            // Not one that disconnects the device when it goes.
            let _without = serve(&format!("nbdkit -f -U {SOCKET} --no-sr memory 64M"), SOCKET);
            let words = ["the server does not have structured replies"];
            fails(&format!("reconnect nbd0 {URI}"), 7, &words);
        }
        let _server = nbdkit("memory 64M");
        ok(&format!("reconnect nbd0 {URI}"));
        assert_eq!(structured(), is_on.to_string());
        use_and_disconnect(64 * MIB);
    }
}

fn what_a_server_says_is_told(guest: &Guest) {
    if !has_them(guest) {
        return;
    }
    let _server = nbdkit("--filter=error memory 64M error-pread=EPERM error-pread-rate=100%");
    let events = Daemon::start("/rnbd/rnbdctl events");
    let json = Daemon::start("/rnbd/rnbdctl events --json");
    for daemon in [&events, &json] {
        let listens = wait_until(SOON, || daemon.said().contains("listening"));
        assert!(listens.is_ok(), "{}", daemon.said());
    }
    ok(&format!("connect --structured-replies on {URI} nbd0"));
    sh("! dd if=/dev/nbd0 of=/dev/null bs=4k count=1 skip=4 iflag=direct status=none");
    let told = wait_until(SOON, || events.said().contains(" server-error connection="));
    assert!(told.is_ok(), "{}", events.said());
    let line = "\"event\":\"server-error\",\"index\":0,\"connection\":";
    let told = wait_until(SOON, || json.said().contains(line));
    assert!(told.is_ok(), "{}", json.said());
    assert!(
        events.said().contains("error=1 command=read"),
        "{}",
        events.said()
    );
    disconnect("disconnect nbd0");
}
