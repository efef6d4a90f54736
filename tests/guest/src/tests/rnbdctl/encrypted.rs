// SPDX-License-Identifier: GPL-2.0

//! Connections that the tool has encrypted by the kernel, with the servers that people use.

pub mod pki;

use std::fs;

use super::super::user_space::{fio, serve, use_device};
use super::tool::{MIB, SOCKET, Server, disconnect, fails, ok, rnbdctl, tells_more};
use crate::device::{self, SOON};
use crate::harness::{Guest, Test, say, wait_until};
use crate::programs::sh;
use crate::test;
use pki::{Issued, Pki};

pub fn tests() -> Vec<Test> {
    vec![
        test!(nbdkit_over_several_connections),
        test!(nbdkit_asks_for_a_certificate),
        test!(qemu_nbd_with_long_keys),
        test!(qemu_nbd_with_chacha20),
        test!(qemu_nbd_with_the_older_version),
        test!(nbd_server_with_the_older_version).limit_seconds(200),
        test!(servers_that_are_not_accepted),
        test!(with_and_without_tls),
        test!(only_tcp),
        test!(a_kernel_without_tls),
    ]
}

const DIR: &str = "/tmp/pki";
const URI: &str = "nbds://127.0.0.1/?tls-certificates=/tmp/pki";

/// How many connections the kernel encrypts now, in both directions.
fn encrypted() -> (u64, u64) {
    let counts = fs::read_to_string("/proc/net/tls_stat").unwrap_or_default();
    let count = |name: &str| {
        let line = counts.lines().find_map(|line| line.strip_prefix(name));
        line.map_or(0, |count| count.trim().parse().expect("a number"))
    };
    (count("TlsCurrTxSw"), count("TlsCurrRxSw"))
}

fn expect_encrypted(number: u64) {
    let right = wait_until(SOON, || encrypted() == (number, number));
    assert!(right.is_ok(), "{:?}, not {number}", encrypted());
}

/// nbdkit with TLS and with this authority's certificates.
fn nbdkit(options: &str) -> Server {
    let command = format!("nbdkit -f -p 10809 -i 127.0.0.1 --tls=require {options}");
    Server::start(&command, "10809")
}

fn use_and_disconnect() {
    use_device();
    disconnect("disconnect nbd0");
    expect_encrypted(0);
}

fn nbdkit_over_several_connections(_: &Guest) {
    let _pki = Pki::new(DIR);
    let _server = nbdkit("--tls-certificates=/tmp/pki memory 64M");
    let table = ok(&format!("exports {URI}"));
    say(&table);
    assert!(table.contains("64 MiB"), "{table}");
    assert_eq!(
        ok(&format!("connect --connections 3 {URI} nbd0")),
        "/dev/nbd0\n"
    );
    expect_encrypted(3);
    let shown = ok("show nbd0");
    say(&shown);
    if tells_more(&ok("show nbd0 --json")) {
        let protocol = "tcp+tls-1.3/aes-gcm-128";
        assert_eq!(shown.matches(protocol).count(), 3, "{shown}");
        let json = ok("list --json");
        assert_eq!(json.matches("\"version\": \"1.3\"").count(), 3, "{json}");
    }
    fio("--rw=randwrite --bsrange=512-256k --ioengine=libaio --iodepth=16");
    use_and_disconnect();
}

/// With TLS 1.3 it says so only after the client's part of the handshake is done.
fn nbdkit_asks_for_a_certificate(_: &Guest) {
    let pki = Pki::new(DIR);
    let server = nbdkit("--tls-certificates=/tmp/pki --tls-verify-peer memory 64M");
    let ca = "--tls-ca /tmp/pki/ca-cert.pem";
    let said = rnbdctl(&format!("connect {ca} nbds://127.0.0.1/ nbd0"));
    assert!([6, 7].contains(&said.status), "{said:?}");
    assert!(said.err.contains("--tls-cert"), "{said:?}");
    // The advice is the same for a server that just goes away. So it has to be the reason that the server tells.
    let reason = wait_until(SOON, || {
        server.0.said().to_lowercase().contains("certificate")
    });
    assert!(reason.is_ok(), "the server: {}", server.0.said());
    pki.issue(Issued::client(), "client");
    let identity = "--tls-cert /tmp/pki/client-cert.pem --tls-key /tmp/pki/client-key.pem";
    ok(&format!("connect {ca} {identity} nbds://127.0.0.1/ nbd0"));
    use_and_disconnect();
    ok(&format!("connect {URI} nbd0"));
    disconnect("disconnect nbd0");
}

/// GnuTLS takes the first cipher of the client that its own priorities allow. nbdkit takes AES with short
/// keys, and nbd-server TLS 1.2 with long ones.
fn qemu_nbd(version: &str, cipher: &str) {
    let _pki = Pki::new(DIR);
    sh("truncate -s 64M /tmp/rnbdctl.img");
    let priority = format!("NORMAL:-VERS-TLS-ALL:+VERS-{version}:-CIPHER-ALL:+{cipher}");
    let command = format!(
        "qemu-nbd -f raw -t -e 8 -p 10809 -b 127.0.0.1 -x disk \
         --object tls-creds-x509,id=tls,endpoint=server,dir={DIR},verify-peer=off,priority={priority} \
         --tls-creds tls /tmp/rnbdctl.img"
    );
    let _server = Server::start(&command, "10809");
    let uri = format!("nbds://127.0.0.1/disk?tls-certificates={DIR}");
    ok(&format!("connect --connections 2 {uri} nbd0"));
    expect_encrypted(2);
    use_and_disconnect();
}

fn qemu_nbd_with_long_keys(_: &Guest) {
    qemu_nbd("TLS1.3", "AES-256-GCM");
}

fn qemu_nbd_with_chacha20(_: &Guest) {
    qemu_nbd("TLS1.3", "CHACHA20-POLY1305");
}

fn qemu_nbd_with_the_older_version(_: &Guest) {
    qemu_nbd("TLS1.2", "AES-128-GCM");
}

/// nbd-server speaks TLS 1.2 only, unless it is told otherwise.
fn nbd_server_with_the_older_version(_: &Guest) {
    let pki = Pki::new(DIR);
    pki.issue(Issued::client(), "client");
    sh("truncate -s 64M /tmp/rnbdctl.img");
    let config = format!(
        "[generic]\nuser = root\ngroup = root\nlistenaddr = 127.0.0.1\nport = 10809\n\
         force_tls = true\ncertfile = {DIR}/server-cert.pem\nkeyfile = {DIR}/server-key.pem\n\
         cacertfile = {DIR}/ca-cert.pem\n\
         [export]\nexportname = /tmp/rnbdctl.img\nflush = true\nfua = true\n"
    );
    fs::write("/tmp/rnbdctl.conf", config).unwrap();
    let server = Server::start("nbd-server -n -C /tmp/rnbdctl.conf", "10809");
    // It computes for long before it greets.
    let connect = format!(
        "connect --connections 1 --connect-timeout 120 nbds://127.0.0.1/export?tls-certificates={DIR} nbd0"
    );
    let said = rnbdctl(&connect);
    assert_eq!(said.status, 0, "{said:?}; the server: {}", server.0.said());
    expect_encrypted(1);
    use_and_disconnect();
}

fn servers_that_are_not_accepted(_: &Guest) {
    let _pki = Pki::new(DIR);
    let other = Pki::new("/tmp/pki-other");
    let server = nbdkit("--tls-certificates=/tmp/pki memory 64M");
    fails(
        &format!("connect {URI}&tls-hostname=other.test nbd0"),
        6,
        &[
            "TLS handshake with 127.0.0.1:10809",
            "is for localhost, 127.0.0.1, not for other.test",
            "--tls-hostname",
        ],
    );
    ok(&format!(
        "exports {URI} --tls-hostname localhost --tls-certificates {DIR}"
    ));
    fails(
        &format!("connect {URI} --tls-certificates /tmp/pki-other nbd0"),
        6,
        &["not issued by anybody who is trusted", "--tls-ca"],
    );
    // Nobody is trusted here without being named.
    fails(
        "exports nbds://127.0.0.1/",
        1,
        &["the system has no certificates of issuers", "--tls-ca"],
    );
    drop(server);
    other.issue(Issued::server().expired(), "server");
    let _server = nbdkit("--tls-certificates=/tmp/pki-other memory 64M");
    fails(
        "exports nbds://127.0.0.1/ --tls-certificates /tmp/pki-other",
        6,
        &["the server's certificate has expired", "clock"],
    );
    assert_eq!(device::pid(0), None);
}

fn with_and_without_tls(_: &Guest) {
    let _pki = Pki::new(DIR);
    let server = nbdkit("--tls-certificates=/tmp/pki memory 64M");
    fails(
        "connect nbd://127.0.0.1/ nbd0",
        7,
        &["NBD_REP_ERR_TLS_REQD", "must begin with nbds"],
    );
    fails(
        &format!("connect nbd://127.0.0.1/ --tls-certificates {DIR} nbd0"),
        2,
        &["--tls-certificates", "without TLS"],
    );
    drop(server);
    let _server = Server(serve("nbdkit -f -p 10809 -i 127.0.0.1 memory 64M", "10809"));
    fails(
        &format!("connect {URI} nbd0"),
        7,
        &["option STARTTLS: the server refuses", "configured for TLS"],
    );
    assert_eq!(device::pid(0), None);
}

fn only_tcp(_: &Guest) {
    let _pki = Pki::new(DIR);
    let _ = fs::remove_file(SOCKET);
    let command =
        format!("nbdkit -f -U {SOCKET} --tls=require --tls-certificates={DIR} memory 64M");
    let _server = Server::start(&command, SOCKET);
    let uri = format!("nbds+unix:///?socket={SOCKET}&tls-certificates={DIR}");
    fails(
        &format!("exports {uri}"),
        1,
        &["must have a name", "--tls-hostname"],
    );
    let uri = format!("{uri}&tls-hostname=localhost");
    assert!(ok(&format!("exports {uri}")).contains("64 MiB"));
    fails(
        &format!("connect {uri} nbd0"),
        1,
        &["the kernel has TLS for TCP only"],
    );
}

/// The size comes over TLS, too.
fn a_kernel_without_tls(_: &Guest) {
    const FORBIDDEN: &str = "/etc/modprobe.d/rnbdctl-test.conf";
    let _pki = Pki::new(DIR);
    sh("truncate -s 64M /tmp/rnbdctl.img");
    let _server = nbdkit("--tls-certificates=/tmp/pki file /tmp/rnbdctl.img");
    fs::write(FORBIDDEN, "install tls /bin/false\n").unwrap();
    let gone = wait_until(SOON, || {
        let _ = crate::programs::try_sh("modprobe -r tls");
        !fs::exists("/sys/module/tls").unwrap()
    });
    let said = rnbdctl(&format!("connect {URI} nbd0"));
    fs::remove_file(FORBIDDEN).unwrap();
    assert!(gone.is_ok(), "the module stays");
    assert_eq!(said.status, 1, "{said:?}");
    for words in ["TLS in the kernel: TCP_ULP: No such file", "modprobe tls"] {
        assert!(said.err.contains(words), "{said:?}");
    }
    // The kernel finds it by itself.
    ok(&format!("connect {URI} nbd0"));
    sh("truncate -s 96M /tmp/rnbdctl.img");
    let said = ok(&format!("resize nbd0 --from-server {URI}"));
    assert_eq!(said, format!("/dev/nbd0: {} bytes\n", 96 * MIB));
    disconnect("disconnect nbd0");
}
