// SPDX-License-Identifier: GPL-2.0
//! The settings that both front ends share: sockets, sizes, flags and timeouts.

#![forbid(unsafe_code)]

use super::{
    config::{
        Config,
        Geometry,
        DEFAULT_BLOCK_BYTES, //
    },
    Device,
    State,
    DEFAULT_TIMEOUT_SECONDS, //
};
use crate::{
    kapi::{
        block::{
            disk::{
                OpenMutexGuard,
                OpenMutexHeld,
                Sectors, //
            },
            limits::{
                valid_block_size,
                BlockSizeError,
                Features,
                RequestSizes,
                SECTOR_BYTES, //
            },
        },
        errno::ENOTCONN,
        net::sock::{
            BadSocket,
            Socket, //
        },
        task::{
            self,
            Deadline,
            TaskId, //
        },
    },
    pure::{
        proto::flags, //
    },
    rnbd_events::{
        Event,
        Notice,
        Size, //
    },
    rnbd_session::Session,
};
use kernel::{
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc,
        MutexGuard, //
    },
    time::{
        delay::fsleep,
        Delta, //
    },
};

/// How long a change of the block size waits until nobody opens or closes the device.
const OPEN_MUTEX_SECONDS: u32 = 5;

/// The longest timeout in jiffies: `MAX_JIFFY_OFFSET`, limited to what 32 bits can hold.
const MAX_JIFFIES: u32 = u32::MAX / 4;

impl Device {
    /// Takes the configuration lock for an ioctl. Netlink cannot connect the device before the lock
    /// is dropped.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the device was configured by netlink.
    ///
    /// # Context
    ///
    /// May sleep, like [`Self::lock()`].
    pub(super) fn lock_for_ioctl(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.config.as_ref().is_some_and(|c| c.bound) {
            pr_err!(
                "nbd{}: cannot use ioctl interface on a netlink controlled device\n",
                self.index
            );
            return Err(EINVAL);
        }
        Ok(state)
    }

    /// Checks that the device can be used by ioctl.
    ///
    /// # Errors
    ///
    /// Those of [`Self::lock_for_ioctl()`].
    pub(crate) fn check_ioctl(&self) -> Result {
        drop(self.lock_for_ioctl()?);
        Ok(())
    }

    /// Takes the configuration lock by `lock`. If the disk has another block size than `wanted`
    /// returns, takes the `open_mutex` as well: [`Self::set_disk_block_bytes()`] needs it.
    ///
    /// # Errors
    ///
    /// - Those of `lock`.
    /// - `EBUSY`: another task has held the `open_mutex`, or has been reading the partition table, for
    ///   [`OPEN_MUTEX_SECONDS`].
    ///
    /// # Context
    ///
    /// May sleep, but holds no lock meanwhile: the configuration lock nests inside the
    /// `open_mutex`.
    pub(super) fn lock_for_block_size<'a>(
        &'a self,
        lock: impl Fn() -> Result<MutexGuard<'a, State>>,
        wanted: impl Fn(Option<&Config>) -> Option<u32>,
    ) -> Result<(MutexGuard<'a, State>, Option<OpenMutexGuard<'a>>)> {
        let deadline = Deadline::after_seconds(OPEN_MUTEX_SECONDS);
        loop {
            let state = lock()?;
            let wanted = wanted(state.config.as_deref());
            if wanted.is_none_or(|bytes| bytes == self.disk.block_bytes()) {
                return Ok((state, None));
            }
            // The work item that reads the partition table uses the page cache, but soon closes the device.
            if state.scanner.is_none() {
                if let Some(held) = self.disk.try_lock_open_mutex() {
                    return Ok((state, Some(held)));
                }
            }
            drop(state);
            if deadline.jiffies_left() == 0 {
                pr_err!(
                    "nbd{}: cannot change the block size while the device is being opened or closed\n",
                    self.index
                );
                return Err(EBUSY);
            }
            fsleep(Delta::from_millis(1));
        }
    }

    /// Calls `f`, which sets up something by ioctl, under the configuration lock. If it succeeds,
    /// netlink cannot connect the device before the last close.
    ///
    /// # Errors
    ///
    /// Those of [`Self::lock_for_ioctl()`], `ENODEV` if the device has no configuration, and those
    /// of `f`.
    fn set_up_by_ioctl(&self, f: impl FnOnce(&mut Config) -> Result) -> Result {
        let mut state = self.lock_for_ioctl()?;
        let config = state.config_mut()?;
        f(config)?;
        config.set_up_by_ioctl = true;
        Ok(())
    }

    /// Adds a socket to those that the device will use (`nbd_add_socket()`). A device that was lost
    /// uses them once it is started again.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the file descriptor is out of range, or its socket is neither TCP, MPTCP,
    ///   nor a vsock or UNIX stream socket, or the device was configured by netlink.
    /// - `EBADF`, `ENOTSOCK`: the file descriptor is not that of a socket.
    /// - `ENOTCONN`: the socket is not connected, and never was.
    /// - `EBUSY`: the device was started already, or another task is configuring it.
    /// - `ENODEV`: the device has no configuration.
    /// - `ENOMEM`.
    pub(crate) fn add_socket(&self, fd: usize) -> Result {
        self.set_up_by_ioctl(|config| {
            let fd = i32::try_from(fd).map_err(|_| EINVAL)?;
            if config.started && !config.may_restart() {
                let why = match config.is_lost() {
                    true => "a device that has lost its server, whose size was not set since",
                    false => "a running device",
                };
                pr_err!("nbd{}: cannot add a socket to {why}\n", self.index);
                return Err(EBUSY);
            }
            let socket = self.socket_from_fd(fd)?;
            if config.is_lost() && config.sockets.is_empty() {
                // The task that has passed the sockets of the lost session need not pass the new ones.
                config.setup_by = None;
            }
            let me = TaskId::current();
            if *config.setup_by.get_or_insert(me) != me {
                pr_err!("nbd{}: being set up by another task\n", self.index);
                return Err(EBUSY);
            }
            // An allocation must not wait for writeback, which may be waiting for this very device.
            Ok(task::memalloc_noio(|| {
                config.sockets.push(socket, GFP_KERNEL)
            })?)
        })
    }

    /// Returns the socket of a file descriptor (`nbd_get_socket()`), and logs why it is not usable.
    ///
    /// # Errors
    ///
    /// `EBADF`, `ENOTSOCK`, `EINVAL` and `ENOTCONN`; see [`Self::add_socket()`].
    pub(super) fn socket_from_fd(&self, fd: i32) -> Result<Socket> {
        Socket::from_fd(fd).map_err(|e| match e {
            BadSocket::Fd(errno) => errno,
            BadSocket::Kind => {
                pr_err!(
                    "nbd{}: unsupported socket: should be TCP, MPTCP, vsock or UNIX\n",
                    self.index
                );
                EINVAL
            }
            BadSocket::NotConnected => {
                pr_err!("nbd{}: unsupported socket: not connected\n", self.index);
                ENOTCONN.into()
            }
        })
    }

    /// Sets the size in bytes (`NBD_SET_SIZE`).
    ///
    /// # Errors
    ///
    /// Those of [`Self::set_up_by_ioctl()`] and of [`Self::set_size()`].
    pub(crate) fn set_size_bytes(&self, size_bytes: usize) -> Result {
        self.set_up_by_ioctl(|config| {
            self.set_size(config, None, size_bytes as u64, config.block_bytes)
        })
    }

    /// Sets the size in units of the block size (`NBD_SET_SIZE_BLOCKS`).
    ///
    /// # Errors
    ///
    /// Those of [`Self::set_up_by_ioctl()`] and of [`Self::set_size()`].
    pub(crate) fn set_size_blocks(&self, blocks: usize) -> Result {
        self.set_up_by_ioctl(|config| {
            let size_bytes = (blocks as u64)
                .checked_mul(u64::from(config.block_bytes))
                .ok_or(EINVAL)?;
            self.set_size(config, None, size_bytes, config.block_bytes)
        })
    }

    /// Sets the block size in bytes; 0 selects the default (`NBD_SET_BLKSIZE`).
    ///
    /// # Errors
    ///
    /// Those of [`Self::lock_for_ioctl()`], [`Self::lock_for_block_size()`] and
    /// [`Self::set_size()`], and `ENODEV` if the device has no configuration.
    pub(crate) fn set_block_bytes(&self, bytes: usize) -> Result {
        let checked = checked_block_bytes(bytes as u64);
        let wanted =
            |c: Option<&Config>| checked.ok().filter(|_| c.is_some_and(Config::is_running));
        let (mut state, held) = self.lock_for_block_size(|| self.lock_for_ioctl(), wanted)?;
        let config = state.config_mut()?;
        self.set_size(config, held.as_deref(), config.size_bytes, checked?)?;
        config.set_up_by_ioctl = true;
        Ok(())
    }

    /// Sets the size and the block size in bytes (`nbd_set_size()`). If the device runs, this takes
    /// effect at once. `held` is needed if the block size of a running device changes.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the size or the block size is not valid.
    /// - `ENOMEM`.
    /// - `EBUSY`: the block size or a feature was to be changed, and the requests in flight did not
    ///   complete in time, or another task that is changing limits is waiting for them. Or the page
    ///   cache cannot be adapted to the block size, or `held` is missing.
    ///
    /// # Context
    ///
    /// May sleep. The caller holds the configuration lock.
    pub(super) fn set_size(
        &self,
        config: &mut Config,
        held: Option<&OpenMutexHeld<'_>>,
        size_bytes: u64,
        block_bytes: u32,
    ) -> Result {
        let before = config.disk_has;
        let notice = self.notice_of_size(config)?;
        if !self.apply_size(config, held, size_bytes, block_bytes)? {
            self.disk.uevent_change();
        }
        if config.is_running() {
            self.queue_wanted_scan(config);
        }
        let notice = notice.filter(|_| config.disk_has != before);
        if let Some((notice, session)) = notice.zip(config.session.as_ref()) {
            let size = Size {
                bytes: size_bytes,
                block_bytes,
            };
            session
                .table()
                .post_before_end(notice, Event::Resized(size));
        }
        Ok(())
    }

    /// Returns what is needed to tell listeners of a change of the size, if the device is connected.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    fn notice_of_size(&self, config: &Config) -> Result<Option<Notice>> {
        let session = config.session.as_ref();
        let session = session.filter(|_| config.is_running());
        // An allocation must not wait for writeback, which may be waiting for this very device.
        let notice = |s: &Arc<Session>| task::memalloc_noio(|| Notice::new(&s.table().origin));
        session.map(notice).transpose()
    }

    /// Sets the size and the block size in bytes. The errors and the context are those of
    /// [`Self::set_size()`]. If the device was lost, this takes effect when it is started again.
    ///
    /// Returns false if a uevent is still to be sent.
    pub(super) fn apply_size(
        &self,
        config: &mut Config,
        held: Option<&OpenMutexHeld<'_>>,
        size_bytes: u64,
        block_bytes: u32,
    ) -> Result<bool> {
        if i64::try_from(size_bytes).is_err() {
            return Err(EINVAL);
        }
        if block_bytes > config.sizes.max_hw_sectors.saturating_mul(SECTOR_BYTES) {
            pr_err!(
                "nbd{}: cannot change the block size to {block_bytes}: the server takes less at once\n",
                self.index
            );
            return Err(EINVAL);
        }
        let running = config.is_running();
        if running {
            let set = self.disk.set_features(features(config.flags));
            set.inspect_err(|e| self.log_busy_limits(*e))?;
            if block_bytes != self.disk.block_bytes() {
                let held = held.ok_or_else(|| {
                    pr_err!(
                        "nbd{}: cannot change the block size to {block_bytes} together with the size\n",
                        self.index
                    );
                    EBUSY
                })?;
                self.set_disk_block_bytes(held, block_bytes, config.sizes)?;
            }
            config.disk_has = Geometry {
                size_bytes,
                block_bytes,
            };
        }
        config.size_bytes = size_bytes;
        config.block_bytes = block_bytes;
        if !running {
            config.sized_at = config.session.as_ref().map(|s| s.table().losses());
            return Ok(true);
        }
        if let Some(data) = &config.running {
            data.size_bytes.store(size_bytes, Relaxed);
            data.block_bytes.store(block_bytes, Relaxed);
        }
        match self.disk.capacity() {
            Sectors(0) => self.want_scan(config),
            size if size != Sectors(size_bytes >> 9) => self.scan_partitions_at_open(config),
            _ => {}
        }
        Ok(self.disk.set_capacity_and_notify(Sectors(size_bytes >> 9)))
    }

    /// Sets the block size in bytes of a disk that is being started. If the page cache is in use and
    /// cannot be adapted, that is logged: I/O through it fails until the last close.
    ///
    /// # Errors
    ///
    /// `EINVAL` and `EBUSY`: the block layer does not accept the limits.
    pub(super) fn set_first_block_bytes(
        &self,
        held: &OpenMutexHeld<'_>,
        block_bytes: u32,
    ) -> Result {
        if !held.set_first_block_bytes(block_bytes)? {
            pr_warn!(
                "nbd{}: the page cache is in use with blocks of less than {block_bytes}: buffered I/O fails until the last close\n",
                self.index
            );
        }
        Ok(())
    }

    /// Sets the block size of the disk in bytes, and logs why it cannot be changed.
    ///
    /// # Errors
    ///
    /// `EINVAL` and `EBUSY`; see [`Self::set_size()`].
    pub(super) fn set_disk_block_bytes(
        &self,
        held: &OpenMutexHeld<'_>,
        block_bytes: u32,
        sizes: RequestSizes,
    ) -> Result {
        let set = held.set_block_bytes(block_bytes, sizes);
        set.map_err(|e| match e {
            BlockSizeError::CacheInUse => {
                pr_err!(
                    "nbd{}: cannot change the block size to {block_bytes} while the page cache is in use\n",
                    self.index
                );
                EBUSY
            }
            BlockSizeError::Limits(e) => {
                self.log_busy_limits(e);
                e
            }
        })
    }

    /// Logs that limits cannot be changed because of requests in flight, if that is the reason.
    fn log_busy_limits(&self, e: Error) {
        if e == EBUSY {
            pr_err!(
                "nbd{}: cannot change the block size while requests are outstanding\n",
                self.index
            );
        }
    }

    /// Sets the request timeout in seconds, 0 if none is set
    /// (`nbd_set_cmd_timeout()`).
    ///
    /// # Errors
    ///
    /// Those of [`Self::set_up_by_ioctl()`].
    pub(crate) fn set_timeout_seconds(&self, seconds: usize) -> Result {
        let mut state = self.lock_for_ioctl()?;
        self.apply_timeout(&mut state, task::seconds_to_jiffies(seconds as u64));
        state.config_mut()?.set_up_by_ioctl = true;
        Ok(())
    }

    /// Sets the request timeout in jiffies under the configuration lock, 0 if none is set.
    pub(super) fn apply_timeout(&self, state: &mut State, jiffies: u64) {
        // A value that is larger than the block layer's maximum must not wrap around to a short
        // timeout.
        let jiffies = u32::try_from(jiffies).map_or(MAX_JIFFIES, |j| j.min(MAX_JIFFIES));
        state.timeout_jiffies = jiffies;
        self.disk.set_request_timeout(match jiffies {
            0 => DEFAULT_TIMEOUT_SECONDS * task::HZ,
            _ => jiffies,
        });
        let session = state.config.as_ref().and_then(|c| c.session.as_ref());
        if let Some(session) = session {
            session.table().set_timeout_jiffies(jiffies);
        }
    }

    /// Sets the server's transmission flags. They take effect when the device is started or its
    /// size is set.
    ///
    /// # Errors
    ///
    /// Those of [`Self::set_up_by_ioctl()`].
    pub(crate) fn set_flags(&self, flags: usize) -> Result {
        self.set_up_by_ioctl(|config| {
            config.flags = flags as u32;
            Ok(())
        })
    }
}

/// Checks a block size in bytes; 0 selects the default.
///
/// # Errors
///
/// `EINVAL`: the block layer does not accept it.
pub(super) fn checked_block_bytes(bytes: u64) -> Result<u32> {
    let bytes = match bytes {
        0 => u64::from(DEFAULT_BLOCK_BYTES),
        bytes => bytes,
    };
    let small = usize::try_from(bytes).map_err(|_| EINVAL)?;
    if !valid_block_size(small) {
        return Err(EINVAL);
    }
    u32::try_from(bytes).map_err(|_| EINVAL)
}

/// Returns the features of a disk whose server has these flags (`nbd_apply_limits()`).
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
