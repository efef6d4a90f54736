// SPDX-License-Identifier: GPL-2.0
//! One connection: its transmit queue, its receive state machine, its death.
//!
//! No thread waits for a connection. What is to be sent is sent by whoever queues it, or by a work item
//! when the socket was full; what comes in is received where the socket tells of it, if it is little, or
//! by a work item. Death is declared by anybody and carried out by that work item, with the lock for
//! receiving, so that receiving and reaping never run at the same time.

use crate::{
    kapi::{
        hook::{Arrival, Events, Hooked, Segment},
        mq::{Op, Request, Status, Verdict},
        payload::Payload,
        sock::{Ending, Socket},
        task,
        try_lock::TryLock,
        wq,
    },
    rnbd_cmd::{Cookie, Refused},
    rnbd_events,
    rnbd_proto::{self as proto, Reply, ServerError, REPLY_BYTES},
    rnbd_ring::Ring,
    rnbd_stream::{Receive, Transmit},
    rnbd_table::Table,
    rnbd_translate::{status_of, Described},
};
use kernel::{
    impl_has_delayed_work, impl_has_work, new_delayed_work, new_mutex, new_spinlock, new_work,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        barrier::smp_mb,
        Arc, ArcBorrow, Completion, Mutex, SpinLock,
    },
    time::msecs_to_jiffies,
    workqueue::{DelayedWork, Work, WorkItem},
};

/// Calls after which a work item lets others run, and a submitter leaves the sending to a work item.
const BUDGET: u32 = 32;
/// Data of a reply that is received where it arrives, which may be in softirq. To copy more is left to
/// the work item, which another CPU may run.
const ARRIVAL_BYTES: usize = 32 << 10;
/// Calls after which a task that has sent a reply leaves receiving to the work item: one for the
/// header with what comes along with it, one for the data.
const LITTLE_CALLS: u32 = 2;
/// How long to wait where a socket has room and still takes nothing, for want of memory.
const NO_MEMORY_DELAY_MS: u32 = 10;

/// It lives.
const ALIVE: u32 = 0;
/// It was declared dead, and the work item has yet to clear it away.
const DYING: u32 = 1;
/// It was cleared away.
const DEAD: u32 = 2;

/// A command that waits to be sent.
struct Queued {
    request: Request,
    wire: proto::Request,
}

/// What waits to be sent and was not looked at by a sender.
struct Backlog {
    queue: Ring<Queued>,
    closed: bool,
}

/// What has gone over a connection. Each number is written by one side only.
struct Traffic {
    requests_sent: Atomic<u64>,
    bytes_sent: Atomic<u64>,
    replies: Atomic<u64>,
    bytes_received: Atomic<u64>,
}

fn add(number: &Atomic<u64>, more: u64) {
    number.store(number.load(Relaxed).wrapping_add(more), Relaxed);
}

/// Who submitted last, and how often that task had slept by then. Wrong where several submit.
struct Submitter {
    task: Atomic<usize>,
    sleeps: Atomic<usize>,
}

impl Submitter {
    fn nobody() -> Self {
        Submitter {
            task: Atomic::new(0),
            sleeps: Atomic::new(0),
        }
    }

    /// Notes that the current task submits. Returns whether it did so before and has not slept since:
    /// it does not wait for its requests one by one, and there are probably more to come.
    fn goes_on(&self) -> bool {
        let (task, sleeps) = (task::TaskId::current().0, task::current_sleeps());
        let goes_on = self.task.load(Relaxed) == task && self.sleeps.load(Relaxed) == sleeps;
        if !goes_on {
            self.task.store(task, Relaxed);
            self.sleeps.store(sleeps, Relaxed);
        }
        goes_on
    }
}

/// How sending or receiving stopped.
enum Stop {
    /// There is nothing to do.
    Idle,
    /// There may be more; somebody else should have a turn.
    Budget,
    /// The socket takes no more now.
    Full { sent_some: bool },
}

/// See the module's documentation.
#[pin_data]
pub(crate) struct Connection {
    /// Which of the session's connections it is.
    index: u16,
    table: Arc<Table>,
    socket: Socket,
    state: Atomic<u32>,
    /// When something was received last, in jiffies.
    progress: Atomic<usize>,
    /// When something was sent last while no reply was awaited, in jiffies.
    awaiting_since: Atomic<usize>,
    traffic: Traffic,
    submitter: Submitter,
    /// The sender waits for room in the socket.
    full: Atomic<bool>,
    /// A disconnect is to be sent.
    say_goodbye: Atomic<bool>,
    /// Completes when it has been cleared away.
    #[pin]
    reaped: Completion,
    #[pin]
    hooked: Mutex<Option<Hooked<Connection>>>,
    #[pin]
    backlog: SpinLock<Backlog>,
    #[pin]
    transmit: Mutex<Transmit>,
    receive: TryLock<Receive>,
    #[pin]
    receive_work: Work<Connection, 1>,
    #[pin]
    transmit_work: DelayedWork<Connection, 2>,
}

impl_has_work! {
    impl HasWork<Self, 1> for Connection { self.receive_work }
}
impl_has_delayed_work! {
    impl HasDelayedWork<Self, 2> for Connection { self.transmit_work }
}

impl WorkItem<1> for Connection {
    type Pointer = Arc<Connection>;

    fn run(this: Arc<Connection>) {
        this.as_arc_borrow().receive_or_reap();
    }
}

impl WorkItem<2> for Connection {
    type Pointer = Arc<Connection>;

    fn run(this: Arc<Connection>) {
        this.full.store(false, Release);
        this.as_arc_borrow().transmit_backlog();
    }
}

impl Events for Connection {
    fn arrived(this: ArcBorrow<'_, Self>, arrival: Arrival<'_>) {
        // Where somebody receives just now, it is for the work item to look again.
        let left = match this.receive.try_lock() {
            Some(mut receive) => this.receive_here(&mut receive, arrival),
            None => true,
        };
        if left {
            this.queue_receive();
        }
    }

    fn takes_from_sender(&self) -> bool {
        // One by one a worker would be woken up for each. Of many it finds several at a time, while the
        // server goes on.
        self.awaited() <= 1
    }

    fn sent_here(this: Arc<Self>) {
        let left = match this.receive.try_lock() {
            Some(mut receive) => this.receive_little(&mut receive),
            None => true,
        };
        if left {
            this.as_arc_borrow().queue_receive();
        }
    }

    fn readable(this: ArcBorrow<'_, Self>) {
        this.queue_receive();
    }

    fn writable(this: ArcBorrow<'_, Self>) -> bool {
        if !this.full.load(Relaxed) || !this.socket.has_room() {
            return false;
        }
        this.queue_transmit(0);
        true
    }
}

impl Connection {
    /// Takes a socket over. [`Self::begin()`] must follow. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where another device, or another part of the kernel, uses the socket.
    pub(crate) fn new(index: u16, table: Arc<Table>, socket: Socket) -> Result<Arc<Self>> {
        let backlog = Backlog {
            queue: Ring::new(table.capacity())?,
            closed: false,
        };
        let transmit = Transmit::new()?;
        let receive = Receive::new()?;
        let this = Arc::pin_init(
            pin_init!(Connection {
                index,
                table,
                socket,
                state: Atomic::new(ALIVE),
                progress: Atomic::new(task::jiffies()),
                awaiting_since: Atomic::new(task::jiffies()),
                traffic: Traffic {
                    requests_sent: Atomic::new(0),
                    bytes_sent: Atomic::new(0),
                    replies: Atomic::new(0),
                    bytes_received: Atomic::new(0),
                },
                submitter: Submitter::nobody(),
                full: Atomic::new(false),
                say_goodbye: Atomic::new(false),
                reaped <- Completion::new(),
                hooked <- new_mutex!(None),
                backlog <- new_spinlock!(backlog),
                transmit <- new_mutex!(transmit),
                receive: TryLock::new(receive),
                receive_work <- new_work!("rnbd::receive"),
                transmit_work <- new_delayed_work!("rnbd::transmit"),
            }),
            GFP_KERNEL,
        )?;
        // From the hook on it can receive, and die: whoever reaps it waits for the lock.
        this.table.connection_born();
        let mut hooked = this.hooked.lock();
        match this.socket.hook(this.clone()) {
            Ok(hook) => *hooked = Some(hook),
            Err(e) => {
                this.table.connection_gone();
                return Err(e);
            }
        }
        drop(hooked);
        Ok(this)
    }

    /// Starts to receive: what came in before there was a callback too.
    pub(crate) fn begin(self: ArcBorrow<'_, Self>) {
        self.queue_receive();
    }

    /// Whether commands can be given to it.
    pub(crate) fn is_alive(&self) -> bool {
        self.state.load(Acquire) == ALIVE
    }

    /// Which of the session's connections it is.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Whether something was received within the last `jiffies`.
    pub(crate) fn progressed_within(&self, jiffies: u32) -> bool {
        self.idle_jiffies() < jiffies as usize
    }

    /// How long nothing has been received.
    pub(crate) fn idle_jiffies(&self) -> usize {
        task::jiffies().wrapping_sub(self.progress.load(Relaxed))
    }

    /// For how long replies have been awaited and nothing came, in jiffies.
    pub(crate) fn stuck_jiffies(&self) -> usize {
        if self.awaited() == 0 {
            return 0;
        }
        let awaiting = task::jiffies().wrapping_sub(self.awaiting_since.load(Relaxed));
        awaiting.min(self.idle_jiffies())
    }

    /// Writes what has gone over it, as `name=value` pairs.
    pub(crate) fn describe(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        write!(
            f,
            "state={} awaited={} requests_sent={} bytes_sent={} replies={} bytes_received={} idle_ms={}",
            if self.is_alive() { "alive" } else { "dead" },
            self.awaited(),
            self.traffic.requests_sent.load(Relaxed),
            self.traffic.bytes_sent.load(Relaxed),
            self.traffic.replies.load(Relaxed),
            self.traffic.bytes_received.load(Relaxed),
            self.idle_jiffies() as u64 * 1000 / u64::from(task::HZ)
        )
    }

    /// Puts a command at the end of the queue. It is sent by the next [`Self::kick()`].
    ///
    /// # Errors
    ///
    /// Gives the request back where the connection is dead.
    pub(crate) fn push(
        &self,
        request: Request,
        wire: proto::Request,
    ) -> core::result::Result<(), Request> {
        let mut backlog = self.backlog.lock();
        if backlog.closed {
            return Err(request);
        }
        // There is a place for every tag, so that it is never full.
        backlog
            .queue
            .push_back(Queued { request, wire })
            .map_err(|queued| queued.request)
    }

    /// Waits until it has been cleared away. It must have been declared dead. May sleep.
    pub(crate) fn wait_reaped(&self) {
        self.reaped.wait_for_completion();
    }

    /// Has sent what waits: at once where nothing else is going on, or else by a work item, so that
    /// what follows soon can go with it in one call. May sleep.
    pub(crate) fn kick(self: ArcBorrow<'_, Self>) {
        let goes_on = self.submitter.goes_on();
        if self.full.load(Acquire) {
            return;
        }
        if goes_on || self.awaited() > 0 {
            self.queue_transmit(0);
        } else {
            self.transmit_backlog();
        }
    }

    /// How many replies are awaited.
    fn awaited(&self) -> u64 {
        let sent = self.traffic.requests_sent.load(Relaxed);
        sent.saturating_sub(self.traffic.replies.load(Relaxed))
    }

    /// Sends a disconnect after what is being sent now. May sleep.
    pub(crate) fn say_goodbye(self: ArcBorrow<'_, Self>) {
        self.say_goodbye.store(true, Release);
        // At once: the socket is ended soon.
        if !self.full.load(Acquire) {
            self.transmit_backlog();
        }
    }

    /// Declares the connection dead. What is in flight on it is given back soon after. May sleep.
    pub(crate) fn die(self: ArcBorrow<'_, Self>, ending: Ending) {
        if self.state.cmpxchg(ALIVE, DYING, Full).is_err() {
            return;
        }
        self.socket.end(ending);
        self.queue_receive();
    }

    fn queue_receive(self: ArcBorrow<'_, Self>) {
        // Where it is queued already it will see whatever we have seen.
        let _ = wq::IO.get().enqueue::<Arc<Self>, 1>(self.into());
    }

    fn queue_transmit(self: ArcBorrow<'_, Self>, delay_ms: u32) {
        let delay = msecs_to_jiffies(delay_ms);
        let _ = wq::IO
            .get()
            .enqueue_delayed::<Arc<Self>, 2>(self.into(), delay);
    }

    // Sending.

    /// Sends until nothing waits. Whoever has the lock sends for all.
    fn transmit_backlog(self: ArcBorrow<'_, Self>) {
        let mut refused = 0;
        // What is left of a connection that is dead is given back by whoever clears it away.
        while self.is_alive() {
            let Some(mut transmit) = self.transmit.try_lock() else {
                return;
            };
            let stop = self.transmit_all(&mut transmit);
            drop(transmit);
            match stop {
                Ok(Stop::Idle) => {}
                Ok(Stop::Budget) => return self.queue_transmit(0),
                Ok(Stop::Full { sent_some }) => {
                    refused = if sent_some { 0 } else { refused + 1 };
                    if !self.wait_for_room(refused) {
                        return;
                    }
                    continue;
                }
                Err(e) => return self.send_failed(e),
            }
            // Somebody may have queued more and found the lock taken: pairs with the lock of the
            // backlog in `push()`, before which nothing orders a failed `try_lock()`.
            smp_mb(Full);
            if !self.has_backlog() {
                return;
            }
        }
    }

    fn has_backlog(&self) -> bool {
        !self.backlog.lock().queue.is_empty() || self.say_goodbye.load(Acquire)
    }

    /// The socket has taken less than it was given, and nothing at all the last `refused` times: has the
    /// rest sent when it can be. Returns whether that is now.
    fn wait_for_room(self: ArcBorrow<'_, Self>, refused: u32) -> bool {
        self.full.store(true, Release);
        // Room that became free before this was not announced to us; what comes after it is.
        smp_mb(Full);
        if !self.socket.has_room() {
            return false;
        }
        if refused > 1 {
            // There is room, and still it takes nothing: it wants for memory, which nobody announces.
            self.queue_transmit(NO_MEMORY_DELAY_MS);
            return false;
        }
        self.full.store(false, Release);
        true
    }

    fn send_failed(self: ArcBorrow<'_, Self>, error: Error) {
        if !self.table.is_disconnected() && self.is_alive() && self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {}: send failed ({:?}), closing it\n",
                self.table.device,
                self.index,
                error
            );
        }
        self.die(Ending::Polite);
    }

    fn transmit_all(&self, transmit: &mut Transmit) -> Result<Stop> {
        for _ in 0..BUDGET {
            let more_waits = self.stage(transmit);
            if transmit.is_empty() {
                return Ok(Stop::Idle);
            }
            let sent = match transmit.send(&self.socket, more_waits) {
                Ok(sent) => sent,
                Err(e) if e == EAGAIN => return Ok(Stop::Full { sent_some: false }),
                Err(e) => return Err(e),
            };
            if self.awaited() == 0 {
                self.awaiting_since.store(task::jiffies(), Relaxed);
            }
            add(&self.traffic.bytes_sent, sent.bytes as u64);
            add(&self.traffic.requests_sent, sent.requests);
            if !sent.all {
                return Ok(Stop::Full { sent_some: true });
            }
        }
        Ok(Stop::Budget)
    }

    /// Moves what waits to the sender, headers written. Returns whether something is left.
    fn stage(&self, transmit: &mut Transmit) -> bool {
        if transmit.has_place()
            && self.say_goodbye.load(Acquire)
            && self.say_goodbye.xchg(false, Full)
        {
            transmit.stage(&proto::Request::DISCONNECT, None);
        }
        while transmit.has_place() {
            let queued = self.backlog.lock().queue.pop_front();
            let Some(queued) = queued else { return false };
            let payload = Payload::new(queued.request, Op::Write);
            transmit.stage(&queued.wire, Some(payload));
        }
        !self.backlog.lock().queue.is_empty()
    }

    // Receiving.

    /// The work item. Also after the connection was declared dead, so that replies that are already
    /// here count.
    fn receive_or_reap(self: ArcBorrow<'_, Self>) {
        if self.state.load(Acquire) == DEAD {
            return;
        }
        let Some(mut receive) = self.receive.try_lock() else {
            // A callback receives just now, and may not have seen everything.
            return self.queue_receive();
        };
        match self.receive_up_to(&mut receive, BUDGET, usize::MAX) {
            Ok(Stop::Budget) => return self.queue_receive(),
            Ok(_) => {}
            Err(e) => {
                self.receive_failed(e);
                self.die(Ending::Polite);
            }
        }
        if self.state.cmpxchg(DYING, DEAD, Full).is_ok() {
            self.reap(&mut receive);
        }
    }

    fn receive_failed(&self, error: Error) {
        // What breaks the protocol was said where it was found.
        let said = error == EPROTO || self.table.is_disconnected() || !self.is_alive();
        if said || !self.table.log.allow() {
            return;
        }
        let (device, index) = (self.table.device, self.index);
        if error == EPIPE {
            pr_warn!("nbd{device}: connection {index}: the server has closed it\n");
        } else {
            pr_err!("nbd{device}: connection {index}: receive failed ({error:?}), closing it\n");
        }
    }

    /// Receives what has arrived. Returns whether something is left to the work item.
    fn receive_here(&self, receive: &mut Receive, arrival: Arrival<'_>) -> bool {
        let mut left = false;
        arrival.read(|segment| {
            match self.receive_segment(receive, segment) {
                Ok(goes_on) => left = !goes_on,
                Err(e) => {
                    receive.failed = Some(e);
                    left = true;
                }
            }
            !left
        });
        left
    }

    /// Receives a piece of the stream. Returns whether it is to go on here.
    fn receive_segment(&self, receive: &mut Receive, segment: &mut Segment<'_>) -> Result<bool> {
        if receive.failed.is_some() {
            return Ok(false);
        }
        self.progress.store(task::jiffies(), Relaxed);
        loop {
            self.understand(receive)?;
            if receive.awaited_bytes() > ARRIVAL_BYTES {
                return Ok(false);
            }
            if segment.left_bytes() == 0 {
                return Ok(true);
            }
            let taken = receive.take_from(segment)?;
            add(&self.traffic.bytes_received, taken as u64);
        }
    }

    /// Receives what is there, in a task of somebody else. Returns whether something is left to the
    /// work item.
    fn receive_little(&self, receive: &mut Receive) -> bool {
        // The socket is another's once it was cleared away.
        if self.state.load(Acquire) == DEAD {
            return false;
        }
        match self.receive_up_to(receive, LITTLE_CALLS, ARRIVAL_BYTES) {
            Ok(Stop::Budget) => true,
            Ok(_) => false,
            Err(e) => {
                receive.failed = Some(e);
                true
            }
        }
    }

    /// Receives with at most `calls` calls, until more than `bytes` of data are awaited.
    fn receive_up_to(&self, receive: &mut Receive, calls: u32, bytes: usize) -> Result<Stop> {
        if let Some(error) = receive.failed {
            return Err(error);
        }
        for _ in 0..calls {
            self.understand(receive)?;
            if receive.awaited_bytes() > bytes {
                break;
            }
            let (got, all) = match receive.fill(&self.socket) {
                Ok(filled) => filled,
                Err(e) if e == EAGAIN => return Ok(Stop::Idle),
                Err(e) => return Err(e),
            };
            add(&self.traffic.bytes_received, got as u64);
            self.progress.store(task::jiffies(), Relaxed);
            if !all && !self.socket.has_input() {
                // The next bytes are announced by the callback.
                self.understand(receive)?;
                return Ok(Stop::Idle);
            }
        }
        Ok(Stop::Budget)
    }

    /// Works through what was received.
    fn understand(&self, receive: &mut Receive) -> Result {
        receive.understand(
            |header| self.handle_reply(header),
            |payload| self.complete(payload.into_request(), Status::OK),
        )
    }

    /// nbd.c's `nbd_handle_reply()`: finds and claims the command. Returns it where data follows.
    fn handle_reply(&self, header: &[u8; REPLY_BYTES]) -> Result<Option<Payload>> {
        let reply = Reply::decode(header).map_err(|magic| {
            self.complain(format_args!("wrong magic ({:#010x})", magic.0));
            EPROTO
        })?;
        let cookie = Cookie(reply.cookie);
        let claimed = match self.table.slot_of(cookie) {
            Some(slot) => slot.claim(cookie.generation(), self.index),
            None => Err(Refused::Stale),
        };
        let request = claimed.map_err(|why| {
            let why = match why {
                Refused::Stale => "no such command is in flight",
                Refused::OtherConnection => "its command was sent on another connection",
                Refused::Claimed => "its command was answered or given up before",
            };
            self.complain(format_args!(
                "unexpected reply (cookie {:#018x}): {why}",
                cookie.0
            ));
            EPROTO
        })?;
        add(&self.traffic.replies, 1);
        if let Some(error) = ServerError::from_wire(reply.error) {
            self.complain_of_error(&request, reply.error);
            let op = request.extent().op;
            self.complete(request, status_of(error, op));
            return Ok(None);
        }
        let payload = Payload::new(request, Op::Read);
        if payload.left_bytes() > 0 {
            return Ok(Some(payload));
        }
        self.complete(payload.into_request(), Status::OK);
        Ok(None)
    }

    /// Ends a command that was answered. The receive lock is held, so nobody clears the connection away.
    fn complete(&self, request: Request, status: Status) {
        if request.forgets_reply() {
            self.table.forget_reply(request);
        } else {
            request.decide(Verdict::Complete(status));
        }
    }

    fn complain(&self, what: core::fmt::Arguments<'_>) {
        if self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {}: {what}, closing it\n",
                self.table.device,
                self.index
            );
        }
    }

    fn complain_of_error(&self, request: &Request, error: u32) {
        if !self.table.log.allow() {
            return;
        }
        pr_err!(
            "nbd{}: server returned error {error} for {}\n",
            self.table.device,
            Described(&request.extent())
        );
    }

    // Death.

    /// Gives back what was not sent, or not wholly. A reply does not help it: a server that has
    /// answered a write that it has not read has not written it.
    fn give_back_unsent(&self) {
        let verdict = self.table.verdict_of_lost();
        let mut transmit = self.transmit.lock();
        transmit.give_back(verdict);
        // Nothing comes after this.
        self.backlog.lock().closed = true;
        loop {
            // Letting go may end the request, which is not for under a spin lock.
            let queued = self.backlog.lock().queue.pop_front();
            match queued {
                Some(queued) => queued.request.decide(verdict),
                None => return,
            }
        }
    }

    /// Clears the connection away: stops the callbacks, and gives back all that it holds. Runs once.
    fn reap(&self, receive: &mut Receive) {
        let mut hooked = self.hooked.lock().take();
        if let Some(hooked) = &mut hooked {
            hooked.stop();
        }
        if let Some(payload) = receive.current.take() {
            payload.decide(self.table.verdict_of_lost());
        }
        self.give_back_unsent();
        // Nobody sends any more: the socket is anybody's.
        drop(hooked);
        self.table.reclaim(self.index);
        if !self.table.is_disconnected() {
            rnbd_events::link_dead(self.table.device);
        }
        self.reaped.complete_all();
        if self.table.connection_gone() == 0 && self.table.is_disconnect_requested() {
            pr_info!("nbd{}: disconnected by user request\n", self.table.device);
        }
    }
}
