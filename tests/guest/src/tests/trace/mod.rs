// SPDX-License-Identifier: GPL-2.0

//! Trace events.

mod connections;

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::device::{Plan, SOON, USUAL_FLAGS, errno, read_page};
use crate::driver::Driver;
use crate::harness::{Guest, Test, Until, wait_until};
use crate::netlink::{Netlink, Setup};
use crate::proto::{BLKDISCARD, CAN_MULTI_CONN, CLEAR_SOCK, Command, Request};
use crate::server::Transport;
use crate::sys::{Buffer, ioctl_number, ioctl_pointer};
use crate::test;
use crate::tracefs::Tracefs;

pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        test!(which_there_are),
        test!(of_the_driver_in_c_have_its_fields),
        test!(of_a_write_and_a_read),
        test!(of_each_kind_of_request),
        test!(of_several_connections),
        test!(of_a_request_that_is_refused),
        test!(of_a_slow_server),
        test!(of_a_request_that_gets_no_reply),
        test!(switched_on_while_a_request_is_in_flight),
        test!(switched_on_and_off_under_load),
        test!(on_when_the_module_is_unloaded).unloaded(),
        test!(histograms_of_the_guide),
    ];
    tests.extend(connections::tests());
    tests
}

const MIB: u64 = 1 << 20;

const OF_BOTH: [&str; 5] = [
    "nbd_header_received",
    "nbd_header_sent",
    "nbd_payload_received",
    "nbd_payload_sent",
    "nbd_send_request",
];

const COMMON: &str = "format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

";

const TRANSPORT: &str = "\tfield:struct request * req;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 handle;\toffset:16;\tsize:8;\tsigned:0;

print fmt: \"nbd transport event: request %p, handle 0x%016llx\", REC->req, REC->handle";

const SEND_REQUEST: &str =
    "\tfield:struct nbd_request * nbd_request;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 dev_index;\toffset:16;\tsize:8;\tsigned:0;
\tfield:struct request * request;\toffset:24;\tsize:8;\tsigned:0;

print fmt: \"nbd%lld: request %p\", REC->dev_index, REC->request";

fn which_there_are(guest: &Guest) {
    let tracefs = Tracefs::new();
    let mut wanted = OF_BOTH.to_vec();
    if guest.expected("more-trace-events") == Driver::Rnbd {
        wanted.extend([
            "nbd_connection_born",
            "nbd_connection_dead",
            "nbd_connection_replaced",
            "nbd_request_done",
        ]);
    }
    wanted.sort();
    assert_eq!(tracefs.events(), wanted);
}

fn of_the_driver_in_c_have_its_fields(_: &Guest) {
    let tracefs = Tracefs::new();
    for event in OF_BOTH {
        let fields = match event {
            "nbd_send_request" => SEND_REQUEST,
            _ => TRANSPORT,
        };
        let wanted = format!("name: {event}\n{COMMON}{fields}");
        assert_eq!(tracefs.format(event), wanted);
    }
}

/// What was traced of the request with this cookie: the names of the events, in order, and the request.
fn story(tracefs: &Tracefs, request: &Request) -> (Vec<String>, String) {
    let cookie = format!("handle {:#018x}", request.cookie);
    let lines = tracefs.lines();
    let ours = lines.iter().filter(|(_, text)| text.contains(&cookie));
    let names = ours.clone().map(|(name, _)| name.clone()).collect();
    let mut pointers: Vec<_> = ours
        .map(|(_, text)| {
            let (_, rest) = text.split_once("request ").expect("a request");
            rest.split(',').next().unwrap().to_owned()
        })
        .collect();
    pointers.dedup();
    assert_eq!(pointers.len(), 1, "{lines:?}");
    (names, pointers.remove(0))
}

fn of_a_write_and_a_read(_: &Guest) {
    let tracefs = Tracefs::new();
    let rig = Plan::new(MIB).attach();
    let device = rig.direct();
    // The reply comes when the request has been sent for long.
    rig.server.script(|conn, request| {
        thread::sleep(Duration::from_millis(20));
        conn.serve(request)
    });
    OF_BOTH.map(|event| tracefs.switch(Some(event), true));
    device
        .write_all_at(&Buffer::new(8192), 40960)
        .expect("to write");
    let mut data = Buffer::new(4096);
    device.read_exact_at(&mut data, 0x8_0000).expect("to read");
    tracefs.switch(None, false);
    for (command, offset) in [(Command::Write, 40960), (Command::Read, 0x8_0000)] {
        let requests = rig.server.requests_of(command);
        let request = requests.iter().find(|r| r.offset == offset);
        let (names, pointer) = story(&tracefs, request.expect("the request"));
        let order = [
            "nbd_header_sent",
            "nbd_payload_sent",
            "nbd_header_received",
            "nbd_payload_received",
        ];
        assert_eq!(names, order);
        let begun = format!("nbd0: request {pointer}");
        assert!(tracefs.lines_of("nbd_send_request").contains(&begun));
    }
}

/// An event `nbd_request_done`.
#[derive(Clone, Debug)]
struct Done {
    op: String,
    connection: i64,
    length: i64,
    offset: i64,
    error: i64,
    server_error: i64,
    queue_us: i64,
    wire_us: i64,
}

fn parse_done(text: &str) -> Done {
    let (disk, rest) = text.split_once(": connection ").expect("a connection");
    assert_eq!(disk, "nbd0");
    let is_number = |c: char| c.is_ascii_digit() || c == '-';
    let numbers: Vec<i64> = rest
        .split(|c| !is_number(c))
        .filter_map(|number| number.parse().ok())
        .collect();
    let [
        connection,
        length,
        offset,
        error,
        server_error,
        queue_us,
        wire_us,
    ] = numbers[..]
    else {
        panic!("{text:?}");
    };
    let (_, op) = rest.split_once(": ").expect("an operation");
    Done {
        op: op.split(" of ").next().unwrap().to_owned(),
        connection,
        length,
        offset,
        error,
        server_error,
        queue_us,
        wire_us,
    }
}

fn all_done(tracefs: &Tracefs) -> Vec<Done> {
    let lines = tracefs.lines_of("nbd_request_done");
    lines.iter().map(|text| parse_done(text)).collect()
}

/// The end of the one request for `offset`, which may be traced a little later than a program hears of it.
fn done_at(tracefs: &Tracefs, offset: i64) -> Done {
    let mut found = Vec::new();
    let done = wait_until(SOON, || {
        found = all_done(tracefs);
        found.retain(|done| done.offset == offset);
        !found.is_empty()
    });
    assert!(done.is_ok(), "no end of a request at {offset}");
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Traces the ends of requests.
fn trace_ends() -> Tracefs {
    let tracefs = Tracefs::new();
    tracefs.switch(Some("nbd_request_done"), true);
    tracefs
}

const SECOND_US: i64 = 1_000_000;

fn of_each_kind_of_request(_: &Guest) {
    let rig = Plan::new(MIB).block_size(4096).attach();
    let device = rig.direct();
    let tracefs = trace_ends();
    device
        .write_all_at(&Buffer::new(8192), 4096)
        .expect("to write");
    let mut data = Buffer::new(4096);
    device.read_exact_at(&mut data, 16384).expect("to read");
    ioctl_pointer(&device, BLKDISCARD, &mut [32768, 65536_u64]).expect("to discard");
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&device, zero, 131_072, 4096).expect("to zero");
    device.sync_all().expect("to flush");
    let wanted = [
        ("write", 4096, 8192),
        ("read", 16384, 4096),
        ("trim/discard", 32768, 65536),
        ("write-zeroes", 131_072, 4096),
        ("flush", 0, 0),
    ];
    for (op, offset, length) in wanted {
        let done = done_at(&tracefs, offset);
        assert_eq!((&*done.op, done.length), (op, length));
        assert_eq!((done.connection, done.error, done.server_error), (0, 0, 0));
        assert!((0..SECOND_US * 60).contains(&done.queue_us), "{done:?}");
        assert!((0..SECOND_US * 60).contains(&done.wire_us), "{done:?}");
    }
}

fn of_several_connections(_: &Guest) {
    let setup = Setup::new(MIB).index(0).flags(USUAL_FLAGS | CAN_MULTI_CONN);
    let link = setup.attach_over(&[Transport::Unix; 2]).settle();
    let news = Netlink::listen();
    link.server.kill_connection(0);
    assert_eq!(news.expect_dead_link(), 0);
    let tracefs = trace_ends();
    assert_eq!(read_page(&link.direct(), 4096), Ok(()));
    assert_eq!(done_at(&tracefs, 4096).connection, 1);
}

fn of_a_request_that_is_refused(_: &Guest) {
    let rig = Plan::new(MIB).attach();
    let device = rig.direct();
    rig.server.script(|conn, request| match request.offset {
        4096 => conn.refuse(request, 28),
        8192 => conn.refuse(request, 1),
        _ => conn.serve(request),
    });
    let tracefs = trace_ends();
    let written = errno(device.write_all_at(&Buffer::new(4096), 4096));
    assert_eq!(written, Err(Errno::NOSPC));
    assert_eq!(read_page(&device, 8192), Err(Errno::REMOTEIO));
    assert_eq!(read_page(&device, 12288), Ok(()));
    for (offset, error, server_error) in [(4096, -28, 28), (8192, -121, 1), (12288, 0, 0)] {
        let done = done_at(&tracefs, offset);
        assert_eq!((done.error, done.server_error), (error, server_error));
    }
}

/// The time on the wire is the server's, and that in the queue is not.
fn of_a_slow_server(_: &Guest) {
    let rig = Plan::new(MIB).transport(Transport::Tcp4).attach();
    let device = rig.direct();
    rig.server.script(|conn, request| {
        thread::sleep(Duration::from_millis(500));
        conn.serve(request)
    });
    let tracefs = trace_ends();
    assert_eq!(read_page(&device, 4096), Ok(()));
    let done = done_at(&tracefs, 4096);
    assert!(done.wire_us + done.queue_us >= 500_000, "{done:?}");
    assert!(done.wire_us > done.queue_us, "{done:?}");
    assert!(done.wire_us < SECOND_US * 60, "{done:?}");
}

fn of_a_request_that_gets_no_reply(_: &Guest) {
    // The session is ended.
    let rig = Plan::new(MIB).attach();
    let device = rig.direct();
    rig.server.script(|conn, _| conn.stall());
    let tracefs = trace_ends();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&device, 4096));
        rig.server.wait_for_command(Command::Read);
        assert_eq!(ioctl_number(&device, CLEAR_SOCK, 0), Ok(0));
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    let done = done_at(&tracefs, 4096);
    assert_eq!((done.connection, done.error, done.server_error), (0, -5, 0));
    drop((device, rig));

    // The request is to be sent again, and there is no connection for it.
    tracefs.clear();
    let mut rig = Plan::new(MIB).attach();
    let device = rig.direct();
    rig.server.script(|conn, _| conn.stall());
    tracefs.clear();
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&device, 4096));
        rig.server.wait_for_command(Command::Read);
        rig.server.kill();
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    rig.client.wait_lost();
    let done = done_at(&tracefs, 4096);
    assert_eq!(
        (done.connection, done.error, done.server_error),
        (-1, -5, 0)
    );
    assert_eq!((done.queue_us, done.wire_us), (0, 0));
}

/// What is not known of such a request is not told, not even of an earlier one with the same tag.
fn switched_on_while_a_request_is_in_flight(_: &Guest) {
    let rig = Plan::new(MIB).attach();
    let device = rig.direct();
    let tracefs = trace_ends();
    for offset in (0..256).map(|page| page * 4096) {
        assert_eq!(read_page(&device, offset), Ok(()));
    }
    tracefs.switch(None, false);
    static MAY_REPLY: AtomicBool = AtomicBool::new(false);
    MAY_REPLY.store(false, Ordering::Relaxed);
    rig.server.script(|conn, request| {
        let allowed = || MAY_REPLY.load(Ordering::Relaxed);
        wait_until(SOON, allowed).expect("to be allowed to reply");
        conn.refuse(request, 5)
    });
    thread::scope(|scope| {
        let _allowed = Until(&MAY_REPLY);
        let reader = scope.spawn(|| read_page(&device, 4096));
        rig.server.forget_requests();
        rig.server.wait_for_command(Command::Read);
        tracefs.clear();
        tracefs.switch(Some("nbd_request_done"), true);
        MAY_REPLY.store(true, Ordering::Relaxed);
        assert_eq!(reader.join().unwrap(), Err(Errno::IO));
    });
    let done = done_at(&tracefs, 4096);
    assert_eq!((&*done.op, done.length, done.error), ("read", 4096, -5));
    assert_eq!((done.connection, done.server_error), (-1, 0));
    assert_eq!((done.queue_us, done.wire_us), (0, 0));
}

fn switched_on_and_off_under_load(guest: &Guest) {
    let rig = Plan::new(MIB).connections(2).attach();
    let device = rig.direct();
    let tracefs = Tracefs::new();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = Until(&is_over);
        for reader in 0..2 {
            let (device, is_over) = (&device, &is_over);
            scope.spawn(move || {
                for page in (reader * 31..).map(|page| page % 256) {
                    assert_eq!(read_page(device, page * 4096), Ok(()));
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        for round in 0..16 {
            tracefs.switch(None, round % 2 == 0);
            thread::sleep(Duration::from_millis(10));
        }
    });
    let lines = tracefs.lines();
    let traced = |name| lines.iter().filter(|line| line.0 == name).count();
    for event in OF_BOTH {
        assert!(traced(event) > 10, "{} of {event}", traced(event));
    }
    if guest.driver == Driver::Nbd {
        return;
    }
    let done = all_done(&tracefs);
    assert!(done.len() > 10, "{} requests have ended", done.len());
    for done in done {
        assert_eq!((&*done.op, done.length, done.error), ("read", 4096, 0));
        assert!((0..SECOND_US * 60).contains(&done.queue_us), "{done:?}");
        assert!((0..SECOND_US * 60).contains(&done.wire_us), "{done:?}");
    }
}

fn on_when_the_module_is_unloaded(guest: &Guest) {
    let tracefs = Tracefs::new();
    assert_eq!(tracefs.events().len(), 0);
    for _ in 0..3 {
        guest.driver.load("nbds_max=1").expect("to load it");
        tracefs.switch(None, true);
        let rig = Plan::new(MIB).attach();
        assert_eq!(read_page(&rig.direct(), 4096), Ok(()));
        drop(rig);
        assert_eq!(guest.driver.unload(), Ok(()));
        assert_eq!(tracefs.events().len(), 0);
    }
}

/// The lines of the guide, as they are there.
fn histograms_of_the_guide(_: &Guest) {
    const GUIDE: &str = include_str!("../../../../../Documentation/admin-guide.rst");
    let tracefs = Tracefs::new();
    let rig = Plan::new(MIB).connections(2).attach();
    let device = rig.direct();
    rig.server.script(|conn, request| match request.offset {
        4096 => conn.refuse(request, 28),
        _ => conn.serve(request),
    });
    let triggers: Vec<_> = GUIDE
        .lines()
        .filter_map(|line| line.trim().strip_prefix("# echo 'hist:"))
        .map(|line| line.split('\'').next().unwrap())
        .collect();
    assert_eq!(triggers.len(), 3, "{triggers:?}");
    let mut histograms = Vec::new();
    for trigger in triggers {
        tracefs.trigger("nbd_request_done", &format!("hist:{trigger}"));
        for page in 0..20 {
            let _ = read_page(&device, page * 4096);
        }
        histograms.push(tracefs.histogram("nbd_request_done"));
        // A module must not be unloaded with a trigger: the kernel warns.
        tracefs.trigger("nbd_request_done", &format!("!hist:{trigger}"));
    }
    let [by_connection, by_time, refused] = &histograms[..] else {
        panic!("{histograms:?}");
    };
    let has = |lines: &[String], what: &str| lines.iter().any(|line| line.contains(what));
    assert!(has(by_connection, "disk: nbd0 "), "{by_connection:?}");
    assert!(has(by_connection, "wire_us: "), "{by_connection:?}");
    assert!(has(by_time, "{ wire_us: ~ 2^"), "{by_time:?}");
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(has(refused, "server_error:         28"), "{refused:?}");
}
