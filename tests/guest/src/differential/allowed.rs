// SPDX-License-Identifier: GPL-2.0

//! The differences that are meant, as narrow as can be told from the operations that came before.
//! Each has its reason in `differences.toml`, under the name that is given here.

use crate::netlink;
use crate::proto::READ_ONLY;

use super::operations::{Attribute, DEVICES, Dev, Manner, Op, Request, Socket};
use super::stage::{Step, Transcript};

/// What is seen, with nbd.ko and with rnbd.
pub type Difference<'a> = (&'a str, &'a str, &'a str);

/// The difference that explains what was seen after the operation `at`, if there is one. From
/// there on the devices are in different states, and are not compared.
pub fn meant(
    sequence: &[Op],
    at: usize,
    differs: &[Difference<'_>],
    nbd: &Transcript,
) -> Option<&'static str> {
    let past = Past::of(sequence, at, nbd);
    let any = |explains: &dyn Fn(&Past, &Difference<'_>) -> bool| {
        differs.iter().any(|difference| explains(&past, difference))
    };
    if any(&keeps_meaning) {
        return Some("server-errors-keep-their-meaning");
    }
    if any(&does_not_hang) {
        return Some("requests-of-a-lost-connection-do-not-hang");
    }
    if any(&writes_as_agreed) {
        return Some("flags-stay-as-agreed");
    }
    if any(&decides_anew) {
        return Some("read-only-ends-with-the-session");
    }
    if any(&fits_the_page_cache) {
        return Some("large-blocks-work-in-the-page-cache");
    }
    if any(&must_be_connected) {
        return Some("sockets-must-be-connected");
    }
    let both_refuse = |one: &Difference<'_>| {
        one.0 != "answer" || (one.1.starts_with("Err") && one.2.starts_with("Err"))
    };
    if is_malformed(past.op.as_ref()) && differs.iter().all(both_refuse) {
        return Some("malformed-messages-change-nothing");
    }
    if any(&|past, difference| takes_an_open_device(past, difference, &nbd[at])) {
        return Some("connect-takes-an-open-device");
    }
    if sets_up_a_lost_device(&past) || any(&keeps_its_size) {
        return Some("a-lost-device-starts-again");
    }
    if past.forgot_sockets.contains(&true) {
        return Some("clear-sock-forgets-sockets");
    }
    if past.signalled {
        return Some("signals-leave-the-session");
    }
    None
}

/// The name of a single difference that is meant, and changes nothing else.
pub fn ignored(
    sequence: &[Op],
    at: usize,
    difference: &Difference<'_>,
    nbd: &Transcript,
) -> Option<&'static str> {
    let past = Past::of(sequence, at, nbd);
    let (key, right, other) = *difference;
    if ends_unasked(sequence, at, difference, nbd) {
        return Some("an-unasked-end-is-epipe");
    }
    let (device, what) = key.split_once(' ').unwrap_or_default();
    let seen = |what: &str| value(&nbd[at], &format!("{device} {what}"));
    let without_timeout = matches!(seen("debugfs timeout"), "-" | "0");
    match what {
        "debugfs flags" if other.replace("|NBD_FLAG_CAN_MULTI_CONN", "") == right => {
            Some("debugfs-shows-connections")
        }
        "debugfs flags" if past.flags_while_running => Some("flags-stay-as-agreed"),
        "debugfs timeout" | "queue/io_timeout" if past.long_timeout => {
            Some("long-timeouts-are-infinite")
        }
        "queue/io_timeout" if other == "30000" && without_timeout => {
            Some("timeouts-end-with-the-connection")
        }
        "ro" if (right, other) == ("1", "0") => Some("read-only-ends-with-the-session"),
        "uevents" if without_read_only(right) == without_read_only(other) => {
            Some("read-only-ends-with-the-session")
        }
        "queue/nr_requests" if (right, other) == ("256", "128") => Some("no-scheduler-by-default"),
        _ => None,
    }
}

fn value<'a>(step: &'a Step, what: &str) -> &'a str {
    let found = step.iter().find(|(key, _)| key == what);
    found.map_or("", |(_, value)| value.as_str())
}

/// What of the operations so far a difference can depend on.
#[derive(Default)]
struct Past {
    op: Option<Op>,
    /// The devices that the files are of.
    files: [Option<Dev>; 3],
    /// Devices that were given a socket which was then taken away, before they were started.
    added: [bool; 3],
    started: [bool; 3],
    /// Devices for which something was set by ioctl, until the last file is closed.
    set_up: [bool; 3],
    /// Devices that have forgotten their sockets with one of the drivers, until the last file is closed.
    forgot_sockets: [bool; 3],
    flags_while_running: bool,
    /// Some device has had blocks of more than a sector.
    larger_blocks: bool,
    /// A process in NBD_DO_IT has had a signal.
    signalled: bool,
    long_timeout: bool,
    /// Devices whose server has ended connections, or had ended one before it was passed.
    lost: [bool; 3],
    /// Devices that were disconnected, or whose sockets were dropped.
    asked_to_end: [bool; 3],
    /// Devices that were marked as read-only, by BLKROSET or by the flags of a session.
    marked: [bool; 3],
    manners: Vec<Manner>,
}

impl Past {
    /// What came of the operations is taken from what was seen with nbd.ko.
    fn of(sequence: &[Op], at: usize, nbd: &Transcript) -> Self {
        let mut past = Self::default();
        for (op, step) in sequence.iter().zip(nbd).take(at + 1) {
            let answer = value(step, "answer");
            if !answer.starts_with("Err") {
                past.add(op);
            }
        }
        past.op = sequence.get(at).cloned();
        past
    }

    fn add(&mut self, op: &Op) {
        match op {
            Op::Open { file, device, .. } => {
                // What was open there is closed first.
                if let Some(before) = self.files[*file].take() {
                    self.close(before);
                }
                self.files[*file] = Some(*device);
            }
            Op::Close { file } => {
                if let Some(device) = self.files[*file].take() {
                    self.close(device);
                }
            }
            Op::Ioctl { file, request, .. } => {
                if let Some(device) = self.files[*file] {
                    self.add_ioctl(device as usize, *request);
                }
            }
            Op::Connect {
                attributes, device, ..
            }
            | Op::Reconfigure {
                attributes, device, ..
            } => {
                let marks =
                    |a: &Attribute| matches!(a, Attribute::ServerFlags(f) if is_read_only(*f));
                let marks = attributes.iter().any(marks);
                for other in DEVICES {
                    // Netlink chooses one that nobody has opened.
                    let chosen = || !self.files.contains(&Some(other));
                    if device.map_or_else(chosen, |device| device == other) {
                        self.started[other as usize] = true;
                        self.marked[other as usize] |= marks;
                    }
                }
                let larger = |a: &Attribute| matches!(a, Attribute::BlockSize(b) if *b != 512);
                self.larger_blocks |= attributes.iter().any(larger);
                let long = |a: &Attribute| matches!(a, Attribute::Timeout(s) if is_long(*s));
                self.long_timeout |= attributes.iter().any(long);
            }
            Op::Serve { manner, device } => {
                self.manners.push(*manner);
                self.lost[*device as usize] |= *manner == Manner::Close;
            }
            Op::Kill { device, .. } => self.lost[*device as usize] = true,
            Op::DisconnectByNetlink {
                device: Some(device),
                ..
            } => self.asked_to_end[*device as usize] = true,
            Op::Signal => self.signalled = true,
            _ => {}
        }
    }

    /// With the last file goes what was configured, unless it runs.
    fn close(&mut self, device: Dev) {
        let index = device as usize;
        self.set_up[index] &= self.files.contains(&Some(device));
        if !self.files.contains(&Some(device)) && !self.started[index] {
            self.added[index] = false;
            self.forgot_sockets[index] = false;
        }
    }

    fn add_ioctl(&mut self, device: usize, request: Request) {
        self.set_up[device] |= matches!(
            request,
            Request::SetSock(_)
                | Request::SetBlksize(_)
                | Request::SetSize(_)
                | Request::SetSizeBlocks(_)
                | Request::SetTimeout(_)
                | Request::SetFlags(_)
        );
        match request {
            Request::SetSock(socket) => {
                self.added[device] = true;
                self.lost[device] |= socket == Socket::Dead;
            }
            Request::DoIt => {
                self.started[device] = true;
                self.asked_to_end[device] = false;
            }
            Request::Disconnect => self.asked_to_end[device] = true,
            Request::ClearSock => {
                self.asked_to_end[device] = true;
                self.forgot_sockets[device] |= self.added[device] && !self.started[device];
            }
            Request::SetFlags(flags) => {
                self.flags_while_running |= self.started[device];
                self.marked[device] |= is_read_only(flags);
            }
            Request::SetBlksize(bytes) => self.larger_blocks |= bytes != 512,
            Request::SetReadOnly(value) => self.marked[device] |= value != 0,
            Request::SetTimeout(seconds) => self.long_timeout |= is_long(seconds),
            _ => {}
        }
    }
}

fn is_read_only(flags: u64) -> bool {
    flags & READ_ONLY != 0
}

fn is_long(seconds: u64) -> bool {
    seconds >= 1 << 32
}

/// Whether it is a message with a list of sockets that cannot be read.
fn is_malformed(op: Option<&Op>) -> bool {
    let odd = |attribute: &Attribute| {
        matches!(
            attribute,
            Attribute::OddSockets(..) | Attribute::Bytes(netlink::SOCKETS, _)
        )
    };
    match op {
        Some(Op::Connect { attributes, .. } | Op::Reconfigure { attributes, .. }) => {
            attributes.iter().any(odd)
        }
        _ => false,
    }
}

fn moves_data(op: Option<&Op>) -> bool {
    let block_layer = |request: &Request| {
        matches!(
            request,
            Request::Discard(..) | Request::ZeroOut(..) | Request::FlushBuffers
        )
    };
    match op {
        Some(Op::Read { .. } | Op::Write { .. } | Op::Sync { .. }) => true,
        Some(Op::Ioctl { request, .. }) => block_layer(request),
        _ => false,
    }
}

/// The server has refused something with a number that means more than EIO.
fn keeps_meaning(past: &Past, difference: &Difference<'_>) -> bool {
    let (key, nbd, rnbd) = *difference;
    let optional = matches!(
        past.op,
        Some(Op::Ioctl {
            request: Request::Discard(..) | Request::ZeroOut(..),
            ..
        })
    );
    // The block layer takes ENOTSUP for done, or goes another way.
    let done = optional && rnbd.starts_with("Ok");
    let means = |manner: &Manner| match manner {
        Manner::Refuse(1) => is_errno(rnbd, libc::EREMOTEIO),
        Manner::Refuse(28) => is_errno(rnbd, libc::ENOSPC),
        Manner::Refuse(22 | 95) => optional && is_errno(rnbd, libc::EOPNOTSUPP) || done,
        _ => false,
    };
    key == "answer"
        && moves_data(past.op.as_ref())
        && is_errno(nbd, libc::EIO)
        && past.manners.iter().any(means)
}

fn is_errno(answer: &str, errno: i32) -> bool {
    answer.starts_with(&format!("Err(Os {{ code: {errno},"))
}

/// The device was marked as read-only, and still is with nbd.ko, though it was closed.
fn decides_anew(past: &Past, difference: &Difference<'_>) -> bool {
    let (key, nbd, rnbd) = *difference;
    let file = match &past.op {
        Some(Op::Write { file, .. } | Op::Sync { file } | Op::Ioctl { file, .. }) => *file,
        _ => return false,
    };
    let marked = past.files[file].is_some_and(|device| past.marked[device as usize]);
    let asks = matches!(
        past.op,
        Some(Op::Ioctl {
            request: Request::GetReadOnly,
            ..
        })
    );
    let refused = moves_data(past.op.as_ref()) && is_errno(nbd, libc::EPERM);
    key == "answer" && marked && nbd != rnbd && (asks || refused)
}

/// Uevents without those of a read-only mark.
fn without_read_only(uevents: &str) -> Vec<&str> {
    let events = uevents.split(", ");
    events
        .filter(|event| !event.is_empty() && !event.contains(" DISK_RO="))
        .collect()
}

/// The blocks of the device are larger than those of its page cache. With nbd.ko that fails; rnbd
/// adapts the page cache, or refuses the blocks.
fn fits_the_page_cache(past: &Past, difference: &Difference<'_>) -> bool {
    let (key, nbd, rnbd) = *difference;
    let sets = match &past.op {
        Some(Op::Ioctl { request, .. }) => matches!(request, Request::SetBlksize(_)),
        Some(Op::Reconfigure { attributes, .. }) => attributes
            .iter()
            .any(|attribute| matches!(attribute, Attribute::BlockSize(_))),
        _ => false,
    };
    let fails = moves_data(past.op.as_ref()) && is_errno(nbd, libc::EIO);
    let refused = sets && is_errno(rnbd, libc::EBUSY);
    // What nbd.ko cannot read or write does not reach the server.
    let only_rnbd = |command: &str| !nbd.contains(command) && rnbd.contains(command);
    let fewer = key.ends_with(" requests") && (only_rnbd("Read") || only_rnbd("Write"));
    past.larger_blocks && ((key == "answer" && nbd != rnbd && (fails || refused)) || fewer)
}

/// One of the sockets is not connected.
fn must_be_connected(past: &Past, difference: &Difference<'_>) -> bool {
    let (key, _, rnbd) = *difference;
    let unconnected = |attribute: &Attribute| matches!(attribute, Attribute::Sockets(sockets) if sockets.contains(&Socket::Unconnected));
    let given = match &past.op {
        Some(Op::Ioctl { request, .. }) => *request == Request::SetSock(Socket::Unconnected),
        Some(Op::Connect { attributes, .. } | Op::Reconfigure { attributes, .. }) => {
            attributes.iter().any(unconnected)
        }
        _ => false,
    };
    key == "answer" && given && is_errno(rnbd, libc::ENOTCONN)
}

/// The device is merely open: nothing was set by ioctl, and there was no session since the first open.
fn takes_an_open_device(past: &Past, difference: &Difference<'_>, seen: &Step) -> bool {
    let (key, nbd, _) = *difference;
    let Some(Op::Connect {
        device: Some(device),
        ..
    }) = &past.op
    else {
        return false;
    };
    key == "answer"
        && is_errno(nbd, libc::EBUSY)
        && past.files.contains(&Some(*device))
        && !past.set_up[*device as usize]
        && value(seen, &format!("{device:?} pid")) == "-"
}

/// The server has ended a connection without answering, and no other is left.
fn does_not_hang(past: &Past, difference: &Difference<'_>) -> bool {
    let silent = |manner: &Manner| matches!(manner, Manner::Stall | Manner::Close);
    let (key, nbd, rnbd) = *difference;
    past.manners.iter().any(silent)
        && ((key == "answer" && nbd == "waits" && rnbd != "waits")
            || (key.ends_with(" ended") && nbd.is_empty()))
}

/// Flags were set while the device ran, and decide with nbd.ko whether it can be written.
fn writes_as_agreed(past: &Past, difference: &Difference<'_>) -> bool {
    let (key, nbd, rnbd) = *difference;
    let one_refuses = nbd.starts_with("Err") != rnbd.starts_with("Err");
    let writes = moves_data(past.op.as_ref()) && !matches!(past.op, Some(Op::Read { .. }));
    // What was written before reaches the server later, if it does.
    let one_sends = key.ends_with(" requests") && nbd.contains("Write") != rnbd.contains("Write");
    past.flags_while_running && (one_sends || (key == "answer" && writes && one_refuses))
}

/// NBD_DO_IT comes back because the server has gone.
fn ends_unasked(sequence: &[Op], at: usize, difference: &Difference<'_>, nbd: &Transcript) -> bool {
    let (key, right, other) = *difference;
    let number = key
        .strip_prefix("operation ")
        .and_then(|rest| rest.strip_suffix(" ended"));
    let begun = match number.map(str::parse) {
        Some(Ok(number)) => number,
        None if key == "answer" => at,
        _ => return false,
    };
    let Some(Op::Ioctl {
        file,
        request: Request::DoIt,
        ..
    }) = sequence.get(begun)
    else {
        return false;
    };
    let device = Past::of(sequence, begun, nbd).files[*file];
    let asked = |device: Dev| Past::of(sequence, at, nbd).asked_to_end[device as usize];
    right == "Ok(0)" && is_errno(other, libc::EPIPE) && !device.is_some_and(asked)
}

/// With nbd.ko, what is set up takes effect at once, or is refused.
fn sets_up_a_lost_device(past: &Past) -> bool {
    let Some(Op::Ioctl { file, request, .. }) = &past.op else {
        return false;
    };
    let sets_up = matches!(
        request,
        Request::SetSock(_)
            | Request::SetBlksize(_)
            | Request::SetSize(_)
            | Request::SetSizeBlocks(_)
            | Request::SetFlags(_)
            | Request::ClearSock
            | Request::DoIt
    );
    let lost = |device: Dev| past.started[device as usize] && past.lost[device as usize];
    sets_up && past.files[*file].is_some_and(lost)
}

/// With nbd.ko, the size is 0 when the server has gone and nobody else has the device open.
fn keeps_its_size(past: &Past, difference: &Difference<'_>) -> bool {
    let (key, nbd, rnbd) = *difference;
    let lost = |device: &Dev| {
        let index = *device as usize;
        key == format!("{device:?} size") && past.started[index] && past.lost[index]
    };
    nbd == "0" && rnbd != "0" && DEVICES.iter().any(lost)
}
