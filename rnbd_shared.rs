// SPDX-License-Identifier: GPL-2.0
//! The module's resources that all devices share.

#![forbid(unsafe_code)]

use crate::kapi::wq::Queue;
use kernel::sync::Arc;

/// What user space is told without asking.
pub(crate) trait Events: Send + Sync {
    /// A connection of `device` has died, and the user did not ask for it. May sleep.
    fn link_dead(&self, device: u32);
}

/// See the module's documentation.
#[derive(Clone)]
pub(crate) struct Shared {
    /// For sending, receiving and clearing away connections: gets on without memory.
    pub(crate) io: Arc<Queue>,
    /// For work that may wait for anything, such as removing a disk.
    pub(crate) slow: Arc<Queue>,
    /// Where user space is told of what happens.
    pub(crate) events: Arc<dyn Events>,
}
