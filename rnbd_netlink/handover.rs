// SPDX-License-Identifier: GPL-2.0
//! The command `handover` of the netlink family "rnbd".

#![forbid(unsafe_code)]

use super::{
    check_capable,
    refuse_others, //
};
use crate::{
    kapi::{
        net::{
            attr::Attr,
            genl::Info, //
        },
        task, //
    },
    rnbd_dev::handover::Handover,
    rnbd_registry::Registry,
    rnbd_session::handover::{
        About,
        Refusal,
        Which, //
    },
};
use kernel::prelude::*;

/// The attributes of the command. Those that connect has, too, have the same numbers there.
const DEVICE: u16 = 1;
const CONNECTION: u16 = 2;
const SOCKETS: u16 = 3;
const DRAIN: u16 = 4;
const BACKEND: u16 = 5;

/// Hands connections of a device over to new sockets.
///
/// # Errors
///
/// - `EPERM`: the sender does not have `CAP_SYS_ADMIN`.
/// - `EINVAL`: an attribute is missing or not valid.
/// - `ENODEV`: there is no such device, or it is being removed.
/// - `ENOMEM`, and those of [`Device::hand_over()`](crate::rnbd_dev::Device::hand_over).
///
/// # Context
///
/// May sleep, but does not wait for a server.
pub(super) fn run(registry: &Registry, info: &Info<'_>) -> Result {
    check_capable(info)?;
    refuse_others(info, &[DEVICE, CONNECTION, SOCKETS, DRAIN, BACKEND])?;
    let index = info.require(DEVICE, c"the index of a device is needed")?;
    let sockets = info.require(SOCKETS, c"at least one socket is needed")?;
    let drain = info.require(DRAIN, c"the time to drain is needed (0: none)")?;
    let number = |kind| info.attr(kind).and_then(|a: Attr<'_>| a.u32());
    let wanted = Handover {
        which: number(CONNECTION).map_or(Which::All, Which::One),
        // Everybody who sends a netlink command waits for this one, perhaps also whoever brings a device back on
        // which writeback waits.
        sockets: task::memalloc_noio(|| descriptors(info, SOCKETS, sockets))?,
        drain_ms: drain.u32().unwrap_or(0),
        backend: backend(info, BACKEND)?,
    };
    let device = index.u32().and_then(|index| registry.find(index));
    let Some(device) = device.filter(|d| !d.is_dying()) else {
        info.complain(Some(DEVICE), c"there is no such device");
        return Err(ENODEV);
    };
    device
        .hand_over(&wanted)
        .map_err(|refusal| refuse(info, &refusal))
}

/// Parses the file descriptors of the sockets, which an attribute of this kind has.
///
/// # Errors
///
/// - `EINVAL`: they are not a list of numbers of 32 bits, or there is none.
/// - `ENOMEM`.
pub(super) fn descriptors(info: &Info<'_>, kind: u16, list: Attr<'_>) -> Result<KVec<i32>> {
    let bytes = list.bytes();
    if bytes.is_empty() || bytes.len() % size_of::<i32>() != 0 {
        info.complain(Some(kind), c"the sockets must be numbers of 32 bits");
        return Err(EINVAL);
    }
    let mut descriptors = KVec::new();
    for number in bytes.chunks_exact(size_of::<i32>()) {
        let number = number.first_chunk().ok_or(EINVAL)?;
        descriptors.push(i32::from_ne_bytes(*number), GFP_KERNEL)?;
    }
    Ok(descriptors)
}

/// Returns the identifier of the backend, if there is an attribute of this kind.
///
/// # Errors
///
/// `EINVAL`: there is a zero byte in it. Those who read the identifier would see only what is before that.
pub(super) fn backend<'a>(info: &Info<'a>, kind: u16) -> Result<Option<&'a [u8]>> {
    let bytes = info.attr(kind).map(|a: Attr<'a>| a.string());
    if bytes.is_some_and(|bytes| bytes.contains(&0)) {
        info.complain(
            Some(kind),
            c"the identifier must not have a zero byte in it",
        );
        return Err(EINVAL);
    }
    Ok(bytes)
}

/// Tells the sender why a handover is refused, and returns the error.
fn refuse(info: &Info<'_>, refusal: &Refusal) -> Error {
    let about = match refusal.about {
        About::Device => DEVICE,
        About::Connection => CONNECTION,
        About::Sockets => SOCKETS,
        About::Backend => BACKEND,
    };
    info.complain(Some(about), refusal.words);
    refusal.error
}
