// SPDX-License-Identifier: GPL-2.0

//! Carries out one sequence on whichever driver is loaded, and writes down all that can be seen.
//!
//! - `actors` are the tasks that do it
//! - `calls` has the ioctls
//! - `sight` has what can be seen of a device

mod actors;
mod calls;
mod sight;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use rustix::thread::Pid;

use super::operations::{Attribute, DEVICES, Dev, How, Manner, Op, Request, Sequence, Socket, Who};
use crate::device::{errno, pattern};
use crate::harness::look_every;
use crate::netlink::{self, Attr, Netlink, attr, nested};
use crate::server::{Server, Transport};
use crate::sys::{self, Buffer, ioctl_number};
use crate::uevents::Uevents;
use crate::{proto, stacks};

use actors::{Actor, Answer, Job, Opened, Waiting, with_netlink};
use calls::{answered, call};
use sight::{checksum, describe, joined, name};

/// How many devices a sequence needs that are there from the start: its own, and one that is found
/// when netlink is to choose and the others are in use.
pub fn devices_of(sequence: &Sequence) -> u32 {
    let chosen = |op: &Op| matches!(op, Op::Connect { device: None, .. });
    if sequence.iter().any(chosen) {
        3
    } else if sequence.iter().any(|op| op.concerns(Dev::B)) {
        2
    } else {
        1
    }
}

/// How long an operation may take that nothing holds up, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was seen after one operation, or at the end: what it is, and its value.
pub type Step = Vec<(String, String)>;

/// What was seen of a sequence: a step for each operation, and two for the end.
pub type Transcript = Vec<Step>;

/// Carries out `sequence` on the devices from `base` on, and `new`, none of which has been used.
/// The descriptors in the answer keep its devices from being chosen by later sequences.
pub fn play(sequence: &Sequence, base: u32, new: u32) -> Result<(Transcript, Vec<File>), String> {
    let mut stage = Stage::new(sequence, base, new);
    let mut transcript: Transcript = sequence.iter().map(|op| stage.step(op)).collect();
    transcript.extend(stage.end()?);
    Ok((transcript, stage.hold()))
}

struct Stage {
    base: u32,
    new: u32,
    /// How many there are from `base` on.
    count: u32,
    /// Those that the sequence has to do with.
    devices: Vec<Dev>,
    actors: [Option<Actor>; 3],
    files: [Option<Opened>; 3],
    servers: [Server; 3],
    /// Whether a server does not answer.
    stalled: [bool; 3],
    waiting: Vec<Waiting>,
    /// Of the tasks that a driver may show.
    tids: Vec<(Pid, String)>,
    uevents: Uevents,
    netlink: Netlink,
    news: Netlink,
    /// Devices that are to be removed when nobody uses them.
    unwanted: Vec<Dev>,
    requests_seen: [usize; 3],
    steps: usize,
}

impl Stage {
    fn new(sequence: &Sequence, base: u32, new: u32) -> Self {
        let used = |device: &Dev| sequence.iter().any(|op| op.concerns(*device));
        Self {
            base,
            new,
            count: devices_of(sequence),
            devices: DEVICES.into_iter().filter(used).collect(),
            actors: [None, None, None],
            files: [None, None, None],
            servers: [Server::new(), Server::new(), Server::new()],
            stalled: [false; 3],
            waiting: Vec::new(),
            tids: Vec::new(),
            uevents: Uevents::listen(),
            netlink: Netlink::open(),
            news: Netlink::listen(),
            unwanted: Vec::new(),
            requests_seen: [0; 3],
            steps: 0,
        }
    }

    fn index(&self, device: Dev) -> u32 {
        match device {
            Dev::A => self.base,
            Dev::B => self.base + 1,
            Dev::New => self.new,
        }
    }

    // --- One operation --------------------------------------------------------

    fn step(&mut self, op: &Op) -> Step {
        let mut answer = self.perform(op);
        let mut seen = self.observe();
        // It may have come back in the meantime.
        let ended = format!("operation {} ended", self.steps);
        if let Some(at) = seen.iter().position(|(what, _)| *what == ended) {
            answer = seen.swap_remove(at).1;
        }
        seen.push(("answer".to_owned(), answer));
        if let Op::Look { device } = op {
            seen.extend(self.look(*device));
        }
        self.steps += 1;
        seen
    }

    /// Waits until nothing goes on any more, and tells what has changed.
    fn observe(&mut self) -> Step {
        self.settle();
        self.await_removal();
        let mut step = self.ended();
        for device in self.devices.clone() {
            step.push((format!("{device:?} size"), self.sysfs(device, "size")));
            step.push((format!("{device:?} pid"), self.sysfs(device, "pid")));
            let server = &self.servers[device as usize];
            let requests = server.requests();
            let seen = std::mem::replace(&mut self.requests_seen[device as usize], requests.len());
            if requests.len() > seen {
                let news = joined(&requests[seen..]);
                step.push((format!("{device:?} requests"), news));
            }
        }
        let heard = self.uevents.rest();
        for device in self.devices.clone() {
            let name = format!("nbd{}", self.index(device));
            let events: Vec<String> = heard.iter().filter_map(|e| describe(e, &name)).collect();
            if !events.is_empty() {
                step.push((format!("{device:?} uevents"), events.join(", ")));
            }
        }
        step
    }

    /// What operations answered that had to wait.
    fn ended(&mut self) -> Step {
        let mut step = Step::new();
        let mut still = Vec::new();
        for mut waiting in std::mem::take(&mut self.waiting) {
            match waiting.take_answer() {
                Some(answer) => step.push((
                    format!("operation {} ended", waiting.step),
                    self.taken(answer),
                )),
                None => still.push(waiting),
            }
        }
        self.waiting = still;
        step
    }

    /// Keeps what was opened.
    fn taken(&mut self, answer: Answer) -> String {
        if let Some((file, opened)) = answer.opened {
            self.files[file] = Some(opened);
        }
        answer.text
    }

    fn settle(&mut self) {
        let mut quiet = 0;
        let _ = wait_finely(Duration::from_secs(1), || {
            quiet = if self.is_quiet() { quiet + 1 } else { 0 };
            quiet == 2
        });
    }

    /// Removal happens in the background, and takes its time. Until nothing of the device is left,
    /// nobody can connect its index again.
    fn await_removal(&mut self) {
        let mut unwanted = std::mem::take(&mut self.unwanted);
        unwanted.retain(|device| {
            if !self.is_free(*device) {
                return true;
            }
            let index = self.index(*device);
            // Goes after the last uevent, unlike the link in /sys/block.
            let path = format!("/sys/devices/virtual/block/nbd{index}");
            let _ = wait_finely(PATIENCE, || {
                !fs::exists(&path).unwrap_or(false) && self.netlink.status(Some(index)).is_empty()
            });
            false
        });
        self.unwanted = unwanted;
    }

    /// Whether nobody has the device open, or connected.
    fn is_free(&self, device: Dev) -> bool {
        let status = self.netlink.status(Some(self.index(device)));
        status.iter().all(|(_, connected)| !connected)
    }

    /// No task of ours does anything, and no NBD_DO_IT is about to end for want of a server.
    fn is_quiet(&mut self) -> bool {
        let servers = &self.servers;
        let ends = |waiting: &mut Waiting| {
            waiting.look_for_answer();
            let deserted = |device: Dev| servers[device as usize].is_deserted();
            waiting.answer.is_none() && waiting.runs.is_some_and(deserted)
        };
        !self.waiting.iter_mut().any(ends) && stacks::others_wait()
    }

    /// Has `who` do it; what does not come back soon goes on by itself.
    fn told(&mut self, who: Who, runs: Option<Dev>, job: Job) -> String {
        let slot = &mut self.actors[who as usize];
        let actor = match (runs, slot.take()) {
            (None, Some(actor)) => actor,
            (_, old) => {
                *slot = old;
                Actor::new(who)
            }
        };
        let name = match runs {
            Some(_) => format!("the task of operation {}", self.steps),
            None => format!("{who:?}"),
        };
        self.tids.push((actor.tid, name));
        actor.jobs.send(job).expect("an actor that lives");
        let began = Instant::now();
        let answer = loop {
            match actor.answers.recv_timeout(Duration::from_millis(1)) {
                Ok(answer) => break Some(answer),
                Err(RecvTimeoutError::Disconnected) => break Some("panicked".to_owned().into()),
                Err(RecvTimeoutError::Timeout) => {
                    let took = began.elapsed();
                    // It comes back soon where all connections have ended before.
                    let served = |device: Dev| !self.servers[device as usize].is_deserted();
                    let runs = runs.is_some_and(served) && stacks::sleeps(actor.tid);
                    let held = self.stalled.contains(&true) && took > PATIENCE / 10;
                    let late = runs || held || took > PATIENCE;
                    if late && stacks::waits(actor.tid) {
                        break None;
                    }
                }
            }
        };
        match answer {
            Some(answer) => {
                if runs.is_none() {
                    self.actors[who as usize] = Some(actor);
                }
                self.taken(answer)
            }
            None => {
                let step = self.steps;
                self.waiting.push(Waiting {
                    step,
                    actor,
                    runs,
                    answer: None,
                });
                "waits".into()
            }
        }
    }

    fn perform(&mut self, op: &Op) -> String {
        match op {
            Op::Open { file, device, how } => self.open(*file, *device, *how),
            Op::Close { file } => self.close(*file),
            Op::Ioctl { who, file, request } => self.ioctl(*who, *file, *request),
            Op::Read { file, at, len } => {
                let (at, len) = (*at, *len);
                self.with_file(*file, move |file| {
                    let mut data = Buffer::new(len);
                    let answer = errno(file.read_at(&mut data, at));
                    format!("{answer:?}, sum {:x}", checksum(&data))
                })
            }
            Op::Write { file, at, len } => {
                let (at, len, seed) = (*at, *len, self.steps as u64);
                self.with_file(*file, move |file| {
                    let mut data = Buffer::new(len);
                    let whole = len / 8 * 8;
                    pattern(seed, 0, &mut data[..whole]);
                    format!("{:?}", errno(file.write_at(&data, at)))
                })
            }
            Op::Sync { file } => {
                self.with_file(*file, |file| format!("{:?}", errno(file.sync_all())))
            }
            Op::Connect {
                who,
                device,
                attributes,
            } => {
                let (base, new) = (self.base, self.new);
                self.with_message(*who, *device, attributes, move |netlink, message| {
                    let named = |index| name(base, new, index);
                    format!("{:?}", netlink.connect_with(message).map(named))
                })
            }
            Op::Reconfigure {
                who,
                device,
                attributes,
            } => self.with_message(*who, *device, attributes, |netlink, message| {
                format!("{:?}", netlink.ask(netlink::RECONFIGURE, message).map(drop))
            }),
            Op::DisconnectByNetlink { who, device } => {
                self.with_message(*who, *device, &[], |netlink, message| {
                    format!("{:?}", netlink.ask(netlink::DISCONNECT, message).map(drop))
                })
            }
            Op::Status { who, device } => {
                let index = self.index(*device);
                let job = move || {
                    let status = with_netlink(|netlink| netlink.status(Some(index)));
                    let state = |(_, connected)| connected;
                    format!("{:?}", status.into_iter().map(state).collect::<Vec<bool>>()).into()
                };
                self.told(*who, None, Box::new(job))
            }
            Op::Signal => self.signal(),
            Op::Serve { device, manner } => self.serve(*device, *manner),
            Op::Kill { device, connection } => {
                let server = &self.servers[*device as usize];
                match connection {
                    Some(index) => server.kill_connection(*index),
                    None => server.kill(),
                }
                String::new()
            }
            Op::Look { .. } => String::new(),
        }
    }

    fn open(&mut self, file: usize, device: Dev, how: How) -> String {
        self.close(file);
        let path = format!("/dev/nbd{}", self.index(device));
        let job = move || {
            let mut options = OpenOptions::new();
            options.read(true).write(how != How::Read);
            options.custom_flags(match how {
                How::Direct => libc::O_DIRECT,
                How::Exclusive => libc::O_EXCL,
                How::Read | How::ReadWrite => 0,
            });
            let answer = errno(options.open(path));
            let text = format!("{:?}", answer.as_ref().map(drop));
            let opened = answer.ok().map(|opened| {
                let opened = Arc::new(opened);
                let device = Opened {
                    device,
                    file: opened,
                };
                (file, device)
            });
            Answer { text, opened }
        };
        self.told(Who::Main, None, Box::new(job))
    }

    fn close(&mut self, file: usize) -> String {
        let Some(opened) = self.files[file].take() else {
            return String::new();
        };
        let job = move || {
            drop(opened);
            "closed".to_owned().into()
        };
        self.told(Who::Main, None, Box::new(job))
    }

    fn with_file(
        &mut self,
        file: usize,
        f: impl FnOnce(&File) -> String + Send + 'static,
    ) -> String {
        self.with_file_of(Who::Main, None, file, f)
    }

    fn with_file_of(
        &mut self,
        who: Who,
        runs: Option<Dev>,
        file: usize,
        f: impl FnOnce(&File) -> String + Send + 'static,
    ) -> String {
        let Some(opened) = self.files[file].clone() else {
            return "not open".into();
        };
        let job = move || {
            let text = f(&opened.file);
            // The last one closes it, and is done then.
            drop(opened);
            text.into()
        };
        self.told(who, runs, Box::new(job))
    }

    fn ioctl(&mut self, who: Who, file: usize, request: Request) -> String {
        let Some(device) = self.files[file].as_ref().map(|opened| opened.device) else {
            return "not open".into();
        };
        if let Request::SetSock(socket) = request {
            let socket = self.socket(device, socket);
            return self.with_file_of(who, None, file, move |file| {
                answered(ioctl_number(file, proto::SET_SOCK, socket.number() as u64))
            });
        }
        let runs = (request == Request::DoIt).then_some(device);
        self.with_file_of(who, runs, file, move |file| call(file, request))
    }

    fn socket(&self, device: Dev, socket: Socket) -> Given {
        let server = &self.servers[device as usize];
        Given::Open(match socket {
            Socket::Unix => server.connect(Transport::Unix),
            Socket::Tcp => server.connect(Transport::Tcp4),
            Socket::Dead => server.connect_and_end(),
            Socket::Unconnected => TcpListener::bind("127.0.0.1:0").expect("listen").into(),
            Socket::Udp => UdpSocket::bind("127.0.0.1:0").expect("a socket").into(),
            Socket::Datagram => UnixDatagram::unbound().expect("a socket").into(),
            Socket::OtherFile => File::open("/dev/null").expect("/dev/null").into(),
            Socket::NotOpen => return Given::Number(100_000),
            Socket::Number(number) => return Given::Number(number),
        })
    }

    fn with_message(
        &mut self,
        who: Who,
        device: Option<Dev>,
        attributes: &[Attribute],
        f: impl FnOnce(&Netlink, Vec<Attr>) -> String + Send + 'static,
    ) -> String {
        let mut sockets = Vec::new();
        let mut message: Vec<Attr> = device
            .map(|device| attr(netlink::INDEX, self.index(device)))
            .into_iter()
            .collect();
        for attribute in attributes {
            message.push(self.attribute(device.unwrap_or(Dev::A), attribute, &mut sockets));
        }
        let job = move || {
            let text = with_netlink(|netlink| f(netlink, message));
            drop(sockets);
            text.into()
        };
        let answer = self.told(who, None, Box::new(job));
        if let Some(flags) = attributes.iter().rev().find_map(Attribute::client_flags) {
            self.note_wishes(device, flags, &answer);
        }
        answer
    }

    /// Which devices are to go when nobody uses them. What was refused may have had an effect all
    /// the same where it asks for that, but takes nothing back.
    fn note_wishes(&mut self, device: Option<Dev>, flags: u64, answer: &str) {
        if flags & netlink::DESTROY_ON_DISCONNECT != 0 {
            let addressed = |d: &Dev| device.is_none_or(|device| device == *d);
            let devices = self.devices.iter().copied();
            self.unwanted.extend(devices.filter(addressed));
        } else if answer.starts_with("Ok") {
            let chosen = |d: Dev| answer == format!("Ok({:?})", format!("{d:?}"));
            let spared = |d: Dev| device.map_or_else(|| chosen(d), |device| device == d);
            self.unwanted.retain(|d| !spared(*d));
        }
    }

    fn attribute(&self, device: Dev, attribute: &Attribute, open: &mut Vec<Given>) -> Attr {
        match attribute {
            Attribute::Size(bytes) => attr(netlink::SIZE_BYTES, *bytes),
            Attribute::BlockSize(bytes) => attr(netlink::BLOCK_SIZE_BYTES, *bytes),
            Attribute::Timeout(seconds) => attr(netlink::TIMEOUT, *seconds),
            Attribute::DeadTimeout(seconds) => attr(netlink::DEAD_CONN_TIMEOUT, *seconds),
            Attribute::ServerFlags(flags) => attr(netlink::SERVER_FLAGS, *flags),
            Attribute::ClientFlags(flags) => attr(netlink::CLIENT_FLAGS, *flags),
            Attribute::Backend(name) => attr(netlink::BACKEND_IDENTIFIER, *name),
            Attribute::Sockets(sockets) => {
                let from = open.len();
                open.extend(sockets.iter().map(|socket| self.socket(device, *socket)));
                let item = |given: &Given| {
                    nested(
                        netlink::SOCK_ITEM,
                        &[attr(netlink::SOCK_FD, given.number())],
                    )
                };
                let items: Vec<Attr> = open[from..].iter().map(item).collect();
                nested(netlink::SOCKETS, &items)
            }
            Attribute::OddSockets(item, member, len) => {
                let member = attr(*member, vec![0xff_u8; *len].as_slice());
                nested(netlink::SOCKETS, &[nested(*item, &[member])])
            }
            Attribute::Bytes(kind, len) => attr(*kind, vec![1_u8; *len].as_slice()),
        }
    }

    fn signal(&mut self) -> String {
        let Some(running) = self.waiting.iter().rev().find(|w| w.runs.is_some()) else {
            return "nobody".into();
        };
        sys::handle_and_ignore(libc::SIGUSR1, false);
        sys::signal_thread(running.actor.tid, libc::SIGUSR1);
        let _ = wait_finely(PATIENCE, || stacks::waits(running.actor.tid));
        String::new()
    }

    fn serve(&mut self, device: Dev, manner: Manner) -> String {
        let server = &self.servers[device as usize];
        self.stalled[device as usize] = matches!(manner, Manner::Stall | Manner::Close);
        match manner {
            Manner::Honest => server.be_honest(),
            Manner::Refuse(error) => {
                server.script(move |conn, request| conn.refuse(request, error));
            }
            Manner::Stall => server.script(|conn, _| conn.stall()),
            Manner::Close => server.script(|conn, _| conn.close()),
        }
        String::new()
    }

    // --- The end --------------------------------------------------------------

    /// Tears everything down, and tells what was to be seen before and after.
    fn end(&mut self) -> Result<[Step; 2], String> {
        let before = self.look_at_all();
        for server in &self.servers {
            server.kill();
        }
        let mut after = self.observe();
        for device in self.devices.clone() {
            let answer = self.disconnect_for_good(self.index(device));
            after.push((format!("{device:?} is disconnected"), answer));
        }
        if self.count == 3 {
            self.disconnect_for_good(self.base + 2);
        }
        for file in 0..self.files.len() {
            self.close(file);
        }
        let done = wait_finely(Duration::from_secs(10), || {
            after.extend(self.ended());
            for file in &mut self.files {
                // What had to wait may have opened another one.
                *file = None;
            }
            self.waiting.is_empty()
        });
        if done.is_err() {
            let steps: BTreeSet<usize> = self.waiting.iter().map(|w| w.step).collect();
            return Err(format!("operations {steps:?} hang:\n{}", stacks::all()));
        }
        // What comes of these closes is nobody's concern.
        let closes = format!("operation {} ended", self.steps);
        after.retain(|(what, _)| *what != closes);
        self.actors = [None, None, None];
        let all_free = || self.devices.iter().all(|device| self.is_free(*device));
        if wait_finely(Duration::from_secs(5), all_free).is_err() {
            return Err("a device stays in use".into());
        }
        after.extend(self.observe());
        let mut dead: Vec<String> = Vec::new();
        while let Some(index) = self.news.dead_link() {
            dead.push(name(self.base, self.new, index));
        }
        dead.sort();
        after.push(("news of dead links".into(), dead.join(" ")));
        after.extend(self.look_at_all());
        Ok([before, after])
    }

    fn disconnect_for_good(&mut self, index: u32) -> String {
        let job = move || {
            let answer = with_netlink(|netlink| netlink.disconnect(index));
            format!("{answer:?}").into()
        };
        self.told(Who::Main, None, Box::new(job))
    }

    fn hold(&self) -> Vec<File> {
        (self.base..self.base + self.count)
            .chain([self.new])
            .filter_map(|index| File::open(format!("/dev/nbd{index}")).ok())
            .collect()
    }
}

/// A descriptor that a driver is given.
enum Given {
    Open(OwnedFd),
    Number(i32),
}

impl Given {
    fn number(&self) -> i32 {
        match self {
            Self::Open(fd) => fd.as_fd().as_raw_fd(),
            Self::Number(number) => *number,
        }
    }
}

/// Looks every millisecond, with the same patience on every kernel.
fn wait_finely(limit: Duration, is_true: impl FnMut() -> bool) -> Result<(), ()> {
    look_every(Duration::from_millis(1), limit, is_true)
}
