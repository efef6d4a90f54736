// SPDX-License-Identifier: GPL-2.0
//! Safe wrappers for C interfaces that the `kernel` crate (7.3) lacks.
//!
//! This is the only part of the driver that contains `unsafe` code. Of NBD it knows nothing but the
//! names of two sysfs files. The one thing that it takes from the driver is the list of the module's
//! parameters: the macro `parameters`, which must be defined before this module.
//!
//! Names and shapes follow the `kernel` crate where that has something similar, so that a file can
//! be deleted once the crate offers the same.

pub(crate) mod barrier;
mod bindings;
pub(crate) mod block;
pub(crate) mod errno;
pub(crate) mod llist;
pub(crate) mod net;
pub(crate) mod param;
pub(crate) mod prepared;
pub(crate) mod task;
pub(crate) mod trace;
mod tracepoint;
pub(crate) mod try_lock;
pub(crate) mod wq;
