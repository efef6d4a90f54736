// SPDX-License-Identifier: GPL-2.0

//! The life of a device over each kind of socket that carries it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use crate::debug_kernel::patient;
use crate::device::{self, Plan, SOON, USUAL_FLAGS, assert_pattern, assert_usable, errno, pattern};
use crate::driver::Driver;
use crate::harness::{Guest, Test, say, skip, wait_until};
use crate::negotiate::{self, Export};
use crate::netlink::{Netlink, Setup};
use crate::programs::{Daemon, sh};
use crate::proto::{CAN_MULTI_CONN, Command, SET_SOCK};
use crate::server::{Server, Transport, mptcp_socket};
use crate::sys::{self, Buffer, MIB, ioctl_number, set_socket_option, socket_option};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(are_taken),
        test!(other_kinds_are_refused),
        test!(data_of_many_sizes),
        test!(many_at_a_time),
        test!(slow_readers),
        test!(room_is_heard_of_at_once),
        test!(slow_writers),
        test!(a_dead_connection_is_replaced),
        test!(the_other_connection_takes_over),
        test!(the_only_connection_dies),
        test!(the_end_comes_with_a_reply),
        test!(a_polite_end),
        test!(stuck_servers_time_out),
        test!(ending_while_much_is_unsent),
        test!(mptcp_sends_at_once),
        test!(mptcp_sockets_do_not_listen_with_our_callbacks),
        test!(nbdkit_by_vsock),
    ]
}

const KIB: usize = 1 << 10;
const SIZE: u64 = 32 << 20;

/// The kinds of sockets that the driver takes: those that this kernel has, and those that it lacks.
pub fn kinds(guest: &Guest) -> (Vec<Transport>, Vec<Transport>) {
    use Transport::{FallenBack, Mptcp, Tcp4, Tcp6, Unix, Vsock};
    let mut kinds = vec![Tcp4, Tcp6, Unix];
    if guest.expected("mptcp-and-vsock-are-taken") == Driver::Rnbd {
        kinds.extend([Mptcp, FallenBack, Vsock]);
    }
    kinds.into_iter().partition(|kind| kind.is_there())
}

/// Does `f` over each kind of socket that the driver takes and this kernel has.
fn each(guest: &Guest, f: impl Fn(Transport)) {
    let (kinds, missing) = kinds(guest);
    for kind in kinds {
        let began = Instant::now();
        f(kind);
        say(&format!("{kind:?}: {:?}", began.elapsed()));
    }
    if !missing.is_empty() {
        skip(&format!("went well, but this kernel lacks {missing:?}"));
    }
}

fn plan(kind: Transport) -> Plan {
    Plan::new(SIZE).transport(kind)
}

/// How much the socket takes of what nobody reads.
fn narrow(kind: Transport, socket: &OwnedFd) {
    if kind == Transport::Vsock {
        // What the other side lets it have is limited by its own buffer, too.
        const AF_VSOCK: i32 = libc::AF_VSOCK;
        const SO_VM_SOCKETS_BUFFER_SIZE: i32 = 0;
        let bytes = (16 * KIB as u64).to_ne_bytes();
        set_socket_option(socket, AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE, &bytes)
            .expect("SO_VM_SOCKETS_BUFFER_SIZE");
    } else {
        sockopt::set_socket_send_buffer_size(socket, 16 * KIB).expect("SO_SNDBUF");
    }
}

fn write_and_read_back(direct: &File, server: &Server, seed: u64, offset: u64, len: usize) {
    let data = Buffer::filled(len, |data| pattern(seed, offset, data));
    direct.write_all_at(&data, offset).expect("to write");
    assert_pattern(seed, offset, &server.peek(offset, len));
    let mut back = Buffer::new(len);
    direct.read_exact_at(&mut back, offset).expect("to read");
    assert_pattern(seed, offset, &back);
}

/// The kernel's own refuses them.
fn are_taken(guest: &Guest) {
    for kind in [Transport::Mptcp, Transport::FallenBack, Transport::Vsock] {
        if !kind.is_there() {
            skip(&format!("this kernel lacks {kind:?}"));
        }
        let server = Server::new();
        let netlink = Netlink::open();
        let setup = Setup::new(SIZE).index(0).sockets([server.connect(kind)]);
        let device = device::open(1, 0).unwrap();
        let socket = server.connect(kind);
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket) as u64;
        let answers = [
            netlink.connect(&setup).map(|_| ()),
            ioctl_number(&device, SET_SOCK, number).map(|_| ()),
        ];
        match guest.expected("mptcp-and-vsock-are-taken") {
            Driver::Nbd => assert_eq!(answers, [Err(Errno::INVAL); 2], "{kind:?}"),
            Driver::Rnbd => {
                assert_eq!(answers, [Ok(()); 2], "{kind:?}");
                netlink.disconnect(0).unwrap();
                super::integrity::wait_free(&netlink, 0);
            }
        }
    }
}

/// Also those that are streams, and those that may use TCP underneath.
fn other_kinds_are_refused(guest: &Guest) {
    const AF_SMC: u16 = 43;
    const AF_KCM: u16 = 41;
    const AF_TIPC: u16 = 30;
    const IPPROTO_SMC: u32 = 256;
    let smc = std::num::NonZero::new(IPPROTO_SMC).map(rustix::net::Protocol::from_raw);
    let stream = SocketType::STREAM;
    let kinds = [
        ("SCTP", AddressFamily::INET, stream, Some(ipproto::SCTP)),
        ("SMC", AddressFamily::from_raw(AF_SMC), stream, None),
        ("SMC by TCP's family", AddressFamily::INET, stream, smc),
        (
            "KCM",
            AddressFamily::from_raw(AF_KCM),
            SocketType::SEQPACKET,
            None,
        ),
        ("TIPC", AddressFamily::from_raw(AF_TIPC), stream, None),
        (
            "vsock packets",
            AddressFamily::from_raw(libc::AF_VSOCK as u16),
            SocketType::SEQPACKET,
            None,
        ),
        ("UDP", AddressFamily::INET, SocketType::DGRAM, None),
    ];
    let device = device::open(0, 0).unwrap();
    let mut refused = Vec::new();
    for (name, family, kind, protocol) in kinds {
        // Most kernels lack some of them.
        let Ok(socket) = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, protocol)
        else {
            continue;
        };
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket) as u64;
        let answer = ioctl_number(&device, SET_SOCK, number);
        assert_eq!(answer, Err(Errno::INVAL), "{name}");
        refused.push(name);
    }
    say(&format!("{refused:?}"));
    guest.expect_logged(
        "Unsupported socket: should be TCP or UNIX.",
        "unsupported socket: should be a stream of TCP, MPTCP, UNIX or vsock",
    );
    // One that is not connected is refused for that.
    if let Ok(socket) = mptcp_socket() {
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket) as u64;
        let expected = match guest.expected("mptcp-and-vsock-are-taken") {
            Driver::Nbd => Errno::INVAL,
            Driver::Rnbd => Errno::NOTCONN,
        };
        assert_eq!(ioctl_number(&device, SET_SOCK, number), Err(expected));
    }
}

fn data_of_many_sizes(guest: &Guest) {
    each(guest, |kind| {
        let mut rig = plan(kind).attach();
        let direct = rig.direct();
        for (round, len) in [4, 12, 60, 64, 68, 256, 1024, 8192].iter().enumerate() {
            write_and_read_back(&direct, &rig.server, round as u64, 4096, len * KIB);
        }
        direct.sync_all().expect("a flush");
        drop(direct);
        assert_eq!(rig.disconnect(), Ok(0), "{kind:?}");

        let link = Setup::new(SIZE).attach_over(&[kind]).settle();
        let direct = link.direct();
        for (round, len) in [4, 60, 8192].iter().enumerate() {
            write_and_read_back(&direct, &link.server, 100 + round as u64, 8192, len * KIB);
        }
        drop(direct);
        assert_eq!(link.disconnect(), Ok(()), "{kind:?}");
        link.wait_free();
    });
    assert_usable(0);
}

fn many_at_a_time(guest: &Guest) {
    each(guest, |kind| {
        let setup = Setup::new(SIZE).flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let link = setup.attach_over(&[kind; 2]).settle();
        together(&link.direct(), &link.server, 10);
        link.disconnect().expect("to disconnect");
        link.wait_free();
    });
}

/// Sixteen tasks, each within its own part.
fn together(direct: &File, server: &Server, rounds: u64) {
    const PART: u64 = 1 << 20;
    thread::scope(|scope| {
        for task in 0..16 {
            scope.spawn(move || {
                for round in 0..rounds {
                    let len = [4, 16, 64, 200][(round + task) as usize % 4] * KIB;
                    write_and_read_back(direct, server, round, task * PART, len);
                }
            });
        }
    });
}

/// The send buffer is full nearly all the time, and is emptied in small pieces.
fn slow_readers(guest: &Guest) {
    each(guest, |kind| {
        let server = Server::new();
        let socket = server.connect(kind);
        narrow(kind, &socket);
        let setup = Setup::new(SIZE).index(0).sockets([socket]);
        let netlink = Netlink::open();
        assert_eq!(netlink.connect(&setup), Ok(0));
        drop(setup);
        server.script(|conn, request| {
            if request.command != Command::Write {
                return conn.serve(request);
            }
            let mut data = Vec::new();
            while data.len() < request.len as usize {
                let piece = (request.len as usize - data.len()).min(3000);
                data.extend(conn.read_bytes(piece)?);
                if data.len() % (64 * KIB) < 3000 {
                    thread::sleep(Duration::from_millis(2));
                }
            }
            conn.store(request, &data);
            conn.send(&crate::server::ok(request))
        });
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        thread::scope(|scope| {
            for task in 0..4 {
                let (direct, server) = (&direct, &server);
                scope.spawn(move || {
                    write_and_read_back(direct, server, task, task * (4 << 20), 3 * MIB);
                });
            }
        });
        drop(direct);
        netlink.disconnect(0).expect("to disconnect");
        super::integrity::wait_free(&netlink, 0);
    });
}

/// A sender that found no room goes on as soon as there is some, not when it happens to look again.
fn room_is_heard_of_at_once(guest: &Guest) {
    each(guest, |kind| {
        let server = Server::new();
        let socket = server.connect(kind);
        narrow(kind, &socket);
        let setup = Setup::new(SIZE).index(0).timeout(20).sockets([socket]);
        let netlink = Netlink::open();
        assert_eq!(netlink.connect(&setup), Ok(0));
        drop(setup);
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        direct.read_exact_at(&mut Buffer::new(4096), 0).unwrap();
        server.script(|conn, request| {
            if request.command == Command::Write {
                // The sender has found no room and looks at nothing any more.
                thread::sleep(Duration::from_millis(300));
            }
            conn.serve(request)
        });
        let began = Instant::now();
        let written = errno(direct.write_all_at(&Buffer::new(MIB), 0));
        assert_eq!(written, Ok(()), "{kind:?}");
        let took = began.elapsed();
        assert!(took < patient(Duration::from_secs(5)), "{kind:?}: {took:?}");
        drop(direct);
        netlink.disconnect(0).expect("to disconnect");
        super::integrity::wait_free(&netlink, 0);
    });
}

/// Replies come in pieces.
fn slow_writers(guest: &Guest) {
    each(guest, |kind| {
        let mut rig = plan(kind).attach();
        let mut stored = vec![0; MIB];
        pattern(5, 0, &mut stored);
        rig.server.poke(0, &stored);
        rig.server.script(|conn, request| {
            let reply = conn.answer(request)?;
            for (index, piece) in reply.chunks(7001).enumerate() {
                if index % 16 < 2 {
                    thread::sleep(Duration::from_millis(1));
                }
                conn.send(piece)?;
            }
            Ok(())
        });
        let direct = rig.direct();
        for offset in [0, 4096, 65536] {
            for len in [4 * KIB, 64 * KIB, 512 * KIB] {
                let mut back = Buffer::new(len);
                direct.read_exact_at(&mut back, offset).unwrap();
                assert_pattern(5, offset, &back);
            }
        }
        drop(direct);
        rig.server.be_honest();
        assert_eq!(rig.disconnect(), Ok(0));
    });
}

/// The only connection ends, by the server's end or as with a crash, and a new one takes its place.
fn a_dead_connection_is_replaced(guest: &Guest) {
    each(guest, |kind| {
        let setup = Setup::new(SIZE).timeout(2).dead_timeout(20);
        let link = setup.attach_over(&[kind]).settle();
        let direct = link.direct();
        for round in 0..6 {
            // It is in the middle of a request.
            link.server.script(|conn, request| {
                if request.command == Command::Write {
                    conn.read_bytes(5000)?;
                }
                conn.stall()
            });
            link.server.forget_requests();
            let offset = round << 20;
            thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let data = Buffer::filled(MIB, |data| pattern(round, offset, data));
                    errno(direct.write_all_at(&data, offset))
                });
                link.server.wait_for_command(Command::Write);
                let news = Netlink::listen();
                if round % 2 == 0 {
                    link.server.kill();
                } else {
                    link.server.abort();
                }
                assert_eq!(news.expect_dead_link(), link.index, "{kind:?}");
                link.server.be_honest();
                let socket = link.server.connect(kind);
                let change = Setup::change(link.index).sockets([socket]);
                assert_eq!(link.netlink.reconfigure(&change), Ok(()));
                assert_eq!(writer.join().unwrap(), Ok(()), "{kind:?}");
                assert_pattern(round, offset, &link.server.peek(offset, MIB));
            });
        }
        drop(direct);
        link.disconnect().expect("to disconnect");
        link.wait_free();
    });
}

/// One of two connections ends under load; nothing fails.
fn the_other_connection_takes_over(guest: &Guest) {
    each(guest, |kind| {
        let setup = Setup::new(SIZE)
            .timeout(2)
            .flags(USUAL_FLAGS | CAN_MULTI_CONN);
        let link = setup.attach_over(&[kind; 2]).settle();
        let direct = link.direct();
        thread::scope(|scope| {
            let load = scope.spawn(|| together(&direct, &link.server, 12));
            for round in 0..2 {
                thread::sleep(Duration::from_millis(100));
                link.server.kill_connection(round + 1);
                let replaced = wait_until(patient(SOON), || {
                    let socket = link.server.connect(kind);
                    let change = Setup::change(link.index).sockets([socket]);
                    link.netlink.reconfigure(&change).expect("RECONFIGURE");
                    thread::sleep(Duration::from_millis(50));
                    link.server.living() == 2
                });
                assert!(replaced.is_ok(), "{kind:?}");
            }
            load.join().expect("the load");
        });
        drop(direct);
        link.disconnect().expect("to disconnect");
        link.wait_free();
    });
}

fn the_only_connection_dies(guest: &Guest) {
    each(guest, |kind| {
        for abort in [false, true] {
            let mut rig = plan(kind).attach();
            rig.server.script(|conn, _| conn.stall());
            thread::scope(|scope| {
                let direct = rig.direct();
                let read = scope.spawn(move || errno(direct.read_at(&mut Buffer::new(4096), 0)));
                rig.server.wait_for_command(Command::Read);
                if abort {
                    rig.server.abort();
                } else {
                    rig.server.kill();
                }
                let ended = wait_until(SOON, || read.is_finished());
                assert!(ended.is_ok(), "{kind:?}: the read hangs");
                assert_eq!(read.join().unwrap(), Err(Errno::IO));
            });
            let _ = rig.client.wait();
        }
    });
    assert_usable(0);
}

/// The server closes the connection right after its last reply.
fn the_end_comes_with_a_reply(guest: &Guest) {
    each(guest, |kind| {
        for _ in 0..4 {
            let link = Setup::new(SIZE).attach_over(&[kind]).settle();
            let news = Netlink::listen();
            link.server.script(|conn, request| {
                conn.serve(request)?;
                conn.close()
            });
            let read = errno(link.direct().read_exact_at(&mut Buffer::new(4096), 0));
            assert_eq!(read, Ok(()), "{kind:?}");
            assert_eq!(news.expect_dead_link(), link.index, "{kind:?}");
            link.disconnect().expect("to disconnect");
            link.wait_free();
        }
    });
}

/// The server hears the goodbye and sees the end.
fn a_polite_end(guest: &Guest) {
    each(guest, |kind| {
        for _ in 0..5 {
            let mut rig = plan(kind).attach();
            let direct = rig.direct();
            direct.write_all_at(&Buffer::new(64 * KIB), 0).unwrap();
            drop(direct);
            assert_eq!(rig.disconnect(), Ok(0));
            let ended = wait_until(SOON, || rig.server.living() == 0);
            assert!(ended.is_ok(), "{kind:?}: the server heard no goodbye");
        }
    });
}

fn stuck_servers_time_out(guest: &Guest) {
    each(guest, |kind| {
        let server = Server::new();
        let socket = server.connect(kind);
        narrow(kind, &socket);
        let mut client = plan(kind).timeout(1).start_over(vec![socket]);
        client.wait_ready(SIZE);
        server.script(|conn, _| conn.stall());
        let direct = device::open(0, libc::O_DIRECT).unwrap();
        let began = Instant::now();
        let write = errno(direct.write_all_at(&Buffer::new(8 * MIB), 0));
        assert_eq!(write, Err(Errno::IO), "{kind:?}");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(8), "{kind:?}: {took:?}");
        drop(direct);
        let _ = client.wait();
    });
    assert_usable(0);
}

/// The session ends at once, and so do those who wait for it.
fn ending_while_much_is_unsent(guest: &Guest) {
    sys::handle_and_ignore(libc::SIGUSR1, false);
    each(guest, |kind| {
        for killed in [false, true] {
            let server = Server::new();
            let socket = server.connect(kind);
            narrow(kind, &socket);
            let mut client = plan(kind).timeout(5).start_over(vec![socket]);
            client.wait_ready(SIZE);
            server.script(|conn, _| conn.stall());
            let direct = device::open(0, libc::O_DIRECT).unwrap();
            thread::scope(|scope| {
                let write = scope.spawn(|| errno(direct.write_all_at(&Buffer::new(8 * MIB), 0)));
                server.wait_for_command(Command::Write);
                thread::sleep(Duration::from_millis(100));
                if killed {
                    sys::signal_thread(client.tid, libc::SIGUSR1);
                    thread::sleep(Duration::from_millis(20));
                }
                ioctl_number(&direct, crate::proto::CLEAR_SOCK, 0).expect("NBD_CLEAR_SOCK");
                let ended = wait_until(2 * SOON, || write.is_finished());
                assert!(ended.is_ok(), "{kind:?}: the write hangs");
                assert_eq!(write.join().unwrap(), Err(Errno::IO));
            });
            drop(direct);
            let _ = client.wait();
            // What nbd.ko leaves to TCP comes before the end, if the server goes on reading.
            if guest.expected("given-up-writes-stay-given-up") == Driver::Rnbd {
                let ended = wait_until(SOON, || server.living() == 0);
                assert!(ended.is_ok(), "{kind:?}: the server saw no end");
            }
        }
    });
    assert_usable(0);
}

/// As with TCP, a program may have forgotten TCP_NODELAY.
fn mptcp_sends_at_once(guest: &Guest) {
    if guest.expected("mptcp-and-vsock-are-taken") == Driver::Nbd {
        return;
    }
    for kind in [Transport::Mptcp, Transport::FallenBack] {
        if !kind.is_there() {
            skip("this kernel has no MPTCP");
        }
        let server = Server::new();
        let socket = server.connect(kind);
        let netlink = Netlink::open();
        let setup = Setup::new(SIZE).index(0);
        let setup = setup.sockets([socket.try_clone().unwrap()]);
        assert_eq!(netlink.connect(&setup), Ok(0));
        let nodelay = socket_option(&socket, libc::IPPROTO_TCP, libc::TCP_NODELAY);
        assert_eq!(nodelay, Ok(1), "{kind:?}");
        netlink.disconnect(0).expect("to disconnect");
        super::integrity::wait_free(&netlink, 0);
    }
}

/// A process undoes the connection of a device and has the socket listen: what it accepts works as usual.
fn mptcp_sockets_do_not_listen_with_our_callbacks(guest: &Guest) {
    if guest.expected("mptcp-and-vsock-are-taken") == Driver::Nbd {
        return;
    }
    if !Transport::Mptcp.is_there() {
        skip("this kernel has no MPTCP");
    }
    let mut heard = 0;
    for _ in 0..30 {
        let server = Server::new();
        let ours = server.connect(Transport::Mptcp);
        let netlink = Netlink::open();
        let setup = Setup::new(SIZE)
            .index(0)
            .sockets([ours.try_clone().unwrap()]);
        assert_eq!(netlink.connect(&setup), Ok(0));
        drop(setup);
        rustix::net::connect_unspec(&ours).expect("to undo the connection");
        // Where the driver was quicker, the socket is shut down and cannot.
        if rustix::net::listen(&ours, 4).is_ok() {
            heard += u32::from(hears(&ours));
        }
        drop(server);
        let _ = netlink.disconnect(0);
        super::integrity::wait_free(&netlink, 0);
    }
    say(&format!("{heard} times something came in on it"));
    assert_usable(0);
}

/// Connects to a socket that may not listen any more, and receives. Whether that went well.
fn hears(listener: &OwnedFd) -> bool {
    let client = mptcp_socket().expect("a socket");
    let address = rustix::net::getsockname(listener).expect("an address");
    if rustix::net::connect(&client, &address).is_err() {
        return false;
    }
    rustix::io::ioctl_fionbio(listener, true).expect("FIONBIO");
    let Ok(accepted) = rustix::net::accept(listener) else {
        return false;
    };
    rustix::io::ioctl_fionbio(&accepted, false).expect("FIONBIO");
    let _ = rustix::net::send(&client, b"x", rustix::net::SendFlags::NOSIGNAL);
    let limit = Some(patient(SOON));
    sockopt::set_socket_timeout(&accepted, sockopt::Timeout::Recv, limit).expect("SO_RCVTIMEO");
    match rustix::net::recv(&accepted, &mut [0; 1][..], rustix::net::RecvFlags::empty()) {
        Ok((got, _)) => got == 1,
        Err(errno) => {
            assert_eq!(errno, Errno::CONNRESET, "a connection that hears nothing");
            false
        }
    }
}

fn nbdkit_by_vsock(guest: &Guest) {
    if !Transport::Vsock.is_there() {
        skip("this kernel has no vsock");
    }
    const PORT: u32 = 10809;
    let _server = Daemon::start(&format!("nbdkit -f --vsock -p {PORT} memory 32M"));
    let mut export = None;
    let dialled = wait_until(SOON, || {
        export = negotiate::dial_by_vsock(PORT).ok();
        export.is_some()
    });
    assert!(dialled.is_ok(), "nbdkit is not there");
    let Export {
        socket,
        size,
        flags,
    } = export.unwrap();
    let netlink = Netlink::open();
    let setup = Setup::new(size).index(0).flags(flags).sockets([socket]);
    match guest.expected("mptcp-and-vsock-are-taken") {
        Driver::Nbd => assert_eq!(netlink.connect(&setup), Err(Errno::INVAL)),
        Driver::Rnbd => {
            assert_eq!(netlink.connect(&setup), Ok(0));
            drop(setup);
            sh("mkfs.ext4 -q /dev/nbd0
                mkdir -p /tmp/mnt
                mount /dev/nbd0 /tmp/mnt
                dd if=/dev/urandom of=/tmp/data bs=1M count=16 status=none
                cp /tmp/data /tmp/mnt/data
                sync
                umount /tmp/mnt
                fsck.ext4 -fn /dev/nbd0
                mount /dev/nbd0 /tmp/mnt
                cmp /tmp/data /tmp/mnt/data
                umount /tmp/mnt");
            netlink.disconnect(0).expect("to disconnect");
            super::integrity::wait_free(&netlink, 0);
        }
    }
}
