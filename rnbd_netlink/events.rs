// SPDX-License-Identifier: GPL-2.0
//! The multicasts of the netlink families "nbd" and "rnbd".
//!
//! `Documentation/netlink/rnbd.yaml` describes those of "rnbd" for programs.

#![forbid(unsafe_code)]

use super::{
    listing::{
        put_backend,
        put_u32,
        put_u64, //
    },
    ATTR_INDEX, //
};
use crate::{
    kapi::{
        net::{
            attr,
            group::Group, //
        },
        task, //
    },
    rnbd_events::{
        Connected,
        Death,
        Event,
        Incarnation,
        Listeners,
        Origin,
        ServerFailure,
        Size, //
    },
    rnbd_shared::Events, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// See `NBD_GENL_MCAST_GROUP_NAME`.
pub(crate) const GROUP: &CStr = c"nbd_mc_group";

/// See `NBD_CMD_LINK_DEAD`.
const CMD_LINK_DEAD: u8 = 4;

/// Multicasts events to the members of the group of the family "nbd".
pub(crate) struct Multicast(pub(crate) Arc<Group>);

impl Events for Multicast {
    /// Multicasts `NBD_CMD_LINK_DEAD` (`nbd_mcast_index()`). It may be lost, for lack
    /// of memory or because a member of the group does not keep up.
    fn link_dead(&self, device: u32) {
        let index = device.to_ne_bytes();
        if let Err(e) = self.0.multicast(CMD_LINK_DEAD, ATTR_INDEX, &index) {
            pr_warn!("nbd{device}: cannot multicast NBD_CMD_LINK_DEAD ({e:?})\n");
        }
    }
}

/// The group of the family "rnbd".
pub(crate) const LISTENERS: &CStr = c"events";

const CMD_CONNECTED: u8 = 3;
const CMD_CONNECTION_DEAD: u8 = 4;
const CMD_RECONNECTED: u8 = 5;
const CMD_DISCONNECTED: u8 = 6;
const CMD_RESIZED: u8 = 7;
const CMD_SERVER_ERROR: u8 = 10;

/// The attributes of an event.
mod attribute {
    pub(super) const DEVICE: u16 = 1;
    pub(super) const CONNECTION: u16 = 2;
    pub(super) const REASON: u16 = 3;
    pub(super) const ERRNO: u16 = 4;
    pub(super) const RECONNECTS: u16 = 5;
    pub(super) const BACKEND: u16 = 6;
    pub(super) const SIZE: u16 = 7;
    pub(super) const BLOCK_SIZE: u16 = 8;
    pub(super) const FLAGS: u16 = 9;
    pub(super) const CONNECTIONS: u16 = 10;
    pub(super) const INTERFACE: u16 = 11;
    pub(super) const PID: u16 = 12;
    pub(super) const ERROR: u16 = 13;
    pub(super) const COMMAND: u16 = 14;
    pub(super) const OFFSET: u16 = 15;
    pub(super) const LENGTH: u16 = 16;
    pub(super) const TEXT: u16 = 17;
    pub(super) const ERROR_OFFSET: u16 = 18;
}

/// Multicasts events to the members of the group of the family "rnbd".
pub(crate) struct Told(pub(crate) Arc<Group>);

impl Listeners for Told {
    fn are_there(&self, origin: &Origin) -> bool {
        self.0.has_listeners(&origin.namespace)
    }

    fn tell(&self, origin: &Origin, event: &Event) {
        let attributes = task::memalloc_noio(|| attributes(origin, event));
        let Ok(attributes) = attributes else {
            return self.0.report_lost(&origin.namespace);
        };
        // A listener that has missed a message learns that from its socket.
        let _ = self
            .0
            .multicast_in(&origin.namespace, command(event), &attributes);
    }
}

/// Returns the number of the command that an event is sent as.
fn command(event: &Event) -> u8 {
    match event {
        Event::Connected(_) => CMD_CONNECTED,
        Event::ConnectionDead(..) => CMD_CONNECTION_DEAD,
        Event::Reconnected(_) => CMD_RECONNECTED,
        Event::Disconnected => CMD_DISCONNECTED,
        Event::Resized(_) => CMD_RESIZED,
        Event::ServerError(_) => CMD_SERVER_ERROR,
    }
}

/// Returns the attributes of an event.
///
/// # Errors
///
/// `ENOMEM`.
fn attributes(origin: &Origin, event: &Event) -> Result<KVec<u8>> {
    let mut list = KVec::new();
    put_u32(&mut list, attribute::DEVICE, origin.device)?;
    if let Some(backend) = &origin.backend {
        put_backend(&mut list, attribute::BACKEND, backend)?;
    }
    match event {
        Event::Connected(connected) => put_connected(&mut list, *connected)?,
        Event::ConnectionDead(incarnation, death) => {
            put_incarnation(&mut list, *incarnation)?;
            put_death(&mut list, *death)?;
        }
        Event::Reconnected(incarnation) => put_incarnation(&mut list, *incarnation)?,
        Event::Disconnected => {}
        Event::Resized(size) => put_size(&mut list, *size)?,
        Event::ServerError(failure) => put_failure(&mut list, failure)?,
    }
    Ok(list)
}

/// Appends what is told of a session that was started. The error is that of [`attributes()`], as for the others.
fn put_connected(list: &mut KVec<u8>, connected: Connected) -> Result {
    put_size(list, connected.size)?;
    put_u64(list, attribute::FLAGS, u64::from(connected.flags))?;
    put_u32(list, attribute::CONNECTIONS, connected.connections)?;
    put_u32(list, attribute::INTERFACE, u32::from(connected.by_netlink))?;
    put_u32(list, attribute::PID, connected.pid as u32)
}

/// Appends what tells a connection from others.
fn put_incarnation(list: &mut KVec<u8>, incarnation: Incarnation) -> Result {
    put_u32(list, attribute::CONNECTION, u32::from(incarnation.index))?;
    put_u32(list, attribute::RECONNECTS, incarnation.reconnects)
}

/// Appends why a connection has died.
fn put_death(list: &mut KVec<u8>, death: Death) -> Result {
    put_u32(list, attribute::REASON, death.reason as u32)?;
    if death.errno != 0 {
        put_u32(list, attribute::ERRNO, u32::from(death.errno))?;
    }
    Ok(())
}

/// Appends what is told of an error that the server has returned.
fn put_failure(list: &mut KVec<u8>, failure: &ServerFailure) -> Result {
    put_incarnation(list, failure.incarnation)?;
    put_u32(list, attribute::ERROR, failure.error)?;
    put_u32(list, attribute::COMMAND, u32::from(failure.command))?;
    put_u64(list, attribute::OFFSET, failure.offset_bytes)?;
    put_u32(list, attribute::LENGTH, failure.len_bytes)?;
    if let Some(at) = failure.at {
        put_u64(list, attribute::ERROR_OFFSET, at)?;
    }
    match failure.text.as_bytes() {
        [] => Ok(()),
        text => attr::put_string(list, attribute::TEXT, text),
    }
}

/// Appends the size of a device.
fn put_size(list: &mut KVec<u8>, size: Size) -> Result {
    put_u64(list, attribute::SIZE, size.bytes)?;
    put_u32(list, attribute::BLOCK_SIZE, size.block_bytes)
}
