// SPDX-License-Identifier: GPL-2.0
//! The command `connect` of the netlink family "rnbd", which has what `NBD_CMD_CONNECT` cannot say.

#![forbid(unsafe_code)]

use super::{
    check_capable,
    connect_any,
    handover::{
        backend,
        descriptors, //
    },
    refuse_others,
    set_owner, //
};
use crate::{
    kapi::{
        block::limits::{
            valid_block_size,
            RequestSizes,
            SECTOR_BYTES, //
        },
        errno::{
            ENOKEY,
            ENOTCONN,
            ENOTSOCK, //
        },
        net::{
            attr::Attr,
            genl::{
                Info,
                Policy, //
            },
        },
        task, //
    },
    pure::proto::flags,
    rnbd_dev::{
        connect::{
            Setup,
            CFLAG_DESTROY_ON_DISCONNECT,
            CFLAG_DISCONNECT_ON_CLOSE,
            CFLAG_DISCONNECT_ON_RELEASE, //
        },
        USUAL_SIZES, //
    },
    rnbd_registry::Registry, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::Arc, //
};

/// The number of the command in the family. Those below are in `rnbd_netlink/listing.rs`.
pub(super) const CMD_CONNECT: u8 = 9;

/// The attributes of the command.
const DEVICE: u16 = 1;
const SOCKETS: u16 = 3;
const BACKEND: u16 = 5;
const SIZE: u16 = 6;
const FLAGS: u16 = 7;
const TIMEOUT: u16 = 8;
const DEAD_CONN_TIMEOUT: u16 = 9;
const MINIMUM_BLOCK_SIZE: u16 = 10;
const PREFERRED_BLOCK_SIZE: u16 = 11;
const MAXIMUM_PAYLOAD: u16 = 12;
const NO_PARTITION_SCAN: u16 = 13;
const TLS: u16 = 14;
const OWNED: u16 = 15;
const DISCONNECT_ON_CLOSE: u16 = 16;
const DESTROY_ON_DISCONNECT: u16 = 17;
const STRUCTURED_REPLIES: u16 = 18;

/// All of them.
const ALL: &[u16] = &[
    DEVICE,
    SOCKETS,
    BACKEND,
    SIZE,
    FLAGS,
    TIMEOUT,
    DEAD_CONN_TIMEOUT,
    MINIMUM_BLOCK_SIZE,
    PREFERRED_BLOCK_SIZE,
    MAXIMUM_PAYLOAD,
    NO_PARTITION_SCAN,
    TLS,
    OWNED,
    DISCONNECT_ON_CLOSE,
    DESTROY_ON_DISCONNECT,
    STRUCTURED_REPLIES,
];

/// The requirements for them. The two that are missing above are those of the command handover.
pub(super) const POLICY: &[Policy] = &[
    Policy::ANY,
    Policy::U32,
    Policy::U32,
    Policy::BINARY,
    Policy::U32,
    Policy::BINARY,
    Policy::U64,
    Policy::U64,
    Policy::U64,
    Policy::U64,
    Policy::U32,
    Policy::U32,
    Policy::U32,
    Policy::FLAG,
    Policy::FLAG,
    Policy::FLAG,
    Policy::FLAG,
    Policy::FLAG,
    Policy::FLAG,
];

/// The logical block size of a device whose server has not told one.
const DEFAULT_BLOCK_BYTES: u32 = SECTOR_BYTES;

/// Connects a device, and replies with its index.
///
/// # Errors
///
/// Each comes with words, except for `EPERM`.
///
/// - `EPERM`: the sender does not have `CAP_SYS_ADMIN`.
/// - `EINVAL`: an attribute is missing or not valid, or the device is going down.
/// - `ENOSPC`: no index is left.
/// - Those of adding a device and of [`Device::connect()`](crate::rnbd_dev::Device::connect).
///
/// # Context
///
/// May sleep.
pub(super) fn run(registry: &Arc<Registry>, info: &Info<'_>) -> Result {
    check_capable(info)?;
    refuse_others(info, ALL)?;
    let wanted = info.attr(DEVICE).and_then(|a| a.u32());
    if wanted.is_some_and(|index| index >= registry.limit()) {
        return refuse(info, DEVICE, c"no device can have such an index");
    }
    let mut setup = parse(info)?;
    set_owner(registry, info, &mut setup)?;
    setup.namespace = Some(Arc::new(info.namespace()?, GFP_KERNEL)?);
    let device = connect_any(registry, info, wanted, &setup).inspect_err(|e| explain(info, *e))?;
    let Some(device) = device else {
        info.complain(Some(DEVICE), c"the device is in use");
        return Err(EBUSY);
    };
    // As with NBD_CMD_CONNECT, the device is connected even if the reply is lost.
    let _ = info.reply(CMD_CONNECT, DEVICE, &device.index.to_ne_bytes());
    Ok(())
}

/// Refuses the message because of one attribute.
///
/// # Errors
///
/// `EINVAL`, always.
fn refuse<T>(info: &Info<'_>, kind: u16, words: &'static CStr) -> Result<T> {
    info.complain(Some(kind), words);
    Err(EINVAL)
}

/// Tells the sender why a device could not be connected, although the message is valid.
fn explain(info: &Info<'_>, error: Error) {
    let (about, words) = match error {
        e if e == EBUSY => (Some(SOCKETS), c"a socket or the device is in use"),
        e if e == EBADF => (Some(SOCKETS), c"a file descriptor is not open"),
        e if e == ENOTSOCK => (Some(SOCKETS), c"a file descriptor is not that of a socket"),
        e if e == ENOTCONN => (Some(SOCKETS), c"a socket is not connected"),
        e if e == ENOKEY => (
            Some(SOCKETS),
            c"a socket is not encrypted by TLS in the kernel",
        ),
        e if e == ENOMEM => (None, c"there is not enough memory"),
        e if e == ENODEV => (None, c"the module is being unloaded"),
        // Everything else that is not valid was refused before, or was explained.
        e if e == EINVAL && info.has_no_words() => {
            (Some(SOCKETS), c"a socket must be TCP, MPTCP, vsock or UNIX")
        }
        _ => return,
    };
    info.complain(about, words);
}

/// Parses the attributes.
///
/// # Errors
///
/// - `EINVAL`: one is missing or not valid.
/// - `EBADF`: a file descriptor is negative.
/// - `ENOMEM`.
fn parse<'a>(info: &Info<'a>) -> Result<Setup<'a>> {
    let list = info.require(SOCKETS, c"at least one socket is needed")?;
    let size = info.require(SIZE, c"a size in bytes is needed")?;
    let number = |kind| info.attr(kind).and_then(|a: Attr<'a>| a.u64());
    let ms = |kind| number(kind).map(task::ms_to_jiffies);
    let size_bytes = size.u64().filter(|bytes| i64::try_from(*bytes).is_ok());
    if size_bytes.is_none() {
        return refuse(info, SIZE, c"the size must be below 2^63 bytes");
    }
    let server_flags = number(FLAGS).unwrap_or(0);
    if u32::try_from(server_flags).is_err() {
        return refuse(info, FLAGS, c"the flags must be below 2^32");
    }
    let sockets = sockets(info, list)?;
    if sockets.len() > 1 && server_flags & u64::from(flags::CAN_MULTI_CONN) == 0 {
        let words = c"the server does not allow several connections (NBD_FLAG_CAN_MULTI_CONN)";
        return refuse(info, SOCKETS, words);
    }
    let (block_bytes, sizes) = sizes(info)?;
    Ok(Setup {
        size_bytes,
        block_bytes: Some(u64::from(block_bytes)),
        sizes: Some(sizes),
        timeout_jiffies: ms(TIMEOUT),
        dead_timeout_jiffies: ms(DEAD_CONN_TIMEOUT),
        server_flags: Some(server_flags),
        client_flags: Some(client_flags(info)),
        sockets,
        backend: backend(info, BACKEND)?,
        never_scans: info.attr(NO_PARTITION_SCAN).is_some(),
        needs_tls: info.attr(TLS).is_some(),
        needs_structured: info.attr(STRUCTURED_REPLIES).is_some(),
        ..Setup::default()
    })
}

/// Parses the file descriptors of the sockets. The errors are those of [`parse()`], and `EBADF`.
fn sockets(info: &Info<'_>, list: Attr<'_>) -> Result<KVec<u32>> {
    let mut sockets = KVec::new();
    for fd in descriptors(info, SOCKETS, list)? {
        let fd = u32::try_from(fd).map_err(|_| EBADF);
        sockets.push(fd.inspect_err(|e| explain(info, *e))?, GFP_KERNEL)?;
    }
    Ok(sockets)
}

/// Returns the flags of the client (`NBD_CFLAG_*`).
fn client_flags(info: &Info<'_>) -> u64 {
    [
        (OWNED, CFLAG_DISCONNECT_ON_RELEASE),
        (DISCONNECT_ON_CLOSE, CFLAG_DISCONNECT_ON_CLOSE),
        (DESTROY_ON_DISCONNECT, CFLAG_DESTROY_ON_DISCONNECT),
    ]
    .into_iter()
    .filter(|(kind, _)| info.attr(*kind).is_some())
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// Returns the logical block size, and how large requests may be. The latter may not exceed the payload that the
/// server takes, not even that of the first one, by which a partition table is read.
///
/// # Errors
///
/// `EINVAL`: a size is not valid, or they do not fit together.
fn sizes(info: &Info<'_>) -> Result<(u32, RequestSizes)> {
    let number = |kind, default| info.attr(kind).and_then(|a| a.u32()).unwrap_or(default);
    let logical = number(MINIMUM_BLOCK_SIZE, DEFAULT_BLOCK_BYTES);
    if !valid_block_size(logical as usize) {
        let words = c"the minimum block size must be a power of two that the kernel supports (512 to 65536)";
        return refuse(info, MINIMUM_BLOCK_SIZE, words);
    }
    let largest = USUAL_SIZES.max_hw_sectors * SECTOR_BYTES;
    let preferred = number(PREFERRED_BLOCK_SIZE, logical);
    if !preferred.is_power_of_two() || preferred < logical || preferred > largest {
        let words =
            c"the preferred block size must be a power of two between the minimum one and 32 MiB";
        return refuse(info, PREFERRED_BLOCK_SIZE, words);
    }
    let payload = number(MAXIMUM_PAYLOAD, largest).min(largest);
    if payload < PAGE_SIZE as u32 || payload < preferred {
        let words = c"the maximum payload must be at least a page and the preferred block size";
        return refuse(info, MAXIMUM_PAYLOAD, words);
    }
    let sizes = RequestSizes {
        physical_block_bytes: preferred,
        io_opt_bytes: USUAL_SIZES.io_opt_bytes.max(preferred).min(payload),
        max_hw_sectors: payload / SECTOR_BYTES,
    };
    Ok((logical, sizes))
}
