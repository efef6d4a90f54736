// SPDX-License-Identifier: GPL-2.0

//! How long it takes to connect and to disconnect a device over netlink, as somebody does who starts
//! and ends sandboxes all the time.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use neli::attr::Attribute;
use neli::consts::nl::NlmF;
use neli::consts::socket::{Msg, NlFamily};
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::NlSocket;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use neli::{FromBytes, Size, ToBytes};
use serde::{Deserialize, Serialize};

use crate::Outcome;
use crate::programs::Module;
use crate::sample::Client;
use crate::server;

const CONNECTIONS: [usize; 3] = [1, 4, 16];
/// Of each kind, in each round.
const TIMES: usize = 15;
/// How often a connect to nbd.ko is tried again.
const TRIES: usize = 5;
/// Devices that are there from the beginning. One that is added comes after them.
const DEVICES: u32 = 2;
const SIZE: u64 = 64 << 20;

/// The family of families (linux/genetlink.h).
const CTRL: u16 = 0x10;
const CTRL_GETFAMILY: u8 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;

/// linux/nbd-netlink.h
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const DESTROY_ON_DISCONNECT: u64 = 1;
/// HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN
const FLAGS: u64 = 1 | (1 << 2) | (1 << 8);

type Attr = Nlattr<u16, Buffer>;

/// What is connected, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Kind {
    /// A device that exists, for no time.
    Same,
    /// As before, for [`LIFE`].
    Lived,
    /// A device that is added by the connect, for no time, and removed after the disconnect.
    New,
}

/// How long a device is connected that is in use for some time: what a driver does soon after the connect
/// is done by then.
const LIFE: Duration = Duration::from_millis(40);

/// One connect and disconnect.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sample {
    client: Client,
    connections: usize,
    kind: Kind,
    connect_us: f64,
    disconnect_us: f64,
}

/// In the guest. Writes a sample a line to standard output.
pub fn run(rounds: &str) -> Outcome<()> {
    let rounds: usize = rounds.parse()?;
    for round in 0..rounds {
        let mut drivers = [Client::Nbd, Client::Rnbd];
        drivers.rotate_left(round % 2);
        for client in drivers {
            measure(client)?;
        }
    }
    Ok(())
}

fn measure(client: Client) -> Outcome<()> {
    let _module = Module::load_with(client, DEVICES as usize)?;
    let netlink = Netlink::open()?;
    for connections in CONNECTIONS {
        for kind in [Kind::Same, Kind::Lived, Kind::New] {
            for time in 0..=TIMES {
                let (connect_us, disconnect_us) =
                    netlink.connect_once(client, connections, kind)?;
                let sample = Sample {
                    client,
                    connections,
                    kind,
                    connect_us,
                    disconnect_us,
                };
                // The first one changes the number of hardware queues.
                if time > 0 {
                    println!("{}", serde_json::to_string(&sample)?);
                }
                // Whatever is left to do in the background is not the next one's.
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
    Ok(())
}

struct Netlink {
    socket: NlSocket,
    family: u16,
}

impl Netlink {
    fn open() -> Outcome<Self> {
        let socket = NlSocket::connect(NlFamily::Generic, None, Groups::empty())?;
        let mut netlink = Self {
            socket,
            family: CTRL,
        };
        let name = attr(CTRL_FAMILY_NAME, "nbd")?;
        let answer = netlink.ask(CTRL_GETFAMILY, vec![name])?;
        let attrs = answer.ok_or("no answer")?;
        let attrs = attrs.attrs();
        let id = attrs
            .iter()
            .find(|attr| *attr.nla_type().nla_type() == CTRL_FAMILY_ID);
        netlink.family = id.ok_or("no family")?.get_payload_as()?;
        Ok(netlink)
    }

    /// Answers how many microseconds the connect and the disconnect take.
    fn connect_once(&self, client: Client, connections: usize, kind: Kind) -> Outcome<(f64, f64)> {
        let new = kind == Kind::New;
        let mut sockets = Vec::new();
        for _ in 0..connections {
            let (ours, theirs) = UnixStream::pair()?;
            thread::spawn(move || server::transmit(&theirs));
            sockets.push(OwnedFd::from(ours));
        }
        let index = if new { DEVICES } else { 0 };
        let flags = if new { DESTROY_ON_DISCONNECT } else { 0 };
        let mut list = attr(SOCKETS, Buffer::new())?;
        for socket in &sockets {
            let item = attr(SOCK_ITEM, Buffer::new())?.nest(&attr(SOCK_FD, socket.as_raw_fd())?)?;
            list = list.nest(&item)?;
        }
        let attrs = vec![
            attr(INDEX, index)?,
            attr(SIZE_BYTES, SIZE)?,
            attr(SERVER_FLAGS, FLAGS)?,
            attr(CLIENT_FLAGS, flags)?,
            list,
        ];
        let mut tries = 0;
        let connect_us = loop {
            match time(|| self.ask(CONNECT, attrs.clone())) {
                // It refuses a device that it has not quite removed, now and then.
                Err(_) if new && client == Client::Nbd && tries < TRIES => tries += 1,
                other => break other?,
            }
            thread::sleep(Duration::from_millis(50));
        };
        drop(sockets);
        if kind == Kind::Lived {
            thread::sleep(LIFE);
        }
        let attrs = vec![attr(INDEX, index)?];
        let disconnect_us = time(|| self.ask(DISCONNECT, attrs))?;
        let path = format!("/sys/block/nbd{index}");
        while new && Path::new(&path).exists() {
            thread::sleep(Duration::from_millis(1));
        }
        Ok((connect_us, disconnect_us))
    }

    /// Sends a command, which the kernel has carried out when this returns.
    fn ask(&self, command: u8, attrs: Vec<Attr>) -> Outcome<Option<Genlmsghdr<u8, u16>>> {
        let message: Genlmsghdr<u8, u16> = GenlmsghdrBuilder::default()
            .cmd(command)
            .version(1)
            .attrs(attrs.into_iter().collect::<GenlBuffer<u16, Buffer>>())
            .build()?;
        let message = NlmsghdrBuilder::default()
            .nl_type(self.family)
            .nl_flags(NlmF::REQUEST | NlmF::ACK)
            .nl_payload(NlPayload::Payload(message))
            .build()?;
        let mut bytes = Cursor::new(Vec::new());
        message.to_bytes(&mut bytes)?;
        self.socket.send(bytes.into_inner(), Msg::empty())?;
        let mut answer = None;
        loop {
            let mut bytes = vec![0; 32 << 10];
            let (len, _) = self.socket.recv(&mut bytes, Msg::empty())?;
            bytes.truncate(len);
            let received: Nlmsghdr<u16, Genlmsghdr<u8, u16>> =
                Nlmsghdr::from_bytes(&mut Cursor::new(bytes))?;
            match received.nl_payload() {
                NlPayload::Payload(payload) => answer = Some(payload.clone()),
                NlPayload::Ack(_) => return Ok(answer),
                other => return Err(format!("command {command}: {other:?}").into()),
            }
        }
    }
}

fn attr(kind: u16, payload: impl Size + ToBytes) -> Outcome<Attr> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build()?;
    let attr = NlattrBuilder::default().nla_type(kind).nla_payload(payload);
    Ok(attr.build()?)
}

fn time<T>(f: impl FnOnce() -> Outcome<T>) -> Outcome<f64> {
    let began = Instant::now();
    f()?;
    Ok(began.elapsed().as_secs_f64() * 1e6)
}

/// Prints the medians, in milliseconds.
pub fn report(file: &Path) -> Outcome<()> {
    let mut cells: BTreeMap<(usize, Kind), BTreeMap<Client, Vec<Sample>>> = BTreeMap::new();
    for line in std::fs::read_to_string(file)?.lines() {
        let Ok(sample) = serde_json::from_str::<Sample>(line) else {
            continue;
        };
        let cell = cells.entry((sample.connections, sample.kind)).or_default();
        cell.entry(sample.client).or_default().push(sample);
    }
    println!(
        "Connecting and disconnecting, median in ms: nbd.ko, rnbd, and rnbd's part of nbd.ko's\n"
    );
    println!("connections device    connect              disconnect           both");
    for ((connections, kind), clients) in &cells {
        let (Some(nbd), Some(rnbd)) = (clients.get(&Client::Nbd), clients.get(&Client::Rnbd))
        else {
            continue;
        };
        let device = match kind {
            Kind::Same => "same",
            Kind::Lived => "lived",
            Kind::New => "new",
        };
        print!("{connections:>11} {device:<6}");
        let both = |sample: &Sample| sample.connect_us + sample.disconnect_us;
        let kinds: [&dyn Fn(&Sample) -> f64; 3] = [
            &|sample| sample.connect_us,
            &|sample| sample.disconnect_us,
            &both,
        ];
        for kind in kinds {
            let (nbd, rnbd) = (median(nbd, kind), median(rnbd, kind));
            print!("{nbd:>7.2} {rnbd:>6.2} {:>5.2} ", rnbd / nbd);
        }
        println!();
    }
    println!();
    Ok(())
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(|sample| of(sample) / 1e3).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
