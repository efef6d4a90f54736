// SPDX-License-Identifier: GPL-2.0
//! The registry of all devices: looks them up, adds and removes them (nbd.c's `nbd_index_idr`).

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        block::gendisk::Disk,
        net::port::{
            Port,
            Released, //
        },
        task,
        wq::{
            self,
            HasQueue,
            Queue, //
        }, //
    },
    rnbd_dev::{
        self,
        Device,
        Job,
        Jobs,
        Layout,
        Nbd, //
    },
    rnbd_shared::Shared, //
};
use kernel::{
    debugfs::Dir,
    impl_has_delayed_work,
    impl_has_work,
    new_delayed_work,
    new_mutex,
    new_work,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNodeReservation, //
    },
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        UniqueArc, //
    },
    workqueue::{
        DelayedWork,
        Work,
        WorkItem, //
    }, //
};

/// See `MINORBITS`.
const MINOR_BITS: u32 = 20;

/// The devices, by index.
type Devices = RBTree<u32, Arc<Disk<Nbd>>>;

/// The devices of the module.
#[pin_data]
pub(crate) struct Registry {
    layout: Layout,
    /// The directory `/sys/kernel/debug/nbd`.
    debugfs: Dir,
    /// The devices (nbd.c's `nbd_index_mutex`).
    ///
    /// The lock is held while a device is looked up, added or removed, but never while a task waits
    /// for a device: the caller of a lookup gets a reference instead. It nests outside the locks of
    /// a device.
    #[pin]
    devices: Mutex<Devices>,
    #[pin]
    jobs: Work<Registry>,
    /// Queues `jobs` later.
    #[pin]
    later: DelayedWork<Registry, 1>,
    /// Whether a device may have an owner, or may have had one; see [`Owners`].
    has_owners: Atomic<u32>,
    /// The resources that all devices share. It is the last field, so that it is dropped last: the
    /// module may be unloaded once the last reference to the workqueues is gone.
    shared: Shared,
}

impl_has_work! {
    impl HasWork<Self> for Registry { self.jobs }
}
impl_has_delayed_work! {
    impl HasDelayedWork<Self, 1> for Registry { self.later }
}

impl HasQueue for Registry {
    fn queue(&self) -> &Queue {
        &self.shared.slow
    }
}

impl WorkItem for Registry {
    type Pointer = Arc<Registry>;

    /// Queues the jobs of all devices.
    ///
    /// Each is done by a work item of its own: removing a disk waits for its users, reading its
    /// partition table for its server, and one device must not delay another.
    fn run(this: Arc<Registry>) {
        loop {
            let next = this.with(|devices| {
                let mut devices = devices.iter();
                devices.find_map(|(index, device)| {
                    let job = device.take_job()?;
                    Some((*index, device.clone(), job))
                })
            });
            let Some((index, device, job)) = next else {
                return;
            };
            this.queue_job(index, &device, job);
        }
    }
}

impl WorkItem<1> for Registry {
    type Pointer = Arc<Registry>;

    fn run(this: Arc<Registry>) {
        this.queue_jobs();
    }
}

/// A job of a device (`nbd_dev_remove_work()`).
#[pin_data]
struct DeviceWork {
    registry: Arc<Registry>,
    index: u32,
    device: Arc<Disk<Nbd>>,
    job: Job,
    #[pin]
    work: Work<DeviceWork>,
}

impl_has_work! {
    impl HasWork<Self> for DeviceWork { self.work }
}

impl DeviceWork {
    /// Returns a work item that does `job`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn new(
        registry: Arc<Registry>,
        index: u32,
        device: Arc<Disk<Nbd>>,
        job: Job,
    ) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(DeviceWork {
                registry,
                index,
                device,
                job,
                work <- new_work!("rnbd::device_work"),
            }),
            GFP_KERNEL,
        )
    }
}

impl WorkItem for DeviceWork {
    type Pointer = Arc<DeviceWork>;

    fn run(this: Arc<DeviceWork>) {
        match &this.job {
            Job::Remove => this.registry.remove(this.index, &this.device),
            Job::Disconnect(owner) => this.device.disconnect_owned(owner),
            Job::AddDebugfs => this.device.add_debugfs(),
            Job::Scan => this.device.scan_partitions(),
            Job::Release => this.device.release_session(),
        }
    }
}

impl Jobs for Registry {
    fn queue_jobs(self: Arc<Self>) {
        // If the work item is queued already, it will find this device as well.
        let slow = self.shared.slow.clone();
        let _ = slow.enqueue::<_, 0>(self);
    }

    fn queue_jobs_soon(self: Arc<Self>) {
        let _ = wq::enqueue_delayed::<Self, 1>(self, 1);
    }
}

/// Disconnects the devices whose owner is released.
pub(crate) struct Owners(pub(crate) Arc<Registry>);

impl Released for Owners {
    fn released(&self, port: Port) {
        // Most sockets that are closed have nothing to do with NBD.
        if self.0.has_owners.load(Relaxed) == 0 {
            return;
        }
        let owned = self.0.with(|devices| {
            let note = |count: usize, device: &Arc<Disk<Nbd>>| {
                count + usize::from(device.note_released(port))
            };
            devices.values().fold(0, note)
        });
        if owned > 0 {
            self.0.clone().queue_jobs();
        }
    }
}

impl Registry {
    /// Returns a registry without devices.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(layout: Layout, shared: Shared) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Registry {
                layout,
                debugfs: Dir::new(c"nbd"),
                shared,
                devices <- new_mutex!(RBTree::new()),
                jobs <- new_work!("rnbd::jobs"),
                later <- new_delayed_work!("rnbd::later"),
                has_owners: Atomic::new(0),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the number of indices that devices can have.
    pub(crate) fn index_limit(layout: Layout) -> u32 {
        1 << (MINOR_BITS - layout.part_shift)
    }

    /// Returns the number of indices that devices can have; see [`Self::index_limit()`].
    pub(crate) fn limit(&self) -> u32 {
        Self::index_limit(self.layout)
    }

    /// Prepares for a device that is given an owner.
    pub(crate) fn expect_owners(&self) {
        self.has_owners.store(1, Relaxed);
    }

    /// Returns the device with this index.
    pub(crate) fn find(&self, index: u32) -> Option<Arc<Disk<Nbd>>> {
        self.with(|devices| devices.get(&index).cloned())
    }

    /// Returns the first device whose index is `from` or more.
    pub(crate) fn next(&self, from: u32) -> Option<Arc<Disk<Nbd>>> {
        self.with(|devices| {
            let cursor = devices.cursor_lower_bound(&from)?;
            Some(cursor.current().1.clone())
        })
    }

    /// Returns the device `wanted`, or the first unused one, and adds it if it does not exist
    /// (`nbd_dev_add()`).
    ///
    /// A device that is added gets `hw_queues` hardware queues if a number is given. When this
    /// returns, another task may be using the device, or it may be about to be removed.
    ///
    /// # Errors
    ///
    /// - `ENOSPC`: no index is left.
    /// - `ENOMEM`, and those of adding a disk.
    ///
    /// # Context
    ///
    /// May sleep.
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

    /// Adds a device.
    fn add(
        self: &Arc<Self>,
        devices: &mut Devices,
        index: u32,
        hw_queues: Option<u32>,
    ) -> Result<Arc<Disk<Nbd>>> {
        let mut layout = self.layout;
        layout.hw_queues = hw_queues.unwrap_or(layout.hw_queues);
        // A disk can be opened as soon as it was added, so nothing may fail after that.
        let node = RBTreeNodeReservation::new(GFP_KERNEL)?;
        let place = UniqueArc::new_uninit(GFP_KERNEL)?;
        let (debugfs, shared) = (self.debugfs.clone(), self.shared.clone());
        let disk = rnbd_dev::add(index, layout, debugfs, shared, self.clone())?;
        let device = Arc::from(place.write(disk));
        devices.insert(node.into_node(index, device.clone()));
        Ok(device)
    }

    /// Calls `f` for each device in the order of their indices, until it fails.
    ///
    /// # Errors
    ///
    /// Those of `f`.
    ///
    /// # Context
    ///
    /// May sleep. `f` must not wait for a device or a server.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&Device) -> Result) -> Result {
        self.with(|devices| devices.values().try_for_each(|device| f(device)))
    }

    /// Calls `f` with all devices, under the lock.
    ///
    /// Allocations in `f` do not start I/O. It might be I/O to one of the devices, and everybody
    /// who uses netlink would wait for its server.
    fn with<R>(&self, f: impl FnOnce(&mut Devices) -> R) -> R {
        let mut devices = self.devices.lock();
        task::memalloc_noio(|| f(&mut devices))
    }

    /// Queues a work item for a job of a device. For lack of memory, the job is done here.
    fn queue_job(self: &Arc<Self>, index: u32, device: &Arc<Disk<Nbd>>, job: Job) {
        let queue = match &job {
            Job::Remove | Job::Disconnect(_) | Job::AddDebugfs | Job::Release => {
                self.shared.slow.clone()
            }
            Job::Scan => self.shared.scan.clone(),
        };
        // The job may be what ends a wait for memory that is being written to this device.
        let work = task::memalloc_noio(|| {
            DeviceWork::new(self.clone(), index, device.clone(), job.clone())
        });
        match work {
            Ok(work) => drop(queue.enqueue(work)),
            Err(_) => match job {
                Job::Remove => self.remove(index, device),
                Job::Disconnect(owner) => device.disconnect_owned(&owner),
                // The device works even without the files.
                Job::AddDebugfs => {}
                Job::Scan => device.leave_scan_to_open(),
                Job::Release => device.release_session(),
            },
        }
    }

    /// Removes a device (`nbd_dev_remove()`).
    ///
    /// Its index is not used again before the disk is gone. Tasks that have looked the device up
    /// keep a reference, and find that it is dying.
    ///
    /// # Context
    ///
    /// May sleep.
    fn remove(&self, index: u32, device: &Disk<Nbd>) {
        device.wait_for_last_scanner();
        device.remove();
        let node = self.with(|devices| devices.remove(&index));
        drop(node);
    }

    /// Removes all devices, except for those that are being removed already.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn clear(&self) {
        let all = self.with(|devices| core::mem::replace(devices, RBTree::new()));
        drop(all);
    }
}

/// Returns the lowest index of an unused device or, if there is none, the lowest free index
/// (`nbd_find_get_unused()`).
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
