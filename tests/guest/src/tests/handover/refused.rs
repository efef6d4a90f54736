// SPDX-License-Identifier: GPL-2.0

//! Handovers that are refused.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use neli::types::Buffer as Bytes;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::{
    BACKEND, CONNECTION, CONNECTION_GET, DEVICE, DRAIN, HANDOVER, MIB, SOCKETS, commands_on,
    connect, first_is_silent, hand_over, open, patient_ms, setup, sockets_attr, while_reading,
};
use crate::debug_kernel::{enough, patient};
use crate::device::{SOON, read_page};
use crate::harness::{Guest, Test, Until, say, wait_until};
use crate::netlink::{Attr, Netlink, Setup, attr, number};
use crate::proto::{Command, REPLY_LEN, Request};
use crate::server::Transport;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(while_another_has_not_finished),
        test!(refusals),
        test!(without_privilege),
        test!(a_new_server_that_talks_nonsense).limit_seconds(120),
    ]
}

fn while_another_has_not_finished(guest: &Guest) {
    let rnbd = open(guest);
    let link = setup(MIB).attach().settle();
    first_is_silent(&link.server);
    let again = |drain_ms| {
        let sockets = connect(&link.server, Transport::Unix, 1);
        hand_over(&rnbd, None, &sockets, drain_ms)
    };
    while_reading(&link, 2, || {
        assert_eq!(again(patient_ms(3000)), Ok(()));
        assert_eq!(again(0), Err(Errno::BUSY));
        let words = rnbd.ext_ack();
        let words = words.as_deref();
        assert_eq!(
            words,
            Some("an earlier handover of the connection has not finished")
        );
    });
    let finished = wait_until(SOON, || again(1000).is_ok());
    assert!(finished.is_ok(), "it does not finish");
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
}

/// Each leaves the device as it was.
fn refusals(guest: &Guest) {
    let rnbd = open(guest);
    let setup = setup(MIB).backend("b");
    let link = setup.attach_over(&[Transport::Tcp4, Transport::Unix]);
    let link = link.settle();
    let other = Setup::new(MIB).index(1).attach();
    let new = |count| connect(&link.server, Transport::Unix, count);
    let refused = |attrs: Vec<Attr>, errno: Errno, words: &str| {
        assert_eq!(rnbd.ask(HANDOVER, attrs).map(drop), Err(errno), "{words}");
        assert_eq!(rnbd.ext_ack().as_deref(), Some(words));
    };
    let device = || attr(DEVICE, 0u32);
    let backend = || attr(BACKEND, "b");
    let drain = || attr(DRAIN, 100u32);
    let all = |sockets: &[OwnedFd]| vec![device(), backend(), sockets_attr(sockets), drain()];
    let one = |index: u32, sockets: &[OwnedFd]| {
        let mut attrs = all(sockets);
        attrs.push(attr(CONNECTION, index));
        attrs
    };
    let raw = |bytes: &[u8]| {
        let sockets = attr(SOCKETS, Bytes::from(bytes));
        vec![device(), backend(), sockets, drain()]
    };
    let two = new(2);
    refused(vec![], Errno::INVAL, "the index of a device is needed");
    refused(
        vec![device()],
        Errno::INVAL,
        "at least one socket is needed",
    );
    refused(
        vec![device(), backend(), sockets_attr(&two)],
        Errno::INVAL,
        "the time to drain is needed (0: none)",
    );
    let numbers = "the sockets must be numbers of 32 bits";
    refused(raw(&[]), Errno::INVAL, numbers);
    refused(raw(&[1, 2, 3]), Errno::INVAL, numbers);
    let nowhere = vec![attr(DEVICE, 77u32), sockets_attr(&two), drain()];
    refused(nowhere, Errno::NODEV, "there is no such device");
    let another = "the device has another backend";
    let none = vec![device(), sockets_attr(&two), drain()];
    refused(none, Errno::INVAL, another);
    let mut wrong = all(&two);
    wrong[1] = attr(BACKEND, "c");
    refused(wrong, Errno::INVAL, another);
    let mut cut = all(&two);
    cut[1] = attr(BACKEND, Bytes::from(&b"b\0c"[..]));
    let zero = "the identifier must not have a zero byte in it";
    refused(cut, Errno::INVAL, zero);
    let single = vec![attr(DEVICE, 1u32), sockets_attr(&two[..1]), drain()];
    let words = "the server does not allow several connections (NBD_FLAG_CAN_MULTI_CONN)";
    refused(single, Errno::INVAL, words);
    let count = "there must be as many sockets as the device has connections";
    refused(all(&two[..1]), Errno::INVAL, count);
    refused(all(&new(3)), Errno::INVAL, count);
    refused(
        one(1, &two),
        Errno::INVAL,
        "one connection needs one socket",
    );
    let index = "the device has no connection with this index";
    refused(one(2, &two[..1]), Errno::INVAL, index);
    refused(one(u32::MAX, &two[..1]), Errno::INVAL, index);
    refused(
        raw(&[0xff; 8]),
        Errno::BADF,
        "a file descriptor is not open",
    );
    let file = std::fs::File::open("/proc/version").expect("a file");
    let not_a_socket = [OwnedFd::from(file), new(1).remove(0)];
    let words = "a file descriptor is not that of a socket";
    refused(all(&not_a_socket), Errno::NOTSOCK, words);
    let datagram = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
    let words = "a socket must be TCP, MPTCP, vsock or UNIX";
    refused(one(0, &[datagram.into()]), Errno::INVAL, words);
    let ended = [new(1).remove(0), link.server.connect_and_end()];
    refused(all(&ended), Errno::NOTCONN, "a socket is not connected");
    let twice = new(1).remove(0);
    let twice = [twice.try_clone().expect("dup"), twice];
    refused(all(&twice), Errno::BUSY, "a socket is in use");
    let taken = connect(&other.server, Transport::Unix, 1);
    let used = taken[0].try_clone().expect("dup");
    let change = Setup::change(1).sockets(taken);
    let news = Netlink::listen();
    other.server.kill_connection(0);
    assert_eq!(news.expect_dead_link(), other.index);
    assert_eq!(other.netlink.reconfigure(&change), Ok(()));
    let mut pair = new(1);
    pair.push(used);
    refused(all(&pair), Errno::BUSY, "a socket is in use");
    let mut short = all(&two);
    short[0] = attr(DEVICE, 0u8);
    assert_eq!(rnbd.ask(HANDOVER, short).map(drop), Err(Errno::INVAL));
    let mut unknown = all(&two);
    unknown.push(attr(9, 1u32));
    assert_eq!(rnbd.ask(HANDOVER, unknown).map(drop), Err(Errno::INVAL));
    let list = rnbd.list(CONNECTION_GET, vec![device(), attr(DRAIN, 1u32)]);
    assert_eq!(list.err(), Some(Errno::INVAL), "it is another command's");

    let connections = rnbd.list(CONNECTION_GET, vec![device()]).expect("a list");
    let numbers = |kind| {
        connections
            .iter()
            .map(move |c| number::<u32>(c, kind).unwrap())
    };
    // Alive, and never replaced.
    assert_eq!(numbers(3).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(numbers(14).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
    let requests = link.server.requests();
    let old = |request: &Request| request.connection < 2;
    let is_goodbye = |request: &Request| request.command == Command::Disconnect;
    assert!(!requests.iter().any(|r| old(r) && is_goodbye(r)));
    assert_eq!(rnbd.ask(HANDOVER, all(&two)).map(drop), Ok(()));
    drop(other);
}

fn without_privilege(guest: &Guest) {
    drop(open(guest));
    let link = setup(MIB).attach().settle();
    let sockets = connect(&link.server, Transport::Unix, 1);
    // Capabilities belong to a thread.
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut sets = capabilities(None).unwrap();
            sets.effective = CapabilitySet::all() - CapabilitySet::SYS_ADMIN;
            sets.effective &= sets.permitted;
            set_capabilities(None, sets).unwrap();
            let rnbd = Netlink::try_open_family("rnbd").expect("the family");
            hand_over(&rnbd, None, &sockets, 0)
        });
        assert_eq!(thread.join().unwrap(), Err(Errno::PERM));
    });
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
    assert_eq!(commands_on(&link.server, 1), []);
}

/// `NBD_CMD_LINK_DEAD` is not sent for a new connection that dies before it is in use: nobody need dial.
fn a_new_server_that_talks_nonsense(guest: &Guest) {
    let rnbd = open(guest);
    const COUNT: usize = 16;
    let link = setup(MIB).attach_over(&[Transport::Unix; COUNT]).settle();
    let news = Netlink::listen();
    let (mut refused, rounds) = (0, enough(20, 8));
    for _ in 0..rounds {
        let finished = wait_until(SOON, || {
            let list = rnbd.list(CONNECTION_GET, vec![]).expect("a list");
            list.len() == COUNT
        });
        assert!(finished.is_ok(), "the last handover does not finish");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        theirs.set_nonblocking(true).expect("O_NONBLOCK");
        let mut sockets = vec![OwnedFd::from(ours)];
        sockets.extend(connect(&link.server, Transport::Unix, COUNT - 1));
        let done = AtomicBool::new(false);
        let answer = thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let _ = (&theirs).write(&[0; REPLY_LEN]);
                }
            });
            let _done = Until(&done);
            hand_over(&rnbd, None, &sockets, patient_ms(5000))
        });
        if answer == Err(Errno::NOTCONN) {
            refused += 1;
            thread::sleep(patient(Duration::from_millis(20)));
        } else {
            assert_eq!(answer, Ok(()));
            // The other thread may not have come to it.
            let _ = (&theirs).write(&[0; REPLY_LEN]);
            assert_eq!(news.expect_dead_link(), 0);
        }
        assert_eq!(news.dead_link(), None, "of one that was refused");
    }
    say(&format!("{refused} of {rounds} refused"));
    assert_eq!(read_page(&link.direct(), 0), Ok(()));
}
