// SPDX-License-Identifier: GPL-2.0
//! Handles requests that have timed out.

#![forbid(unsafe_code)]

use super::Session;
use crate::{
    kapi::{
        block::{
            mq::TimeoutStatus,
            request::TimedOutRequest, //
        },
        task, //
    },
    rnbd_sock::Connection,
    rnbd_translate::RequestDescription, //
};
use kernel::prelude::*;

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
        let (hw_queue, tag) = rq.tag();
        let Some(slot) = self.table.slot(hw_queue, tag) else {
            return TimeoutStatus::ResetTimer;
        };
        // The lock is taken before the slot is read. A connection is replaced under this lock and
        // after its commands were given back, so this is the connection that the slot names.
        let connections = self.connections.lock();
        let (index, unclaimed) = slot.status();
        let count = connections.len();
        let Some(place) = connections.get(usize::from(index)) else {
            return TimeoutStatus::ResetTimer;
        };
        let connection = place.connection.clone();
        drop(connections);
        if !unclaimed && connection.traffic().idle_jiffies() < rq.timeout_jiffies() as usize {
            // Its data is arriving, or it is just ending.
            return TimeoutStatus::ResetTimer;
        }
        if count == 1 && self.table.timeout_jiffies() == 0 {
            self.warn_of_stuck(&rq, &connection);
            return TimeoutStatus::ResetTimer;
        }
        if connection.is_alive() && self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {} timed out, retrying ({}/{} alive)\n",
                self.table.device,
                index,
                self.table.unreaped_connections().saturating_sub(1),
                count
            );
        }
        // The reaper of the connection gives this request back as well.
        connection.as_arc_borrow().mark_dead();
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
