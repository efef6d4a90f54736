// SPDX-License-Identifier: GPL-2.0

//! What a driver tells of its own accord: the events of the family "rnbd", and the dead links of the family
//! "nbd" where that is all there is.

use serde::Serialize;

use crate::connect::no_driver;
use crate::device::Interface;
use crate::failure::Failure;
use crate::netlink::Answer;
use crate::netlink::listener::{self, Group, Listener};
use crate::sysfs::{Driver, Sysfs};
use crate::wire;

const LISTENING: &str = "listening to the kernel";

/// What is heard, if there is the family. rnbd has both.
const RNBD: usize = 0;
const GROUPS: [Group; 2] = [
    Group {
        family: "rnbd",
        name: "events",
    },
    Group {
        family: "nbd",
        name: "nbd_mc_group",
    },
];

/// Events of the family "rnbd".
const CONNECTED: u8 = 3;
const CONNECTION_DEAD: u8 = 4;
const RECONNECTED: u8 = 5;
const DISCONNECTED: u8 = 6;
const RESIZED: u8 = 7;
const SERVER_ERROR: u8 = 10;

/// Attributes of these.
const DEVICE: u16 = 1;
const CONNECTION: u16 = 2;
const REASON: u16 = 3;
const ERRNO: u16 = 4;
const RECONNECTS: u16 = 5;
const BACKEND: u16 = 6;
const SIZE: u16 = 7;
const BLOCK_SIZE: u16 = 8;
const FLAGS: u16 = 9;
const CONNECTIONS: u16 = 10;
const INTERFACE: u16 = 11;
const PID: u16 = 12;
const ERROR: u16 = 13;
const COMMAND: u16 = 14;
const OFFSET: u16 = 15;
const LENGTH: u16 = 16;
const TEXT: u16 = 17;
const ERROR_OFFSET: u16 = 18;

/// The only event of the family "nbd", and its attribute.
const LINK_DEAD: u8 = 4;
const INDEX: u16 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Connected,
    ConnectionDead,
    Reconnected,
    Disconnected,
    Resized,
    ServerError,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::ConnectionDead => "connection-dead",
            Self::Reconnected => "reconnected",
            Self::Disconnected => "disconnected",
            Self::Resized => "resized",
            Self::ServerError => "server-error",
        }
    }
}

/// What has happened to a device. What the event does not tell is `None`, and not in the JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    #[serde(rename = "event")]
    pub kind: Kind,
    pub index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<u32>,
    /// Why a connection is not used any more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errno: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconnects: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// In bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// In bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<Interface>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What a server has said of a request that it could not carry out: the protocol's number, and words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<&'static str>,
    /// Where it has failed, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_offset: Option<u64>,
    /// Of the request, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// In bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Event(Box<Event>),
    /// Nobody knows which events, so the devices are to be looked at.
    Missed,
    /// The driver was loaded anew, or another one was, or it is gone. What has happened meanwhile was missed.
    Changed,
}

/// A listener to the driver that is loaded, whichever that is.
pub struct Events(Listener);

impl Events {
    /// Hears from now on.
    ///
    /// # Errors
    ///
    /// `NoDevice`: no driver is loaded. Or the kernel's reason.
    pub fn open() -> Result<Self, Failure> {
        let listener = Listener::open(&GROUPS).map_err(|error| error.during(LISTENING))?;
        listener.heard().ok_or_else(no_driver)?;
        Ok(Self(listener))
    }

    /// The driver whose family is heard. That of rnbd may be missing where rnbd is older.
    pub fn family(&self) -> Option<Driver> {
        self.0.heard().map(|place| match place {
            RNBD => Driver::Rnbd,
            _ => Driver::Nbd,
        })
    }

    /// Whether rnbd, which has both families, is about to register its own one, or has just unregistered it.
    fn is_between(&self) -> bool {
        self.family() == Some(Driver::Nbd) && Sysfs::new().driver() == Some(Driver::Rnbd)
    }

    /// Waits for what comes next. What is not known is left out, so there may be nothing.
    ///
    /// # Errors
    ///
    /// The socket has failed.
    pub fn wait(&mut self) -> Result<Vec<Heard>, Failure> {
        let family = self.family();
        let heard = self.0.wait();
        let heard = heard.map_err(|error| error.during(LISTENING))?;
        let parsed = heard.iter().filter_map(|heard| match heard {
            listener::Heard::Missed => Some(Heard::Missed),
            listener::Heard::Changed if self.is_between() => None,
            listener::Heard::Changed => Some(Heard::Changed),
            listener::Heard::Message(command, answer) => {
                parse(family?, *command, answer).map(|event| Heard::Event(event.into()))
            }
        });
        Ok(parsed.collect())
    }
}

fn parse(driver: Driver, command: u8, answer: &Answer) -> Option<Event> {
    match driver {
        Driver::Rnbd => event(command, answer),
        Driver::Nbd if command == LINK_DEAD => {
            Some(Event::new(Kind::ConnectionDead, answer.number(INDEX)?))
        }
        Driver::Nbd => None,
    }
}

impl Event {
    /// An event that tells no more than this.
    pub fn new(kind: Kind, index: u32) -> Self {
        Self {
            kind,
            index,
            connection: None,
            reason: None,
            errno: None,
            reconnects: None,
            backend: None,
            size: None,
            block_size: None,
            flags: None,
            connections: None,
            interface: None,
            pid: None,
            error: None,
            error_offset: None,
            text: None,
            command: None,
            offset: None,
            length: None,
        }
    }
}

fn event(command: u8, answer: &Answer) -> Option<Event> {
    let kind = match command {
        CONNECTED => Kind::Connected,
        CONNECTION_DEAD => Kind::ConnectionDead,
        RECONNECTED => Kind::Reconnected,
        DISCONNECTED => Kind::Disconnected,
        RESIZED => Kind::Resized,
        SERVER_ERROR => Kind::ServerError,
        _ => return None,
    };
    let flags = answer.number(FLAGS).map(|flags: u64| flags as u16);
    Some(Event {
        connection: answer.number(CONNECTION),
        reason: answer.number(REASON).map(reason),
        errno: answer.number(ERRNO),
        reconnects: answer.number(RECONNECTS),
        backend: answer.text(BACKEND),
        size: answer.number(SIZE),
        block_size: answer.number(BLOCK_SIZE),
        flags: flags.map(wire::flag_names),
        connections: answer.number(CONNECTIONS),
        interface: answer.number(INTERFACE).and_then(Interface::of_number),
        pid: answer.number(PID),
        error: answer.number(ERROR),
        error_offset: answer.number(ERROR_OFFSET),
        text: answer.text(TEXT),
        command: answer.number(COMMAND).map(command_name),
        offset: answer.number(OFFSET),
        length: answer.number(LENGTH),
        ..Event::new(kind, answer.number(DEVICE)?)
    })
}

/// What a server was asked to do, by the protocol's number.
fn command_name(number: u32) -> &'static str {
    match number {
        0 => "read",
        1 => "write",
        3 => "flush",
        4 => "trim",
        6 => "write-zeroes",
        _ => "unknown",
    }
}

/// Why a connection has died, as Documentation/netlink/rnbd.yaml calls it.
fn reason(number: u32) -> &'static str {
    match number {
        0 => "closed",
        1 => "receive-failed",
        2 => "send-failed",
        3 => "protocol-violated",
        4 => "timed-out",
        5 => "shutting-down",
        6 => "replaced",
        7 => "replacement-failed",
        8 => "wants-rekeying",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{Attrs, NetlinkError};

    #[test]
    fn a_connection_that_has_died() {
        let attrs = || -> Result<Attrs, NetlinkError> {
            Attrs::default()
                .with(DEVICE, 3_u32)?
                .with(BACKEND, "image")?
                .with(CONNECTION, 1_u32)?
                .with(RECONNECTS, 2_u32)?
                .with(REASON, 1_u32)?
                .with(ERRNO, 104_u32)
        };
        let event = parse(Driver::Rnbd, CONNECTION_DEAD, &attrs().unwrap().into()).unwrap();
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            "{\"event\":\"connection-dead\",\"index\":3,\"connection\":1,\"reason\":\"receive-failed\",\
             \"errno\":104,\"reconnects\":2,\"backend\":\"image\"}"
        );
    }

    /// The names in the specification, from 0 on.
    #[test]
    fn reasons_are_those_of_the_specification() {
        let specification = include_str!("../../../Documentation/netlink/rnbd.yaml");
        let (_, rest) = specification
            .split_once("    name: death-reason\n")
            .unwrap();
        let list = rest.split("\n\n").next().unwrap();
        let list = list.split("\n  -\n").next().unwrap();
        let names = list
            .lines()
            .filter_map(|line| line.trim().strip_prefix("name: "));
        let names: Vec<&str> = names.collect();
        let known: Vec<&str> = (0..names.len() as u32).map(reason).collect();
        assert_eq!(known, names);
        assert_eq!(reason(names.len() as u32), "unknown");
    }

    #[test]
    fn what_a_server_has_said() {
        let attrs = || -> Result<Attrs, NetlinkError> {
            Attrs::default()
                .with(DEVICE, 3_u32)?
                .with(CONNECTION, 1_u32)?
                .with(ERROR, 28_u32)?
                .with(COMMAND, 0_u32)?
                .with(OFFSET, 4096_u64)?
                .with(LENGTH, 512_u32)?
                .with(TEXT, "no \"room\"\n")
        };
        let event = parse(Driver::Rnbd, SERVER_ERROR, &attrs().unwrap().into()).unwrap();
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            "{\"event\":\"server-error\",\"index\":3,\"connection\":1,\"error\":28,\
             \"text\":\"no \\\"room\\\"\\n\",\"command\":\"read\",\"offset\":4096,\"length\":512}"
        );
    }

    #[test]
    fn what_is_new_is_ignored() {
        let attrs = Attrs::default().with(DEVICE, 3_u32).unwrap();
        assert_eq!(parse(Driver::Rnbd, 99, &attrs.into()), None);
        assert_eq!(parse(Driver::Rnbd, CONNECTED, &Answer::default()), None);
    }

    #[test]
    fn a_dead_link() {
        let link = |command| {
            let attrs = Attrs::default().with(INDEX, 3_u32).unwrap();
            parse(Driver::Nbd, command, &attrs.into())
        };
        assert_eq!(link(LINK_DEAD), Some(Event::new(Kind::ConnectionDead, 3)));
        assert_eq!(link(1), None);
    }
}
