// SPDX-License-Identifier: GPL-2.0
//! The multicasts of the netlink family "nbd".

#![forbid(unsafe_code)]

use super::ATTR_INDEX;
use crate::{
    kapi::net::group::Group,
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

/// Multicasts events to the members of the group.
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
