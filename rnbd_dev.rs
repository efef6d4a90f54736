// SPDX-License-Identifier: GPL-2.0
//! One `/dev/nbdN`: its disk, its life from the first open to the last close, and what the data path
//! sees of it. What user space sets up is in `rnbd_config.rs`.

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        disk::{BlockDevice, Disk, File, GenDisk, Numbers},
        limits::FixedLimits,
        mq::{Dispatch, Expired, Expiry, NewRequest, Operations, Overdue, Queued, Status, TagSet},
        published::Published,
        task,
    },
    rnbd_config::Config,
    rnbd_ioctl,
    rnbd_session::Session,
    rnbd_shared::Shared,
};
use kernel::{
    debugfs::Dir,
    new_condvar, new_mutex, new_spinlock,
    prelude::*,
    str::CString,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, CondVar, Mutex, MutexGuard, SpinLock,
    },
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
pub(crate) trait Graveyard: Send + Sync {
    /// Some device is doomed: has it removed, soon. The caller may hold the device's locks.
    fn bury_later(self: Arc<Self>);
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
pub(crate) struct Life {
    /// There is a configuration, or what it has set up is still being undone.
    in_use: bool,
    /// The device is removed when it is no longer used (`NBD_DESTROY_ON_DISCONNECT`).
    pub(crate) destroy_on_disconnect: bool,
    /// Somebody asked for a disconnect since the device was made (`NBD_DISCONNECT_REQUESTED`).
    pub(crate) disconnect_requested: bool,
    /// It is to be removed: nobody may use it again.
    doomed: bool,
    /// Somebody removes it.
    buried: bool,
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
    graveyard: Arc<dyn Graveyard>,
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
    settled: CondVar,
    /// Taken with or without `state`.
    #[pin]
    pub(crate) life: SpinLock<Life>,
    /// What all devices share. It goes last: the module may be unloaded when the last user of it has gone.
    pub(crate) shared: Shared,
}

/// Makes `/dev/nbd{index}` (`nbd_dev_add()`). May sleep.
pub(crate) fn add(
    index: u32,
    layout: Layout,
    debugfs: Dir,
    shared: Shared,
    graveyard: Arc<dyn Graveyard>,
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
            graveyard,
            debugfs,
            shared,
            pid: Atomic::new(0),
            backend <- new_mutex!(None),
            session: queue.published(),
            state <- new_mutex!(state),
            settled <- new_condvar!(),
            life <- new_spinlock!(Life::default()),
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
    fn queue_rq(&self, cx: &Dispatch<'_>, rq: NewRequest, last: bool) -> Queued {
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

    fn timeout(&self, cx: &Expiry<'_>, rq: Overdue<'_>) -> Expired {
        match self.session.get(cx) {
            Some(session) => session.timeout(rq),
            None => Expired::Waits,
        }
    }
}

impl BlockDevice for Nbd {
    /// `nbd_open()`
    fn open(device: &Device) -> Result {
        let mut state = device.state.lock();
        if state.config.as_ref().is_none_or(|c| c.is_disconnected()) {
            device.scan_partitions_later();
        }
        match &mut state.config {
            Some(config) => config.references += 1,
            None => {
                device.new_config(&mut state)?;
            }
        }
        Ok(())
    }

    /// `nbd_release()`
    fn release(device: &Device, openers: u32) {
        let disconnect = openers == 0
            && device
                .with_config(|config| Ok(config.disconnect_on_close))
                .unwrap_or(false);
        if disconnect {
            device.disconnect_and_put();
        }
        device.put_config();
    }

    fn ioctl(device: &Device, cmd: u32, arg: usize) -> Result<usize> {
        rnbd_ioctl::ioctl(device, cmd, arg)
    }

    fn pid(&self) -> i32 {
        self.pid.load(Relaxed)
    }

    fn backend(&self, print: impl FnOnce(&CStr) -> isize) -> isize {
        print(self.backend.lock().as_deref().unwrap_or(c""))
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
        let life = self.life.lock();
        !life.in_use && !life.destroy_on_disconnect && !life.doomed
    }

    /// Whether somebody uses it, as the status says.
    pub(crate) fn is_in_use(&self) -> bool {
        self.life.lock().in_use
    }

    /// Whether it is to be removed: now, or when it is closed after the disconnect that was asked for.
    pub(crate) fn is_going(&self) -> bool {
        let life = self.life.lock();
        life.doomed || (life.destroy_on_disconnect && life.disconnect_requested)
    }

    /// Whether it is being removed.
    pub(crate) fn is_doomed(&self) -> bool {
        self.life.lock().doomed
    }

    /// Whether the device is to be removed, by whoever is told so, which is one caller only.
    pub(crate) fn begin_burial(&self) -> bool {
        let mut life = self.life.lock();
        let begin = life.doomed && !life.buried;
        life.buried |= begin;
        begin
    }

    /// Takes the configuration lock, when nobody starts the device. May sleep, but waits for no server.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        while state.starting {
            self.settled.wait(&mut state);
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
        self.settled.notify_all();
        state
    }

    /// Runs `f` with the configuration, which is there while the device is open or connected, when nobody
    /// starts the device.
    pub(crate) fn with_config<R>(&self, f: impl FnOnce(&mut Config) -> Result<R>) -> Result<R> {
        f(self.lock().config_mut()?)
    }

    /// Makes a configuration, with one reference (`nbd_alloc_and_init_config()`). There is none.
    ///
    /// # Errors
    ///
    /// `ENXIO` where the device is about to be removed, `ENODEV` where the module is about to go,
    /// `ENOMEM`.
    pub(crate) fn new_config<'a>(&self, state: &'a mut State) -> Result<&'a mut Config> {
        let config = KBox::new(Config::new()?, GFP_KERNEL)?;
        let mut life = self.life.lock();
        if life.doomed {
            return Err(ENXIO);
        }
        life.in_use = true;
        Ok(state.config.insert(config))
    }

    /// Lets go of the configuration (`nbd_config_put()`). The last one ends the session, and the device
    /// where it is not wanted any more. May sleep.
    pub(crate) fn put_config(&self) {
        let mut state = self.state.lock();
        let last = state.config.as_mut().is_some_and(|config| {
            config.references -= 1;
            config.references == 0
        });
        if !last {
            return;
        }
        if let Some(mut config) = state.config.take() {
            self.tear_down(&mut config);
            state.timeout_jiffies = 0;
            self.disk
                .set_request_timeout(DEFAULT_TIMEOUT_SECONDS * task::HZ);
            self.leave();
        }
    }

    /// Nobody uses the device any more. Has it removed where it was to go. The configuration lock is held.
    fn leave(&self) {
        let mut life = self.life.lock();
        life.in_use = false;
        let doom = life.destroy_on_disconnect && !life.doomed;
        life.doomed |= doom;
        drop(life);
        if doom {
            self.graveyard.clone().bury_later();
        }
    }

    /// Undoes what was set up. The lock is held.
    fn tear_down(&self, config: &mut Config) {
        config.hide();
        config.end();
        if config.session.is_some() {
            // Nothing is in flight any more, and what comes in is refused.
            let gone = self.session.retract(&self.disk.freeze());
            drop(gone);
        }
        self.disk.invalidate();
        self.disk.reset_limits();
        if config.size_bytes != 0 {
            self.disk.uevent_change();
        }
        if config.started {
            self.remove_file(File::Pid);
        }
        self.pid.store(0, Relaxed);
        if config.has_backend_file {
            self.remove_file(File::Backend);
        }
        // Also where the file could not be made: the next image is another one.
        *self.backend.lock() = None;
    }
}
