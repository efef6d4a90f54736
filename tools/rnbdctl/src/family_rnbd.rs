// SPDX-License-Identifier: GPL-2.0

//! The family "rnbd" (Documentation/netlink/rnbd.yaml), which only that driver has.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use neli::types::Buffer;
use rustix::io::Errno;

use crate::device::{Connection, ConnectionState, Device, Interface, State};
use crate::family_nbd::Setup;
use crate::netlink::{Answer, Attrs, Family, NetlinkError};
use crate::sockaddr;
use crate::wire;

const DEVICE_GET: u8 = 1;
const CONNECTION_GET: u8 = 2;
const HANDOVER: u8 = 8;
const CONNECT: u8 = 9;

/// Attributes of a device.
mod of_device {
    pub const INDEX: u16 = 1;
    pub const STATE: u16 = 2;
    pub const INTERFACE: u16 = 3;
    pub const PID: u16 = 4;
    pub const BACKEND: u16 = 5;
    pub const SIZE: u16 = 6;
    pub const BLOCK_SIZE: u16 = 7;
    pub const FLAGS: u16 = 8;
    pub const CONNECTIONS: u16 = 9;
    pub const ALIVE: u16 = 10;
    pub const TIMEOUT: u16 = 11;
    pub const DEAD_CONN_TIMEOUT: u16 = 12;
    pub const STRUCTURED_REPLIES: u16 = 13;
}

/// Attributes of a connection.
mod of_connection {
    pub const DEVICE: u16 = 1;
    pub const INDEX: u16 = 2;
    pub const STATE: u16 = 3;
    pub const PEER: u16 = 4;
    pub const LOCAL: u16 = 5;
    pub const PROTOCOL: u16 = 6;
    pub const ULP: u16 = 7;
    pub const IN_FLIGHT: u16 = 8;
    pub const REQUESTS: u16 = 9;
    pub const REPLIES: u16 = 10;
    pub const ERRORS: u16 = 11;
    pub const BYTES_SENT: u16 = 12;
    pub const BYTES_RECEIVED: u16 = 13;
    pub const RECONNECTS: u16 = 14;
    pub const IDLE: u16 = 15;
    pub const SILENT: u16 = 16;
    pub const OLDEST: u16 = 17;
}

/// Attributes of a handover.
mod of_handover {
    pub const DEVICE: u16 = 1;
    pub const CONNECTION: u16 = 2;
    pub const SOCKETS: u16 = 3;
    pub const DRAIN: u16 = 4;
    pub const BACKEND: u16 = 5;
}

/// What a device's connections are to be replaced by.
pub struct Handover<'a> {
    pub index: u32,
    /// The place of the connection to be replaced; `None`: all are.
    pub connection: Option<u32>,
    /// One, or as many as the device has connections.
    pub sockets: &'a [OwnedFd],
    /// For how long the connections that are replaced may finish what is in flight.
    pub drain: Duration,
    pub backend: Option<&'a str>,
}

/// Attributes of a command that connects a device.
mod to_connect {
    pub const DEVICE: u16 = 1;
    pub const SOCKETS: u16 = 3;
    pub const BACKEND: u16 = 5;
    pub const SIZE: u16 = 6;
    pub const FLAGS: u16 = 7;
    pub const TIMEOUT: u16 = 8;
    pub const DEAD_CONN_TIMEOUT: u16 = 9;
    pub const MINIMUM_BLOCK_SIZE: u16 = 10;
    pub const PREFERRED_BLOCK_SIZE: u16 = 11;
    pub const MAXIMUM_PAYLOAD: u16 = 12;
    pub const STRUCTURED_REPLIES: u16 = 18;
}

const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;

/// The family, as far as the tool uses it.
pub struct Rnbd(Family);

impl Rnbd {
    /// `None`: the driver that is loaded, if any, does not have it.
    ///
    /// # Errors
    ///
    /// Those of [`Family::open`].
    pub fn open() -> Result<Option<Self>, NetlinkError> {
        Ok(Family::open("rnbd")?.map(Self))
    }

    /// Connects a device, and returns its index. `None`: the driver is older than the command.
    ///
    /// # Errors
    ///
    /// `Refused`: the kernel's reason. Others: those of [`Family::ask`].
    pub fn connect(&self, setup: &Setup) -> Result<Option<u32>, NetlinkError> {
        use to_connect::*;
        let numbers = setup.sockets.iter().map(|socket| socket.as_raw_fd());
        let sockets: Vec<u8> = numbers.flat_map(i32::to_ne_bytes).collect();
        let ms = |seconds: u64| seconds.saturating_mul(1000);
        let attrs = Attrs::default()
            .with_some(DEVICE, setup.index)?
            .with(SOCKETS, Buffer::from(sockets))?
            .with_some(BACKEND, setup.backend.as_deref())?
            .with(SIZE, setup.size)?
            .with(FLAGS, u64::from(setup.flags))?
            .with_some(TIMEOUT, setup.timeout.map(ms))?
            .with_some(DEAD_CONN_TIMEOUT, setup.dead_conn_timeout.map(ms))?
            .with(MINIMUM_BLOCK_SIZE, setup.block_size)?
            .with_some(PREFERRED_BLOCK_SIZE, setup.preferred_block_size)?
            .with_some(MAXIMUM_PAYLOAD, setup.max_payload)?
            .with_some(STRUCTURED_REPLIES, setup.structured_replies.then_some(()))?;
        let answer = match self.0.ask(CONNECT, attrs) {
            Err(NetlinkError::Refused {
                errno: Errno::OPNOTSUPP,
                ..
            }) => return Ok(None),
            answer => answer?,
        };
        match answer.number(DEVICE) {
            None => Err(NetlinkError::Malformed("the reply names no device".into())),
            index => Ok(index),
        }
    }

    /// Whether the driver knows of structured replies.
    ///
    /// # Errors
    ///
    /// Those of [`Family::knows`].
    pub fn has_structured_replies(&self) -> Result<bool, NetlinkError> {
        self.0.knows(CONNECT, to_connect::STRUCTURED_REPLIES)
    }

    /// All devices, unused ones among them.
    ///
    /// # Errors
    ///
    /// Those of [`Family::dump`].
    pub fn devices(&self) -> Result<Vec<Device>, NetlinkError> {
        let answers = self.0.dump(DEVICE_GET, Attrs::default())?;
        Ok(answers.iter().filter_map(device).collect())
    }

    /// The connections of one device, or of all, each with its device's index.
    ///
    /// # Errors
    ///
    /// Those of [`Family::dump`].
    pub fn connections(&self, index: Option<u32>) -> Result<Vec<(u32, Connection)>, NetlinkError> {
        let attrs = Attrs::default().with_some(of_connection::DEVICE, index)?;
        let answers = self.0.dump(CONNECTION_GET, attrs)?;
        Ok(answers.iter().filter_map(connection).collect())
    }

    /// Replaces connections, alive or dead. The new ones are in use when this returns.
    ///
    /// # Errors
    ///
    /// `Refused`: the kernel's reason. Nothing has changed then, but the sockets may have been shut down.
    pub fn hand_over(&self, handover: &Handover<'_>) -> Result<(), NetlinkError> {
        let sockets: Vec<u8> = handover
            .sockets
            .iter()
            .flat_map(|socket| socket.as_raw_fd().to_ne_bytes())
            .collect();
        let drain = u32::try_from(handover.drain.as_millis()).unwrap_or(u32::MAX);
        let attrs = Attrs::default()
            .with(of_handover::DEVICE, handover.index)?
            .with_some(of_handover::CONNECTION, handover.connection)?
            .with(of_handover::SOCKETS, sockets.as_slice())?
            .with(of_handover::DRAIN, drain)?
            .with_some(of_handover::BACKEND, handover.backend)?;
        self.0.ask(HANDOVER, attrs).map(drop)
    }
}

fn device(answer: &Answer) -> Option<Device> {
    use of_device::*;
    let mut device = Device::unused(answer.number(INDEX)?);
    device.state = match answer.number::<u32>(STATE)? {
        0 => State::Unused,
        1 => State::Connected,
        2 => State::Lost,
        3 => State::Ended,
        _ => State::Unknown,
    };
    device.interface = answer.number(INTERFACE).and_then(Interface::of_number);
    device.pid = answer.number(PID);
    device.backend = answer.text(BACKEND);
    device.size = answer.number(SIZE).unwrap_or(0);
    device.block_size = answer.number(BLOCK_SIZE);
    device.flag_bits = answer.number(FLAGS).map(|flags: u64| flags as u16);
    device.flags = device.flag_bits.map(wire::flag_names);
    device.connections = answer.number(CONNECTIONS);
    device.alive = answer.number(ALIVE);
    device.timeout_ms = answer.number(TIMEOUT);
    device.dead_conn_timeout_ms = answer.number(DEAD_CONN_TIMEOUT);
    device.structured_replies = device
        .flags
        .is_some()
        .then(|| answer.has(STRUCTURED_REPLIES));
    Some(device)
}

fn connection(answer: &Answer) -> Option<(u32, Connection)> {
    use of_connection::*;
    let protocol = answer
        .number(PROTOCOL)
        .and_then(|number: u32| match number {
            IPPROTO_TCP => Some("tcp"),
            IPPROTO_MPTCP => Some("mptcp"),
            _ => None,
        });
    let connection = Connection {
        index: answer.number(INDEX)?,
        state: match answer.number::<u32>(STATE)? {
            0 => ConnectionState::Alive,
            1 => ConnectionState::Draining,
            2 => ConnectionState::Dead,
            _ => ConnectionState::Unknown,
        },
        peer: answer.bytes(PEER).map(sockaddr::show),
        local: answer.bytes(LOCAL).map(sockaddr::show),
        protocol,
        ulp: answer.has(ULP),
        tls: None,
        in_flight: answer.number(IN_FLIGHT),
        requests: answer.number(REQUESTS),
        replies: answer.number(REPLIES),
        errors: answer.number(ERRORS),
        bytes_sent: answer.number(BYTES_SENT),
        bytes_received: answer.number(BYTES_RECEIVED),
        reconnects: answer.number(RECONNECTS),
        idle_ms: answer.number(IDLE),
        silent_ms: answer.number(SILENT),
        oldest_ms: answer.number(OLDEST),
    };
    Some((answer.number(DEVICE)?, connection))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::NetlinkError;

    #[test]
    fn a_device() {
        let attrs = || -> Result<Attrs, NetlinkError> {
            Attrs::default()
                .with(of_device::INDEX, 3_u32)?
                .with(of_device::STATE, 2_u32)?
                .with(of_device::INTERFACE, 1_u32)?
                .with(of_device::PID, 77_u32)?
                .with(of_device::BACKEND, "image")?
                .with(of_device::SIZE, 1_u64 << 30)?
                .with(of_device::BLOCK_SIZE, 4096_u32)?
                .with(of_device::FLAGS, 0x105_u64)?
                .with(of_device::CONNECTIONS, 2_u32)?
                .with(of_device::ALIVE, 0_u32)?
                .with(of_device::TIMEOUT, 0_u64)?
                .with(of_device::DEAD_CONN_TIMEOUT, 20_000_u64)
        };
        let device = device(&attrs().unwrap().into()).unwrap();
        assert_eq!((device.index, device.state), (3, State::Lost));
        assert_eq!(device.interface, Some(Interface::Netlink));
        assert_eq!((device.pid, device.size), (Some(77), 1 << 30));
        assert_eq!(device.backend.as_deref(), Some("image"));
        assert_eq!(device.block_size, Some(4096));
        let flags = device.flags.unwrap();
        assert_eq!(flags, ["flush", "multi-conn"]);
        assert_eq!((device.connections, device.alive), (Some(2), Some(0)));
        assert_eq!(device.timeout_ms, Some(0));
        assert_eq!(device.dead_conn_timeout_ms, Some(20_000));
    }

    #[test]
    fn an_unused_device_has_no_more() {
        let attrs = Attrs::default()
            .with(of_device::INDEX, 3_u32)
            .and_then(|attrs| attrs.with(of_device::STATE, 0_u32));
        let device = device(&attrs.unwrap().into()).unwrap();
        assert_eq!((device.state, device.size), (State::Unused, 0));
        assert_eq!((device.flags, device.connections), (None, None));
    }

    #[test]
    fn a_connection() {
        let peer = [2, 0, 0x2a, 0x39, 127, 0, 0, 1];
        let attrs = || -> Result<Attrs, NetlinkError> {
            Attrs::default()
                .with(of_connection::DEVICE, 3_u32)?
                .with(of_connection::INDEX, 1_u32)?
                .with(of_connection::STATE, 1_u32)?
                .with(of_connection::PEER, &peer[..])?
                .with(of_connection::PROTOCOL, 6_u32)?
                .with(of_connection::ULP, ())?
                .with(of_connection::REQUESTS, 9_u64)?
                .with(of_connection::RECONNECTS, 4_u32)?
                .with(of_connection::SILENT, 1500_u64)?
                .with(of_connection::OLDEST, 1700_u64)
        };
        let (device, connection) = connection(&attrs().unwrap().into()).unwrap();
        assert_eq!((device, connection.index), (3, 1));
        assert_eq!(connection.state, ConnectionState::Draining);
        assert_eq!(connection.peer.as_deref(), Some("127.0.0.1:10809"));
        assert_eq!(connection.local, None);
        assert_eq!((connection.protocol, connection.ulp), (Some("tcp"), true));
        assert_eq!((connection.requests, connection.replies), (Some(9), None));
        assert_eq!(connection.reconnects, Some(4));
        assert_eq!(connection.silent_ms, Some(1500));
        assert_eq!(connection.oldest_ms, Some(1700));
    }

    #[test]
    fn what_has_no_index_is_nothing() {
        assert!(device(&Answer::default()).is_none());
        assert!(connection(&Answer::default()).is_none());
    }
}
