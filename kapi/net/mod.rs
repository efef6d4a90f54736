// SPDX-License-Identifier: GPL-2.0
//! Networking: sockets, and generic netlink.

pub(crate) mod address;
pub(crate) mod arrival;
pub(crate) mod attr;
mod bh_lock;
mod callbacks;
mod context;
pub(crate) mod dump;
pub(crate) mod genl;
pub(crate) mod group;
pub(crate) mod hook;
pub(crate) mod iov;
mod kind;
mod lock_class;
mod memalloc;
mod message;
pub(crate) mod namespace;
mod owner;
pub(crate) mod page_frag;
pub(crate) mod port;
mod room;
mod saved;
pub(crate) mod sock;
pub(crate) mod transfer;
