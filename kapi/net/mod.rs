// SPDX-License-Identifier: GPL-2.0
//! Networking: sockets, and generic netlink.

pub(crate) mod arrival;
pub(crate) mod attr;
mod callbacks;
mod context;
pub(crate) mod genl;
pub(crate) mod hook;
pub(crate) mod iov;
mod lock_class;
mod memalloc;
mod message;
mod owner;
pub(crate) mod port;
pub(crate) mod room;
mod saved;
pub(crate) mod sock;
