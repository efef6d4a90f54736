// SPDX-License-Identifier: GPL-2.0
//! What all connections of a session share: the table of the commands in flight, and the session's
//! fate.
//!
//! Replies find their command here and never in memory that the block layer may be reallocating.

#![forbid(unsafe_code)]

use crate::{
    kapi::block::request::{
        Outcome,
        Parked,
        Side,
        Status,
        Unanswered, //
    },
    pure::{
        cmd::{
            Cookie,
            Parking,
            Slot, //
        },
        fate::Fate, //
    },
    rnbd_ratelimit::Ratelimit,
    rnbd_shared::Shared, //
};
use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        CondVar,
        Mutex, //
    }, //
};

impl Parking for Parked {
    type Item = Unanswered;

    fn put(&self, item: Unanswered) -> Option<Unanswered> {
        Parked::put(self, item)
    }

    fn take(&self) -> Option<Unanswered> {
        Parked::take(self)
    }
}

/// How many bits of a slot number are the tag; the hardware queue is above them, as in
/// `blk_mq_unique_tag()`.
const TAG_BITS: u32 = 16;

/// See the module's documentation.
#[pin_data]
pub(crate) struct Table {
    /// The device's index, for messages.
    pub(crate) device: u32,
    /// Limits what a bad server can write into the log.
    pub(crate) log: Ratelimit,
    depth: u32,
    slots: KVVec<Slot<Parked>>,
    /// How long a request may take; 0: for ever.
    timeout_jiffies: Atomic<u32>,
    pub(crate) fate: Fate,
    /// Connections that have not been reaped.
    #[pin]
    unreaped: Mutex<u32>,
    #[pin]
    all_reaped: CondVar,
    /// What all devices share. It goes last: the module may be unloaded when the last user of it has gone.
    pub(crate) shared: Shared,
}

impl Table {
    /// A table for `connections` hardware queues of `depth` tags. May sleep.
    pub(crate) fn new(
        device: u32,
        shared: Shared,
        connections: u32,
        depth: u32,
        timeout_jiffies: u32,
    ) -> Result<Arc<Self>> {
        let count = connections as usize * depth as usize;
        let mut slots = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            slots.push(Slot::new(Parked::empty()), GFP_KERNEL)?;
        }
        Arc::pin_init(
            pin_init!(Table {
                device,
                shared,
                log: Ratelimit::new(),
                depth,
                slots,
                timeout_jiffies: Atomic::new(timeout_jiffies),
                fate: Fate::new(),
                unreaped <- new_mutex!(0),
                all_reaped <- new_condvar!(),
            }),
            GFP_KERNEL,
        )
    }

    /// The slot of a tag.
    pub(crate) fn slot(&self, hw_queue: u32, tag: u32) -> Option<&Slot<Parked>> {
        if tag >= self.depth {
            return None;
        }
        let index = u64::from(hw_queue) * u64::from(self.depth) + u64::from(tag);
        self.slots.get(usize::try_from(index).ok()?)
    }

    /// The slot that a cookie from the wire names.
    pub(crate) fn slot_of(&self, cookie: Cookie) -> Option<&Slot<Parked>> {
        let number = cookie.slot();
        self.slot(number >> TAG_BITS, number & ((1 << TAG_BITS) - 1))
    }

    /// The cookie of the command that a tag's slot was started for.
    pub(crate) fn cookie(&self, hw_queue: u32, tag: u32) -> Option<Cookie> {
        let generation = self.slot(hw_queue, tag)?.generation();
        Some(Cookie::new(generation, hw_queue << TAG_BITS | tag))
    }

    /// Whether anything is in flight on `connection` that nobody has claimed. Counts of requests and replies
    /// would not do: a server can answer what it was not sent.
    pub(crate) fn has_open(&self, connection: u16) -> bool {
        self.slots
            .iter()
            .any(|slot| slot.status() == (connection, true))
    }

    /// Claims everything in flight on `connection`, and has it sent on another one, or failed where
    /// none is wanted.
    pub(crate) fn reclaim(&self, connection: u16) {
        for slot in &self.slots {
            if let Some(request) = slot.reclaim(connection) {
                request.finish(self.lost_command_outcome());
            }
        }
    }

    /// Does as if a command that was claimed had not been answered. Not while its connection is cleared
    /// away.
    pub(crate) fn forget_reply(&self, request: Unanswered) {
        let (hw_queue, tag) = request.tag();
        if let Some(slot) = self.slot(hw_queue, tag) {
            slot.unclaim(request);
        }
    }

    /// What becomes of a command whose connection is lost.
    pub(crate) fn lost_command_outcome(&self) -> Outcome {
        if self.fate.snapshot().is_disconnected() {
            Outcome::Complete(Status::IOERR)
        } else {
            Outcome::Requeue
        }
    }

    /// How long a request may take, in jiffies; 0: for ever.
    pub(crate) fn timeout_jiffies(&self) -> u32 {
        self.timeout_jiffies.load(Relaxed)
    }

    /// Sets how long a request may take, in jiffies; 0: for ever.
    pub(crate) fn set_timeout_jiffies(&self, jiffies: u32) {
        self.timeout_jiffies.store(jiffies, Relaxed);
    }

    /// A connection is there. May sleep.
    pub(crate) fn add_connection(&self) {
        *self.unreaped.lock() += 1;
    }

    /// A connection has been reaped. May sleep.
    pub(crate) fn remove_connection(&self) {
        let mut unreaped = self.unreaped.lock();
        *unreaped = unreaped.saturating_sub(1);
        if *unreaped > 0 {
            return;
        }
        if self.fate.finish_disconnect() {
            pr_info!("nbd{}: disconnected by user request\n", self.device);
        }
        self.all_reaped.notify_all();
    }

    /// How many connections have not been cleared away. May sleep.
    pub(crate) fn unreaped_connections(&self) -> u32 {
        *self.unreaped.lock()
    }

    /// Waits until the last connection has been reaped, or for a signal; returns whether it was a
    /// signal.
    pub(crate) fn wait_all_reaped_interruptible(&self) -> bool {
        let mut unreaped = self.unreaped.lock();
        while *unreaped > 0 {
            if self.all_reaped.wait_interruptible(&mut unreaped) {
                return *unreaped > 0;
            }
        }
        false
    }

    /// Waits until the last connection has been reaped.
    pub(crate) fn wait_all_reaped(&self) {
        let mut unreaped = self.unreaped.lock();
        while *unreaped > 0 {
            self.all_reaped.wait(&mut unreaped);
        }
    }
}
