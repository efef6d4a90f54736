// SPDX-License-Identifier: GPL-2.0
//! Safe wrappers for the C interfaces that the `kernel` crate (7.3) lacks. The only place with
//! `unsafe`.
//!
//! Nothing here knows what NBD is; of the driver it needs only the list of its parameters, the macro
//! `parameters`, which must come before this module. Names and shapes are those of the `kernel` crate where it has
//! something alike, so that a file can go on the day the crate grows the same thing.

pub(crate) mod arrival;
mod bindings;
mod callbacks;
pub(crate) mod disk;
mod frozen;
pub(crate) mod genl;
pub(crate) mod hook;
pub(crate) mod iov;
pub(crate) mod limits;
pub(crate) mod llist;
mod lock_class;
mod memalloc;
pub(crate) mod mq;
pub(crate) mod param;
pub(crate) mod payload;
pub(crate) mod published;
pub(crate) mod sock;
pub(crate) mod task;
pub(crate) mod try_lock;
pub(crate) mod wq;
