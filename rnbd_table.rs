// SPDX-License-Identifier: GPL-2.0
//! The state that all connections of a session share: the table of the commands in flight, and the
//! session's fate.
//!
//! A reply finds its command in this table. Unlike nbd.c, which looks a reply's tag up in the tag
//! set, it never accesses memory that the block layer may be reallocating.

#![forbid(unsafe_code)]

use crate::{
    kapi::block::{
        disk::DiskRef,
        parked::Parked,
        request::{
            Outcome,
            Side,
            Status,
            Unanswered, //
        },
    },
    pure::{
        cmd::{
            Cookie,
            Parking,
            Slot, //
        },
        coverage::Progress,
        fate::Fate, //
    },
    rnbd_events::{
        Event,
        Notice,
        Origin, //
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
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
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

/// Whether the server answers reads by structured replies. Other commands may be answered by either kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Structured {
    /// It does not.
    No,
    /// It may.
    Possible,
    /// It does. A simple reply to a read violates the protocol.
    Required,
}

/// The number of bits of a slot number that hold the tag. The hardware queue is above them, as in
/// `blk_mq_unique_tag()`.
const TAG_BITS: u32 = 16;

/// The connections of a session that were not reaped yet.
struct Unreaped {
    count: u32,
    /// How often the last one was reaped. A session that was lost can be started again.
    losses: u32,
    /// Posted when the session has ended. There is none before listeners were told of the session.
    ended: Option<Notice>,
}

/// Nobody reads the partition table.
const NOT_READING: u32 = 0;
/// The partition table is being read.
const READING: u32 = 1;
/// The partition table is being read, and a request has failed for want of a connection since.
const READING_FAILED: u32 = 2;

/// The commands in flight of a session, and the session's fate.
#[pin_data]
pub(crate) struct Table {
    /// The index of the device, for log messages.
    pub(crate) device: u32,
    /// Whom events are for, and what they say of the session.
    pub(crate) origin: Arc<Origin>,
    /// Limits the messages that a server can cause.
    pub(crate) log: Ratelimit,
    /// Whether the server sends structured replies.
    pub(crate) structured: Structured,
    depth: u32,
    slots: KVVec<Slot<Parked>>,
    /// The state of the structured reply to the command in each slot. It is empty if the server sends none.
    progress: KVVec<Progress>,
    /// The request timeout in jiffies, 0 if none is set.
    timeout_jiffies: Atomic<u32>,
    pub(crate) fate: Fate,
    /// Whether the partition table is being read.
    table_read: Atomic<u32>,
    #[pin]
    unreaped: Mutex<Unreaped>,
    #[pin]
    all_reaped: CondVar,
    /// The resources that all devices share. It is the last field, so that it is dropped last: the
    /// module may be unloaded once the last reference to the workqueues is gone.
    pub(crate) shared: Shared,
}

impl Table {
    /// Returns a table for `connections` hardware queues of `depth` tags each.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(
        origin: Arc<Origin>,
        shared: Shared,
        connections: u32,
        depth: u32,
        timeout_jiffies: u32,
        structured: Structured,
    ) -> Result<Arc<Self>> {
        let count = connections as usize * depth as usize;
        let mut slots = KVVec::with_capacity(count, GFP_KERNEL)?;
        for _ in 0..count {
            slots.push(Slot::new(Parked::empty()), GFP_KERNEL)?;
        }
        let mut progress = KVVec::new();
        if structured != Structured::No {
            progress.reserve(count, GFP_KERNEL)?;
            for _ in 0..count {
                progress.push(Progress::new(), GFP_KERNEL)?;
            }
        }
        Arc::pin_init(
            pin_init!(Table {
                device: origin.device,
                origin,
                shared,
                log: Ratelimit::new(),
                structured,
                depth,
                slots,
                progress,
                timeout_jiffies: Atomic::new(timeout_jiffies),
                fate: Fate::new(),
                table_read: Atomic::new(NOT_READING),
                unreaped <- new_mutex!(Unreaped {
                    count: 0,
                    losses: 0,
                    ended: None,
                }),
                all_reaped <- new_condvar!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the slot of a tag.
    pub(crate) fn slot(&self, hw_queue: u32, tag: u32) -> Option<&Slot<Parked>> {
        self.slots.get(self.index(hw_queue, tag)?)
    }

    /// Returns the index of a tag's slot.
    fn index(&self, hw_queue: u32, tag: u32) -> Option<usize> {
        if tag >= self.depth {
            return None;
        }
        let index = u64::from(hw_queue) * u64::from(self.depth) + u64::from(tag);
        usize::try_from(index).ok()
    }

    /// Returns the slot that a cookie from the wire names.
    pub(crate) fn slot_of(&self, cookie: Cookie) -> Option<&Slot<Parked>> {
        let (hw_queue, tag) = tag_of(cookie);
        self.slot(hw_queue, tag)
    }

    /// Returns where the state of the structured reply to the command in a slot is kept, if the server sends such
    /// replies. Only the holder of the command's claim may use it.
    pub(crate) fn progress_of(&self, cookie: Cookie) -> Option<&Progress> {
        let (hw_queue, tag) = tag_of(cookie);
        self.progress.get(self.index(hw_queue, tag)?)
    }

    /// Returns when the last chunk of the reply to the command of a tag has come, in jiffies, if any has.
    pub(crate) fn heard_at(&self, hw_queue: u32, tag: u32) -> Option<usize> {
        let progress = self.progress.get(self.index(hw_queue, tag)?)?;
        progress.heard_at(self.slot(hw_queue, tag)?.generation())
    }

    /// Returns the cookie of the command for which a tag's slot was started last.
    pub(crate) fn cookie(&self, hw_queue: u32, tag: u32) -> Option<Cookie> {
        let generation = self.slot(hw_queue, tag)?.generation();
        Some(Cookie::new(generation, hw_queue << TAG_BITS | tag))
    }

    /// Returns whether an unclaimed command is in flight on `connection`.
    ///
    /// Comparing the counts of requests and replies would not do, because a server can send replies
    /// to requests that it never received.
    pub(crate) fn has_open(&self, connection: u16) -> bool {
        self.slots
            .iter()
            .any(|slot| slot.status() == (connection, true))
    }

    /// Returns the age of the oldest command in flight on `connection`, in milliseconds; 0 if there is none. Commands
    /// that wait to be sent are among them, and those whose reply is being received.
    ///
    /// Returns `None` if that is not known, because the number of hardware queues is being changed.
    ///
    /// # Context
    ///
    /// May sleep, but does not wait. `disk` is that of the session.
    pub(crate) fn oldest_ms(&self, disk: &DiskRef, connection: u16) -> Option<u64> {
        let mut oldest_ms = 0;
        let told = disk.look_at_requests(|request| {
            let slot = self.slot(request.hw_queue, request.tag);
            // A command that was claimed stays on its connection until its reply was received.
            if slot.is_some_and(|slot| slot.status().0 == connection) {
                oldest_ms = oldest_ms.max(request.age_ms);
            }
        });
        told.then_some(oldest_ms)
    }

    /// Claims all commands in flight on `connection`, and requeues them, or fails them if the
    /// session was disconnected (`nbd_clear_req()`).
    pub(crate) fn reclaim(&self, connection: u16) {
        for slot in &self.slots {
            if let Some(request) = slot.reclaim(connection) {
                self.give_up(request);
            }
        }
    }

    /// Ends a claimed command whose connection has died, or which was not sent.
    pub(crate) fn give_up(&self, request: Unanswered) {
        if self.structured != Structured::No {
            let (hw_queue, tag) = request.tag();
            let index = self.index(hw_queue, tag);
            if let Some(progress) = index.and_then(|index| self.progress.get(index)) {
                progress.clear();
            }
        }
        request.finish(self.lost_command_outcome());
    }

    /// Undoes a claim: after a chunk that is not the last one, after a reply that violates the protocol, or as if a reply
    /// had not arrived (fault injection, `blk_should_fake_timeout()`). Ends the command if the transmit side has taken
    /// it back without sending it, so that it is sent again.
    ///
    /// # Context
    ///
    /// The connection must not be reaped concurrently: the caller holds its receive lock.
    pub(crate) fn unclaim(&self, request: Unanswered) {
        let (hw_queue, tag) = request.tag();
        if let Some(slot) = self.slot(hw_queue, tag) {
            if let Some(withdrawn) = slot.unclaim(request) {
                self.give_up(withdrawn);
            }
        }
    }

    /// Returns the outcome of a command whose connection has died: a requeue, or an error if the
    /// session was disconnected.
    pub(crate) fn lost_command_outcome(&self) -> Outcome {
        if self.fate.snapshot().is_disconnected() {
            self.note_failure();
            Outcome::Complete(Status::IOERR)
        } else {
            Outcome::Requeue
        }
    }

    /// Notes that the block layer begins to read the partition table, for which it holds the
    /// `open_mutex`. Meanwhile reads into the page cache do not wait for a connection: whoever brings one
    /// may have to open the device.
    pub(crate) fn begin_table_read(&self) {
        self.table_read.store(READING, Release);
    }

    /// Notes that the partition table was read. Returns whether a request has failed meanwhile for want
    /// of a connection.
    pub(crate) fn end_table_read(&self) -> bool {
        self.table_read.xchg(NOT_READING, Full) == READING_FAILED
    }

    /// Returns whether the partition table is being read.
    pub(crate) fn is_table_read(&self) -> bool {
        self.table_read.load(Acquire) != NOT_READING
    }

    /// Notes that a request fails for want of a connection.
    pub(crate) fn note_failure(&self) {
        let _ = self.table_read.cmpxchg(READING, READING_FAILED, Full);
    }

    /// Returns the request timeout in jiffies, 0 if none is set.
    pub(crate) fn timeout_jiffies(&self) -> u32 {
        self.timeout_jiffies.load(Relaxed)
    }

    /// Sets the request timeout in jiffies, 0 if none is set.
    pub(crate) fn set_timeout_jiffies(&self, jiffies: u32) {
        self.timeout_jiffies.store(jiffies, Relaxed);
    }

    /// Counts a new connection.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn add_connection(&self) {
        self.unreaped.lock().count += 1;
    }

    /// Counts a connection as reaped, and wakes up those who wait for the last one.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn remove_connection(&self) {
        let mut unreaped = self.unreaped.lock();
        unreaped.count = unreaped.count.saturating_sub(1);
        if unreaped.count > 0 {
            return;
        }
        unreaped.losses = unreaped.losses.wrapping_add(1);
        if self.fate.finish_disconnect() {
            pr_info!("nbd{}: disconnected by user request\n", self.device);
            self.post_end(&mut unreaped);
        }
        self.all_reaped.notify_all();
    }

    /// Has listeners told of `news`, if there are any, and then of the session's end, when it comes. `notice` is
    /// not needed if they are going to be told of the end anyway. If it has come already, they are told now.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn will_report_end(&self, news: Option<(Notice, Event)>, notice: Notice) {
        let mut unreaped = self.unreaped.lock();
        if let Some((notice, event)) = news {
            self.shared.news.post(notice, event);
        }
        if unreaped.ended.is_none() {
            unreaped.ended = Some(notice);
        }
        if unreaped.count == 0 && self.fate.snapshot().is_end_wanted() {
            self.post_end(&mut unreaped);
        }
    }

    /// Has listeners told of an event, if they were told of the session and not of its end.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn post_before_end(&self, notice: Notice, event: Event) {
        // The end is told with this lock held, too.
        let unreaped = self.unreaped.lock();
        if unreaped.ended.is_some() {
            self.shared.news.post(notice, event);
        }
    }

    /// Has listeners told that the session has ended, unless they were.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn report_end(&self) {
        self.post_end(&mut self.unreaped.lock());
    }

    fn post_end(&self, unreaped: &mut Unreaped) {
        if let Some(notice) = unreaped.ended.take() {
            self.shared.news.post(notice, Event::Disconnected);
        }
    }

    /// Returns the number of connections that were not reaped yet.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn unreaped_connections(&self) -> u32 {
        self.unreaped.lock().count
    }

    /// Returns how often the last connection was reaped.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn losses(&self) -> u32 {
        self.unreaped.lock().losses
    }

    /// Waits until the last connection was reaped for more than `losses` times, or a signal arrives.
    /// Returns immediately if no connection is left.
    ///
    /// Returns true if a signal has interrupted the wait.
    pub(crate) fn wait_all_reaped_interruptible(&self, losses: u32) -> bool {
        let mut unreaped = self.unreaped.lock();
        while unreaped.count > 0 && unreaped.losses == losses {
            if self.all_reaped.wait_interruptible(&mut unreaped) {
                return unreaped.count > 0 && unreaped.losses == losses;
            }
        }
        false
    }

    /// Waits until the last connection was reaped.
    pub(crate) fn wait_all_reaped(&self) {
        let mut unreaped = self.unreaped.lock();
        while unreaped.count > 0 {
            self.all_reaped.wait(&mut unreaped);
        }
    }
}

/// Returns the number of the hardware queue, and the tag, that a cookie from the wire names.
fn tag_of(cookie: Cookie) -> (u32, u32) {
    let number = cookie.slot();
    (number >> TAG_BITS, number & ((1 << TAG_BITS) - 1))
}
