// SPDX-License-Identifier: GPL-2.0

//! The operators' tool, as operators use it, with either driver.

pub mod encrypted;
mod structured;
pub mod tool;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use super::user_space::use_device;
use crate::device::{self, SOON};
use crate::driver::Driver;
use crate::harness::{Guest, Test, say, wait_until};
use crate::programs::{Daemon, sh};
use crate::test;
use tool::{
    MIB, SOCKET, Server, URI, disconnect, expect_connections, fails, nbdkit, ok, rnbdctl, run,
    tells_more, use_and_disconnect,
};

pub fn tests() -> Vec<Test> {
    [of_every_kind(), encrypted::tests(), structured::tests()]
        .into_iter()
        .flatten()
        .collect()
}

fn of_every_kind() -> Vec<Test> {
    vec![
        test!(over_tcp),
        test!(over_the_second_address_of_a_name),
        test!(over_ipv6),
        test!(over_a_unix_socket_with_everything),
        test!(over_vsock),
        test!(read_only),
        test!(block_sizes_of_the_server),
        test!(a_server_without_several_connections),
        test!(an_export_that_is_refused),
        test!(lists_exports),
        test!(resizes),
        test!(in_use),
        test!(a_server_that_is_lost),
        test!(nobody_there),
        test!(backends_are_told_apart),
        test!(without_privilege),
        test!(statistics),
        test!(pages),
        test!(without_a_driver).unloaded(),
    ]
}

fn over_tcp(_: &Guest) {
    let _server = Server::start("nbdkit -f -p 10809 -i 127.0.0.1 memory 64M", "10809");
    assert_eq!(ok("connect nbd://127.0.0.1/ /dev/nbd0"), "/dev/nbd0\n");
    use_and_disconnect(64 * MIB);
    // Without a device's name an unused one is chosen.
    assert_eq!(ok("connect nbd://127.0.0.1:10809"), "/dev/nbd0\n");
    use_and_disconnect(64 * MIB);
}

/// Nothing listens at the first one.
fn over_the_second_address_of_a_name(_: &Guest) {
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    fs::write("/etc/hosts", "::1 two-addresses\n127.0.0.1 two-addresses\n").unwrap();
    let _server = Server::start("nbdkit -f -p 10809 -i 127.0.0.1 memory 64M", "10809");
    assert_eq!(ok("connect nbd://two-addresses/ nbd0"), "/dev/nbd0\n");
    fs::write("/etc/hosts", hosts).unwrap();
    use_and_disconnect(64 * MIB);
}

fn over_ipv6(_: &Guest) {
    let _server = Server::start("nbdkit -f -p 10809 -i ::1 memory 64M", "[::1]:10809");
    assert_eq!(ok("connect nbd://[::1]:10809/ 0"), "/dev/nbd0\n");
    use_and_disconnect(64 * MIB);
}

fn over_a_unix_socket_with_everything(_: &Guest) {
    let _server = nbdkit("memory 64M");
    let options =
        "--connections 3 --timeout 30 --dead-conn-timeout 20 --block-size 4096 --backend image-7";
    assert_eq!(
        ok(&format!("connect {options} {URI} /dev/nbd1")),
        "/dev/nbd1\n"
    );
    expect_connections(3);
    assert_eq!(device::sysfs(1, "queue/logical_block_size"), "4096");
    assert_eq!(device::sysfs(1, "queue/io_timeout"), "30000");
    assert_eq!(device::sysfs(1, "backend"), "image-7");
    let table = ok("list");
    say(&table);
    assert!(
        table.contains("/dev/nbd1") && table.contains("64 MiB"),
        "{table}"
    );
    assert!(!table.contains("/dev/nbd0"), "{table}");
    assert!(ok("list --all").contains("/dev/nbd0"));
    say(&ok("show nbd1"));
    let json = ok("list --json");
    for part in [
        "\"index\": 1,",
        "\"device\": \"/dev/nbd1\"",
        "\"state\": \"connected\"",
        "\"size\": 67108864",
        "\"block_size\": 4096",
        "\"backend\": \"image-7\"",
        "\"read_only\": false",
    ] {
        assert!(json.contains(part), "{part} is not in {json}");
    }
    if tells_more(&json) {
        for part in [
            "\"connections\": 3,",
            "\"alive\": 3,",
            "\"timeout_ms\": 30000",
            "\"dead_conn_timeout_ms\": 20000",
            "\"interface\": \"netlink\"",
            "\"peer\": \"/tmp/rnbdctl.sock\"",
            "\"flush\",",
        ] {
            assert!(json.contains(part), "{part} is not in {json}");
        }
        assert!(ok("show nbd1").contains("/tmp/rnbdctl.sock"));
    }
    // The times that connections have been idle differ.
    let other = ok("show /dev/nbd1 --json");
    assert_eq!(other.lines().count(), json.lines().count(), "{other}");
    ok("disconnect 1 --backend image-7");
}

/// Where only sysfs tells, the session is all that can be seen.
fn a_server_that_is_lost(_: &Guest) {
    let mut server = nbdkit("memory 64M");
    ok(&format!("connect --dead-conn-timeout 60 {URI} nbd0"));
    use_device();
    server.0.kill();
    let expected = match tells_more(&ok("list --json")) {
        true => "\"state\": \"lost\"",
        false => "\"state\": \"connected\"",
    };
    let told = wait_until(SOON, || ok("list --json").contains(expected));
    assert!(told.is_ok(), "{}", ok("list --json"));
    say(&ok("show nbd0"));
    disconnect("disconnect nbd0");
}

fn over_vsock(guest: &Guest) {
    let connect = "connect nbd+vsock://1:10809/ nbd0";
    if guest.expected("takes-mptcp-and-vsock") == Driver::Nbd {
        fails(connect, 1, &["nbd.ko takes no vsock sockets"]);
        return;
    }
    sh("modprobe vsock_loopback");
    let server = Server(Daemon::start("nbdkit -f --vsock -p 10809 memory 64M"));
    let connected = wait_until(SOON * 6, || rnbdctl(connect).status == 0);
    assert!(connected.is_ok(), "{}", server.0.said());
    use_and_disconnect(64 * MIB);
}

fn read_only(_: &Guest) {
    let _server = nbdkit("memory 64M");
    ok(&format!("connect --read-only {URI} nbd0"));
    assert_eq!(device::sysfs(0, "ro"), "1");
    let json = ok("show 0 --json");
    assert!(json.contains("\"read_only\": true"), "{json}");
    disconnect("disconnect nbd0");
}

/// Larger requests than the server takes are not sent.
fn block_sizes_of_the_server(_: &Guest) {
    let _server = nbdkit(
        "--filter=blocksize-policy memory 64M blocksize-minimum=4096 blocksize-preferred=4096 \
         blocksize-maximum=65536 blocksize-error-policy=error",
    );
    fails(
        &format!("connect --block-size 512 {URI} nbd0"),
        2,
        &["block size: the server takes no blocks below 4096 bytes"],
    );
    ok(&format!("connect {URI} nbd0"));
    assert_eq!(device::sysfs(0, "queue/logical_block_size"), "4096");
    assert_eq!(device::sysfs(0, "queue/max_sectors_kb"), "64");
    sh(
        "dd if=/dev/zero of=/dev/nbd0 bs=4M count=4 oflag=direct status=none
        dd if=/dev/nbd0 of=/dev/null bs=4M count=4 iflag=direct status=none",
    );
    use_and_disconnect(64 * MIB);
}

fn a_server_without_several_connections(_: &Guest) {
    let _server = nbdkit("--filter=multi-conn memory 64M multi-conn-mode=disable");
    fails(
        &format!("connect --connections 2 {URI} nbd0"),
        7,
        &["number of connections", "NBD_FLAG_CAN_MULTI_CONN"],
    );
    ok(&format!("connect {URI} nbd0"));
    expect_connections(1);
    use_and_disconnect(64 * MIB);
}

/// A server that knows its export's name, and says what it misses.
fn qemu_nbd() -> Server {
    let _ = fs::remove_file(SOCKET);
    sh("truncate -s 64M /tmp/rnbdctl.img");
    let command =
        format!("qemu-nbd -f raw -t -e 8 -k {SOCKET} -x disk -D the-description /tmp/rnbdctl.img");
    Server::start(&command, SOCKET)
}

fn an_export_that_is_refused(_: &Guest) {
    let _server = qemu_nbd();
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={SOCKET}");
    let words = [
        "option GO: the server refuses: it has no such export (NBD_REP_ERR_UNKNOWN)",
        "nope",
        "rnbdctl exports",
    ];
    fails(&format!("connect {} nbd0", uri("nope")), 7, &words);
    assert_eq!(device::pid(0), None);
    ok(&format!("connect {} nbd0", uri("disk")));
    use_and_disconnect(64 * MIB);
}

fn lists_exports(_: &Guest) {
    let server = qemu_nbd();
    let table = ok(&format!("exports {URI}"));
    say(&table);
    for words in ["\"disk\"", "64 MiB", "the-description", "flush"] {
        assert!(table.contains(words), "{table}");
    }
    let json = ok(&format!("exports --json {URI}"));
    assert!(json.contains("\"size\": 67108864"), "{json}");
    drop(server);

    sh(
        "mkdir -p /tmp/exports && truncate -s 1M /tmp/exports/a && truncate -s 2M '/tmp/exports/b c'",
    );
    let _server = nbdkit("file dir=/tmp/exports");
    let table = ok(&format!("exports {URI}"));
    for words in ["\"a\"", "1 MiB", "\"b c\"", "2 MiB"] {
        assert!(table.contains(words), "{table}");
    }
    ok(&format!("connect nbd+unix:///b%20c?socket={SOCKET} nbd0"));
    assert_eq!(device::sysfs(0, "size"), "4096");
    disconnect("disconnect nbd0");
}

fn resizes(_: &Guest) {
    sh("truncate -s 64M /tmp/rnbdctl.img");
    let _server = nbdkit("file /tmp/rnbdctl.img");
    ok(&format!("connect --backend image {URI} nbd0"));
    sh("truncate -s 96M /tmp/rnbdctl.img");
    let said = ok(&format!("resize nbd0 --from-server {URI}"));
    assert_eq!(said, "/dev/nbd0: 100663296 bytes\n");
    assert_eq!(device::sysfs(0, "size"), (96 * MIB / 512).to_string());
    ok("resize nbd0 67108864");
    assert_eq!(device::sysfs(0, "size"), (64 * MIB / 512).to_string());
    disconnect("disconnect nbd0");
    fails("resize nbd0 4096", 5, &["/dev/nbd0: it is not connected"]);
}

fn in_use(_: &Guest) {
    let _server = nbdkit("memory 64M");
    ok(&format!("connect {URI} nbd0"));
    fails(
        &format!("connect {URI} nbd0"),
        3,
        &["connecting the device", "in use"],
    );
    use_and_disconnect(64 * MIB);
}

fn nobody_there(_: &Guest) {
    let connect = "connect nbd://127.0.0.1:10999/ nbd0";
    let step = "connecting to 127.0.0.1:10999: Connection refused";
    fails(connect, 6, &[step, "Is the server running?"]);
    fails(
        "exports nbd+unix:///?socket=/tmp/nothing",
        6,
        &["connecting to /tmp/nothing"],
    );
    fails(
        "connect nbd://no.such.host.invalid/ nbd0",
        6,
        &["resolving no.such.host.invalid"],
    );
    // It accepts connections, and says nothing.
    let _ = fs::remove_file(SOCKET);
    let _listener = UnixListener::bind(SOCKET).unwrap();
    fails(
        &format!("connect --connect-timeout 0.3 {URI} nbd0"),
        6,
        &["greeting of /tmp/rnbdctl.sock: the server does not answer in time"],
    );
}

fn backends_are_told_apart(_: &Guest) {
    let _server = nbdkit("memory 64M");
    ok(&format!("connect --backend image-a {URI} nbd0"));
    fails("disconnect nbd0 --backend image-b", 5, &["image-a"]);
    assert!(device::pid(0).is_some());
    disconnect("disconnect nbd0 --backend image-a");
    fails("disconnect nbd0", 5, &["it is not connected"]);
    fails("disconnect nbd77", 5, &["there is no such device"]);
    fails("show nbd77", 5, &["there is no such device"]);
}

fn without_privilege(_: &Guest) {
    let _server = nbdkit("memory 64M");
    fs::set_permissions(SOCKET, PermissionsExt::from_mode(0o777)).unwrap();
    let nobody = |arguments: &str| {
        let line =
            format!("--reuid 65534 --clear-groups --inh-caps=-all /rnbd/rnbdctl {arguments}");
        run("setpriv", &line.split_whitespace().collect::<Vec<_>>())
    };
    ok(&format!("connect {URI} nbd0"));
    for arguments in [
        "list",
        "list --json",
        "show nbd0",
        "stats",
        "watch --once --interval 0.1",
    ] {
        let said = nobody(arguments);
        assert_eq!(said.status, 0, "{arguments}: {said:?}");
        assert!(said.out.contains("nbd0"), "{arguments}: {said:?}");
    }
    for arguments in [
        "disconnect nbd0",
        "resize nbd0 4096",
        &format!("connect {URI} nbd1"),
    ] {
        let said = nobody(arguments);
        assert_eq!(said.status, 4, "{arguments}: {said:?}");
        assert!(said.err.contains("CAP_SYS_ADMIN"), "{said:?}");
    }
    use_and_disconnect(64 * MIB);
}

fn statistics(guest: &Guest) {
    let _server = nbdkit("memory 64M");
    ok(&format!("connect --backend a\"b\\c {URI} nbd0"));
    sh("dd if=/dev/zero of=/dev/nbd0 bs=64k count=16 oflag=direct status=none");
    let text = ok("stats");
    for line in [
        format!("rnbd_driver_info{{driver=\"{}\"}} 1", guest.driver.name()),
        "# TYPE rnbd_device_size_bytes gauge".into(),
        "rnbd_device_size_bytes{device=\"nbd0\"} 67108864".into(),
        "rnbd_device_state{device=\"nbd0\",state=\"connected\"} 1".into(),
        "# TYPE rnbd_device_requests_total counter".into(),
        "rnbd_device_requests_total{device=\"nbd0\",kind=\"write\"} 16".into(),
        "rnbd_device_bytes_total{device=\"nbd0\",kind=\"write\"} 1048576".into(),
        "rnbd_device_in_flight{device=\"nbd0\"} 0".into(),
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in {text}"
        );
    }
    assert!(text.contains("backend=\"a\\\"b\\\\c\""), "{text}");
    // Each line is a comment or a sample.
    for line in text.lines() {
        let (name, value) = line.rsplit_once(' ').expect("two words");
        let sample = name.ends_with('}') && value.parse::<f64>().is_ok();
        assert!(line.starts_with("# ") || sample, "{line}");
    }
    let table = ok("watch --once --interval 0.2");
    say(&table);
    assert!(
        table.starts_with("DEVICE") && table.contains("nbd0"),
        "{table}"
    );
    if guest.driver == Driver::Rnbd {
        let age = "rnbd_connection_oldest_request_seconds{device=\"nbd0\",connection=\"0\"} 0\n";
        assert!(text.contains(age), "{text}");
        assert!(ok("show nbd0").contains("OLDEST"));
    }
    disconnect("disconnect nbd0");
    assert_eq!(
        ok("watch --once --interval 0.1"),
        "no device is connected\n"
    );
}

fn pages(_: &Guest) {
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(&format!("completion {shell}")).contains("rnbdctl"));
    }
    let page = ok("man");
    assert!(
        page.contains(".TH rnbdctl 8") && page.contains("Exit status"),
        "{page}"
    );
    assert!(ok("man connect").contains("dead\\-conn\\-timeout"));
    assert!(ok("--version").starts_with("rnbdctl "));
}

/// Looking does not load one. Connecting does: the kernel runs modprobe for it.
fn without_a_driver(_: &Guest) {
    for arguments in [
        "list",
        "show 0",
        "stats",
        "watch --once",
        "disconnect nbd0",
        "resize nbd0 512",
    ] {
        fails(
            arguments,
            5,
            &["neither rnbd nor nbd.ko is loaded", "modprobe nbd"],
        );
    }
}
