// SPDX-License-Identifier: GPL-2.0
//! A connection: what is queued on it, its sending, its death. For the models `sending` and `session`.
//!
//! The steps of `rnbd_sock.rs`, `rnbd_sock/sending.rs` and `rnbd_table.rs` are repeated here, in the same
//! order and under the same names: keep them alike. `pure/cmd.rs`, `pure/fate.rs` and `kapi/llist.rs` are
//! the module's own.

use crate::{
    blk_mq::{Tag, Unsent, Verdict},
    parts::{Batches, Commands, Fates, Lists, Parts, Snapshots},
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        barrier::smp_mb,
    },
};
use loom::{
    cell::UnsafeCell,
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use std::{
    collections::VecDeque,
    ops::{Deref, DerefMut},
    sync::Arc,
};

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

/// A command on the wire: a request's use of a tag, and the generation that names it.
#[derive(Clone)]
pub(crate) struct Command {
    pub(crate) tag: Arc<Tag>,
    use_number: usize,
    pub(crate) generation: u32,
}

/// A message: a command, or else a goodbye.
struct Message(Option<Command>);

/// What is staged, with the request that is let go of when it was sent.
struct Outgoing {
    message: Message,
    request: Option<Unsent>,
}

/// What becomes of what has not left yet when a socket ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Polite,
    Reset,
}

/// A socket, and the server at its other end.
struct Socket {
    stream: Mutex<Stream>,
    /// How many messages it takes before they are acknowledged; none: any number.
    limit: Option<usize>,
    /// How many it has taken.
    used: AtomicUsize,
    /// `SOCK_NOSPACE`: it reports room. Only ever exchanged, as bits are.
    reports: AtomicBool,
}

#[derive(Default)]
struct Stream {
    ended: bool,
    /// It was reset. The test's own.
    reset: bool,
    /// What was sent and has not left yet.
    queue: VecDeque<Message>,
    /// What the server has answered.
    replies: Vec<Command>,
    /// What was ever sent: how many commands, how many goodbyes. The test's own.
    sent: (usize, usize),
    /// What the server has got: of which tag, and which use of it. The test's own.
    got: Vec<(usize, usize)>,
}

/// Sending is over.
struct Ended;

impl Socket {
    /// Sends as much of `staged` as fits; returns how much that is.
    fn send(&self, staged: &[Outgoing]) -> Result<usize, Ended> {
        let mut stream = self.stream.lock().unwrap();
        if stream.ended {
            return Err(Ended);
        }
        let mut count = 0;
        for outgoing in staged {
            if !self.takes_one() {
                break;
            }
            match &outgoing.message.0 {
                Some(_) => stream.sent.0 += 1,
                None => stream.sent.1 += 1,
            }
            stream.queue.push_back(Message(outgoing.message.0.clone()));
            count += 1;
        }
        Ok(count)
    }

    fn takes_one(&self) -> bool {
        let Some(limit) = self.limit else {
            return true;
        };
        // What it sees here may be out of date, as for a UNIX socket.
        let takes = self.used.load(Ordering::Relaxed) < limit;
        if takes {
            self.used.fetch_add(1, Ordering::Relaxed);
        } else {
            self.reports.swap(true, Ordering::Relaxed);
        }
        takes
    }

    fn has_room(&self) -> bool {
        self.limit
            .is_none_or(|limit| self.used.load(Ordering::Relaxed) < limit)
    }

    fn has_room_or_requests_report(&self, left_out: LeftOut) -> bool {
        if self.has_room() {
            return true;
        }
        if left_out != LeftOut::AskingForRoom {
            self.reports.swap(true, Ordering::Relaxed);
        }
        if left_out != LeftOut::BarrierBeforeLookingForRoom {
            smp_mb(Full);
        }
        self.has_room()
    }

    /// The network: what was sent leaves, in its own time, unless the socket was reset. A server that
    /// `answers` does so at once.
    fn leave(&self, answers: bool) {
        let mut stream = self.stream.lock().unwrap();
        while let Some(message) = stream.queue.pop_front() {
            let Some(command) = message.0 else {
                continue;
            };
            let given_up = command.tag.was_given_up(command.use_number);
            assert!(!given_up, "it left the socket after it was given up");
            stream.got.push((command.tag.number, command.use_number));
            if answers && !stream.ended {
                stream.replies.push(command);
            }
        }
    }

    fn end(&self, ending: Ending) {
        let mut stream = self.stream.lock().unwrap();
        stream.ended = true;
        if ending == Ending::Reset {
            stream.reset = true;
            stream.queue.clear();
        }
    }
}

/// A work item: to queue it while it is queued does nothing, and while it runs has it run once more.
#[derive(Default)]
pub(crate) struct Work {
    queued: Mutex<(bool, bool)>,
    wake: Condvar,
}

impl Work {
    fn queue(&self) {
        self.queued.lock().unwrap().0 = true;
        self.wake.notify_one();
    }

    /// It is never queued again.
    pub(crate) fn stop(&self) {
        self.queued.lock().unwrap().1 = true;
        self.wake.notify_one();
    }

    /// Waits until it is queued. Returns whether that can be.
    pub(crate) fn wait_queued(&self) -> bool {
        let mut queued = self.queued.lock().unwrap();
        loop {
            if std::mem::take(&mut queued.0) {
                return true;
            }
            if queued.1 {
                return false;
            }
            queued = self.wake.wait(queued).unwrap();
        }
    }
}

#[derive(Default)]
struct Completion {
    done: Mutex<bool>,
    wake: Condvar,
}

impl Completion {
    fn complete_all(&self) {
        *self.done.lock().unwrap() = true;
        self.wake.notify_all();
    }

    fn wait(&self) {
        let mut done = self.done.lock().unwrap();
        while !*done {
            done = self.wake.wait(done).unwrap();
        }
    }
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

/// The lock of the outbox. Loom lets others run before an attempt at a lock, but not before the unlocking.
/// Each attempt reads `unlocks` and the unlocking writes it, so it does.
struct OutboxLock<P: Parts> {
    mutex: Mutex<Outbox<P>>,
    unlocks: AtomicUsize,
}

struct OutboxGuard<'a, P: Parts> {
    outbox: MutexGuard<'a, Outbox<P>>,
    unlocks: &'a AtomicUsize,
}

impl<P: Parts> OutboxLock<P> {
    fn new(outbox: Outbox<P>) -> Self {
        OutboxLock {
            mutex: Mutex::new(outbox),
            unlocks: AtomicUsize::new(0),
        }
    }

    fn try_lock(&self) -> Option<OutboxGuard<'_, P>> {
        self.unlocks.load(Ordering::Relaxed);
        self.mutex.try_lock().ok().map(|outbox| self.guard(outbox))
    }

    fn lock(&self) -> OutboxGuard<'_, P> {
        self.guard(self.mutex.lock().unwrap())
    }

    fn guard<'a>(&'a self, outbox: MutexGuard<'a, Outbox<P>>) -> OutboxGuard<'a, P> {
        OutboxGuard {
            outbox,
            unlocks: &self.unlocks,
        }
    }
}

impl<P: Parts> Drop for OutboxGuard<'_, P> {
    fn drop(&mut self) {
        self.unlocks.fetch_add(1, Ordering::Relaxed);
    }
}

impl<P: Parts> Deref for OutboxGuard<'_, P> {
    type Target = Outbox<P>;

    fn deref(&self) -> &Outbox<P> {
        &self.outbox
    }
}

impl<P: Parts> DerefMut for OutboxGuard<'_, P> {
    fn deref_mut(&mut self) -> &mut Outbox<P> {
        &mut self.outbox
    }
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
    outbox: OutboxLock<P>,
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
            socket: Socket {
                stream: Mutex::default(),
                limit: conditions.limit,
                used: AtomicUsize::new(conditions.limit.unwrap_or(0)),
                reports: AtomicBool::new(false),
            },
            state: Atomic::new(ALIVE),
            reaped: Completion::default(),
            full: Atomic::new(false),
            send_disconnect: Atomic::new(false),
            backlog: P::List::new(),
            outbox: OutboxLock::new(Outbox {
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

    /// As often as it takes: there is less than the driver's budget.
    fn transmit_all(&self, outbox: &mut Outbox<P>) -> Result<StopReason, Ended> {
        loop {
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
        }
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
