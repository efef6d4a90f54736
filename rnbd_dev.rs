// SPDX-License-Identifier: GPL-2.0
//! One `/dev/nbdN`: its disk, what user space has set up for it, and who has it open.

use crate::{
    kapi::{
        disk::{
            valid_block_size, BlockDevice, Disk, DiskRef, Features, FixedLimits, Numbers, Sectors,
        },
        mq::{InQueue, NewRequest, Operations, Overdue, Published, Queued, Status, TagSet},
        sock::{Ending, Socket},
        task::{self, TaskId},
    },
    rnbd_ioctl,
    rnbd_proto::flags,
    rnbd_session::{Queues, Session},
    rnbd_sock,
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, Mutex,
    },
};

/// `NBD_MAJOR`.
pub(crate) const MAJOR: u32 = 43;
/// Tags of one hardware queue, as nbd.c has it.
const QUEUE_DEPTH: u32 = 128;
/// The block size until one is set (`NBD_DEF_BLKSIZE_BITS`).
const DEFAULT_BLOCK_BYTES: u32 = 1024;
/// How long a request may take before there is a word in the log, where no timeout is set.
const DEFAULT_TIMEOUT_SECONDS: u32 = 30;

/// What the module's parameters say about every device.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    /// Minors of a device are its index shifted by this.
    pub(crate) part_shift: u32,
    /// Hardware queues that a device is made with.
    pub(crate) hw_queues: u32,
}

/// What user space has set up, from the first open to the last close (`struct nbd_config`).
pub(crate) struct Config {
    /// Opens, and whatever else keeps it.
    references: u32,
    /// `NBD_FLAG_*`.
    pub(crate) flags: u32,
    size_bytes: u64,
    block_bytes: u32,
    sockets: KVec<Socket>,
    /// The task that hands over sockets: no other may.
    setup_by: Option<TaskId>,
    /// The device was started; it is not started again before the last close.
    started: bool,
    /// The session, from its start to the last close.
    session: Option<Arc<Session>>,
    disconnect_requested: bool,
}

impl Config {
    fn new() -> Self {
        Config {
            references: 0,
            flags: 0,
            size_bytes: 0,
            block_bytes: DEFAULT_BLOCK_BYTES,
            sockets: KVec::new(),
            setup_by: None,
            started: false,
            session: None,
            disconnect_requested: false,
        }
    }

    fn is_disconnected(&self) -> bool {
        self.disconnect_requested
            || self
                .session
                .as_ref()
                .is_some_and(|s| s.table().is_disconnected())
    }
}

/// What the configuration lock protects.
pub(crate) struct State {
    config: Option<KBox<Config>>,
    /// How long a request may take, in jiffies; 0: for ever (`tag_set.timeout`).
    timeout_jiffies: u32,
}

/// See the module's documentation. Lives in the disk.
#[pin_data]
pub(crate) struct Device {
    index: u32,
    partitions: bool,
    disk: DiskRef,
    /// The process that started the session, as sysfs shows it; 0 while there is none.
    pid: Atomic<i32>,
    /// The session, for the data path.
    session: Published<Session>,
    /// nbd.c's `config_lock`.
    #[pin]
    state: Mutex<State>,
}

/// Makes `/dev/nbd{index}` (`nbd_dev_add()`). May sleep.
pub(crate) fn add(index: u32, layout: Layout) -> Result<Disk<Device>> {
    let tags = KBox::pin_init(TagSet::new(layout.hw_queues, QUEUE_DEPTH), GFP_KERNEL)?;
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
    Disk::add(tags, limits, numbers, fmt!("nbd{index}"), |disk| {
        try_pin_init!(Device {
            index,
            partitions: layout.part_shift > 0,
            pid: Atomic::new(0),
            session: disk.published(),
            state <- new_mutex!(State { config: None, timeout_jiffies: 0 }),
            disk,
        })
    })
}

impl Operations for Device {
    fn queue_rq(&self, cx: &InQueue<'_>, hw_queue: u32, rq: NewRequest, last: bool) -> Queued {
        match self.session.get(cx) {
            Some(session) => session.queue_rq(hw_queue, rq, last),
            None => rq.refuse(Status::IOERR),
        }
    }

    fn commit_rqs(&self, cx: &InQueue<'_>, hw_queue: u32) {
        if let Some(session) = self.session.get(cx) {
            session.commit_rqs(hw_queue);
        }
    }

    fn timeout(&self, cx: &InQueue<'_>, rq: Overdue<'_>) {
        if let Some(session) = self.session.get(cx) {
            session.timeout(rq);
        }
    }
}

impl BlockDevice for Device {
    /// `nbd_open()`
    fn open(&self) -> Result {
        let mut state = self.state.lock();
        let config = match state.config.take() {
            Some(config) => {
                if config.is_disconnected() {
                    self.scan_partitions_later();
                }
                config
            }
            None => {
                self.scan_partitions_later();
                KBox::new(Config::new(), GFP_KERNEL)?
            }
        };
        state.config.insert(config).references += 1;
        Ok(())
    }

    /// `nbd_release()`
    fn release(&self, _openers: u32) {
        let mut state = self.state.lock();
        let last = state.config.as_mut().is_some_and(|config| {
            config.references -= 1;
            config.references == 0
        });
        if last {
            if let Some(config) = state.config.take() {
                self.tear_down(config);
            }
            state.timeout_jiffies = 0;
            self.disk
                .set_request_timeout(DEFAULT_TIMEOUT_SECONDS * task::HZ);
        }
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<usize> {
        rnbd_ioctl::ioctl(self, cmd, arg)
    }

    fn pid(&self) -> i32 {
        self.pid.load(Relaxed)
    }
}

impl Device {
    fn scan_partitions_later(&self) {
        if self.partitions {
            self.disk.need_partition_scan();
        }
    }

    /// Runs `f` with the configuration, which is there while the device is open.
    fn with_config<R>(&self, f: impl FnOnce(&mut Config) -> Result<R>) -> Result<R> {
        let mut state = self.state.lock();
        f(state.config.as_mut().ok_or(ENODEV)?)
    }

    /// The last reference has gone (`nbd_config_put()`). The lock is held.
    fn tear_down(&self, config: KBox<Config>) {
        if let Some(session) = &config.session {
            session.end(Ending::Polite);
            // Nothing is in flight any more, and what comes in is refused.
            let gone = self.session.retract(&self.disk.freeze());
            drop(gone);
        }
        self.disk.invalidate();
        // It can only fail for limits that do not go together, and these do.
        let _ = self.disk.set_limits(Features::default(), None);
        if config.size_bytes != 0 {
            self.disk.uevent_change();
        }
        if config.started {
            Disk::<Device>::remove_pid_file(&self.disk);
        }
        self.pid.store(0, Relaxed);
    }

    /// Adds a socket to the ones that the device will use (`nbd_add_socket()`).
    ///
    /// # Errors
    ///
    /// `EINVAL` for something that is no TCP or UNIX stream socket, `EBADF`, `ENOTSOCK`, `EBUSY` where
    /// the device was started or another task sets it up, `ENOMEM`.
    pub(crate) fn add_socket(&self, fd: usize) -> Result {
        let fd = i32::try_from(fd).map_err(|_| EINVAL)?;
        self.with_config(|config| {
            if config.started {
                pr_err!(
                    "nbd{}: cannot add a socket to a running device\n",
                    self.index
                );
                return Err(EBUSY);
            }
            let socket = self.socket_from_fd(fd)?;
            let me = TaskId::current();
            if *config.setup_by.get_or_insert(me) != me {
                pr_err!("nbd{}: being set up by another task\n", self.index);
                return Err(EBUSY);
            }
            Ok(config.sockets.push(socket, GFP_KERNEL)?)
        })
    }

    fn socket_from_fd(&self, fd: i32) -> Result<Socket> {
        use crate::kapi::sock::BadSocket;
        Socket::from_fd(fd).map_err(|e| match e {
            BadSocket::Fd(errno) => errno,
            BadSocket::Kind => {
                pr_err!(
                    "nbd{}: unsupported socket: should be TCP or UNIX\n",
                    self.index
                );
                EINVAL
            }
        })
    }

    /// Sets the size, in bytes.
    pub(crate) fn set_size_bytes(&self, size_bytes: usize) -> Result {
        self.with_config(|config| self.set_size(config, size_bytes as u64, config.block_bytes))
    }

    /// Sets the size, in blocks of the size that was set.
    pub(crate) fn set_size_blocks(&self, blocks: usize) -> Result {
        self.with_config(|config| {
            let size_bytes = (blocks as u64)
                .checked_mul(u64::from(config.block_bytes))
                .ok_or(EINVAL)?;
            self.set_size(config, size_bytes, config.block_bytes)
        })
    }

    /// Sets the block size, in bytes; 0 is the default.
    pub(crate) fn set_block_bytes(&self, bytes: usize) -> Result {
        let bytes = match bytes {
            0 => DEFAULT_BLOCK_BYTES as usize,
            bytes => bytes,
        };
        if !valid_block_size(bytes) {
            return Err(EINVAL);
        }
        self.with_config(|config| self.set_size(config, config.size_bytes, bytes as u32))
    }

    /// `nbd_set_size()`: remembers it, and tells the block layer where the device runs.
    fn set_size(&self, config: &mut Config, size_bytes: u64, block_bytes: u32) -> Result {
        if i64::try_from(size_bytes).is_err() {
            return Err(EINVAL);
        }
        config.size_bytes = size_bytes;
        config.block_bytes = block_bytes;
        if !config.started {
            return Ok(());
        }
        self.disk
            .set_limits(features(config.flags), Some(block_bytes))?;
        self.scan_partitions_later();
        let told = self.disk.set_capacity_and_notify(Sectors(size_bytes >> 9));
        if !told {
            self.disk.uevent_change();
        }
        Ok(())
    }

    /// Sets how long a request may take; 0 is for ever (`nbd_set_cmd_timeout()`).
    pub(crate) fn set_timeout_seconds(&self, seconds: usize) -> Result {
        let mut state = self.state.lock();
        let jiffies = (seconds as u32).wrapping_mul(task::HZ);
        state.timeout_jiffies = jiffies;
        self.disk.set_request_timeout(match seconds {
            0 => DEFAULT_TIMEOUT_SECONDS * task::HZ,
            _ => jiffies,
        });
        let session = state.config.as_ref().and_then(|c| c.session.as_ref());
        if let Some(session) = session {
            session.table().set_timeout_jiffies(jiffies);
        }
        Ok(())
    }

    /// Sets what the server can do. Taken up when the device starts or its size is set.
    pub(crate) fn set_flags(&self, flags: usize) -> Result {
        self.with_config(|config| {
            config.flags = flags as u32;
            Ok(())
        })
    }

    /// Asks the servers to end the session (`nbd_disconnect()`). May sleep.
    pub(crate) fn disconnect(&self) -> Result {
        pr_info!("nbd{}: NBD_DISCONNECT\n", self.index);
        self.with_config(|config| {
            config.disconnect_requested = true;
            if let Some(session) = &config.session {
                session.say_goodbye();
                return Ok(());
            }
            for socket in &config.sockets {
                if let Err(e) = rnbd_sock::say_goodbye_on(socket) {
                    pr_err!("nbd{}: send disconnect failed ({e:?})\n", self.index);
                }
            }
            Ok(())
        })
    }

    /// Ends the session at once, and forgets the sockets (`nbd_clear_sock_ioctl()`). May sleep.
    pub(crate) fn clear_sockets(&self) -> Result {
        self.with_config(|config| {
            if let Some(session) = &config.session {
                session.end(Ending::Polite);
            }
            config.sockets = KVec::new();
            config.setup_by = None;
            Ok(())
        })?;
        self.disk.force_media_change();
        self.reset_size();
        Ok(())
    }

    /// `nbd_bdev_reset()`
    fn reset_size(&self) {
        if self.disk.openers() <= 1 {
            self.disk.set_capacity(Sectors(0));
        }
    }

    /// Runs a session until its last connection has gone, or a signal comes (`NBD_DO_IT`,
    /// `nbd_start_device_ioctl()`).
    ///
    /// # Errors
    ///
    /// `EBUSY` where the device was started already or a socket is in use elsewhere, `EINVAL` without a
    /// socket or with several that the server does not allow, `ERESTARTSYS` after a signal.
    pub(crate) fn run(&self) -> Result {
        let session = self.start()?;
        self.scan_partitions_later();
        let signal = session.table().wait_gone_or_signal();
        if signal {
            session.end(Ending::Polite);
        }
        self.with_config(|config| {
            self.reset_size();
            if signal && !config.disconnect_requested {
                return Err(ERESTARTSYS);
            }
            Ok(())
        })
    }

    /// `nbd_start_device()`
    fn start(&self) -> Result<Arc<Session>> {
        self.prepare_hw_queues()?;
        let mut state = self.state.lock();
        let timeout_jiffies = state.timeout_jiffies;
        let config = state.config.as_mut().ok_or(ENODEV)?;
        // Somebody may have been here while the lock was not held.
        self.check_startable(config)?;
        let queues = Queues {
            count: self.disk.hw_queues(),
            depth: QUEUE_DEPTH,
        };
        let session = Session::new(
            self.index,
            &config.sockets,
            queues,
            config.flags,
            timeout_jiffies,
        )?;
        if let Err(e) = self.show(config, &session) {
            session.end(Ending::Polite);
            return Err(e);
        }
        session.begin();
        Ok(session)
    }

    fn check_startable(&self, config: &Config) -> Result {
        if config.started {
            return Err(EBUSY);
        }
        if config.sockets.is_empty() {
            return Err(EINVAL);
        }
        if config.sockets.len() > 1 && config.flags & flags::CAN_MULTI_CONN == 0 {
            pr_err!(
                "nbd{}: the server does not support several connections for a device\n",
                self.index
            );
            return Err(EINVAL);
        }
        Ok(())
    }

    /// Makes one hardware queue for each socket. The configuration lock is not held while the block
    /// layer changes them: it takes locks that are held where ours is taken.
    fn prepare_hw_queues(&self) -> Result {
        let sockets = self.with_config(|config| {
            self.check_startable(config)?;
            Ok(config.sockets.len())
        })?;
        self.disk.set_hw_queues(sockets as u32);
        Ok(())
    }

    /// Publishes a session, and shows it to user space.
    fn show(&self, config: &mut Config, session: &Arc<Session>) -> Result {
        Disk::<Device>::add_pid_file(&self.disk).inspect_err(|_| {
            pr_err!("nbd{}: cannot make the pid file\n", self.index);
        })?;
        config.started = true;
        config.session = Some(session.clone());
        self.pid.store(task::current_pid(), Relaxed);
        if config.disconnect_requested {
            session.table().request_disconnect();
        }
        self.disk
            .set_read_only(config.flags & flags::READ_ONLY != 0);
        self.session.publish(session.clone()).map_err(|_| EBUSY)?;
        self.set_size(config, config.size_bytes, config.block_bytes)
    }
}

/// What the disk can do with such a server (`nbd_apply_limits()`).
fn features(flags: u32) -> Features {
    let has = |flag| flags & flag != 0;
    Features {
        write_cache: has(flags::SEND_FLUSH),
        fua: has(flags::SEND_FLUSH) && has(flags::SEND_FUA),
        rotational: has(flags::ROTATIONAL),
        discard: has(flags::SEND_TRIM),
        write_zeroes: has(flags::SEND_WRITE_ZEROES),
    }
}
