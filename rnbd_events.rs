// SPDX-License-Identifier: GPL-2.0
//! What user space is told without asking: netlink multicasts of the family "nbd".

#![forbid(unsafe_code)]

use crate::kapi::genl::Group;
use kernel::prelude::*;

/// `NBD_GENL_MCAST_GROUP_NAME`
pub(crate) const GROUP: &CStr = c"nbd_mc_group";

/// `NBD_CMD_LINK_DEAD`
const CMD_LINK_DEAD: u8 = 4;
/// `NBD_ATTR_INDEX`
pub(crate) const ATTR_INDEX: u16 = 1;

/// A connection of a device has died, and the user did not ask for it (`nbd_mcast_index()`). May sleep.
pub(crate) fn link_dead(group: &Group, device: u32) {
    if let Err(e) = group.multicast(CMD_LINK_DEAD, ATTR_INDEX, &device.to_ne_bytes()) {
        pr_warn!("nbd{device}: cannot tell that a link is dead ({e:?})\n");
    }
}
