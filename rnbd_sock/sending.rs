// SPDX-License-Identifier: GPL-2.0
//! A connection's sending. Whoever queues a command sends it, or a work item does: where more is likely
//! to come soon, or the socket was full.

#![forbid(unsafe_code)]

use super::{
    stream::Transmit,
    Connection, //
};
use crate::{
    kapi::{
        block::{
            payload::Payload,
            request::{
                Outcome,
                Side,
                Status,
                Unsent, //
            },
        },
        llist::{
            Batch,
            List, //
        },
        net::sock::{
            Next,
            RoomFor, //
        },
        task,
        wq, //
    },
    pure::proto,
    rnbd_translate::wire_of, //
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
        barrier::smp_mb,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    time::msecs_to_jiffies, //
};

/// Calls after which a work item lets others run, and a submitter leaves the sending to a work item.
const BUDGET: u32 = 32;
/// How long to wait where a socket has room and still takes nothing, for want of memory.
const NO_MEMORY_DELAY_MS: u32 = 10;

/// What a sender has taken over.
struct Outbox {
    /// Commands that wait for a place among what is staged.
    waiting: Batch<Unsent>,
    transmit: Transmit,
}

/// Who submitted last, and how often that task had slept by then. Wrong where several submit.
struct LastSubmitter {
    task: Atomic<usize>,
    sleeps: Atomic<usize>,
}

impl LastSubmitter {
    fn nobody() -> Self {
        LastSubmitter {
            task: Atomic::new(0),
            sleeps: Atomic::new(0),
        }
    }

    /// Notes that the current task submits. Returns whether it did so before and has not slept since:
    /// it does not wait for its requests one by one, and there are probably more to come.
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

/// When a command is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// By its submitter.
    AtOnce,
    /// By a work item where others are in flight or likely to follow, so that one call sends several. By its
    /// submitter where not.
    Batched,
}

/// How sending stopped.
enum StopReason {
    /// There is nothing to do.
    Idle,
    /// A signal is pending, and TLS does not wait for its lock then. A worker gets no signals.
    Signal,
    /// There may be more; somebody else should have a turn.
    Budget,
    /// The socket takes no more now.
    Full { sent_some: bool },
}

/// What sending needs of a connection.
#[pin_data]
pub(super) struct Sending {
    last_submitter: LastSubmitter,
    /// The sender waits for room in the socket.
    full: Atomic<bool>,
    /// A disconnect is to be sent.
    send_disconnect: Atomic<bool>,
    /// Commands that no sender has taken over.
    backlog: List<Unsent>,
    #[pin]
    outbox: Mutex<Outbox>,
}

impl Sending {
    /// Nothing to send.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new() -> Result<impl PinInit<Self>> {
        let outbox = Outbox {
            waiting: Batch::empty(),
            transmit: Transmit::new()?,
        };
        Ok(pin_init!(Sending {
            last_submitter: LastSubmitter::nobody(),
            full: Atomic::new(false),
            send_disconnect: Atomic::new(false),
            backlog: List::new(),
            outbox <- new_mutex!(outbox),
        }))
    }
}

impl Connection {
    /// Puts a command, whose slot in the table was started, at the end of the queue. It is sent by the
    /// next [`Self::kick()`].
    ///
    /// # Errors
    ///
    /// Gives the request back where the connection is dead.
    pub(crate) fn push(&self, request: Unsent) -> Result<(), Unsent> {
        self.sending.backlog.push(request)
    }

    /// Sends the backlog, here or by a work item, as `pace` has it. May sleep.
    pub(crate) fn kick(self: ArcBorrow<'_, Self>, pace: Pace) {
        let continues_burst = self.sending.last_submitter.continues_burst();
        // Pairs with `clear_full()`, and with the exchange in `List::push()` before this.
        if self.sending.full.load(Acquire) {
            return;
        }
        // TLS waits for a lock of its own, and not at all when the task has a signal. A worker has none,
        // and holds none of the locks that a submitter may.
        let by_work = self.socket.has_upper_layer();
        let batch = pace == Pace::Batched && (continues_burst || self.traffic.awaited() > 0);
        if by_work || batch {
            self.queue_transmit();
        } else {
            self.transmit_backlog();
        }
    }

    /// Sends a disconnect after what is being sent now. May sleep.
    pub(crate) fn send_disconnect(self: ArcBorrow<'_, Self>) {
        self.sending.send_disconnect.store(true, Release);
        // Who has the lock looks again afterwards: pairs with the barrier in `transmit_backlog()`.
        smp_mb(Full);
        // At once: the socket is ended soon.
        if !self.sending.full.load(Acquire) {
            self.transmit_backlog();
        }
    }

    /// The socket tells of room. Returns whether that was waited for.
    pub(super) fn write_space(self: ArcBorrow<'_, Self>) -> bool {
        // Pairs with the barrier in `look_for_room()`: either the flag is seen here, or the room there. A
        // UNIX socket's room was made with no more than release ordering (`sock_wfree()`).
        smp_mb(Full);
        if !self.sending.full.load(Relaxed) || !self.socket.has_room(RoomFor::Wakeup) {
            return false;
        }
        self.queue_transmit();
        true
    }

    /// The work item.
    pub(super) fn transmit_work(self: ArcBorrow<'_, Self>) {
        self.clear_full();
        self.transmit_backlog();
    }

    fn queue_transmit(self: ArcBorrow<'_, Self>) {
        // Where it is queued already it will see whatever we have seen.
        let _ = self.table.shared.io.enqueue::<Arc<Self>, 2>(self.into());
    }

    /// A work item of its own, so that it cannot hold up one that is not to wait.
    fn queue_retry(self: ArcBorrow<'_, Self>) {
        let delay = msecs_to_jiffies(NO_MEMORY_DELAY_MS);
        let _ = wq::enqueue_delayed::<Self, 4>(self.into(), delay);
    }

    /// Sends until nothing waits. Whoever has the lock sends for all.
    fn transmit_backlog(self: ArcBorrow<'_, Self>) {
        let mut refused = 0;
        // What is left of a connection that is dead is given back by whoever clears it away.
        while self.is_alive() {
            let Some(mut outbox) = self.sending.outbox.try_lock() else {
                return;
            };
            // `mark_dead()` first changes the state and then tries this lock: either it learns of what is sent
            // here, or nothing is.
            if !self.is_alive() {
                return;
            }
            match self.transmit_all(&mut outbox) {
                Ok(StopReason::Idle) => {}
                Ok(StopReason::Budget | StopReason::Signal) => {
                    drop(outbox);
                    return self.queue_transmit();
                }
                Ok(StopReason::Full { sent_some }) => {
                    refused = if sent_some { 0 } else { refused + 1 };
                    // Still with the lock: else the next one who has it might have found room and used it
                    // up by then, and the socket would tell nobody of more.
                    self.sending.full.xchg(true, Full);
                    drop(outbox);
                    if !self.look_for_room(refused) {
                        return;
                    }
                    continue;
                }
                Err(e) => {
                    drop(outbox);
                    return self.send_failed(e);
                }
            }
            drop(outbox);
            // Somebody may have queued more and found the lock taken: pairs with the exchange in
            // `List::push()`, which orders that before the failed `try_lock()`.
            smp_mb(Full);
            if !self.has_backlog() {
                return;
            }
        }
    }

    /// Whether all that was begun to be sent was sent and answered. Of a connection that lives this may
    /// be wrong as soon as it is said; of one that was declared dead it stays true, because nobody begins
    /// to send. Does not wait for somebody who sends just now, which may take until the socket is ended.
    pub(super) fn nothing_outstanding(&self) -> bool {
        let outbox = self.sending.outbox.try_lock();
        outbox.is_some_and(|o| o.transmit.is_empty()) && !self.table.has_open(self.index)
    }

    /// From here on whoever queues a command may send it. Fully ordered: a command that was queued before
    /// by somebody who still saw `full` is found by the caller, or by whoever has the lock.
    fn clear_full(&self) {
        self.sending.full.xchg(false, Full);
    }

    fn has_backlog(&self) -> bool {
        !self.sending.backlog.is_empty() || self.sending.send_disconnect.load(Acquire)
    }

    /// The socket has taken less than it was given, and nothing at all the last `refused` times; `full` was
    /// set since, and the lock was let go of. Has the rest sent when it can be. Returns whether that is now.
    fn look_for_room(self: ArcBorrow<'_, Self>, refused: u32) -> bool {
        // Room that became free before `full` was set was not announced to us; what comes after it is, to a
        // work item, which does nothing where it finds the lock taken. Pairs with the barrier in
        // `write_space()`, and with `clear_full()`.
        smp_mb(Full);
        if !self.socket.has_room(RoomFor::Sending) {
            return false;
        }
        if refused > 1 {
            // There is room, and still it takes nothing: it wants for memory, which nobody announces.
            self.queue_retry();
            return false;
        }
        self.clear_full();
        true
    }

    fn send_failed(self: ArcBorrow<'_, Self>, error: Error) {
        if !self.table.fate.snapshot().is_end_wanted() && self.is_alive() && self.table.log.allow()
        {
            pr_err!(
                "nbd{}: connection {}: send failed ({:?}), closing it\n",
                self.table.device,
                self.index,
                error
            );
        }
        self.mark_dead();
    }

    fn transmit_all(&self, outbox: &mut Outbox) -> Result<StopReason> {
        for _ in 0..BUDGET {
            let next = self.stage(outbox);
            if outbox.transmit.is_empty() {
                return Ok(StopReason::Idle);
            }
            let sent = match outbox.transmit.send(&self.socket, next) {
                Ok(sent) => sent,
                Err(e) if e == EAGAIN => return Ok(StopReason::Full { sent_some: false }),
                Err(e) if e == EINTR || e == ERESTARTSYS => return Ok(StopReason::Signal),
                Err(e) => return Err(e),
            };
            self.traffic.sent(sent.bytes, sent.requests);
            if !sent.all {
                return Ok(StopReason::Full { sent_some: true });
            }
        }
        Ok(StopReason::Budget)
    }

    /// Writes the headers of commands that wait, and stages them. Returns whether some are left.
    fn stage(&self, outbox: &mut Outbox) -> Next {
        if outbox.transmit.can_stage()
            && self.sending.send_disconnect.load(Acquire)
            && self.sending.send_disconnect.xchg(false, Full)
        {
            outbox
                .transmit
                .stage(&proto::RequestHeader::DISCONNECT, None);
        }
        while outbox.transmit.can_stage() {
            if outbox.waiting.is_empty() {
                outbox.waiting = self.sending.backlog.take();
            }
            let Some(request) = outbox.waiting.pop() else {
                return Next::Nothing;
            };
            match self.wire_of(&request) {
                Some(wire) => outbox.transmit.stage(&wire, Some(Payload::new(request))),
                // `queue_rq` has refused what there is no command for, and there is a slot for every tag.
                None => request.overrule(Outcome::Complete(Status::IOERR)),
            }
        }
        if outbox.waiting.is_empty() && self.sending.backlog.is_empty() {
            Next::Nothing
        } else {
            Next::More
        }
    }

    fn wire_of(&self, request: &Unsent) -> Option<proto::RequestHeader> {
        let (hw_queue, tag) = request.tag();
        wire_of(&request.extent(), self.table.cookie(hw_queue, tag)?)
    }

    /// Gives back what was not sent, or not wholly. A reply does not help it: a server that has
    /// answered a write that it has not read has not written it.
    pub(super) fn give_back_unsent(&self) {
        let outcome = self.table.lost_command_outcome();
        let mut outbox = self.sending.outbox.lock();
        outbox.transmit.give_back(outcome);
        let waiting = core::mem::replace(&mut outbox.waiting, Batch::empty());
        // Nothing comes after this.
        for mut batch in [waiting, self.sending.backlog.close()] {
            while let Some(request) = batch.pop() {
                request.overrule(outcome);
            }
        }
    }
}
