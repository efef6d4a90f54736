// SPDX-License-Identifier: GPL-2.0

//! What is known of a device and of its connections. What is not known is `None`, and null in JSON.

use serde::{Deserialize, Serialize};

use crate::netlink::tls::Tls;

/// Whether a device has a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is no session.
    Unused,
    /// At least one connection is alive. nbd.ko tells only that there is a session.
    Connected,
    /// No connection is alive, but new ones can be brought.
    Lost,
    /// A user has ended the session, but the device is still open.
    Ended,
    /// The tool is older than the driver.
    Unknown,
}

impl State {
    /// The states of a device that has a session.
    pub const IN_SESSION: [Self; 3] = [Self::Connected, Self::Lost, Self::Ended];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unused => "unused",
            Self::Connected => "connected",
            Self::Lost => "lost",
            Self::Ended => "ended",
            Self::Unknown => "unknown",
        }
    }
}

/// By which interface a session was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interface {
    Ioctl,
    Netlink,
}

impl Interface {
    /// The one that has this number in the family "rnbd".
    pub fn of_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Ioctl),
            1 => Some(Self::Netlink),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Ioctl => "ioctl",
            Self::Netlink => "netlink",
        }
    }
}

/// What tells one session of a device from the next one, which may have the same index and identifier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// The process that has started it.
    pub pid: Option<u32>,
    /// The inode of the file in sysfs that says so: both drivers make it for each session, and sysfs gives no
    /// number twice. One process may start several sessions.
    #[serde(default)]
    pub file: Option<u64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Device {
    pub index: u32,
    /// The path of its node.
    pub device: String,
    pub state: State,
    pub interface: Option<Interface>,
    pub pid: Option<u32>,
    /// See [`Session::file`].
    #[serde(skip)]
    pub session_file: Option<u64>,
    pub backend: Option<String>,
    /// In bytes.
    pub size: u64,
    /// In bytes.
    pub block_size: Option<u32>,
    pub read_only: Option<bool>,
    /// The names of the server's transmission flags.
    pub flags: Option<Vec<String>>,
    /// The same flags.
    #[serde(skip)]
    pub flag_bits: Option<u16>,
    pub connections: Option<u32>,
    pub alive: Option<u32>,
    pub timeout_ms: Option<u64>,
    pub dead_conn_timeout_ms: Option<u64>,
    /// Whether the server uses structured replies.
    pub structured_replies: Option<bool>,
}

impl Device {
    /// A device without a session.
    pub fn unused(index: u32) -> Self {
        Self {
            index,
            device: format!("/dev/nbd{index}"),
            state: State::Unused,
            interface: None,
            pid: None,
            session_file: None,
            backend: None,
            size: 0,
            block_size: None,
            read_only: None,
            flags: None,
            flag_bits: None,
            connections: None,
            alive: None,
            timeout_ms: None,
            dead_conn_timeout_ms: None,
            structured_replies: None,
        }
    }

    pub fn name(&self) -> String {
        format!("nbd{}", self.index)
    }

    pub fn session(&self) -> Session {
        Session {
            pid: self.pid,
            file: self.session_file,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectionState {
    Alive,
    Draining,
    Dead,
    Unknown,
}

impl ConnectionState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Draining => "draining",
            Self::Dead => "dead",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Connection {
    pub index: u32,
    pub state: ConnectionState,
    pub peer: Option<String>,
    pub local: Option<String>,
    pub protocol: Option<&'static str>,
    /// Whether an upper layer protocol, such as TLS, is on top of the socket.
    pub ulp: bool,
    /// How the kernel encrypts it, if it does and that was asked.
    pub tls: Option<Tls>,
    pub in_flight: Option<u64>,
    pub requests: Option<u64>,
    pub replies: Option<u64>,
    pub errors: Option<u64>,
    pub bytes_sent: Option<u64>,
    pub bytes_received: Option<u64>,
    pub reconnects: Option<u32>,
    /// The time since anything was received.
    pub idle_ms: Option<u64>,
    /// For how long the server has owed replies and been silent.
    pub silent_ms: Option<u64>,
    /// The age of the oldest request in flight; 0: there is none.
    pub oldest_ms: Option<u64>,
}

impl Connection {
    /// A connection of which nothing more is known.
    #[cfg(test)]
    pub fn new(index: u32, state: ConnectionState) -> Self {
        Self {
            index,
            state,
            peer: None,
            local: None,
            protocol: None,
            ulp: false,
            tls: None,
            in_flight: None,
            requests: None,
            replies: None,
            errors: None,
            bytes_sent: None,
            bytes_received: None,
            reconnects: None,
            idle_ms: None,
            silent_ms: None,
            oldest_ms: None,
        }
    }

    pub fn is_alive(&self) -> bool {
        self.state == ConnectionState::Alive
    }
}
