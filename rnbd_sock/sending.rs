// SPDX-License-Identifier: GPL-2.0
//! Queues commands and sends them (nbd.c's `nbd_send_cmd()`).
//!
//! A command is sent by the task that queues it, or by a work item if more commands are likely to
//! follow or the socket was full. The module documentation of `rnbd_sock/receiving.rs` lists the
//! contexts.

#![forbid(unsafe_code)]

use super::{
    staging::{
        Outbox,
        StopReason, //
    },
    Connection, //
};
use crate::{
    kapi::{
        barrier::smp_mb,
        block::request::Unsent,
        llist::List,
        net::sock::Ending,
        task,
        wq, //
    },
    rnbd_events::{
        Death,
        Reason, //
    },
    rnbd_table::Structured, //
};
use kernel::{
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
        ArcBorrow,
        Mutex, //
    },
    time::msecs_to_jiffies, //
};

/// The number of `sendmsg()` calls after which a sender leaves the rest to the transmit work, even if
/// it had to release the lock of the outbox in between.
const BUDGET: u32 = 32;
/// The delay before sending is retried when the socket has room, but accepts nothing for lack of
/// memory.
const NO_MEMORY_DELAY_MS: u32 = 10;

/// The task that has submitted last, and how often it had slept by then.
///
/// The fields are not updated as one, so the answer may be wrong if several tasks submit. It is
/// only a hint.
struct LastSubmitter {
    task: Atomic<usize>,
    sleeps: Atomic<usize>,
}

impl LastSubmitter {
    /// Returns a value that no task matches.
    fn nobody() -> Self {
        LastSubmitter {
            task: Atomic::new(0),
            sleeps: Atomic::new(0),
        }
    }

    /// Records the current task. Returns whether it was also the last one to submit, and has not
    /// slept since.
    ///
    /// Such a task does not wait for each of its requests, and will probably submit more.
    fn continues_burst(&self) -> bool {
        let (task, sleeps) = (task::TaskId::current().0, task::voluntary_switches());
        let same = self.task.load(Relaxed) == task && self.sleeps.load(Relaxed) == sleeps;
        if !same {
            self.task.store(task, Relaxed);
            self.sleeps.store(sleeps, Relaxed);
        }
        same
    }
}

/// When a command is sent, and by whom.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// The submitter sends it immediately.
    AtOnce,
    /// The transmit work sends it if others are in flight or likely to follow, so that one
    /// `sendmsg()` carries several. Otherwise the submitter sends it.
    Batched,
}

/// What a sender does if another one holds the lock of the outbox.
enum IfHeld {
    /// It returns, and leaves everything to the other one.
    Return,
    /// It waits for the lock.
    Wait,
}

/// The transmit side of a connection.
#[pin_data]
pub(super) struct Sending {
    last_submitter: LastSubmitter,
    /// The last sender has found no room in the socket. Written with the lock of the outbox held.
    full: Atomic<bool>,
    /// The last sender has left a message that was not sent completely.
    unsent: Atomic<bool>,
    /// A disconnect is to be sent.
    pub(super) send_disconnect: Atomic<bool>,
    /// The connection drains, and all commands that were not staged were given back.
    pub(super) stopped: Atomic<bool>,
    /// The receive side has found the connection to be drained.
    pub(super) drained: Atomic<bool>,
    /// The same, which is still to be recorded in the outbox.
    pub(super) newly_drained: Atomic<bool>,
    /// The next sender is to trim the pages.
    pub(super) trim_due: Atomic<bool>,
    /// See [`Connection::pages_kib()`].
    pub(super) pages_kib: Atomic<usize>,
    /// The commands that no sender has taken yet.
    pub(super) backlog: List<Unsent>,
    #[pin]
    pub(super) outbox: Mutex<Outbox>,
}

impl Sending {
    /// Returns a transmit side with nothing to send.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new() -> Result<impl PinInit<Self>> {
        let outbox = Outbox::new()?;
        Ok(pin_init!(Sending {
            last_submitter: LastSubmitter::nobody(),
            full: Atomic::new(false),
            unsent: Atomic::new(false),
            send_disconnect: Atomic::new(false),
            stopped: Atomic::new(false),
            drained: Atomic::new(false),
            newly_drained: Atomic::new(false),
            trim_due: Atomic::new(false),
            pages_kib: Atomic::new(0),
            backlog: List::new(),
            outbox <- new_mutex!(outbox),
        }))
    }
}

impl Connection {
    /// Appends a command, whose slot in the table was started, to the backlog. The next
    /// [`Self::kick()`] sends it.
    ///
    /// # Errors
    ///
    /// Returns the request if the connection drains, or was reaped or is being reaped.
    pub(crate) fn push(&self, request: Unsent) -> Result<(), Unsent> {
        self.sending.backlog.push(request)
    }

    /// Sends the backlog, or queues the work that does, depending on `pace`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn kick(self: ArcBorrow<'_, Self>, pace: Pace) {
        let continues_burst = self.sending.last_submitter.continues_burst();
        // Pairs with `clear_full()`, and with the exchange in `List::push()` that precedes this.
        if self.sending.full.load(Acquire) {
            return;
        }
        // TLS takes a lock of its own, and does not wait for it if the task has a pending signal. A
        // worker gets no signals, and holds none of the locks that a submitter may hold.
        let by_work = self.socket.has_upper_layer();
        let batch = pace == Pace::Batched && (continues_burst || self.traffic.awaited() > 0);
        if by_work || batch {
            self.queue_transmit();
        } else {
            self.transmit_backlog();
        }
    }

    /// Sends a disconnect after the messages that are being sent (`send_disconnects()`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn send_disconnect(self: ArcBorrow<'_, Self>) {
        self.sending.send_disconnect.store(true, Release);
        // The holder of the lock looks again after unlocking. Pairs with the barrier in
        // `transmit_backlog()`.
        smp_mb(Full);
        if self.sending.full.load(Acquire) {
            return;
        }
        // The disconnect is sent immediately, since the socket is shut down soon. A task that is sending
        // is waited for, but not with TLS, where it may itself be waiting for others.
        let if_held = match self.socket.has_upper_layer() {
            true => IfHeld::Return,
            false => IfHeld::Wait,
        };
        self.transmit(if_held);
    }

    /// Returns whether a sender is waiting for room in the socket, and there is some.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(super) fn sender_awaits_space(&self) -> bool {
        // Pairs with the barrier in `has_room_or_requests_report()`: either this sees `full`, or
        // `look_for_room()` sees the room. A UNIX socket frees room with no more than release ordering
        // (`sock_wfree()`).
        smp_mb(Full);
        self.sending.full.load(Relaxed) && self.socket.has_room_for_sender()
    }

    /// Sends the backlog in a worker (`nbd_pending_cmd_work()`).
    pub(super) fn transmit_work(self: ArcBorrow<'_, Self>) {
        self.transmit_backlog();
    }

    /// Queues the transmit work.
    pub(super) fn queue_transmit(self: ArcBorrow<'_, Self>) {
        self.table.shared.io.enqueue_once::<Self, 2>(self);
    }

    /// Queues the retry work. It is a separate work item, so that its delay does not hold up the
    /// transmit work.
    fn queue_retry(self: ArcBorrow<'_, Self>) {
        let delay = msecs_to_jiffies(NO_MEMORY_DELAY_MS);
        let _ = wq::enqueue_delayed::<Self, 4>(self.into(), delay);
    }

    /// Sends until the backlog is empty. The holder of the lock sends for all.
    pub(super) fn transmit_backlog(self: ArcBorrow<'_, Self>) {
        self.transmit(IfHeld::Return);
    }

    /// Sends until the backlog is empty.
    fn transmit(self: ArcBorrow<'_, Self>, if_held: IfHeld) {
        let outbox = &self.sending.outbox;
        let mut taken = match if_held {
            IfHeld::Return => outbox.try_lock(),
            IfHeld::Wait => Some(outbox.lock()),
        };
        let mut refused = 0;
        let mut budget = BUDGET;
        while let Some(mut outbox) = taken {
            // `mark_dead()` first changes the state and then takes this lock. So either it learns what
            // was sent here, or nothing is sent. The reaper gives back what is left.
            if self.is_dead() {
                return;
            }
            self.clear_full();
            let stopped = self.transmit_all(&mut outbox, &mut budget);
            self.trim_if_due(&mut outbox);
            self.trim_later(&mut outbox);
            let unsent = !outbox.transmit.is_empty();
            self.sending.unsent.store(unsent, Relaxed);
            match stopped {
                Ok(StopReason::Idle) => {
                    refused = 0;
                    let Some(kept) = self.end_if_drained(outbox) else {
                        return;
                    };
                    drop(kept);
                    // Another task may have queued more, or begun to drain the connection, and found the
                    // lock taken. Pairs with the exchange in `List::push()`, which orders the push before
                    // the failed `try_lock()`, and with those in `drain()` and `check_drained()`.
                    smp_mb(Full);
                    if !self.has_backlog() {
                        return;
                    }
                }
                Ok(StopReason::Budget | StopReason::Signal) => {
                    drop(outbox);
                    return self.queue_transmit();
                }
                Ok(StopReason::Full { sent_some }) => {
                    refused = if sent_some { 0 } else { refused + 1 };
                    // This happens with the lock held. Otherwise the next holder might find room
                    // and use it up before the flag is set, and the socket would report no more
                    // room.
                    self.sending.full.xchg(true, Full);
                    let Some(kept) = self.end_if_drained(outbox) else {
                        return;
                    };
                    drop(kept);
                    let has_room = self.look_for_room(refused);
                    if !has_room && !self.drain_wants_sender() && !self.is_trim_due() {
                        return;
                    }
                }
                Err(e) => {
                    drop(outbox);
                    return self.send_failed(e);
                }
            }
            taken = self.sending.outbox.try_lock();
        }
    }

    /// Returns for how long the server has owed a reply, or has not read, and was silent, in
    /// jiffies; 0 if it owes nothing.
    pub(crate) fn stuck_jiffies(&self) -> usize {
        // A request counts as sent with its last byte, which the socket of a server that does not
        // read may never take. The lock is not taken: a sender that found it taken would rely on
        // this task to send.
        if self.traffic.awaited() > 0 || self.sending.unsent.load(Relaxed) {
            self.traffic.silent_jiffies()
        } else {
            0
        }
    }

    /// Returns whether all commands that were staged were sent and answered.
    ///
    /// The connection must have been marked as dead, so that no sender starts any more.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(super) fn nothing_outstanding(&self) -> bool {
        if self.awaits_reply() {
            return false;
        }
        let outbox = self.sending.outbox.try_lock().unwrap_or_else(|| {
            // A task is sending, perhaps no more than a disconnect to which the server has reacted
            // already. It may wait for TLS's lock until the socket is shut down.
            self.socket.end(Ending::Polite);
            self.sending.outbox.lock()
        });
        // What that task has sent may not have been open above.
        !outbox.transmit.has_requests() && !self.awaits_reply()
    }

    /// Returns whether a command waits for its reply, or for the rest of it.
    fn awaits_reply(&self) -> bool {
        // A command of which a chunk is being received is not open, and may be again.
        let has_partial = || self.table.structured != Structured::No && self.traffic.awaited() > 0;
        self.table.has_open(self.id()) || has_partial()
    }

    /// Allows the next task that queues a command to send it.
    ///
    /// The caller holds the lock of the outbox. Without it, this could clear the flag of a sender that then
    /// waits for room.
    fn clear_full(&self) {
        // A command that was queued by a task which still sees `full` is found by the caller, who looks
        // at the backlog again after a full barrier, or finds the socket full again.
        if self.sending.full.load(Relaxed) {
            self.sending.full.store(false, Release);
        }
    }

    /// Returns whether there is anything that no sender has taken yet.
    fn has_backlog(&self) -> bool {
        !self.sending.backlog.is_empty()
            || self.sending.send_disconnect.load(Acquire)
            || self.is_trim_due()
            || self.drain_wants_sender()
    }

    /// Decides how to continue after the socket has taken less than it was given.
    ///
    /// `full` was set since, and the lock was released. `refused` is the number of successive
    /// attempts in which the socket has taken nothing. Returns true if the caller should send now.
    /// Otherwise the transmit work or the retry work continues.
    fn look_for_room(self: ArcBorrow<'_, Self>, refused: u32) -> bool {
        // The socket did not report room that became free before `full` was set. It reports any later
        // room to the transmit work.
        if !self.socket.has_room_or_requests_report() {
            return false;
        }
        if refused > 1 {
            // The socket has room and still takes nothing: it lacks memory, and does not report
            // when there is some.
            self.queue_retry();
            return false;
        }
        true
    }

    /// Logs why nothing more can be sent, and marks the connection as dead.
    fn send_failed(self: ArcBorrow<'_, Self>, error: Error) {
        if !self.table.fate.snapshot().is_end_wanted() && self.is_alive() && self.table.log.allow()
        {
            pr_err!(
                "nbd{}: connection {}: send failed ({:?}), closing it\n",
                self.table.device,
                self.index(),
                error
            );
        }
        self.mark_dead(Death::by(Reason::SendFailed, error));
    }
}
