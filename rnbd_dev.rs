// SPDX-License-Identifier: GPL-2.0
//! One `/dev/nbdN`: its disk, its locks, and what the data path sees of it. What user space does with it is
//! in `rnbd_dev/`.

#![forbid(unsafe_code)]

mod config;
pub(crate) mod connect;
mod debugfs;
mod lifetime;
mod setup;

use crate::{
    kapi::block::{
        gendisk::{
            Disk,
            GenDisk,
            Numbers, //
        },
        limits::FixedLimits,
        mq::{
            Dispatch,
            Expiry,
            Operations,
            TagSet, //
            TimeoutStatus,
        },
        published::Published,
        request::{
            NewRequest,
            QueueStatus,
            Status, //
            TimedOutRequest,
        },
    },
    rnbd_session::Session,
    rnbd_shared::Shared, //
};
use config::Config;
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

/// `NBD_MAJOR`.
pub(crate) const MAJOR: u32 = 43;
/// Tags of one hardware queue, as nbd.c has it.
pub(crate) const QUEUE_DEPTH: u32 = 128;
/// How long a request may take before there is a word in the log, where no timeout is set.
pub(crate) const DEFAULT_TIMEOUT_SECONDS: u32 = 30;

/// What the module's parameters say about every device.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    /// Minors of a device are its index shifted by this.
    pub(crate) part_shift: u32,
    /// Hardware queues that a device is made with.
    pub(crate) hw_queues: u32,
    /// After how long a connection that owes replies may be replaced, in jiffies; 0: never.
    pub(crate) stuck_jiffies: usize,
}

/// Where devices go that are no longer wanted.
pub(crate) trait Remover: Send + Sync {
    /// Some device is dying: has it removed, soon. The caller may hold the device's locks.
    fn remove_later(self: Arc<Self>);
}

/// What the configuration lock protects.
pub(crate) struct State {
    /// From the first open, or the connect, to the last close, or the disconnect.
    pub(crate) config: Option<KBox<Config>>,
    /// How long a request may take, in jiffies; 0: for ever (`tag_set.timeout`).
    pub(crate) timeout_jiffies: u32,
    /// Somebody starts the device and has let go of the lock meanwhile. Nobody else changes the
    /// configuration before that is over ([`Device::lock()`]); nor does it go, since who starts the
    /// device uses it.
    starting: bool,
}

/// What whoever looks for a device asks of it. Not part of [`State`], whose lock may be held for seconds,
/// while this one is held for a few instructions only.
#[derive(Default)]
pub(crate) struct Usage {
    /// There is a configuration, or what it has set up is still being undone.
    in_use: bool,
    /// The device is removed when it is no longer used (`NBD_DESTROY_ON_DISCONNECT`).
    pub(crate) destroy_on_disconnect: bool,
    /// Somebody asked for a disconnect since the device was made (`NBD_DISCONNECT_REQUESTED`).
    pub(crate) disconnect_requested: bool,
    /// It is to be removed: nobody may use it again.
    dying: bool,
    /// Somebody removes it.
    removal_started: bool,
}

/// See the module's documentation: the disk, and with it the driver's part.
pub(crate) type Device = GenDisk<Nbd>;

/// The driver's part of a disk (`struct nbd_device`).
#[pin_data]
pub(crate) struct Nbd {
    pub(crate) index: u32,
    partitions: bool,
    /// As in [`Layout`].
    pub(crate) stuck_jiffies: usize,
    remover: Arc<dyn Remover>,
    /// Where debugfs shows the devices.
    pub(crate) debugfs: Dir,
    /// The process that started the session, as sysfs shows it; 0 while there is none.
    pub(crate) pid: Atomic<i32>,
    /// What the user calls the image, as sysfs shows it.
    #[pin]
    pub(crate) backend: Mutex<Option<CString>>,
    /// The session, for the data path.
    pub(crate) session: Published<Session>,
    /// nbd.c's `config_lock`.
    #[pin]
    state: Mutex<State>,
    /// Notified when [`State::starting`] is cleared.
    #[pin]
    starting_wait: CondVar,
    /// Taken with or without `state`.
    #[pin]
    pub(crate) usage: SpinLock<Usage>,
    /// What all devices share. It goes last: the module may be unloaded when the last user of it has gone.
    pub(crate) shared: Shared,
}

/// Makes `/dev/nbd{index}` (`nbd_dev_add()`). May sleep.
pub(crate) fn add(
    index: u32,
    layout: Layout,
    debugfs: Dir,
    shared: Shared,
    remover: Arc<dyn Remover>,
) -> Result<Disk<Nbd>> {
    let tags = Arc::pin_init(TagSet::new(layout.hw_queues, QUEUE_DEPTH), GFP_KERNEL)?;
    // The limits are nbd.c's.
    let limits = FixedLimits {
        max_hw_sectors: 65536,
        max_segments: u16::MAX,
        max_segment_size: u32::MAX,
        io_opt_bytes: 256 << 9,
    };
    let numbers = Numbers {
        major: MAJOR,
        first_minor: index << layout.part_shift,
        minors: 1 << layout.part_shift,
    };
    let state = State {
        config: None,
        timeout_jiffies: 0,
        starting: false,
    };
    Disk::add(tags, limits, numbers, fmt!("nbd{index}"), |queue| {
        try_pin_init!(Nbd {
            index,
            partitions: layout.part_shift > 0,
            stuck_jiffies: layout.stuck_jiffies,
            remover,
            debugfs,
            shared,
            pid: Atomic::new(0),
            backend <- new_mutex!(None),
            session: queue.published(),
            state <- new_mutex!(state),
            starting_wait <- new_condvar!(),
            usage <- new_spinlock!(Usage::default()),
        })
    })
}

impl State {
    /// The configuration.
    ///
    /// # Errors
    ///
    /// `ENODEV` where there is none.
    pub(crate) fn config_mut(&mut self) -> Result<&mut Config> {
        Ok(self.config.as_mut().ok_or(ENODEV)?)
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
    /// The next open reads the partition table, where there can be partitions.
    pub(crate) fn scan_partitions_later(&self) {
        if self.partitions {
            self.disk.need_partition_scan();
        }
    }

    /// Whether nobody uses it and it is not about to go.
    pub(crate) fn is_unused(&self) -> bool {
        let usage = self.usage.lock();
        !usage.in_use && !usage.destroy_on_disconnect && !usage.dying
    }

    /// Whether somebody uses it, as the status says.
    pub(crate) fn is_in_use(&self) -> bool {
        self.usage.lock().in_use
    }

    /// Whether it is to be removed: now, or when it is closed after the disconnect that was asked for.
    pub(crate) fn is_going_down(&self) -> bool {
        let usage = self.usage.lock();
        usage.dying || (usage.destroy_on_disconnect && usage.disconnect_requested)
    }

    /// Whether it is being removed.
    pub(crate) fn is_dying(&self) -> bool {
        self.usage.lock().dying
    }

    /// Whether the device is to be removed, by whoever is told so, which is one caller only.
    pub(crate) fn begin_removal(&self) -> bool {
        let mut usage = self.usage.lock();
        let begin = usage.dying && !usage.removal_started;
        usage.removal_started |= begin;
        begin
    }

    /// Takes the configuration lock, when nobody starts the device. May sleep, but waits for no server.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        while state.starting {
            self.starting_wait.wait(&mut state);
        }
        state
    }

    /// Has the block layer make `count` hardware queues. The configuration lock is not held meanwhile:
    /// the block layer takes locks that are held where ours is taken. But who takes it by
    /// [`Self::lock()`] waits until this is over.
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

    /// Runs `f` with the configuration, which is there while the device is open or connected, when nobody
    /// starts the device.
    pub(crate) fn with_config<R>(&self, f: impl FnOnce(&mut Config) -> Result<R>) -> Result<R> {
        f(self.lock().config_mut()?)
    }
}
