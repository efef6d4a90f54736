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
    Scanner,
    State, //
};
use crate::{
    kapi::{
        block::{
            disk::Sectors,
            gendisk::Purpose, //
        },
        errno::ENODATA, //
    },
    pure::fate::Snapshot,
    rnbd_session::Session, //
};
use kernel::{
    prelude::*,
    sync::{
        Arc,
        CondVarTimeoutResult,
        MutexGuard, //
    },
    time::msecs_to_jiffies, //
};

/// How often, and for how long each time, an open waits until the first block was read.
const OPEN_WAITS: u32 = 20;
const OPEN_WAIT_MS: u32 = 50;
/// How often in a row a server may be lost while the partition table is read. That may be what it dies of.
const MAX_LOST_SCANS: u32 = 3;

impl Device {
    /// Makes the next open read the partition table, if partitions are looked for.
    pub(super) fn scan_partitions_at_open(&self, config: &Config) {
        if self.scans_partitions && !config.never_scans {
            self.disk.need_partition_scan();
        }
    }

    /// Records that the partition table is to be read, if partitions are looked for.
    pub(super) fn want_scan(&self, config: &mut Config) {
        if self.scans_partitions {
            // Not by an open, before the server has replied.
            self.disk.cancel_partition_scan();
        }
        if self.scans_partitions && !config.never_scans {
            config.scan = Scan::Wanted;
        }
    }

    /// Queues the work item that reads the partition table, if that is wanted. Requests can be sent.
    pub(super) fn queue_wanted_scan(&self, config: &Config) {
        // Whoever waits for the work item of an ended session does not wait for this one's server.
        self.scanning_wait.notify_all();
        if self.note_wanted_scan(config) {
            self.jobs.clone().queue_jobs();
        }
    }

    /// Makes the work item that reads the partition table a job of the device, if that is wanted, and
    /// returns whether it is. The caller queues the jobs.
    pub(super) fn note_wanted_scan(&self, config: &Config) -> bool {
        let wanted = config.scan != Scan::Done;
        if wanted {
            self.usage.lock().scan_wanted = true;
        }
        wanted
    }

    /// Leaves the partition table to the next open, for lack of memory for a work item.
    pub(crate) fn leave_scan_to_open(&self) {
        let mut state = self.lock();
        if let Some(config) = state.config.as_mut().filter(|c| c.scan != Scan::Done) {
            config.scan = Scan::Done;
            self.disk.need_partition_scan();
        }
        drop(state);
        self.scanning_wait.notify_all();
        self.finish_scan();
    }

    /// Ends the job of reading the partition table. If it is wanted again meanwhile, for another session or
    /// over another connection, it is queued again.
    fn finish_scan(&self) {
        let mut usage = self.usage.lock();
        usage.scanning = false;
        let wanted = usage.scan_wanted;
        drop(usage);
        if wanted {
            self.jobs.clone().queue_jobs();
        }
    }

    /// Reads the partition table, once the server has replied.
    ///
    /// The block layer reads it in an open, which also prepares the page cache for the block size, and
    /// empties it afterwards.
    ///
    /// # Context
    ///
    /// May sleep, until the server replies or the session ends.
    pub(crate) fn scan_partitions(&self) {
        if let Some((session, fate)) = self.session_to_scan() {
            self.scan_partitions_of(&session, fate);
        }
        self.finish_scan();
    }

    /// Reads the partition table of a session whose fate was `fate` when the job began; see
    /// [`Self::scan_partitions()`].
    fn scan_partitions_of(&self, session: &Arc<Session>, fate: Snapshot) {
        let read = self.disk.read_first_block();
        let mut state = self.lock();
        // If a connection has come back meanwhile, the job is queued again.
        let unchanged = session.table().fate.snapshot() == fate && session.is_served();
        let config = state.config_of(session).filter(|c| c.scan != Scan::Done);
        let Some(config) = config.filter(|_| unchanged) else {
            return;
        };
        if read.is_err_and(|e| e == ENODATA) && self.disk.capacity() != Sectors(0) {
            // The device has got its size meanwhile, and with it the job is queued again.
            return;
        }
        config.scan = Scan::Done;
        // If the first block cannot be read, somebody else may try.
        self.disk.need_partition_scan();
        self.scanning_wait.notify_all();
        if read.is_err() {
            return;
        }
        state.begin_scan();
        session.table().begin_table_read();
        drop(state);
        // Another open may come first, and read the table. This one waits for it.
        self.disk.open_and_close();
        let mut state = self.lock();
        state.scanner = None;
        let lost = session.table().end_table_read();
        if let Some(config) = state.config_of(session) {
            self.end_scan(config, session, lost);
        }
        drop(state);
        self.scanning_wait.notify_all();
    }

    /// Decides whether the partition table is to be read again, because requests were `lost` together with
    /// their connections while it was read. The caller holds the configuration lock.
    fn end_scan(&self, config: &mut Config, session: &Session, lost: bool) {
        if !lost {
            config.lost_scans = 0;
            return;
        }
        config.lost_scans += 1;
        if config.lost_scans == MAX_LOST_SCANS {
            pr_warn!(
                "nbd{}: the server was lost {MAX_LOST_SCANS} times while the partition table was read, giving that up\n",
                self.index
            );
        }
        if config.lost_scans >= MAX_LOST_SCANS {
            return;
        }
        self.want_scan(config);
        if session.is_served() {
            self.note_wanted_scan(config);
        }
    }

    /// Returns the session whose partition table is to be read, and its fate.
    fn session_to_scan(&self) -> Option<(Arc<Session>, Snapshot)> {
        let state = self.lock();
        let config = state.config.as_ref().filter(|c| c.scan != Scan::Done)?;
        let session = config.session.as_ref()?.clone();
        let fate = session.table().fate.snapshot();
        Some((session, fate))
    }

    /// Waits until the first block was read, but not for long, so that whoever opens the device finds
    /// its partitions.
    ///
    /// # Context
    ///
    /// May sleep. The caller holds the configuration lock, which is dropped meanwhile.
    pub(super) fn wait_for_first_block(&self, state: &mut MutexGuard<'_, State>) {
        if is_scan_due(state) && self.usage.lock().scan_wanted {
            self.jobs.clone().queue_jobs();
        }
        for _ in 0..OPEN_WAITS {
            if !is_scan_due(state) {
                return;
            }
            let waited = self
                .scanning_wait
                .wait_interruptible_timeout(state, msecs_to_jiffies(OPEN_WAIT_MS));
            if let CondVarTimeoutResult::Signal { .. } = waited {
                return;
            }
        }
        if let Some(config) = state.config.as_mut().filter(|c| c.scan == Scan::Wanted) {
            // The next one does not wait.
            config.scan = Scan::Late;
        }
    }

    /// Waits until a work item that was reading the partition table has closed the device. Its session
    /// has ended since, so that it cannot take long, unless it was started again.
    ///
    /// # Context
    ///
    /// May sleep. The caller must not hold the `open_mutex`.
    pub(super) fn wait_for_scanner(&self, scanner: Option<Scanner>) {
        if scanner.is_none() {
            return;
        }
        let is_served = |state: &State| {
            let session = state.config.as_ref().and_then(|c| c.session.as_ref());
            session.is_some_and(|s| s.is_served())
        };
        let mut state = self.lock();
        while state.scanner == scanner && !is_served(&state) {
            self.scanning_wait.wait(&mut state);
        }
    }

    /// Waits until no work item is about to open the device by its number. The device has no session, and
    /// will get none.
    ///
    /// # Context
    ///
    /// May sleep. The caller must not hold the `open_mutex`.
    pub(crate) fn wait_for_last_scanner(&self) {
        let scanner = self.lock().scanner;
        self.wait_for_scanner(scanner);
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
        if self.disk.cancel_partition_scan() && !config.never_scans {
            config.scan = Scan::Wanted;
        }
        match purpose {
            Purpose::Scan => Err(EIO),
            Purpose::Use => Ok(()),
        }
    }
}

/// Returns whether an open should wait for the first block. Not while a work item opens the device, after
/// which the next one can start: it may be waiting for the caller.
fn is_scan_due(state: &State) -> bool {
    if state.scanner.is_some() {
        return false;
    }
    let config = state.config.as_ref().filter(|c| c.scan == Scan::Wanted);
    let session = config.and_then(|c| c.session.as_ref());
    session.is_some_and(|s| s.is_served())
}
