// SPDX-License-Identifier: GPL-2.0
//! Dispatches requests to the connections of a session (`nbd_handle_cmd()`).

#![forbid(unsafe_code)]

use super::Session;
use crate::{
    kapi::{
        block::{
            mq::Dispatch,
            request::{
                Extent,
                NewRequest,
                Op,
                Outcome,
                QueueStatus,
                Status,
                Unanswered,
                Unsent, //
            },
        },
        task, //
    },
    pure::{
        fate::{
            Exhausted,
            Snapshot, //
        },
        proto::flags,
        time::elapsed, //
    },
    rnbd_sock::{
        Connection,
        Pace, //
    },
    rnbd_translate::command_of, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Full,
            Relaxed, //
        },
        ArcBorrow, //
    },
};

/// The interval at which waiting requests check whether `dead_conn_timeout` has expired. A new
/// connection runs the queues immediately.
const RECHECK_MS: u32 = 100;

/// The same while the partition table is read.
const RECHECK_TABLE_MS: u32 = 10;

/// Reads of this size or more are sent immediately: the cost of sending one alone is small compared
/// with that of its data, and smaller than that of waking up a worker.
const LONG_READ_BYTES: u32 = 64 << 10;

/// What becomes of a request for which there is no connection.
enum Unserved {
    /// It fails.
    Fail,
    /// It waits, and the others of its hardware queue behind it.
    Wait,
    /// It waits, and is not in the way of others meanwhile.
    StepAside,
}

/// The hardware queue and the tag of a command.
#[derive(Clone, Copy)]
struct TagId {
    hw_queue: u32,
    tag: u32,
}

impl Session {
    /// Dispatches a request (`nbd_queue_rq()`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn queue_rq(&self, cx: &Dispatch<'_>, rq: NewRequest, last: bool) -> QueueStatus {
        let extent = rq.extent();
        if command_of(extent.op).is_none() {
            return rq.refuse(Status::IOERR);
        }
        if extent.op.is_write() && self.flags & flags::READ_ONLY != 0 {
            if self.table.log.allow() {
                pr_err!("nbd{}: write on read-only\n", self.table.device);
            }
            return rq.refuse(Status::IOERR);
        }
        let connection = match self.pick_or_refuse(cx, &rq, extent.op) {
            Ok(connection) => connection,
            Err(Unserved::Fail) => return rq.refuse(Status::IOERR),
            Err(Unserved::Wait) => {
                cx.run_again(RECHECK_MS);
                return rq.refuse(Status::DEV_RESOURCE);
            }
            Err(Unserved::StepAside) => return rq.requeue_later(RECHECK_TABLE_MS),
        };
        let tag = TagId {
            hw_queue: cx.hw_queue(),
            tag: rq.tag(),
        };
        let pace = if is_long_read(&extent) {
            Pace::AtOnce
        } else {
            Pace::Batched
        };
        let (unsent, unanswered, queued) = rq.start();
        self.dispatch(cx, connection, tag, (unsent, unanswered), last, pace);
        queued
    }

    /// Queues a request on `connection`, or on another one if that has died meanwhile.
    fn dispatch<'a>(
        &'a self,
        cx: &'a Dispatch<'_>,
        mut connection: ArcBorrow<'a, Connection>,
        tag: TagId,
        (mut unsent, mut unanswered): (Unsent, Unanswered),
        last: bool,
        pace: Pace,
    ) {
        let Some(slot) = self.table.slot(tag.hw_queue, tag.tag) else {
            // This cannot happen, because each tag of each queue has a slot. Dropping both handles
            // fails the request.
            return;
        };
        loop {
            slot.start(connection.id(), unanswered);
            let Err(back) = connection.push(unsent) else {
                // `commit_rqs` kicks the connection of the hardware queue, which is not this one.
                if last || u32::from(connection.index()) != tag.hw_queue {
                    connection.kick(pace);
                }
                return;
            };
            unsent = back;
            // The connection has died or begun to drain since it was picked.
            let Some(ours) = slot.withdraw(connection.id()) else {
                // The reaper has claimed the command, or the receive side for a reply to what was never sent. A
                // command that was not sent was not executed, whatever such a reply says. It is requeued as soon
                // as the other side lets go of it.
                unsent.overrule(Outcome::Requeue);
                return;
            };
            // The slot names the number of the connection, which another one at its place may have by now.
            connection.command_taken_back();
            if let Some(current) = self.connection(cx, usize::from(connection.index())) {
                current.command_taken_back();
            }
            unanswered = ours;
            match self.pick(cx, self.table.fate.snapshot()) {
                Some(next) => connection = next,
                None => {
                    // The request was started, so `queue_rq` cannot return it. It is requeued
                    // instead.
                    unanswered.finish(Outcome::Requeue);
                    return;
                }
            }
        }
    }

    /// Sends the commands that were queued without `last` being set (`blk_mq_ops.commit_rqs`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn commit_rqs(&self, cx: &Dispatch<'_>) {
        if let Some(connection) = self.connection(cx, cx.hw_queue() as usize) {
            connection.kick(Pace::Batched);
        }
    }

    /// Returns the connection with this index, dead or alive.
    fn connection<'a>(
        &'a self,
        cx: &'a Dispatch<'_>,
        index: usize,
    ) -> Option<ArcBorrow<'a, Connection>> {
        self.slots.get(index)?.get(cx)
    }

    /// Returns the connection for a request (`nbd_handle_cmd()`), or what becomes of the request if
    /// there is none.
    fn pick_or_refuse<'a>(
        &'a self,
        cx: &'a Dispatch<'_>,
        rq: &NewRequest,
        op: Op,
    ) -> Result<ArcBorrow<'a, Connection>, Unserved> {
        loop {
            // The snapshot is taken before the connections are examined, so that a connection which
            // comes back meanwhile is noticed.
            let fate = self.table.fate.snapshot();
            if let Some(connection) = self.pick(cx, fate) {
                return Ok(connection);
            }
            if let Some(unserved) = self.wait_or_fail(rq, op, fate) {
                return Err(unserved);
            }
        }
    }

    /// Returns the connection of the hardware queue, or any other that is alive
    /// (`find_fallback()`).
    fn pick<'a>(
        &'a self,
        cx: &'a Dispatch<'_>,
        fate: Snapshot,
    ) -> Option<ArcBorrow<'a, Connection>> {
        if fate.is_over() {
            return None;
        }
        let own = self.connection(cx, cx.hw_queue() as usize);
        own.filter(|c| c.is_alive()).or_else(|| {
            (0..self.slots.len())
                .filter_map(|index| self.connection(cx, index))
                .find(|c| c.is_alive())
        })
    }

    /// Returns what becomes of a request when no connection is alive (`wait_for_reconnect()`).
    ///
    /// nbd.c waits in `queue_rq`. Here the block layer keeps the request and dispatches it again
    /// later. Returns `None` if the session's fate is no longer `fate`; the caller must then try
    /// again.
    fn wait_or_fail(&self, rq: &NewRequest, op: Op, fate: Snapshot) -> Option<Unserved> {
        let replacing = self.replacing.load(Acquire);
        let table_read = !replacing && self.table.is_table_read();
        // Other buffered reads, too: the reader of the table may be waiting for the same page.
        if table_read && op == Op::Read && rq.is_for_page_cache() {
            self.table.note_failure();
            return Some(Unserved::Fail);
        }
        if replacing || (!fate.is_disconnected() && self.may_wait()) {
            return Some(match table_read {
                // A read of the table may be behind it.
                true => Unserved::StepAside,
                false => Unserved::Wait,
            });
        }
        match self.table.fate.exhaust(fate) {
            Exhausted::Changed => return None,
            Exhausted::Now if !fate.is_end_wanted() => pr_err!(
                "nbd{}: no connection left, I/O fails until the device is reconnected\n",
                self.table.device
            ),
            Exhausted::Now | Exhausted::Before => {}
        }
        Some(Unserved::Fail)
    }

    /// Returns whether requests may still wait for a connection. The first request that does starts
    /// the clock.
    fn may_wait(&self) -> bool {
        let patience = self.dead_timeout_jiffies.load(Relaxed);
        if patience == 0 {
            return false;
        }
        let now = task::jiffies() | 1;
        let since = match self.waiting_since.cmpxchg(0, now, Full) {
            Ok(_) => {
                pr_warn!(
                    "nbd{}: no connection left, requests wait for up to {} seconds for another\n",
                    self.table.device,
                    patience / u64::from(task::HZ)
                );
                now
            }
            Err(since) => since,
        };
        (elapsed(now, since) as u64) < patience
    }
}

fn is_long_read(extent: &Extent) -> bool {
    extent.op == Op::Read && extent.len_bytes >= LONG_READ_BYTES
}
