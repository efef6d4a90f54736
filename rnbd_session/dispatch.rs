// SPDX-License-Identifier: GPL-2.0
//! How requests are spread over the connections of a session, and what becomes of one for which there is none.

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
        proto::flags, //
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

/// How often requests that wait for a connection check whether `dead_conn_timeout` is over. A connection
/// that comes back runs the queues at once.
const RECHECK_MS: u32 = 100;

/// Reads from this size on are sent at once: to send one alone costs little beside its data, less than
/// to have a worker woken up for it.
const LONG_READ_BYTES: u32 = 64 << 10;

/// A command's tag in the table.
#[derive(Clone, Copy)]
struct TagId {
    hw_queue: u32,
    tag: u32,
}

impl Session {
    /// `nbd_queue_rq()`: puts a request in flight. May sleep.
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
        let connection = match self.pick_or_refuse(cx) {
            Ok(connection) => connection,
            Err(status) => return rq.refuse(status),
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

    /// Hands a request to a connection; to another one where that has just died.
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
            // There is a slot for every tag of every queue, so this cannot be; both handles go, and
            // the request fails.
            return;
        };
        loop {
            let generation = slot.start(connection.index(), unanswered);
            let Err(back) = connection.push(unsent) else {
                // `commit_rqs` names the hardware queue, which is another connection's here.
                if last || u32::from(connection.index()) != tag.hw_queue {
                    connection.kick(pace);
                }
                return;
            };
            unsent = back;
            // It has died since it was picked.
            let Ok(ours) = slot.claim(generation, connection.index()) else {
                // It has given the command back. What was not sent was not done, whatever a reply
                // that came first may say.
                unsent.overrule(Outcome::Requeue);
                return;
            };
            unanswered = ours;
            match self.pick(cx, self.table.fate.snapshot()) {
                Some(next) => connection = next,
                None => {
                    // It was started, so it cannot be left to the block layer: once around.
                    unanswered.finish(Outcome::Requeue);
                    return;
                }
            }
        }
    }

    /// `nbd_commit_rqs`: what was queued without a `last` is sent. May sleep.
    pub(crate) fn commit_rqs(&self, cx: &Dispatch<'_>) {
        if let Some(connection) = self.connection(cx, cx.hw_queue() as usize) {
            connection.kick(Pace::Batched);
        }
    }

    fn connection<'a>(
        &'a self,
        cx: &'a Dispatch<'_>,
        index: usize,
    ) -> Option<ArcBorrow<'a, Connection>> {
        self.slots.get(index)?.get(cx)
    }

    /// The connection for a request (`nbd_handle_cmd()`), or what becomes of the request for want of one.
    fn pick_or_refuse<'a>(
        &'a self,
        cx: &'a Dispatch<'_>,
    ) -> Result<ArcBorrow<'a, Connection>, Status> {
        loop {
            // Before the connections are looked at, so that one that comes back meanwhile is noticed.
            let fate = self.table.fate.snapshot();
            if let Some(connection) = self.pick(cx, fate) {
                return Ok(connection);
            }
            if let Some(status) = self.wait_or_fail(cx, fate) {
                return Err(status);
            }
        }
    }

    /// The hardware queue's own connection, or one that lives (`find_fallback()`).
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

    /// No connection lives: a request waits for one to come back, or fails (`wait_for_reconnect()`).
    /// nbd.c waits in `queue_rq`; here the block layer keeps the request. Returns nothing where the
    /// session's fate has changed since it was `fate`.
    fn wait_or_fail(&self, cx: &Dispatch<'_>, fate: Snapshot) -> Option<Status> {
        let waits = self.replacing.load(Acquire) || (!fate.is_disconnected() && self.may_wait());
        if waits {
            cx.run_again(RECHECK_MS);
            return Some(Status::DEV_RESOURCE);
        }
        match self.table.fate.exhaust(fate) {
            Exhausted::Changed => return None,
            Exhausted::Now if !fate.is_end_wanted() => pr_err!(
                "nbd{}: no connection left, I/O fails until the device is connected anew\n",
                self.table.device
            ),
            Exhausted::Now | Exhausted::Before => {}
        }
        Some(Status::IOERR)
    }

    /// Whether a request may still wait for a connection. Starts the clock with the first one that does.
    fn may_wait(&self) -> bool {
        let patience = self.dead_timeout_jiffies.load(Relaxed);
        if patience == 0 {
            return false;
        }
        let now = task::jiffies() | 1;
        let since = match self.waiting_since.cmpxchg(0, now, Full) {
            Ok(_) => now,
            Err(since) => since,
        };
        (now.wrapping_sub(since) as u64) < patience
    }
}

fn is_long_read(extent: &Extent) -> bool {
    extent.op == Op::Read && extent.len_bytes >= LONG_READ_BYTES
}
