// SPDX-License-Identifier: GPL-2.0
//! The module's resources that all devices share.

#![forbid(unsafe_code)]

use crate::kapi::{genl::Group, wq::Queue};
use kernel::sync::Arc;

/// See the module's documentation.
#[derive(Clone)]
pub(crate) struct Shared {
    /// For sending, receiving and clearing away connections: gets on without memory.
    pub(crate) io: Arc<Queue>,
    /// For work that may wait for anything, such as removing a disk.
    pub(crate) slow: Arc<Queue>,
    /// Where user space is told of dead connections.
    pub(crate) events: Arc<Group>,
}
