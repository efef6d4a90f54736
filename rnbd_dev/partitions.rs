// SPDX-License-Identifier: GPL-2.0
//! Reads the partition table of a device that was started.
//!
//! The block layer reads it with the disk's `open_mutex` held, so that a server which does not reply
//! would hold up everybody who opens the device, also to disconnect it. Therefore a work item reads the
//! first block before, without that lock, and the table only once the server has replied.

#![forbid(unsafe_code)]

use super::{
    config::{
        Config,
        Scan, //
    },
    Device,
    State, //
};
use crate::kapi::block::{
    disk::Sectors,
    gendisk::Purpose, //
};
use kernel::{
    prelude::*,
    sync::{
        CondVarTimeoutResult,
        MutexGuard, //
    },
    time::msecs_to_jiffies, //
};

/// How often, and for how long each time, an open waits until the first block was read.
const OPEN_WAITS: u32 = 20;
const OPEN_WAIT_MS: u32 = 50;

impl Device {
    /// Makes the next open read the partition table, if partitions are looked for.
    pub(super) fn scan_partitions_at_open(&self) {
        if self.scans_partitions {
            self.disk.need_partition_scan();
        }
    }

    /// Records that the partition table is to be read, if partitions are looked for.
    pub(super) fn want_scan(&self, config: &mut Config) {
        if self.scans_partitions {
            config.scan = Scan::Wanted;
        }
    }

    /// Queues the work item that reads the partition table, if that is wanted. Requests can be sent.
    pub(super) fn queue_wanted_scan(&self, config: &Config) {
        if config.scan == Scan::Wanted {
            self.usage.lock().scan_wanted = true;
            self.jobs.clone().queue_jobs();
        }
    }

    /// Leaves the partition table to the next open, for lack of memory for a work item.
    pub(crate) fn leave_scan_to_open(&self) {
        self.finish_scan(&mut self.lock(), Ok(()));
    }

    /// Reads the partition table, once the server has replied.
    ///
    /// # Context
    ///
    /// May sleep, until the server replies or the session ends.
    pub(crate) fn scan_partitions(&self) {
        let read = self.disk.read_first_block();
        self.finish_scan(&mut self.lock(), read);
        let held = self.disk.lock_open_mutex();
        // A task that has opened the device meanwhile has read the table.
        if is_served(&self.lock()) {
            held.scan_partitions();
        }
    }

    /// Makes the next open read the partition table if the first block could be read, and lets those
    /// continue who wait for this. If the session has no connection, the next one tries again.
    fn finish_scan(&self, state: &mut State, read: Result) {
        if !is_served(state) {
            return;
        }
        let wanted = |c: &&mut KBox<Config>| c.scan == Scan::Wanted;
        if let Some(config) = state.config.as_mut().filter(wanted) {
            config.scan = Scan::Done;
            if read.is_ok() {
                self.disk.need_partition_scan();
            }
        }
        self.first_block_read.notify_all();
    }

    /// Waits until the first block was read, but not for long, so that whoever opens the device finds
    /// its partitions.
    ///
    /// # Context
    ///
    /// May sleep. The caller holds the configuration lock, which is dropped meanwhile.
    pub(super) fn wait_for_first_block(&self, state: &mut MutexGuard<'_, State>) {
        let wanted = |state: &State| {
            let config = state.config.as_ref();
            config.is_some_and(|c| c.scan == Scan::Wanted) && is_served(state)
        };
        for _ in 0..OPEN_WAITS {
            if !wanted(state) {
                return;
            }
            let waited = self
                .first_block_read
                .wait_interruptible_timeout(state, msecs_to_jiffies(OPEN_WAIT_MS));
            if let CondVarTimeoutResult::Signal { .. } = waited {
                return;
            }
        }
    }

    /// Keeps an open from reading the partition table of a device that has lost its connections. The
    /// read would fail, or wait for a connection that maybe this very task is about to bring.
    ///
    /// # Errors
    ///
    /// `EIO`: the device was to be opened for nothing else.
    pub(super) fn put_scan_off(&self, config: &mut Config, purpose: Purpose) -> Result {
        let served = config.session.as_ref().is_none_or(|s| s.is_served());
        if served || self.disk.capacity() == Sectors(0) {
            return Ok(());
        }
        if self.disk.cancel_partition_scan() {
            config.scan = Scan::Wanted;
        }
        match purpose {
            Purpose::Scan => Err(EIO),
            Purpose::Use => Ok(()),
        }
    }
}

/// Returns whether requests can be sent now.
fn is_served(state: &State) -> bool {
    let session = state.config.as_ref().and_then(|c| c.session.as_ref());
    session.is_some_and(|s| s.is_served())
}
