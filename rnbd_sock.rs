// SPDX-License-Identifier: GPL-2.0
//! One connection: its transmit queue, its receive state machine, its death.
//!
//! No thread waits for a connection. What is to be sent is sent by whoever queues it, or by a work item
//! when the socket was full; what comes in is received by a work item that the socket's callbacks
//! queue. Death is declared by anybody and carried out by the receiving work item, so that receiving
//! and reaping never run at the same time.

use crate::{
    kapi::{
        mq::{Extent, Op, Payload, Request, Status, Verdict},
        sock::{Ending, Events, Hooked, IoPage, Iov, Pieces, Socket},
        task, wq,
    },
    rnbd_cmd::{Cookie, Refused},
    rnbd_events,
    rnbd_proto::{self as proto, Command, Reply, ServerError, REPLY_BYTES, REQUEST_BYTES},
    rnbd_ring::Ring,
    rnbd_table::Table,
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

/// Requests that one call may send.
const STAGED: usize = 64;
/// Pieces of memory that one call may send or receive.
const PIECES: usize = 128;
/// Bytes that are received ahead of the data that is being waited for. More would be copied twice when
/// it is data; less would not hold the headers that a busy server answers writes with.
const READ_AHEAD_BYTES: usize = 512;
/// Calls after which a work item lets others run, and a submitter leaves the sending to a work item.
const BUDGET: u32 = 32;
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

/// A message that is being sent.
struct Outgoing {
    /// Where the header lies in the page, and how much of it is left.
    header_at: usize,
    header_left: usize,
    /// The request and its data; none for a disconnect.
    payload: Option<Payload>,
}

impl Outgoing {
    /// Counts `bytes` as sent, at most to the end; returns how many are of the next message.
    fn advance(&mut self, bytes: usize) -> usize {
        let header = bytes.min(self.header_left);
        self.header_at += header;
        self.header_left -= header;
        let Some(payload) = &mut self.payload else {
            return bytes - header;
        };
        let data = (bytes - header).min(payload.left_bytes());
        payload.advance(data);
        bytes - header - data
    }

    fn is_sent(&self) -> bool {
        self.header_left == 0 && self.payload.as_ref().is_none_or(|p| p.left_bytes() == 0)
    }
}

/// The transmit side's own.
struct Transmit {
    headers: IoPage,
    pieces: Pieces,
    staged: Ring<Outgoing>,
    /// Where the next header goes.
    next_header: usize,
}

/// The receive side's own.
struct Receive {
    buffer: IoPage,
    pieces: Pieces,
    /// What is received and not understood yet lies between these.
    start: usize,
    end: usize,
    /// The command whose data is being received.
    current: Option<Payload>,
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
    traffic: Traffic,
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
    #[pin]
    receive: Mutex<Receive>,
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
        let transmit = Transmit {
            headers: IoPage::new()?,
            pieces: Pieces::new(PIECES)?,
            staged: Ring::new(STAGED)?,
            next_header: 0,
        };
        let receive = Receive {
            buffer: IoPage::new()?,
            pieces: Pieces::new(PIECES)?,
            start: 0,
            end: 0,
            current: None,
        };
        let this = Arc::pin_init(
            pin_init!(Connection {
                index,
                table,
                socket,
                state: Atomic::new(ALIVE),
                progress: Atomic::new(task::jiffies()),
                traffic: Traffic {
                    requests_sent: Atomic::new(0),
                    bytes_sent: Atomic::new(0),
                    replies: Atomic::new(0),
                    bytes_received: Atomic::new(0),
                },
                full: Atomic::new(false),
                say_goodbye: Atomic::new(false),
                reaped <- Completion::new(),
                hooked <- new_mutex!(None),
                backlog <- new_spinlock!(backlog),
                transmit <- new_mutex!(transmit),
                receive <- new_mutex!(receive),
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

    /// Writes what has gone over it, as `name=value` pairs.
    pub(crate) fn describe(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        let sent = self.traffic.requests_sent.load(Relaxed);
        let replies = self.traffic.replies.load(Relaxed);
        write!(
            f,
            "state={} awaited={} requests_sent={} bytes_sent={} replies={} bytes_received={} idle_ms={}",
            if self.is_alive() { "alive" } else { "dead" },
            sent.saturating_sub(replies),
            sent,
            self.traffic.bytes_sent.load(Relaxed),
            replies,
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

    /// Sends what waits, unless somebody else does or the socket is full. May sleep.
    pub(crate) fn kick(self: ArcBorrow<'_, Self>) {
        if !self.full.load(Acquire) {
            self.transmit_backlog();
        }
    }

    /// Sends a disconnect after what is being sent now. May sleep.
    pub(crate) fn say_goodbye(self: ArcBorrow<'_, Self>) {
        self.say_goodbye.store(true, Release);
        self.kick();
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
            if transmit.staged.is_empty() {
                return Ok(Stop::Idle);
            }
            match self.send_staged(transmit, more_waits) {
                Ok(true) => {}
                Ok(false) => return Ok(Stop::Full { sent_some: true }),
                Err(e) if e == EAGAIN => return Ok(Stop::Full { sent_some: false }),
                Err(e) => return Err(e),
            }
        }
        Ok(Stop::Budget)
    }

    /// Moves what waits to the sender, headers written. Returns whether something is left.
    fn stage(&self, transmit: &mut Transmit) -> bool {
        if transmit.staged.len() < STAGED
            && self.say_goodbye.load(Acquire)
            && self.say_goodbye.xchg(false, Full)
        {
            transmit.stage(&goodbye(), None);
        }
        while transmit.staged.len() < STAGED {
            let queued = self.backlog.lock().queue.pop_front();
            let Some(queued) = queued else { return false };
            let payload = Payload::new(queued.request, Op::Write);
            transmit.stage(&queued.wire, Some(payload));
        }
        !self.backlog.lock().queue.is_empty()
    }

    /// Sends what is staged, as far as one call can. Returns whether all that it was given was taken.
    fn send_staged(&self, transmit: &mut Transmit, more_waits: bool) -> Result<bool> {
        let Transmit {
            headers,
            pieces,
            staged,
            ..
        } = transmit;
        let mut iov = Iov::new(pieces);
        let mut all = true;
        for message in staged.iter() {
            let header = message.header_left == 0
                || iov.push_bytes(headers, message.header_at, message.header_left);
            let data = header && message.payload.as_ref().is_none_or(|p| iov.push_payload(p));
            if !data {
                all = false;
                break;
            }
        }
        let offered = iov.bytes();
        let sent = self.socket.send(iov, !all || more_waits)?;
        add(&self.traffic.bytes_sent, sent as u64);
        let mut left = sent;
        while let Some(first) = staged.front_mut() {
            left = first.advance(left);
            if !first.is_sent() {
                break;
            }
            add(&self.traffic.requests_sent, 1);
            // Letting go of the request may end it, when its reply is already in.
            drop(staged.pop_front());
        }
        Ok(sent == offered)
    }

    // Receiving.

    /// The work item. Also after the connection was declared dead, so that replies that are already
    /// here count.
    fn receive_or_reap(self: ArcBorrow<'_, Self>) {
        if self.state.load(Acquire) == DEAD {
            return;
        }
        let stop = self.receive_all(&mut self.receive.lock());
        match stop {
            Ok(Stop::Budget) => return self.queue_receive(),
            Ok(_) => {}
            Err(e) => {
                self.receive_failed(e);
                self.die(Ending::Polite);
            }
        }
        if self.state.cmpxchg(DYING, DEAD, Full).is_ok() {
            self.reap();
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

    fn receive_all(&self, receive: &mut Receive) -> Result<Stop> {
        for _ in 0..BUDGET {
            self.understand(receive)?;
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
        loop {
            if let Some(mut payload) = receive.current.take() {
                receive.move_to(&mut payload);
                if payload.left_bytes() > 0 {
                    receive.current = Some(payload);
                    return Ok(());
                }
                payload.decide(Verdict::Complete(Status::OK));
            }
            let Some(header) = receive.next_header()? else {
                return Ok(());
            };
            receive.current = self.handle_reply(&header)?;
        }
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
            request.decide(Verdict::Complete(status_of(error, op)));
            return Ok(None);
        }
        let payload = Payload::new(request, Op::Read);
        if payload.left_bytes() > 0 {
            return Ok(Some(payload));
        }
        payload.decide(Verdict::Complete(Status::OK));
        Ok(None)
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
        while let Some(message) = transmit.staged.pop_front() {
            if let Some(payload) = message.payload {
                payload.decide(verdict);
            }
        }
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
    fn reap(&self) {
        let hooked = self.hooked.lock().take();
        drop(hooked);
        let receiving = self.receive.lock().current.take();
        if let Some(payload) = receiving {
            payload.decide(self.table.verdict_of_lost());
        }
        self.give_back_unsent();
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

impl Transmit {
    /// Writes a header, and puts the message at the end of what is sent.
    fn stage(&mut self, wire: &proto::Request, payload: Option<Payload>) {
        // Headers of messages that are staged lie behind one another, and there are fewer than fit.
        let header_at = self.next_header;
        let message = Outgoing {
            header_at,
            header_left: REQUEST_BYTES,
            payload,
        };
        self.next_header = (header_at + REQUEST_BYTES) % (STAGED * REQUEST_BYTES);
        // Neither can fail: the place is within the page, and the caller has looked for room.
        let _ = self.headers.write(header_at, &wire.encode());
        let _ = self.staged.push_back(message);
    }
}

impl Receive {
    /// Receives into the data that is waited for, and ahead of it. Returns how much it was, and whether
    /// it was everything that there was room for.
    fn fill(&mut self, socket: &Socket) -> Result<(usize, bool)> {
        let mut iov = Iov::new(&mut self.pieces);
        let whole = self.current.as_ref().is_none_or(|p| iov.push_payload(p));
        if whole {
            let room = READ_AHEAD_BYTES - self.end;
            iov.push_room(&mut self.buffer, self.end, room);
        }
        let offered = iov.bytes();
        let got = socket.receive(iov)?;
        let mut ahead = got;
        if let Some(payload) = &mut self.current {
            let data = got.min(payload.left_bytes());
            payload.advance(data);
            ahead -= data;
        }
        self.end += ahead;
        Ok((got, got == offered))
    }

    /// Copies what was received ahead to where it belongs.
    fn move_to(&mut self, payload: &mut Payload) {
        let ahead = self.end - self.start;
        if ahead > 0 && payload.left_bytes() > 0 {
            self.start += self.buffer.copy_to(self.start, ahead, payload);
        }
        self.forget_used();
    }

    /// The next reply's header, if it is all there.
    fn next_header(&mut self) -> Result<Option<[u8; REPLY_BYTES]>> {
        let mut header = [0; REPLY_BYTES];
        let there = (self.end - self.start).min(REPLY_BYTES);
        let (have, _) = header.split_at_mut(there);
        self.buffer.read(self.start, have)?;
        if there == REPLY_BYTES {
            self.start += REPLY_BYTES;
            self.forget_used();
            return Ok(Some(header));
        }
        // What there is of a header goes to the front, so that the rest of it has room.
        let (have, _) = header.split_at(there);
        self.buffer.write(0, have)?;
        self.start = 0;
        self.end = there;
        Ok(None)
    }

    fn forget_used(&mut self) {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }
}

/// Sends a disconnect on a socket that no connection has taken over. May sleep.
pub(crate) fn say_goodbye_on(socket: &Socket) -> Result {
    let mut page = IoPage::new()?;
    page.write(0, &goodbye().encode())?;
    let mut pieces = Pieces::new(1)?;
    let mut iov = Iov::new(&mut pieces);
    iov.push_bytes(&page, 0, REQUEST_BYTES);
    socket.send(iov, false).map(|_| ())
}

/// The request that ends a session (`send_disconnects()`).
fn goodbye() -> proto::Request {
    proto::Request {
        command: Command::Disconnect,
        flags: 0,
        cookie: 0,
        offset_bytes: 0,
        len_bytes: 0,
    }
}

/// The command for an operation (`req_to_nbd_cmd_type()`).
pub(crate) fn command_of(op: Op) -> Option<Command> {
    Some(match op {
        Op::Read => Command::Read,
        Op::Write => Command::Write,
        Op::Flush => Command::Flush,
        Op::Discard => Command::Trim,
        Op::WriteZeroes => Command::WriteZeroes,
        Op::Other => return None,
    })
}

/// A request, as the log shows it.
pub(crate) struct Described<'a>(pub(crate) &'a Extent);

impl kernel::fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        let Extent {
            op,
            offset_bytes,
            len_bytes,
            ..
        } = *self.0;
        let name = command_of(op).map_or("request", Command::name);
        if op == Op::Flush {
            return f.write_str(name);
        }
        write!(f, "{name} of {len_bytes} bytes at {offset_bytes}")
    }
}

/// What the block layer is told of a server's error.
fn status_of(error: ServerError, op: Op) -> Status {
    let optional = matches!(op, Op::Discard | Op::WriteZeroes);
    match error {
        ServerError::NoSpace => Status::NOSPC,
        ServerError::NotPermitted => Status::TARGET,
        // A server that does not know a command says that it is invalid. The block layer can do
        // without these two.
        ServerError::NotSupported | ServerError::Invalid if optional => Status::NOTSUPP,
        _ => Status::IOERR,
    }
}
