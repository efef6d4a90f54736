// SPDX-License-Identifier: GPL-2.0

//! The family "nbd" (linux/nbd-netlink.h), which both drivers have.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::netlink::{Attrs, Family, NetlinkError};

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;

const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// What a device is to be connected with.
pub struct Setup {
    /// `None`: the kernel chooses an unused device.
    pub index: Option<u32>,
    pub size: u64,
    pub block_size: u32,
    /// For rnbd only, as the next one.
    pub preferred_block_size: Option<u32>,
    pub max_payload: Option<u32>,
    /// Whether reads must be answered by structured replies. For rnbd only.
    pub structured_replies: bool,
    pub flags: u16,
    /// In seconds.
    pub timeout: Option<u64>,
    /// In seconds.
    pub dead_conn_timeout: Option<u64>,
    pub backend: Option<String>,
    pub sockets: Vec<OwnedFd>,
}

/// What is to change of a device that is connected by netlink.
#[derive(Default)]
pub struct Change<'a> {
    /// New connections, which take the places of dead ones. More than are dead are ignored.
    pub sockets: &'a [OwnedFd],
    /// In seconds.
    pub timeout: Option<u64>,
    /// In seconds.
    pub dead_conn_timeout: Option<u64>,
}

fn sockets_attr(sockets: &[OwnedFd]) -> Result<Attrs, NetlinkError> {
    sockets.iter().try_fold(Attrs::default(), |list, socket| {
        let item = Attrs::default().with(SOCK_FD, socket.as_raw_fd())?;
        list.nest(SOCK_ITEM, item)
    })
}

/// The family, as far as the tool uses it.
pub struct Nbd(Family);

impl Nbd {
    /// `None`: no driver is loaded.
    ///
    /// # Errors
    ///
    /// Those of [`Family::open`].
    pub fn open() -> Result<Option<Self>, NetlinkError> {
        Ok(Family::open("nbd")?.map(Self))
    }

    /// Connects a device, and returns its index.
    ///
    /// # Errors
    ///
    /// `Refused`: the kernel's reason. Others: those of [`Family::ask`].
    pub fn connect(&self, setup: &Setup) -> Result<u32, NetlinkError> {
        let attrs = Attrs::default()
            .with_some(INDEX, setup.index)?
            .with(SIZE_BYTES, setup.size)?
            .with(BLOCK_SIZE_BYTES, u64::from(setup.block_size))?
            .with(SERVER_FLAGS, u64::from(setup.flags))?
            .with_some(TIMEOUT, setup.timeout)?
            .with_some(DEAD_CONN_TIMEOUT, setup.dead_conn_timeout)?
            .with_some(BACKEND_IDENTIFIER, setup.backend.as_deref())?
            .nest(SOCKETS, sockets_attr(&setup.sockets)?)?;
        let answer = self.0.ask(CONNECT, attrs)?;
        answer
            .number(INDEX)
            .ok_or_else(|| NetlinkError::Malformed("the reply names no device".into()))
    }

    /// Disconnects a device. With an identifier, rnbd does so only if it is the device's; nbd.ko ignores it.
    ///
    /// # Errors
    ///
    /// Those of [`Family::ask`].
    pub fn disconnect(&self, index: u32, backend: Option<&str>) -> Result<(), NetlinkError> {
        self.change(DISCONNECT, index, backend, Attrs::default())
    }

    /// Changes the size of a device, which must have this identifier.
    ///
    /// # Errors
    ///
    /// Those of [`Family::ask`].
    pub fn resize(
        &self,
        index: u32,
        backend: Option<&str>,
        bytes: u64,
    ) -> Result<(), NetlinkError> {
        let attrs = Attrs::default().with(SIZE_BYTES, bytes)?;
        self.change(RECONFIGURE, index, backend, attrs)
    }

    /// Changes a device, which must have this identifier.
    ///
    /// # Errors
    ///
    /// Those of [`Family::ask`].
    pub fn reconfigure(
        &self,
        index: u32,
        backend: Option<&str>,
        change: &Change<'_>,
    ) -> Result<(), NetlinkError> {
        let mut attrs = Attrs::default()
            .with_some(TIMEOUT, change.timeout)?
            .with_some(DEAD_CONN_TIMEOUT, change.dead_conn_timeout)?;
        if !change.sockets.is_empty() {
            attrs = attrs.nest(SOCKETS, sockets_attr(change.sockets)?)?;
        }
        self.change(RECONFIGURE, index, backend, attrs)
    }

    fn change(
        &self,
        command: u8,
        index: u32,
        backend: Option<&str>,
        attrs: Attrs,
    ) -> Result<(), NetlinkError> {
        let attrs = attrs
            .with(INDEX, index)?
            .with_some(BACKEND_IDENTIFIER, backend)?;
        self.0.ask(command, attrs).map(drop)
    }
}
