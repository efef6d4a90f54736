// SPDX-License-Identifier: GPL-2.0
//! The size of a device, and the limits of its requests: block sizes and what the server can do.

#![forbid(unsafe_code)]

use super::{
    config::{
        Config,
        Geometry,
        DEFAULT_BLOCK_BYTES, //
    },
    Device,
    State, //
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
        task::{
            self,
            Deadline, //
        },
    },
    pure::proto::flags,
    rnbd_events::{
        Event,
        Notice,
        Size, //
    },
    rnbd_session::Session, //
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

impl Device {
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
        fast_zeroes: has(flags::SEND_WRITE_ZEROES) && has(flags::SEND_FAST_ZERO),
    }
}
