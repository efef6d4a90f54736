// SPDX-License-Identifier: GPL-2.0
//! The generic netlink family "rnbd": lists devices and connections.
//!
//! `Documentation/netlink/rnbd.yaml` describes it for programs.

#![forbid(unsafe_code)]

use super::{
    connect::{
        self,
        CMD_CONNECT, //
    },
    handover, //
};
use crate::{
    kapi::{
        errno::EOPNOTSUPP,
        net::{
            attr,
            dump::Dump,
            genl::{
                Commands,
                Info,
                List,
                Policy, //
            },
        },
        task, //
    },
    rnbd_dev::{
        running::Running,
        Device, //
    },
    rnbd_registry::Registry,
    rnbd_session::Session,
    rnbd_sock::{
        Connection,
        Life, //
    }, //
    rnbd_table::Structured,
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

const CMD_DEVICE_GET: u8 = 1;
const CMD_CONNECTION_GET: u8 = 2;
/// The numbers in between are those of events.
const CMD_HANDOVER: u8 = 8;

/// The requirements for the attributes of all messages. A message may only have those of its command.
const POLICY: &[Policy] = connect::POLICY;

/// The index of a device, in each message and answer.
const INDEX: u16 = 1;

/// The other attributes of a device.
mod device {
    pub(super) const STATE: u16 = 2;
    pub(super) const INTERFACE: u16 = 3;
    pub(super) const PID: u16 = 4;
    pub(super) const BACKEND: u16 = 5;
    pub(super) const SIZE: u16 = 6;
    pub(super) const BLOCK_SIZE: u16 = 7;
    pub(super) const FLAGS: u16 = 8;
    pub(super) const CONNECTIONS: u16 = 9;
    pub(super) const ALIVE: u16 = 10;
    pub(super) const TIMEOUT: u16 = 11;
    pub(super) const DEAD_CONN_TIMEOUT: u16 = 12;
    pub(super) const STRUCTURED_REPLIES: u16 = 13;
}

/// The other attributes of a connection.
mod connection {
    pub(super) const INDEX: u16 = 2;
    pub(super) const STATE: u16 = 3;
    pub(super) const PEER: u16 = 4;
    pub(super) const LOCAL: u16 = 5;
    pub(super) const PROTOCOL: u16 = 6;
    pub(super) const ULP: u16 = 7;
    pub(super) const IN_FLIGHT: u16 = 8;
    pub(super) const REQUESTS: u16 = 9;
    pub(super) const REPLIES: u16 = 10;
    pub(super) const ERRORS: u16 = 11;
    pub(super) const BYTES_SENT: u16 = 12;
    pub(super) const BYTES_RECEIVED: u16 = 13;
    pub(super) const RECONNECTS: u16 = 14;
    pub(super) const IDLE: u16 = 15;
    pub(super) const SILENT: u16 = 16;
    pub(super) const OLDEST: u16 = 17;
}

/// How much is told of a backend's identifier, in bytes: what is told of a device has to fit into a message.
const BACKEND_BYTES: usize = 2048;

/// The state of a device.
#[derive(Clone, Copy)]
enum State {
    Unused = 0,
    Connected = 1,
    Lost = 2,
    Ended = 3,
}

/// The commands of the family.
pub(crate) struct Listing {
    pub(crate) registry: Arc<Registry>,
}

impl Commands for Listing {
    const NAME: &'static CStr = c"rnbd";
    const VERSION: u32 = 1;
    const POLICY: &'static [Policy] = POLICY;
    const COMMANDS: &'static [u8] = &[CMD_HANDOVER, CMD_CONNECT];
    const DUMPS: &'static [List] = &[
        List {
            command: CMD_DEVICE_GET,
            privileged: false,
        },
        // debugfs shows connections to root only.
        List {
            command: CMD_CONNECTION_GET,
            privileged: true,
        },
    ];
    const STRICT: bool = true;

    fn run(&self, command: u8, info: &Info<'_>) -> Result {
        match command {
            CMD_HANDOVER => handover::run(&self.registry, info),
            CMD_CONNECT => connect::run(&self.registry, info),
            _ => Err(EOPNOTSUPP.into()),
        }
    }

    /// Lists devices or connections, of one device if the message names it.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the message has an attribute that only other commands have.
    /// - `ENODEV`: there is no device that has the index in the message.
    /// - `ENOMEM`, and `EMSGSIZE` if this part of the answer is full.
    fn dump(&self, command: u8, dump: &mut Dump<'_>) -> Result {
        // Netlink has refused what no command of the family has.
        let mut others = INDEX + 1..POLICY.len() as u16;
        if others.any(|kind| dump.attr(kind).is_some()) {
            return Err(EINVAL);
        }
        // An allocation must not wait for writeback, which may be waiting for the device that is listed.
        task::memalloc_noio(|| match command {
            CMD_DEVICE_GET => self.list(dump, add_device),
            CMD_CONNECTION_GET => self.list(dump, add_connections),
            _ => Err(EOPNOTSUPP.into()),
        })
    }
}

impl Listing {
    /// Calls `add` for the devices that are left to be listed. Where the last part of the answer has ended in
    /// the middle of a device's connections, `add` learns how many of them were listed.
    fn list(
        &self,
        dump: &mut Dump<'_>,
        add: fn(&mut Dump<'_>, &Device, usize) -> Result,
    ) -> Result {
        let only = dump.attr(INDEX).and_then(|a| a.u32());
        let [from, listed] = dump.position();
        let mut next = u32::try_from(from)?.max(only.unwrap_or(0));
        while only.is_none_or(|only| next == only) {
            let Some(device) = self.registry.next(next) else {
                break;
            };
            if only.is_some_and(|only| device.index != only) {
                break;
            }
            let listed = if device.index as usize == from {
                listed
            } else {
                0
            };
            add(dump, &device, listed)?;
            next = device.index + 1;
            dump.set_position([next as usize, 0]);
        }
        match only {
            Some(only) if next == only => Err(ENODEV),
            _ => Ok(()),
        }
    }
}

/// Adds a device to a list.
///
/// # Errors
///
/// `ENOMEM`, and `EMSGSIZE` if this part of the answer is full.
fn add_device(dump: &mut Dump<'_>, device: &Device, _: usize) -> Result {
    dump.add(&device_attributes(device)?)
}

/// Adds the connections of a device to a list, of which so many were added before.
///
/// # Errors
///
/// `ENOMEM`, and `EMSGSIZE` if this part of the answer is full.
fn add_connections(dump: &mut Dump<'_>, device: &Device, listed: usize) -> Result {
    let Some(running) = device.running() else {
        return Ok(());
    };
    // Each place counts twice: there is another connection while a handover drains it.
    let mut next = listed;
    while let Some(both) = running.session.connections_at(next / 2) {
        let connection = match next % 2 {
            0 => Some(&both.0),
            _ => both.1.as_ref(),
        };
        if let Some(connection) = connection {
            let mut list = connection_attributes(connection)?;
            if let Some(oldest_ms) = oldest_ms(device, &running, connection) {
                put_u64(&mut list, connection::OLDEST, oldest_ms)?;
            }
            put_u32(&mut list, INDEX, device.index)?;
            dump.add(&list)?;
        }
        next += 1;
        dump.set_position([device.index as usize, next]);
    }
    Ok(())
}

/// Returns what is told of a device.
///
/// # Errors
///
/// `ENOMEM`.
fn device_attributes(device: &Device) -> Result<KVec<u8>> {
    let mut list = KVec::new();
    put_u32(&mut list, INDEX, device.index)?;
    let Some(running) = device.running() else {
        put_u32(&mut list, device::STATE, State::Unused as u32)?;
        return Ok(list);
    };
    put_session(&mut list, &running)?;
    if let Some(backend) = running.backend() {
        put_backend(&mut list, device::BACKEND, backend)?;
    }
    Ok(list)
}

/// Appends what is told of a session.
///
/// # Errors
///
/// `ENOMEM`.
fn put_session(list: &mut KVec<u8>, running: &Running) -> Result {
    let session = &running.session;
    let (connections, alive) = session.count();
    put_u32(list, device::STATE, state_of(session, alive) as u32)?;
    put_u32(list, device::INTERFACE, u32::from(running.by_netlink))?;
    put_u32(list, device::PID, running.pid() as u32)?;
    put_u64(list, device::SIZE, running.size_bytes())?;
    put_u32(list, device::BLOCK_SIZE, running.block_bytes())?;
    put_u64(list, device::FLAGS, u64::from(running.flags))?;
    put_u32(list, device::CONNECTIONS, connections as u32)?;
    put_u32(list, device::ALIVE, alive as u32)?;
    put_u64(list, device::TIMEOUT, running.timeout_ms())?;
    if session.table().structured != Structured::No {
        attr::put(list, device::STRUCTURED_REPLIES, &[])?;
    }
    let dead_timeout = usize::try_from(session.dead_timeout_jiffies())?;
    put_u64(
        list,
        device::DEAD_CONN_TIMEOUT,
        task::jiffies_to_ms(dead_timeout),
    )
}

/// Returns the state of a device with this session, of whose connections `alive` are alive.
fn state_of(session: &Session, alive: usize) -> State {
    if alive > 0 {
        State::Connected
    } else if session.table().fate.snapshot().is_end_wanted() {
        State::Ended
    } else {
        State::Lost
    }
}

/// Returns what a connection tells about itself.
///
/// # Errors
///
/// `ENOMEM`.
fn connection_attributes(connection: &Connection) -> Result<KVec<u8>> {
    let mut list = KVec::new();
    let totals = connection.totals();
    let life = connection.life();
    let state = match life {
        Life::Alive => 0,
        Life::Draining => 1,
        Life::Dead => 2,
    };
    // What is in flight on a dead connection is sent again elsewhere, or has failed.
    let (in_flight, silent_ms) = match life {
        Life::Dead => (0, 0),
        Life::Alive | Life::Draining => (totals.in_flight, connection.silent_ms()),
    };
    let incarnation = connection.incarnation();
    put_u32(&mut list, connection::INDEX, u32::from(incarnation.index))?;
    put_u32(&mut list, connection::RECONNECTS, incarnation.reconnects)?;
    put_u32(&mut list, connection::STATE, state)?;
    put_u32(&mut list, connection::PROTOCOL, connection.protocol())?;
    if connection.has_upper_layer() {
        attr::put(&mut list, connection::ULP, &[])?;
    }
    for (kind, number) in [
        (connection::IN_FLIGHT, in_flight),
        (connection::REQUESTS, totals.requests),
        (connection::REPLIES, totals.replies),
        (connection::ERRORS, totals.errors),
        (connection::BYTES_SENT, totals.bytes_sent),
        (connection::BYTES_RECEIVED, totals.bytes_received),
        (connection::IDLE, totals.idle_ms),
        (connection::SILENT, silent_ms),
    ] {
        put_u64(&mut list, kind, number)?;
    }
    let addresses = connection.addresses();
    for (kind, address) in [
        (connection::PEER, &addresses.peer),
        (connection::LOCAL, &addresses.local),
    ] {
        if let Some(address) = address {
            attr::put(&mut list, kind, address.bytes())?;
        }
    }
    Ok(list)
}

/// Returns the age of the oldest request in flight on a connection, in milliseconds; 0 if there is none, and `None` if
/// the connection is dead or that is not known now.
fn oldest_ms(device: &Device, running: &Running, connection: &Connection) -> Option<u64> {
    // Its requests are on other connections now, or wait for one, or have failed.
    if connection.is_dead() {
        return None;
    }
    let table = running.session.table();
    table.oldest_ms(&device.disk, connection.id())
}

/// Appends as much of a backend's identifier as is told.
///
/// # Errors
///
/// `ENOMEM`.
pub(super) fn put_backend(list: &mut KVec<u8>, kind: u16, backend: &CStr) -> Result {
    let all = backend.to_bytes();
    let bytes = all.get(..BACKEND_BYTES).unwrap_or(all);
    attr::put_string(list, kind, bytes)
}

pub(super) fn put_u32(list: &mut KVec<u8>, kind: u16, value: u32) -> Result {
    attr::put(list, kind, &value.to_ne_bytes())
}

pub(super) fn put_u64(list: &mut KVec<u8>, kind: u16, value: u64) -> Result {
    attr::put(list, kind, &value.to_ne_bytes())
}
