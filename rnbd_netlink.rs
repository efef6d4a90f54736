// SPDX-License-Identifier: GPL-2.0
//! The generic netlink family "nbd".
//!
//! This is one of the two front ends; the other one is `rnbd_ioctl.rs`.
//!
//! C header: [`include/uapi/linux/nbd-netlink.h`](srctree/include/uapi/linux/nbd-netlink.h)

#![forbid(unsafe_code)]

mod connect;
pub(crate) mod events;
mod handover;
pub(crate) mod listing;

use crate::{
    kapi::{
        block::gendisk::Disk,
        errno::EOPNOTSUPP,
        net::{
            attr::{
                self,
                Attr, //
            },
            genl::{
                Commands,
                Info,
                Policy, //
            },
        },
        task, //
    },
    rnbd_dev::{
        connect::Setup,
        disconnect::Target,
        Device,
        Nbd, //
    },
    rnbd_registry::Registry, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

const CMD_CONNECT: u8 = 1;
const CMD_DISCONNECT: u8 = 2;
const CMD_RECONFIGURE: u8 = 3;
const CMD_STATUS: u8 = 5;

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_CLIENT_FLAGS: u16 = 6;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_DEVICE_LIST: u16 = 9;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;

const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// The commands of the family.
pub(crate) struct Netlink {
    pub(crate) registry: Arc<Registry>,
}

impl Commands for Netlink {
    const NAME: &'static CStr = c"nbd";
    const VERSION: u32 = 1;
    /// See `nbd_attr_policy`.
    const POLICY: &'static [Policy] = &[
        Policy::ANY,
        Policy::U32,
        Policy::U64,
        Policy::U64,
        Policy::U64,
        Policy::U64,
        Policy::U64,
        Policy::NESTED,
        Policy::U64,
        Policy::NESTED,
        Policy::STRING,
    ];
    const COMMANDS: &'static [u8] = &[CMD_CONNECT, CMD_DISCONNECT, CMD_RECONFIGURE, CMD_STATUS];

    fn run(&self, command: u8, info: &Info<'_>) -> Result {
        match command {
            CMD_CONNECT => self.connect(info),
            CMD_DISCONNECT => self.disconnect(info),
            CMD_RECONFIGURE => self.reconfigure(info),
            CMD_STATUS => self.status(info),
            _ => Err(EOPNOTSUPP.into()),
        }
    }
}

impl Netlink {
    /// Connects a device (`nbd_genl_connect()`).
    ///
    /// # Errors
    ///
    /// - `EPERM`: the sender does not have `CAP_SYS_ADMIN`.
    /// - `EINVAL`: an attribute is missing or not valid, or the device is going down.
    /// - `EBUSY`: the device or a socket is in use.
    /// - `ENOSPC`: no index is left.
    /// - Those of adding a device and of [`Device::connect()`].
    fn connect(&self, info: &Info<'_>) -> Result {
        check_capable(info)?;
        let wanted = info.attr(ATTR_INDEX).and_then(|a| a.u32());
        if wanted.is_some_and(|index| index >= self.registry.limit()) {
            info.complain(Some(ATTR_INDEX), c"no device can have such an index");
            return Err(EINVAL);
        }
        info.require(ATTR_SOCKETS, c"at least one socket is needed")?;
        info.require(ATTR_SIZE_BYTES, c"a size in bytes is needed")?;
        let mut setup = self.parse_setup(info)?;
        setup.namespace = Some(Arc::new(info.namespace()?, GFP_KERNEL)?);
        let device = connect_any(&self.registry, info, wanted, &setup).inspect_err(|e| {
            if *e == EBUSY {
                info.complain(Some(ATTR_SOCKETS), c"a socket or the device is in use");
            }
        })?;
        let Some(device) = device else {
            info.complain(Some(ATTR_INDEX), c"the device is in use");
            return Err(EBUSY);
        };
        // As in nbd.c, the device is connected even if the reply is lost.
        let _ = info.reply(CMD_CONNECT, ATTR_INDEX, &device.index.to_ne_bytes());
        Ok(())
    }

    /// Disconnects a device (`nbd_genl_disconnect()`).
    ///
    /// The index may belong to another user of the device by now. A message with a backend
    /// identifier is for the device that has this backend only. nbd.c ignores the identifier.
    ///
    /// # Errors
    ///
    /// - `EPERM`: the sender does not have `CAP_SYS_ADMIN`.
    /// - `EINVAL`: the device does not have the backend that the message names.
    /// - Those of [`Self::device()`].
    fn disconnect(&self, info: &Info<'_>) -> Result {
        check_capable(info)?;
        let backend = info.attr(ATTR_BACKEND_IDENTIFIER);
        let target = backend.map_or(Target::Any, |a| Target::Backend(a.string()));
        let device = self.device(info)?;
        device.disconnect_and_put(target).inspect_err(|_| {
            info.complain(
                Some(ATTR_BACKEND_IDENTIFIER),
                c"the device has another backend",
            );
        })
    }

    /// Changes a device or replaces its dead connections (`nbd_genl_reconfigure()`).
    ///
    /// # Errors
    ///
    /// - `EPERM`: the sender does not have `CAP_SYS_ADMIN`.
    /// - Those of [`Self::device()`] and of [`Device::reconfigure()`].
    fn reconfigure(&self, info: &Info<'_>) -> Result {
        check_capable(info)?;
        let setup = self.parse_setup(info)?;
        self.device(info)?.reconfigure(&setup)
    }

    /// Returns the device that a message names.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the message names no device, or there is no such device, or it is being removed.
    fn device(&self, info: &Info<'_>) -> Result<Arc<Disk<Nbd>>> {
        let index = info.require(ATTR_INDEX, c"the index of a device is needed")?;
        let index = index.u32().ok_or(EINVAL)?;
        let Some(device) = self.registry.find(index) else {
            info.complain(Some(ATTR_INDEX), c"there is no such device");
            return Err(EINVAL);
        };
        if device.is_dying() {
            info.complain(Some(ATTR_INDEX), c"the device is being removed");
            return Err(EINVAL);
        }
        Ok(device)
    }

    /// Parses the attributes of a connect or reconfigure message.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: an attribute is not valid.
    /// - `ENOMEM`.
    fn parse_setup<'a>(&self, info: &Info<'a>) -> Result<Setup<'a>> {
        let number = |kind| info.attr(kind).and_then(|a: Attr<'a>| a.u64());
        let jiffies = |kind| number(kind).map(task::seconds_to_jiffies);
        let mut setup = Setup {
            size_bytes: number(ATTR_SIZE_BYTES),
            block_bytes: number(ATTR_BLOCK_SIZE_BYTES),
            timeout_jiffies: jiffies(ATTR_TIMEOUT),
            dead_timeout_jiffies: jiffies(ATTR_DEAD_CONN_TIMEOUT),
            server_flags: number(ATTR_SERVER_FLAGS),
            client_flags: number(ATTR_CLIENT_FLAGS),
            sockets: sockets(info)?,
            backend: info.attr(ATTR_BACKEND_IDENTIFIER).map(|a| a.string()),
            ..Setup::default()
        };
        set_owner(&self.registry, info, &mut setup)?;
        Ok(setup)
    }

    /// Reports whether a device, or each device, is in use (`nbd_genl_status()`).
    ///
    /// # Errors
    ///
    /// `ENOMEM`, and those of sending the reply.
    fn status(&self, info: &Info<'_>) -> Result {
        let wanted = info.attr(ATTR_INDEX).and_then(|a| a.u32());
        // nbd.c takes this value for "all devices".
        let wanted = wanted.filter(|index| *index != u32::MAX);
        let mut list = KVec::new();
        self.registry.for_each(|device| {
            if wanted.is_none_or(|wanted| wanted == device.index) {
                put_status(&mut list, device)?;
            }
            Ok(())
        })?;
        info.reply(CMD_STATUS, ATTR_DEVICE_LIST, &list)
    }
}

/// Checks that a message has no attributes but `known` ones. Others belong to other commands of the family: netlink has
/// refused what none of them has.
///
/// # Errors
///
/// `EINVAL`: it has such an attribute.
fn refuse_others(info: &Info<'_>, known: &[u16]) -> Result {
    if let Some(other) = info.kind_other_than(known) {
        info.complain(Some(other), c"the command does not have this attribute");
        return Err(EINVAL);
    }
    Ok(())
}

/// Makes the sender the owner of the device, if it has asked for that.
///
/// # Errors
///
/// - `EINVAL`: the message does not come from a socket.
/// - `ENOMEM`.
fn set_owner(registry: &Registry, info: &Info<'_>, setup: &mut Setup<'_>) -> Result {
    if setup.makes_owner() {
        registry.expect_owners();
        setup.owner = Some(Arc::new(info.sender()?, GFP_KERNEL)?);
    }
    Ok(())
}

/// Connects the device `wanted`, or an unused one, which is added if there is none. Returns the device, or nothing
/// if `wanted` is in use.
///
/// # Errors
///
/// - `EINVAL`: the device is going down.
/// - `ENOSPC`: no index is left.
/// - Those of adding a device and of [`Device::connect()`].
fn connect_any(
    registry: &Arc<Registry>,
    info: &Info<'_>,
    wanted: Option<u32>,
    setup: &Setup<'_>,
) -> Result<Option<Arc<Disk<Nbd>>>> {
    loop {
        let sockets = setup.sockets.len() as u32;
        let device = registry
            .find_or_add(wanted, Some(sockets.max(1)))
            .inspect_err(|e| {
                if *e == ENOSPC {
                    info.complain(None, c"no index is left");
                }
            })?;
        if wanted.is_some() {
            refuse_if_going_down(info, &device)?;
        }
        if device.connect(setup)? {
            return Ok(Some(device));
        }
        // Another task was faster. Another device will do, unless the message names this one.
        if wanted.is_some() {
            refuse_if_going_down(info, &device)?;
            return Ok(None);
        }
    }
}

/// Checks that the sender may administer the system (`netlink_capable()`).
///
/// # Errors
///
/// `EPERM`: the sender does not have `CAP_SYS_ADMIN`.
fn check_capable(info: &Info<'_>) -> Result {
    if !info.may_administer() {
        return Err(EPERM);
    }
    Ok(())
}

/// Checks that a device is neither being removed nor about to be after a disconnect.
///
/// # Errors
///
/// `EINVAL`: the device is going down.
fn refuse_if_going_down(info: &Info<'_>, device: &Device) -> Result {
    if device.is_going_down() {
        info.complain(Some(ATTR_INDEX), c"the device is being removed");
        return Err(EINVAL);
    }
    Ok(())
}

/// Appends a device's status to a reply (`populate_nbd_status()`).
fn put_status(list: &mut KVec<u8>, device: &Device) -> Result {
    let mut item = KVec::new();
    attr::put(&mut item, DEVICE_INDEX, &device.index.to_ne_bytes())?;
    let connected = u8::from(device.is_in_use());
    attr::put(&mut item, DEVICE_CONNECTED, &[connected])?;
    attr::put(list, DEVICE_ITEM, &item)
}

/// Parses the file descriptors of the sockets (`nbd_genl_foreach_sock()`).
///
/// # Errors
///
/// - `EINVAL`: an attribute is not valid.
/// - `ENOMEM`.
fn sockets(info: &Info<'_>) -> Result<KVec<u32>> {
    let mut fds = KVec::new();
    let Some(list) = info.attr(ATTR_SOCKETS) else {
        return Ok(fds);
    };
    for (kind, item) in list.nested() {
        if kind != SOCK_ITEM {
            info.complain(Some(ATTR_SOCKETS), c"sockets must be in a SOCK_ITEM");
            return Err(EINVAL);
        }
        // The last of several counts, as in `nla_parse_nested_deprecated()`.
        let mut last = None;
        for (kind, value) in item {
            if kind == SOCK_FD {
                last = Some(value.u32().ok_or(EINVAL).inspect_err(|_| {
                    info.complain(Some(ATTR_SOCKETS), c"a socket's number must have 32 bits");
                })?);
            }
        }
        if let Some(fd) = last {
            fds.push(fd, GFP_KERNEL)?;
        }
    }
    Ok(fds)
}
