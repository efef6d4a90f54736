// SPDX-License-Identifier: GPL-2.0
//! Handles requests that have timed out.

#![forbid(unsafe_code)]

use super::{
    Place,
    Session, //
};
use crate::{
    kapi::{
        block::{
            mq::TimeoutStatus,
            timed_out::{
                SinceTimeout,
                TimedOutRequest, //
            },
        },
        task, //
    },
    pure::time::elapsed,
    rnbd_events::{
        Death,
        Reason, //
    },
    rnbd_sock::Connection,
    rnbd_translate::RequestDescription, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

impl Session {
    /// Handles a request that has timed out (`nbd_xmit_timeout()`).
    ///
    /// It never ends the request itself. It either restarts the timer, or marks the connection as
    /// dead; whoever reaps the connection then gives the request back.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn timeout(&self, rq: TimedOutRequest<'_>) -> TimeoutStatus {
        let Some(tag) = rq.tag() else {
            // It was requeued, and is not started.
            return TimeoutStatus::Done;
        };
        let Some(slot) = self.table.slot(tag.0, tag.1) else {
            // There is a slot for each tag.
            return TimeoutStatus::ResetTimer;
        };
        // The lock is taken before the slot is read. A connection is replaced under this lock, and after
        // its commands were given back, or it stays beside the new one until they were. So the connection
        // that the slot names is found.
        let connections = self.connections.lock();
        let (id, unclaimed) = slot.status();
        // While the lock was waited for, the request may have been given back, and sent again over
        // a connection that is not to blame (`cmd->cookie == nsock->cookie` in nbd.c). This comes
        // after the slot was read, so that the slot's state is that of the request in flight.
        match rq.since_timeout(tag) {
            SinceTimeout::InFlight => {}
            // The block layer has marked it as timed out, maybe after it was started again. Only
            // its timer clears that.
            SinceTimeout::Restarted => return TimeoutStatus::ResetTimer,
            SinceTimeout::NotStarted => return TimeoutStatus::Done,
        }
        let count = connections.len();
        let is_named = |connection: &&Arc<Connection>| connection.id() == id;
        let all = |place| Place::all(place).find(is_named);
        let Some(connection) = connections.iter().find_map(all).cloned() else {
            return TimeoutStatus::ResetTimer;
        };
        drop(connections);
        let timeout = rq.timeout_jiffies() as usize;
        if !unclaimed && connection.traffic().idle_jiffies() < timeout {
            // Its data is arriving. (Or it is ending this moment: C has that race, too.)
            return TimeoutStatus::ResetTimer;
        }
        let heard_at = self.table.heard_at(tag.0, tag.1);
        if heard_at.is_some_and(|then| elapsed(task::jiffies(), then) < timeout) {
            // A part of its data has arrived, and the server was not silent since.
            return TimeoutStatus::ResetTimer;
        }
        if count == 1 && self.table.timeout_jiffies() == 0 {
            self.warn_of_stuck(&rq, &connection);
            return TimeoutStatus::ResetTimer;
        }
        if !connection.is_dead() && self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {} timed out, retrying ({}/{} alive)\n",
                self.table.device,
                connection.index(),
                self.table.unreaped_connections().saturating_sub(1),
                count
            );
        }
        // The reaper of the connection gives this request back as well.
        connection
            .as_arc_borrow()
            .mark_dead(Death::of(Reason::TimedOut));
        TimeoutStatus::Done
    }

    /// Logs a request that may be stuck, and for how long the server has been silent.
    fn warn_of_stuck(&self, rq: &TimedOutRequest<'_>, connection: &Connection) {
        if !self.table.log.allow() {
            return;
        }
        pr_info!(
            "nbd{}: possible stuck request: {}; nothing came from the server for {} seconds\n",
            self.table.device,
            RequestDescription(&rq.extent()),
            connection.traffic().idle_jiffies() / task::HZ as usize
        );
    }
}
