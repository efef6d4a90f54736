// SPDX-License-Identifier: GPL-2.0
//! All devices: which there are, and how they come and go (nbd.c's `nbd_index_idr`).

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        block::gendisk::Disk,
        task, //
    },
    rnbd_dev::{
        self,
        Device,
        Layout,
        Nbd,
        Remover, //
    },
    rnbd_shared::Shared, //
};
use kernel::{
    debugfs::Dir,
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNodeReservation, //
    },
    sync::{
        Arc,
        Mutex,
        UniqueArc, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

/// `MINORBITS`
const MINOR_BITS: u32 = 20;

/// The devices, by index.
type Devices = RBTree<u32, Arc<Disk<Nbd>>>;

/// See the module's documentation.
#[pin_data]
pub(crate) struct Registry {
    layout: Layout,
    /// `/sys/kernel/debug/nbd`
    debugfs: Dir,
    /// Held while a device is looked up, added or removed, and never while anybody waits for a device:
    /// who has looked one up has a reference to it. Not taken by who holds a lock of a device.
    #[pin]
    devices: Mutex<Devices>,
    #[pin]
    sweep: Work<Registry>,
    /// It goes last: the module may be unloaded when the last user of it has gone.
    shared: Shared,
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
            let dying = this.with(|devices| {
                let mut devices = devices.iter();
                devices
                    .find(|(_, device)| device.begin_removal())
                    .map(|(index, device)| (*index, device.clone()))
            });
            let Some((index, device)) = dying else {
                return;
            };
            match Removal::new(this.clone(), index, device.clone()) {
                Ok(removal) => drop(this.shared.slow.enqueue(removal)),
                Err(_) => this.remove(index, &device),
            }
        }
    }
}

/// A device that is being removed.
#[pin_data]
struct Removal {
    registry: Arc<Registry>,
    index: u32,
    device: Arc<Disk<Nbd>>,
    #[pin]
    work: Work<Removal>,
}

impl_has_work! {
    impl HasWork<Self> for Removal { self.work }
}

impl Removal {
    fn new(registry: Arc<Registry>, index: u32, device: Arc<Disk<Nbd>>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Removal {
                registry,
                index,
                device,
                work <- new_work!("rnbd::removal"),
            }),
            GFP_KERNEL,
        )
    }
}

impl WorkItem for Removal {
    type Pointer = Arc<Removal>;

    fn run(this: Arc<Removal>) {
        this.registry.remove(this.index, &this.device);
    }
}

impl Remover for Registry {
    fn remove_later(self: Arc<Self>) {
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

    /// The device `index`.
    pub(crate) fn find(&self, index: u32) -> Option<Arc<Disk<Nbd>>> {
        self.with(|devices| devices.get(&index).cloned())
    }

    /// The device `wanted`, or, where none is named, the lowest one that nobody uses. Makes it where there
    /// is none (`nbd_dev_add()`), with so many hardware queues where a number is given. By the time that
    /// the caller has it, somebody may use it, or it may be about to go. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOSPC` where no index is left, `ENOMEM`, and those of adding a disk.
    pub(crate) fn find_or_add(
        self: &Arc<Self>,
        wanted: Option<u32>,
        hw_queues: Option<u32>,
    ) -> Result<Arc<Disk<Nbd>>> {
        self.with(|devices| {
            let index = wanted.unwrap_or_else(|| first_unused(devices));
            if let Some(device) = devices.get(&index) {
                return Ok(device.clone());
            }
            if index >= self.limit() {
                return Err(ENOSPC);
            }
            self.add(devices, index, hw_queues)
        })
    }

    fn add(
        self: &Arc<Self>,
        devices: &mut Devices,
        index: u32,
        hw_queues: Option<u32>,
    ) -> Result<Arc<Disk<Nbd>>> {
        let mut layout = self.layout;
        layout.hw_queues = hw_queues.unwrap_or(layout.hw_queues);
        // A disk that is there can be in use already, so nothing may fail after it was added.
        let node = RBTreeNodeReservation::new(GFP_KERNEL)?;
        let place = UniqueArc::new_uninit(GFP_KERNEL)?;
        let (debugfs, shared) = (self.debugfs.clone(), self.shared.clone());
        let disk = rnbd_dev::add(index, layout, debugfs, shared, self.clone())?;
        let device = Arc::from(place.write(disk));
        devices.insert(node.into_node(index, device.clone()));
        Ok(device)
    }

    /// Calls `f` for each device, in the order of their indices, until it fails. `f` must not wait for
    /// anybody. May sleep.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&Device) -> Result) -> Result {
        self.with(|devices| devices.values().try_for_each(|device| f(device)))
    }

    /// Runs `f` with all devices; none comes or goes meanwhile. No allocation in `f` waits for I/O, which
    /// might be I/O to one of them: everybody who uses netlink would wait for its server.
    fn with<R>(&self, f: impl FnOnce(&mut Devices) -> R) -> R {
        let mut devices = self.devices.lock();
        task::memalloc_noio(|| f(&mut devices))
    }

    /// Removes a device. Nobody gets its index before it is gone from sight. Who has looked it up keeps
    /// the rest of it for a moment longer, and finds that it is dying. May sleep.
    fn remove(&self, index: u32, device: &Disk<Nbd>) {
        device.remove();
        let node = self.with(|devices| devices.remove(&index));
        drop(node);
    }

    /// Removes all devices, but for those that are being removed already. May sleep.
    pub(crate) fn clear(&self) {
        let all = self.with(|devices| core::mem::replace(devices, RBTree::new()));
        drop(all);
    }
}

/// The lowest index that is free, or whose device nobody uses (`nbd_find_get_unused()`).
fn first_unused(devices: &Devices) -> u32 {
    let unused = devices.iter().find(|(_, device)| device.is_unused());
    if let Some((index, _)) = unused {
        return *index;
    }
    let mut free = 0;
    for index in devices.keys() {
        if *index != free {
            break;
        }
        free += 1;
    }
    free
}
