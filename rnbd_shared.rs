// SPDX-License-Identifier: GPL-2.0
//! The resources of the module that all devices share.

#![forbid(unsafe_code)]

use crate::{
    kapi::wq::Queue,
    rnbd_events::EventQueue, //
};
use kernel::sync::Arc;

/// Notifies user space. `rnbd_netlink/events.rs` implements it.
pub(crate) trait Events: Send + Sync {
    /// Reports that a connection of `device` has died although the user did not ask for it.
    ///
    /// # Context
    ///
    /// May sleep.
    fn link_dead(&self, device: u32);
}

/// References to the shared resources.
#[derive(Clone)]
pub(crate) struct Shared {
    /// The workqueue for sending, receiving and reaping connections. It has `WQ_MEM_RECLAIM`.
    pub(crate) io: Arc<Queue>,
    /// The workqueue for work that may wait for memory or I/O, such as removing a disk.
    pub(crate) slow: Arc<Queue>,
    /// The workqueue for reading partition tables, which may wait for a server.
    pub(crate) scan: Arc<Queue>,
    /// Notifies the listeners of the family "nbd".
    pub(crate) events: Arc<dyn Events>,
    /// Notifies those of the family "rnbd".
    pub(crate) news: Arc<EventQueue>,
}
