// SPDX-License-Identifier: GPL-2.0
//! All devices: which there are, and how they come and go (nbd.c's `nbd_index_idr`).

use crate::{
    kapi::{disk::Disk, wq},
    rnbd_dev::{self, Device, Graveyard, Layout},
};
use kernel::{
    debugfs::Dir,
    impl_has_work, new_mutex, new_work,
    prelude::*,
    rbtree::RBTree,
    sync::{Arc, Mutex},
    workqueue::{Work, WorkItem},
};

/// `MINORBITS`
const MINOR_BITS: u32 = 20;

/// The devices, by index.
pub(crate) type Devices = RBTree<u32, Disk<Device>>;

/// See the module's documentation.
#[pin_data]
pub(crate) struct Registry {
    layout: Layout,
    /// `/sys/kernel/debug/nbd`
    debugfs: Dir,
    /// Held while a device is added, removed or controlled by netlink; never by who holds a lock of a
    /// device.
    #[pin]
    devices: Mutex<Devices>,
    #[pin]
    sweep: Work<Registry>,
}

impl_has_work! {
    impl HasWork<Self> for Registry { self.sweep }
}

impl WorkItem for Registry {
    type Pointer = Arc<Registry>;

    /// Removes the devices that were to go on disconnect.
    fn run(this: Arc<Registry>) {
        let mut devices = this.devices.lock();
        let mut from = 0;
        loop {
            let doomed = devices
                .iter()
                .find(|(index, device)| **index >= from && device.is_doomed())
                .map(|(index, _)| *index);
            let Some(index) = doomed else { return };
            drop(devices.remove(&index));
            from = index + 1;
        }
    }
}

impl Graveyard for Registry {
    fn bury_later(self: Arc<Self>) {
        // Where it is queued already it will see this one too.
        let _ = wq::SLOW.get().enqueue(self);
    }
}

impl Registry {
    /// No device yet. May sleep.
    pub(crate) fn new(layout: Layout) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Registry {
                layout,
                debugfs: Dir::new(c"nbd"),
                devices <- new_mutex!(RBTree::new()),
                sweep <- new_work!("rnbd::sweep"),
            }),
            GFP_KERNEL,
        )
    }

    /// The highest index that a device can have, plus one.
    pub(crate) fn index_limit(layout: Layout) -> u32 {
        1 << (MINOR_BITS - layout.part_shift)
    }

    /// As [`Self::index_limit()`].
    pub(crate) fn limit(&self) -> u32 {
        Self::index_limit(self.layout)
    }

    /// Runs `f` with all devices; none comes or goes meanwhile. May sleep.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Devices) -> R) -> R {
        f(&mut self.devices.lock())
    }

    /// Adds the device `index` (`nbd_dev_add()`), with so many hardware queues where a number is given.
    /// May sleep.
    pub(crate) fn add(
        self: &Arc<Self>,
        devices: &mut Devices,
        index: u32,
        hw_queues: Option<u32>,
    ) -> Result {
        let mut layout = self.layout;
        layout.hw_queues = hw_queues.unwrap_or(layout.hw_queues);
        let disk = rnbd_dev::add(index, layout, self.debugfs.clone(), self.clone())?;
        devices.try_create_and_insert(index, disk, GFP_KERNEL)?;
        Ok(())
    }

    /// Removes all devices. May sleep.
    pub(crate) fn clear(&self) {
        *self.devices.lock() = RBTree::new();
    }
}
