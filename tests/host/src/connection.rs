// SPDX-License-Identifier: GPL-2.0
//! A connection: what is queued on it, its sending, its death. For the models `sending` and `session`.
//!
//! The steps of `rnbd_sock.rs`, `rnbd_sock/{sending,staging}.rs` and `rnbd_table.rs` are repeated here, in the same
//! order and under the same names: keep them alike. `pure/cmd.rs`, `pure/fate.rs` and `kapi/llist.rs` are
//! the module's own.

use crate::{
    blk_mq::{Tag, Unsent, Verdict},
    parts::{Batches, Commands, Fates, Lists, Parts, Snapshots},
    socket::{Command, Ended, Ending, Message, Outgoing, Socket},
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        barrier::smp_mb,
    },
    waits::{Completion, TryMutex, Work},
};
use loom::{
    cell::UnsafeCell,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use std::sync::Arc;

pub(crate) const ALIVE: u32 = 0;
const ENDING: u32 = 1;
const ENDED: u32 = 2;
const REAPED: u32 = 3;

/// The step of the protocol that is left out or done wrong, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeftOut {
    Nothing,
    /// A socket ends politely whatever is owed.
    Resetting,
    /// A socket is reset if somebody is sending, although that may be nothing but a goodbye.
    WaitingForSender,
    /// A connection is cleared away as soon as it was declared dead.
    EndingBeforeReaping,
    /// What was not sent is dropped rather than overruled.
    Overruling,
    /// Who says goodbye leaves that to whoever is sending.
    WaitingForTurn,
    /// A sender does not look at the backlog again after it has unlocked.
    LookingAgain,
    /// It does, but without the barrier before that.
    BarrierBeforeLookingAgain,
    /// Who says goodbye does not order that before its attempt at the lock.
    BarrierAfterGoodbye,
    /// A sender does not look for room after it has said that it waits for it.
    LookingForRoom,
    /// It looks for room before it says so.
    WaitingBeforeLooking,
    /// It does both, but without the barrier in between.
    BarrierBeforeLookingForRoom,
    /// Who takes its turn says so before its attempt at the lock, which may fail.
    LockingBeforeTurns,
    /// A sender relies on the report that its send has asked for, which may have been about room that is
    /// gone.
    AskingForRoom,
    /// Who tells of room lets somebody send before it forgets that a report was asked for.
    ForgettingReportFirst,
    /// Who tells of room does not order that before it looks who waits.
    BarrierAfterRoom,
    /// Who reconnects does not wait until the dead connection was cleared away.
    WaitingForReaped,
    /// The session is revived before the new connection is in the dead one's place.
    ReplacingBeforeReviving,
    /// The dead connection is let go of while dispatches may use it.
    Quiescing,
    /// A connection is said to be cleared away before it is counted as gone.
    CountingBeforeTelling,
}

/// What all connections share.
pub(crate) struct Table<P: Parts> {
    pub(crate) left_out: LeftOut,
    /// The tags of the only hardware queue, and their slots.
    pub(crate) tags: Vec<Arc<Tag>>,
    pub(crate) slots: Vec<P::Slot>,
    pub(crate) fate: P::Fate,
    /// Connections that have not been reaped.
    alive: Mutex<usize>,
    all_reaped: Condvar,
    /// How many deaths user space was told of: the test's own.
    pub(crate) told: std::sync::atomic::AtomicUsize,
}

impl<P: Parts> Table<P> {
    pub(crate) fn new(left_out: LeftOut, tags: usize) -> Arc<Self> {
        Arc::new(Table {
            left_out,
            tags: (0..tags).map(Tag::numbered).collect(),
            slots: (0..tags).map(|_| P::Slot::new()).collect(),
            fate: P::Fate::new(),
            alive: Mutex::new(0),
            all_reaped: Condvar::new(),
            told: Default::default(),
        })
    }

    fn has_open(&self, connection: u16) -> bool {
        let mut slots = self.slots.iter();
        slots.any(|slot| slot.status() == (connection, true))
    }

    fn reclaim(&self, connection: u16) {
        for slot in &self.slots {
            if let Some(request) = slot.reclaim(connection) {
                request.finish(self.lost_command_outcome());
            }
        }
    }

    pub(crate) fn lost_command_outcome(&self) -> Verdict {
        match self.fate.snapshot().is_disconnected() {
            true => Verdict::Fail,
            false => Verdict::Requeue,
        }
    }

    pub(crate) fn add_connection(&self) {
        *self.alive.lock().unwrap() += 1;
    }

    fn remove_connection(&self) {
        let mut alive = self.alive.lock().unwrap();
        *alive = alive.saturating_sub(1);
        if *alive > 0 {
            return;
        }
        self.fate.finish_disconnect();
        self.all_reaped.notify_all();
    }

    pub(crate) fn wait_all_reaped(&self) {
        let mut alive = self.alive.lock().unwrap();
        while *alive > 0 {
            alive = self.all_reaped.wait(alive).unwrap();
        }
    }
}

/// What a sender has taken over.
struct Outbox<P: Parts> {
    waiting: <P::List as Lists>::Batch,
    staged: Vec<Outgoing>,
}

/// How sending stopped.
enum StopReason {
    Idle,
    Full { sent_some: bool },
}

/// What a sender does if another one holds the lock of the outbox.
enum IfHeld {
    Return,
    Wait,
}

/// How a connection is in a model.
#[derive(Clone, Copy, Default)]
pub(crate) struct Conditions {
    /// How many messages its socket takes, and has taken and not got rid of; none: any number.
    pub(crate) limit: Option<usize>,
    /// Its server does not answer.
    pub(crate) is_silent: bool,
    /// Somebody else runs its work items ([`Connection::receive_work`]).
    pub(crate) has_worker: bool,
}

pub(crate) struct Connection<P: Parts> {
    pub(crate) index: u16,
    conditions: Conditions,
    table: Arc<Table<P>>,
    socket: Socket,
    state: Atomic<u32>,
    /// `Traffic`, as far as it counts requests.
    reaped: Completion,
    full: Atomic<bool>,
    send_disconnect: Atomic<bool>,
    backlog: P::List,
    outbox: TryMutex<Outbox<P>>,
    /// The lock that nobody waits for; `receiving` is about how that works.
    receive: Mutex<()>,
    pub(crate) receive_work: Work,
    pub(crate) transmit_work: Work,
    /// What the dispatches' pointer points to. Loom objects to uses that are not ordered before its end.
    memory: UnsafeCell<()>,
    freed: AtomicBool,
}

// SAFETY: Only `memory` is not `Sync` by itself, and there is nothing in it: whether its uses are ordered
// is what loom is there to check.
unsafe impl<P: Parts> Sync for Connection<P> {}

impl<P: Parts> Connection<P> {
    pub(crate) fn new(index: u16, table: &Arc<Table<P>>, conditions: Conditions) -> Self {
        Connection {
            index,
            conditions,
            table: table.clone(),
            socket: Socket::full(conditions.limit),
            state: Atomic::new(ALIVE),
            reaped: Completion::default(),
            full: Atomic::new(false),
            send_disconnect: Atomic::new(false),
            backlog: P::List::new(),
            outbox: TryMutex::new(Outbox {
                waiting: Batches::empty(),
                staged: Vec::new(),
            }),
            receive: Mutex::new(()),
            receive_work: Work::default(),
            transmit_work: Work::default(),
            memory: UnsafeCell::new(()),
            freed: AtomicBool::new(false),
        }
    }

    /// What is done with the pointer that dispatches have.
    pub(crate) fn is_used(&self) {
        self.memory.with(|_| ());
        let freed = self.freed.load(Ordering::Relaxed);
        assert!(!freed, "it was used after it was let go of");
    }

    /// Lets go of it.
    pub(crate) fn free(&self) {
        self.memory.with_mut(|_| ());
        self.freed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.state.load(Acquire) == ALIVE
    }

    pub(crate) fn wait_reaped(&self) {
        self.reaped.wait();
    }

    /// What was sent leaves.
    pub(crate) fn leave(&self) {
        self.socket.leave(!self.conditions.is_silent);
    }

    /// An acknowledgement makes room; the callback is called. For a UNIX socket the room is made by
    /// `refcount_sub_and_test()`, which is no more than a release.
    pub(crate) fn acknowledge(&self) {
        self.socket.used.fetch_sub(1, Ordering::Release);
        if self.table.left_out != LeftOut::BarrierAfterRoom {
            smp_mb(Full);
        }
        if self.socket.reports.load(Ordering::Relaxed) {
            self.write_space();
        }
    }

    /// The socket takes room for something else: TCP cuts what it sends into pieces.
    pub(crate) fn shrink(&self) {
        self.socket.used.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the server has got that use of a tag.
    pub(crate) fn server_got(&self, tag: usize, use_number: usize) -> bool {
        let stream = self.socket.stream.lock().unwrap();
        stream.got.contains(&(tag, use_number))
    }

    /// Whether the socket was reset.
    pub(crate) fn was_reset(&self) -> bool {
        self.socket.stream.lock().unwrap().reset
    }

    /// How many commands and goodbyes were sent.
    pub(crate) fn sent(&self) -> (usize, usize) {
        self.socket.stream.lock().unwrap().sent
    }
}

// `rnbd_sock/sending.rs`.
impl<P: Parts> Connection<P> {
    pub(crate) fn push(&self, request: Unsent) -> Result<(), Unsent> {
        self.backlog.push(request)
    }

    pub(crate) fn kick(&self) {
        if self.full.load(Acquire) {
            return;
        }
        self.transmit_backlog();
    }

    pub(crate) fn send_disconnect(&self) {
        self.send_disconnect.store(true, Release);
        if self.table.left_out != LeftOut::BarrierAfterGoodbye {
            smp_mb(Full);
        }
        if !self.full.load(Acquire) {
            self.transmit(match self.table.left_out {
                // The latter is needed where a sender must not wait, with TLS.
                LeftOut::WaitingForTurn | LeftOut::BarrierAfterGoodbye => IfHeld::Return,
                _ => IfHeld::Wait,
            });
        }
    }

    fn write_space(&self) {
        if self.table.left_out != LeftOut::BarrierAfterRoom {
            smp_mb(Full);
        }
        if !self.full.load(Relaxed) || !self.socket.has_room() {
            return;
        }
        // The callback in `kapi/net/callbacks.rs`.
        let late = self.table.left_out == LeftOut::ForgettingReportFirst;
        if !late {
            self.socket.reports.swap(false, Ordering::Relaxed);
        }
        self.queue_transmit();
        if late {
            self.socket.reports.swap(false, Ordering::Relaxed);
        }
    }

    /// The work item.
    pub(crate) fn transmit_work(&self) {
        if self.table.left_out == LeftOut::LockingBeforeTurns {
            self.full.xchg(false, Full);
        }
        self.transmit_backlog();
    }

    fn clear_full(&self) {
        if self.full.load(Relaxed) {
            self.full.store(false, Release);
        }
    }

    pub(crate) fn queue_transmit(&self) {
        self.transmit_work.queue();
    }

    fn transmit_backlog(&self) {
        self.transmit(IfHeld::Return);
    }

    fn transmit(&self, if_held: IfHeld) {
        let left_out = self.table.left_out;
        let mut taken = match if_held {
            IfHeld::Return => self.outbox.try_lock(),
            IfHeld::Wait => Some(self.outbox.lock()),
        };
        let mut refused = 0;
        while let Some(mut outbox) = taken {
            if !self.is_alive() {
                return;
            }
            self.clear_full();
            match self.transmit_all(&mut outbox) {
                Ok(StopReason::Idle) => {
                    drop(outbox);
                    if left_out != LeftOut::BarrierBeforeLookingAgain {
                        smp_mb(Full);
                    }
                    if left_out == LeftOut::LookingAgain || !self.has_backlog() {
                        return;
                    }
                }
                Ok(StopReason::Full { sent_some }) => {
                    refused = if sent_some { 0 } else { refused + 1 };
                    if left_out == LeftOut::WaitingBeforeLooking {
                        drop(outbox);
                        let has_room = self.socket.has_room();
                        self.full.store(!has_room, Release);
                        if !has_room {
                            return;
                        }
                        taken = self.outbox.try_lock();
                        continue;
                    }
                    if left_out == LeftOut::BarrierBeforeLookingForRoom {
                        self.full.store(true, Release);
                    } else {
                        self.full.xchg(true, Full);
                    }
                    drop(outbox);
                    if !self.look_for_room(refused) {
                        return;
                    }
                }
                // `send_failed()`
                Err(Ended) => {
                    drop(outbox);
                    return self.mark_dead();
                }
            }
            taken = self.outbox.try_lock();
        }
    }

    fn nothing_outstanding(&self) -> bool {
        if self.table.has_open(self.index) {
            return false;
        }
        let outbox = match self.outbox.try_lock() {
            Some(outbox) => outbox,
            None if self.table.left_out == LeftOut::WaitingForSender => return false,
            None => {
                self.socket.end(Ending::Polite);
                self.outbox.lock()
            }
        };
        let has_requests = outbox.staged.iter().any(|o| o.request.is_some());
        !has_requests && !self.table.has_open(self.index)
    }

    fn has_backlog(&self) -> bool {
        !self.backlog.is_empty() || self.send_disconnect.load(Acquire)
    }

    fn look_for_room(&self, refused: u32) -> bool {
        let left_out = self.table.left_out;
        if left_out == LeftOut::LookingForRoom || !self.socket.has_room_or_requests_report(left_out)
        {
            return false;
        }
        if refused > 1 {
            // `queue_retry()`
            self.queue_transmit();
            return false;
        }
        true
    }

    /// There is less to send than one call takes, so it does not do it again.
    fn transmit_all(&self, outbox: &mut Outbox<P>) -> Result<StopReason, Ended> {
        self.stage(outbox);
        if outbox.staged.is_empty() {
            return Ok(StopReason::Idle);
        }
        for request in outbox.staged.iter().filter_map(|o| o.request.as_ref()) {
            request.0.read_pages();
        }
        let count = self.socket.send(&outbox.staged)?;
        let all = count == outbox.staged.len();
        outbox.staged.drain(..count);
        if !all {
            let sent_some = count > 0;
            return Ok(StopReason::Full { sent_some });
        }
        Ok(StopReason::Idle)
    }

    fn stage(&self, outbox: &mut Outbox<P>) {
        if self.send_disconnect.load(Acquire) && self.send_disconnect.xchg(false, Full) {
            outbox.staged.push(Outgoing {
                message: Message(None),
                request: None,
            });
        }
        loop {
            if outbox.waiting.is_empty() {
                outbox.waiting = self.backlog.take();
            }
            let Some(request) = outbox.waiting.pop() else {
                return;
            };
            let tag = request.0.tag().clone();
            let command = Command {
                use_number: tag.use_number(),
                generation: self.table.slots[tag.number].generation(),
                tag,
            };
            outbox.staged.push(Outgoing {
                message: Message(Some(command)),
                request: Some(request),
            });
        }
    }

    fn give_back_unsent(&self) {
        let outcome = self.table.lost_command_outcome();
        let give_back = |request: Unsent| {
            if self.table.left_out != LeftOut::Overruling {
                request.overrule(outcome);
            }
        };
        let mut outbox = self.outbox.lock();
        let outbox = &mut *outbox;
        outbox
            .staged
            .drain(..)
            .filter_map(|outgoing| outgoing.request)
            .for_each(give_back);
        let waiting = std::mem::replace(&mut outbox.waiting, Batches::empty());
        for mut batch in [waiting, self.backlog.close()] {
            while let Some(request) = batch.pop() {
                give_back(request);
            }
        }
    }
}

// `rnbd_sock.rs`.
impl<P: Parts> Connection<P> {
    pub(crate) fn mark_dead(&self) {
        if self.state.cmpxchg(ALIVE, ENDING, Full).is_err() {
            return;
        }
        if !self.table.fate.snapshot().is_end_wanted() {
            self.table.told.fetch_add(1, Ordering::Relaxed);
        }
        let ending = match self.nothing_outstanding() {
            true => Ending::Polite,
            false if self.table.left_out == LeftOut::Resetting => Ending::Polite,
            false => Ending::Reset,
        };
        self.socket.end(ending);
        self.state.store(ENDED, Release);
        self.queue_receive();
    }

    /// Where nobody else runs the work item, it runs here.
    fn queue_receive(&self) {
        match self.conditions.has_worker {
            true => self.receive_work.queue(),
            false => self.receive_work(),
        }
    }

    /// The work item: what was queued, or anything that comes in, makes it run.
    pub(crate) fn receive_work(&self) {
        let _receive = self.receive.lock().unwrap();
        self.receive_up_to();
        let ended = self.state.cmpxchg(ENDED, REAPED, Full).is_ok();
        let early = self.table.left_out == LeftOut::EndingBeforeReaping;
        if ended || early && self.state.cmpxchg(ENDING, REAPED, Full).is_ok() {
            self.reap();
        }
    }

    fn receive_up_to(&self) {
        let replies = std::mem::take(&mut self.socket.stream.lock().unwrap().replies);
        for command in replies {
            let slot = &self.table.slots[command.tag.number];
            let claimed = slot.claim(command.generation, self.index);
            let request = claimed.expect("a good reply was refused");
            request.finish(Verdict::Complete);
        }
    }

    fn reap(&self) {
        self.give_back_unsent();
        self.table.reclaim(self.index);
        if self.table.left_out == LeftOut::CountingBeforeTelling {
            self.reaped.complete_all();
            return self.table.remove_connection();
        }
        self.table.remove_connection();
        self.reaped.complete_all();
    }
}
