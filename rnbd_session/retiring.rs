// SPDX-License-Identifier: GPL-2.0
//! Ends the connections that a handover has replaced: each when its time is over, unless it has ended by itself.

#![forbid(unsafe_code)]

use super::Session;
use crate::{
    kapi::{
        task,
        wq::{
            self,
            HasQueue,
            Queue, //
        }, //
    },
    pure::time::elapsed,
    rnbd_events::{
        Death,
        Reason, //
    },
    rnbd_sock::Connection, //
};
use kernel::{
    impl_has_delayed_work,
    sync::Arc,
    time::msecs_to_jiffies,
    workqueue::WorkItem, //
};

/// The interval at which connections that were retired are looked at.
const LOOK_MS: u32 = 100;

/// How long a connection may take beyond its time for its disconnect, if it owes nothing.
const GOODBYE_MS: u32 = 1000;

/// The same if it is not known yet what it owes: the work items which find that out may only have been queued,
/// or the reply to the last command may have begun.
const GRACE_MS: u32 = 200;

/// A connection that was replaced while it was not dead.
pub(super) struct Retiring {
    pub(super) connection: Arc<Connection>,
    /// The time in jiffies at which it was replaced, and for how many it may drain.
    since: usize,
    drain_jiffies: usize,
}

impl Retiring {
    /// Returns the record of a connection that is replaced now.
    pub(super) fn new(connection: Arc<Connection>, drain_jiffies: usize) -> Self {
        Retiring {
            connection,
            since: task::jiffies(),
            drain_jiffies,
        }
    }

    /// Ends the connection if its time is over, or at once if nothing can be sent again: `is_alone`. Returns the
    /// number of jiffies after which it is to be looked at again.
    fn end_if_due(&self, is_alone: bool) -> usize {
        let gone = elapsed(task::jiffies(), self.since);
        let left = self.drain_jiffies.saturating_sub(gone);
        if left > 0 && !is_alone {
            return left;
        }
        let over = gone.saturating_sub(self.drain_jiffies);
        let more = self.more_jiffies().saturating_sub(over);
        if more > 0 && !is_alone {
            return more;
        }
        let replaced = Death::of(Reason::Replaced);
        self.connection.as_arc_borrow().mark_dead(replaced);
        msecs_to_jiffies(LOOK_MS) as usize
    }

    /// Returns the number of jiffies that the connection has beyond its time.
    ///
    /// One that is about to send its disconnect keeps nobody waiting. One on which a command is open has no more.
    fn more_jiffies(&self) -> usize {
        if self.connection.is_drained() {
            msecs_to_jiffies(GOODBYE_MS) as usize
        } else if self.connection.has_open() {
            0
        } else {
            msecs_to_jiffies(GRACE_MS) as usize
        }
    }
}

impl Session {
    /// Ends the connections that were replaced now if they have no time, and later otherwise.
    pub(super) fn end_retired(self: &Arc<Self>, drain_jiffies: usize) {
        if drain_jiffies == 0 {
            self.look_at_retiring();
        }
        self.look_later(drain_jiffies);
    }

    /// Queues the work that looks at the connections which were retired, in so many jiffies, or earlier.
    ///
    /// If it is queued already, for connections that have more time, it may come later, but no later than
    /// [`LOOK_MS`] from now.
    fn look_later(self: &Arc<Self>, jiffies: usize) {
        let delay = msecs_to_jiffies(LOOK_MS).min(jiffies).max(1);
        let _ = wq::enqueue_delayed::<Self, 1>(self.clone(), delay);
    }

    /// Ends the connections whose time is over, and forgets those that were reaped. Returns the number of jiffies
    /// after which this is to be done again, if any are left.
    ///
    /// It does not wait for the lock of the connections: its holder may be waiting for this workqueue.
    fn look_at_retiring(&self) -> Option<usize> {
        let Some(mut places) = self.connections.try_lock() else {
            return Some(1);
        };
        // `NBD_DO_IT` returns when the last connection was reaped, and until then no place can be filled.
        let is_alone = self.by_ioctl && !places.iter().any(|p| p.connection.is_alive());
        let mut next = None;
        for place in &mut **places {
            if place.retiring().is_none() {
                place.retiring = None;
            }
            if let Some(retiring) = &place.retiring {
                let left = retiring.end_if_due(is_alone);
                next = Some(next.map_or(left, |next: usize| next.min(left)));
            }
        }
        next
    }
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self, 1> for Session { self.retire_work }
}

impl HasQueue for Session {
    fn queue(&self) -> &Queue {
        // What is in flight on a connection that is retired may be written-back memory.
        &self.table.shared.io
    }
}

impl WorkItem<1> for Session {
    type Pointer = Arc<Session>;

    fn run(this: Arc<Session>) {
        if let Some(jiffies) = this.look_at_retiring() {
            this.look_later(jiffies);
        }
    }
}
