// SPDX-License-Identifier: GPL-2.0
//! All devices: which there are, and how they come and go (nbd.c's `nbd_index_idr`).

use crate::{
    kapi::disk::Disk,
    rnbd_dev::{self, Graveyard, Layout, Nbd},
    rnbd_shared::Shared,
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
pub(crate) type Devices = RBTree<u32, Arc<Disk<Nbd>>>;

/// See the module's documentation.
#[pin_data]
pub(crate) struct Registry {
    layout: Layout,
    /// `/sys/kernel/debug/nbd`
    debugfs: Dir,
    shared: Shared,
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

    /// Removes the devices that were to go on disconnect. Each by a work item of its own: removing a
    /// disk means waiting, and they need not wait for one another.
    fn run(this: Arc<Registry>) {
        loop {
            let doomed = this.with(|devices| {
                let mut devices = devices.iter();
                devices
                    .find(|(_, device)| device.begin_burial())
                    .map(|(index, device)| (*index, device.clone()))
            });
            let Some((index, device)) = doomed else {
                return;
            };
            match Burial::new(this.clone(), index, device.clone()) {
                Ok(burial) => drop(this.shared.slow.enqueue(burial)),
                Err(_) => this.bury(index, &device),
            }
        }
    }
}

/// A device that is being removed.
#[pin_data]
struct Burial {
    registry: Arc<Registry>,
    index: u32,
    device: Arc<Disk<Nbd>>,
    #[pin]
    work: Work<Burial>,
}

impl_has_work! {
    impl HasWork<Self> for Burial { self.work }
}

impl Burial {
    fn new(registry: Arc<Registry>, index: u32, device: Arc<Disk<Nbd>>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Burial {
                registry,
                index,
                device,
                work <- new_work!("rnbd::burial"),
            }),
            GFP_KERNEL,
        )
    }
}

impl WorkItem for Burial {
    type Pointer = Arc<Burial>;

    fn run(this: Arc<Burial>) {
        this.registry.bury(this.index, &this.device);
    }
}

impl Graveyard for Registry {
    fn bury_later(self: Arc<Self>) {
        // Where it is queued already it will see this one too.
        let slow = self.shared.slow.clone();
        let _ = slow.enqueue(self);
    }
}

impl Registry {
    /// No device yet. May sleep.
    pub(crate) fn new(layout: Layout, shared: Shared) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Registry {
                layout,
                debugfs: Dir::new(c"nbd"),
                shared,
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
        let (debugfs, shared) = (self.debugfs.clone(), self.shared.clone());
        let disk = rnbd_dev::add(index, layout, debugfs, shared, self.clone())?;
        devices.try_create_and_insert(index, Arc::new(disk, GFP_KERNEL)?, GFP_KERNEL)?;
        Ok(())
    }

    /// Removes a device. Nobody gets its index before it is gone. May sleep.
    fn bury(&self, index: u32, device: &Disk<Nbd>) {
        device.remove();
        let node = self.with(|devices| devices.remove(&index));
        drop(node);
    }

    /// Removes all devices. May sleep.
    pub(crate) fn clear(&self) {
        *self.devices.lock() = RBTree::new();
    }
}
