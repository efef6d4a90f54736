// SPDX-License-Identifier: GPL-2.0
//! A multicast group has a family that is registered.

use crate::{
    kapi::net::{genl::Registration, group::Group},
    rnbd_netlink::Netlink,
};
use kernel::{prelude::*, sync::Arc};

fn bind(netlink: Netlink, group: Arc<Group>) -> Result {
    group.claim().map(drop) //~ E0624
    //fix: Registration::new(netlink, Some(group)).map(drop)
}
