// SPDX-License-Identifier: GPL-2.0
//! One `/dev/nbdN` (`struct nbd_device`): its disk, its locks, and its blk-mq operations.
//!
//! The operations that user space requests are in `rnbd_dev/`.

#![forbid(unsafe_code)]

mod config;
pub(crate) mod connect;
mod debugfs;
pub(crate) mod disconnect;
pub(crate) mod handover;
mod lifetime;
mod partitions;
pub(crate) mod running;
mod setup;
mod sizes;
mod start;

use crate::{
    kapi::{
        block::{
            gendisk::{
                Disk,
                GenDisk,
                Numbers, //
            },
            limits::{
                FixedLimits,
                RequestSizes, //
            },
            mq::{
                Dispatch,
                Expiry,
                Operations,
                TagSet,
                TimeoutStatus, //
            },
            published::Published,
            request::{
                NewRequest,
                QueueStatus,
                Status, //
            },
            timed_out::TimedOutRequest, //
        },
        net::port::{
            Port,
            Sender, //
        },
        task::TaskId, //
    },
    rnbd_session::Session,
    rnbd_shared::Shared, //
};
use config::Config;
use debugfs::Files;
use kernel::{
    debugfs::Dir,
    new_condvar,
    new_mutex,
    new_spinlock,
    prelude::*,
    str::CString,
    sync::{
        atomic::Atomic,
        Arc,
        CondVar,
        Mutex,
        MutexGuard,
        SpinLock, //
    }, //
};
use running::Running;

/// The major number of the devices (`NBD_MAJOR`).
pub(crate) const MAJOR: u32 = 43;
/// The number of tags of a hardware queue, which is that of nbd.c.
pub(crate) const QUEUE_DEPTH: u32 = 128;
/// The sizes of requests if the server asks for no others. These are nbd.c's limits.
pub(crate) const USUAL_SIZES: RequestSizes = RequestSizes {
    physical_block_bytes: 0,
    io_opt_bytes: 256 << 9,
    max_hw_sectors: 65536,
};
/// The request timeout in seconds if none is set. A request of the only connection is then logged as
/// possibly stuck, and otherwise sent on another connection.
pub(crate) const DEFAULT_TIMEOUT_SECONDS: u32 = 30;

/// What the module parameters determine for every device.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    /// The device's index is shifted by this to get its first minor number.
    pub(crate) part_shift: u32,
    /// The number of hardware queues that a device is created with.
    pub(crate) hw_queues: u32,
    /// The time in jiffies for which a connection must have owed replies, and been silent, before
    /// it may be replaced; 0 means never.
    pub(crate) stuck_jiffies: usize,
    /// The time in jiffies for which requests of a device that was configured by ioctl wait for a new
    /// connection.
    pub(crate) dead_timeout_jiffies: u64,
    /// Partitions are looked for when a device has started.
    pub(crate) scan_partitions: bool,
}

/// What is to be done with a device in a work item.
#[derive(Clone)]
pub(crate) enum Job {
    /// To remove it.
    Remove,
    /// To create its files in debugfs ([`Device::add_debugfs()`]).
    AddDebugfs,
    /// To read its partition table ([`Device::scan_partitions()`]).
    Scan,
    /// To release its last session ([`Device::release_session()`]).
    Release,
    /// To disconnect it, because its owner was released ([`Device::disconnect_owned()`]).
    Disconnect(Arc<Sender>),
}

/// Queues jobs. The registry implements it.
pub(crate) trait Jobs: Send + Sync {
    /// Queues work items for the jobs of all devices ([`Device::take_job()`]).
    ///
    /// # Context
    ///
    /// Any task context. The caller may hold the device's locks.
    fn queue_jobs(self: Arc<Self>);

    /// Does the same after a jiffy, and wakes up no task meanwhile that competes with the caller.
    fn queue_jobs_soon(self: Arc<Self>);
}

/// The data that the configuration lock protects.
pub(crate) struct State {
    /// The configuration. It exists from the first open, or the netlink connect, to the last put.
    pub(crate) config: Option<KBox<Config>>,
    /// The request timeout in jiffies, 0 if none is set (`tag_set.timeout`). A request of one of
    /// several connections then times out after [`DEFAULT_TIMEOUT_SECONDS`].
    pub(crate) timeout_jiffies: u32,
    /// The work item that opens the device to read its partition table.
    scanner: Option<Scanner>,
    /// How many there were.
    scanners: u32,
    /// A task is starting the device and has dropped the lock meanwhile.
    ///
    /// [`Device::lock()`] waits until this is cleared, so nobody else changes the configuration. The
    /// configuration cannot be freed either, because the task that starts the device holds a
    /// reference to it.
    starting: bool,
}

/// A work item that opens a device to read its partition table.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Scanner {
    task: TaskId,
    /// Tells it from others that the same task runs.
    number: u32,
}

/// What the registry and the netlink front end need to know to pick a device.
///
/// It is not part of [`State`]: that lock may be held for seconds, while this spin lock is held for
/// a few instructions only.
#[derive(Default)]
pub(crate) struct Usage {
    /// The device has a configuration, or the teardown of the last one has not finished.
    in_use: bool,
    /// The device is removed after the last put of its configuration (`NBD_DESTROY_ON_DISCONNECT`).
    pub(crate) destroy_on_disconnect: bool,
    /// A disconnect was requested since the device was added (`NBD_DISCONNECT_REQUESTED`).
    pub(crate) disconnect_requested: bool,
    /// The device is to be removed, and must not be opened or connected again.
    dying: bool,
    /// A work item has begun to remove the device.
    removal_started: bool,
    /// What is told about the session, until the device is free again.
    running: Option<Arc<Running>>,
    /// A work item is to create the files in debugfs.
    debugfs_wanted: bool,
    /// A work item is to read the partition table.
    scan_wanted: bool,
    /// A work item is reading the partition table. Another one would wait for the same server.
    scanning: bool,
    /// A work item is to release the last session.
    session_retracted: bool,
    /// The netlink socket whose release disconnects the device. It changes only under the
    /// configuration lock.
    owner: Option<Arc<Sender>>,
    /// The owner that was released, until a work item has disconnected the device.
    released_owner: Option<Arc<Sender>>,
}

/// A disk together with the driver's data for it.
pub(crate) type Device = GenDisk<Nbd>;

/// The driver's data for a disk (`struct nbd_device`).
#[pin_data]
pub(crate) struct Nbd {
    pub(crate) index: u32,
    /// See [`Layout::scan_partitions`]; false also if the device cannot have partitions.
    scans_partitions: bool,
    /// See [`Layout::stuck_jiffies`].
    pub(crate) stuck_jiffies: usize,
    /// See [`Layout::dead_timeout_jiffies`].
    dead_timeout_jiffies: u64,
    jobs: Arc<dyn Jobs>,
    /// The directory of the driver in debugfs.
    pub(crate) debugfs: Dir,
    /// The PID of the task that started the session, as sysfs shows it; 0 if there is no session.
    pub(crate) pid: Atomic<i32>,
    /// The identifier of the backend, as sysfs shows it (`NBD_ATTR_BACKEND_IDENTIFIER`).
    #[pin]
    pub(crate) backend: Mutex<Option<CString>>,
    /// The session, as the blk-mq operations read it.
    pub(crate) session: Published<Session>,
    /// The configuration and the lock that protects it (nbd.c's `config_lock`).
    #[pin]
    state: Mutex<State>,
    /// Waited on until [`State::starting`] is cleared.
    #[pin]
    starting_wait: CondVar,
    /// Waited on until the first block was read ([`config::Scan`]), and until [`State::scanner`] is
    /// cleared.
    #[pin]
    scanning_wait: CondVar,
    /// The files in debugfs, while there are any. Nests inside `state`.
    #[pin]
    debugfs_files: Mutex<Option<Files>>,
    /// Nests inside `state`.
    #[pin]
    pub(crate) usage: SpinLock<Usage>,
    /// The resources that all devices share. It is the last field, so that it is dropped last: the
    /// module may be unloaded once the last reference to the workqueues is gone.
    pub(crate) shared: Shared,
}

/// Adds `/dev/nbd{index}` (`nbd_dev_add()`).
///
/// # Errors
///
/// `ENOMEM`, and those of `add_disk()`.
///
/// # Context
///
/// May sleep.
pub(crate) fn add(
    index: u32,
    layout: Layout,
    debugfs: Dir,
    shared: Shared,
    jobs: Arc<dyn Jobs>,
) -> Result<Disk<Nbd>> {
    let tags = Arc::pin_init(TagSet::new(layout.hw_queues, QUEUE_DEPTH), GFP_KERNEL)?;
    // These are nbd.c's limits.
    let limits = FixedLimits {
        max_hw_sectors: USUAL_SIZES.max_hw_sectors,
        max_segments: u16::MAX,
        max_segment_size: u32::MAX,
        io_opt_bytes: USUAL_SIZES.io_opt_bytes,
    };
    let numbers = Numbers {
        major: MAJOR,
        first_minor: index << layout.part_shift,
        minors: 1 << layout.part_shift,
    };
    let state = State {
        config: None,
        timeout_jiffies: 0,
        scanner: None,
        scanners: 0,
        starting: false,
    };
    Disk::add(tags, limits, numbers, fmt!("nbd{index}"), |queue| {
        try_pin_init!(Nbd {
            index,
            scans_partitions: layout.scan_partitions && layout.part_shift > 0,
            stuck_jiffies: layout.stuck_jiffies,
            dead_timeout_jiffies: layout.dead_timeout_jiffies,
            jobs,
            debugfs,
            shared,
            pid: Atomic::new(0),
            backend <- new_mutex!(None),
            session: queue.published(),
            state <- new_mutex!(state),
            starting_wait <- new_condvar!(),
            scanning_wait <- new_condvar!(),
            debugfs_files <- new_mutex!(None),
            usage <- new_spinlock!(Usage::default()),
        })
    })
}

impl Device {
    /// Sets the netlink socket whose release disconnects the device. The caller holds the configuration
    /// lock.
    fn set_owner(&self, owner: Option<Arc<Sender>>) {
        let before = core::mem::replace(&mut self.usage.lock().owner, owner);
        // Not under the spin lock.
        drop(before);
    }
}

impl State {
    /// Returns the configuration.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device has no configuration.
    pub(crate) fn config_mut(&mut self) -> Result<&mut Config> {
        Ok(self.config.as_mut().ok_or(ENODEV)?)
    }

    /// Returns the configuration, if it is that of `session`.
    fn config_of(&mut self, session: &Arc<Session>) -> Option<&mut Config> {
        let is_ours = |c: &&mut KBox<Config>| {
            let ours = c.session.as_ref();
            ours.is_some_and(|ours| Arc::ptr_eq(ours, session))
        };
        Some(self.config.as_mut().filter(is_ours)?)
    }

    /// Makes the current task the one that reads the partition table.
    fn begin_scan(&mut self) {
        self.scanners = self.scanners.wrapping_add(1);
        self.scanner = Some(Scanner {
            task: TaskId::current(),
            number: self.scanners,
        });
    }

    /// Returns whether the current task is the one that reads the partition table.
    fn is_scanner(&self) -> bool {
        self.scanner.is_some_and(|s| s.task == TaskId::current())
    }
}

impl Operations for Nbd {
    fn queue_rq(&self, cx: &Dispatch<'_>, rq: NewRequest, last: bool) -> QueueStatus {
        match self.session.get(cx) {
            Some(session) => session.queue_rq(cx, rq, last),
            None => rq.refuse(Status::IOERR),
        }
    }

    fn commit_rqs(&self, cx: &Dispatch<'_>) {
        if let Some(session) = self.session.get(cx) {
            session.commit_rqs(cx);
        }
    }

    fn timeout(&self, cx: &Expiry<'_>, rq: TimedOutRequest<'_>) -> TimeoutStatus {
        match self.session.get(cx) {
            Some(session) => session.timeout(rq),
            None => TimeoutStatus::ResetTimer,
        }
    }
}

impl Device {
    /// Returns whether the device is neither in use nor about to be removed.
    pub(crate) fn is_unused(&self) -> bool {
        let usage = self.usage.lock();
        !usage.in_use && !usage.destroy_on_disconnect && !usage.dying
    }

    /// Returns whether the device is in use. This is what `NBD_CMD_STATUS` reports.
    pub(crate) fn is_in_use(&self) -> bool {
        self.usage.lock().in_use
    }

    /// Returns whether the device is being removed, or will be after the disconnect that was
    /// requested.
    pub(crate) fn is_going_down(&self) -> bool {
        let usage = self.usage.lock();
        usage.dying || (usage.destroy_on_disconnect && usage.disconnect_requested)
    }

    /// Returns whether the device is being removed.
    pub(crate) fn is_dying(&self) -> bool {
        self.usage.lock().dying
    }

    /// Takes the next job of the device. The caller must do it.
    pub(crate) fn take_job(&self) -> Option<Job> {
        let mut usage = self.usage.lock();
        if usage.dying && !usage.removal_started {
            usage.removal_started = true;
            return Some(Job::Remove);
        }
        if let Some(owner) = usage.released_owner.take() {
            return Some(Job::Disconnect(owner));
        }
        if !usage.scanning && core::mem::take(&mut usage.scan_wanted) {
            usage.scanning = true;
            return Some(Job::Scan);
        }
        if core::mem::take(&mut usage.session_retracted) {
            return Some(Job::Release);
        }
        core::mem::take(&mut usage.debugfs_wanted).then_some(Job::AddDebugfs)
    }

    /// Records that a netlink socket was released. Returns whether it owned the device.
    pub(crate) fn note_released(&self, port: Port) -> bool {
        let mut usage = self.usage.lock();
        let owner = usage.owner.take_if(|owner| owner.is_released_at(port));
        let owned = owner.is_some();
        if owned {
            usage.released_owner = owner.clone();
            usage.owner = owner;
        }
        owned
    }

    /// Takes the configuration lock, after waiting for a start that is in progress.
    ///
    /// # Context
    ///
    /// May sleep. It waits for requests in flight for at most five seconds, while a holder of the lock
    /// changes the block size of a running device.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        while state.starting {
            self.starting_wait.wait(&mut state);
        }
        state
    }

    /// Sets the number of hardware queues to at most `count` (`blk_mq_update_nr_hw_queues()`).
    ///
    /// The configuration lock is dropped meanwhile, because the block layer takes locks inside
    /// which the configuration lock is taken. [`State::starting`] makes [`Self::lock()`] wait.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn set_hw_queues<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        count: u32,
    ) -> MutexGuard<'a, State> {
        state.starting = true;
        drop(state);
        self.disk.set_hw_queues(count);
        let mut state = self.state.lock();
        state.starting = false;
        self.starting_wait.notify_all();
        state
    }

    /// Calls `f` with the configuration, under the configuration lock.
    ///
    /// # Errors
    ///
    /// `ENODEV` if the device has no configuration, and those of `f`.
    ///
    /// # Context
    ///
    /// May sleep, like [`Self::lock()`].
    pub(crate) fn with_config<R>(&self, f: impl FnOnce(&mut Config) -> Result<R>) -> Result<R> {
        f(self.lock().config_mut()?)
    }
}
