// SPDX-License-Identifier: GPL-2.0
//! Safe wrappers for the C interfaces that the `kernel` crate (7.3) lacks. The only place with `unsafe`.
//!
//! Nothing here knows what NBD is. Of the driver it needs only the list of its parameters, the macro
//! `parameters`, which must come before this module. Names and shapes are those of the `kernel` crate where
//! it has something alike, so that a file can be deleted once the crate has grown the same thing.

mod bindings;
pub(crate) mod block;
pub(crate) mod llist;
pub(crate) mod net;
pub(crate) mod param;
pub(crate) mod task;
pub(crate) mod try_lock;
pub(crate) mod wq;
