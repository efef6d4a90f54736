// SPDX-License-Identifier: GPL-2.0
//! A connection (`struct nbd_sock`): its setup, its socket's events, and its end.
//!
//! How it sends and receives is in `rnbd_sock/`; `rnbd_sock/receiving.rs` has a table of the
//! contexts in which it does.
//!
//! A connection has no thread of its own. A command is sent by the task that queues it, or by a
//! work item. A reply is received in the socket's callback, or by the task that has sent it, or by
//! a work item.
//!
//! Anybody may mark a connection as dead, which also shuts its socket down. The receive work then
//! *reaps* it: it gives back the commands in flight and releases the socket. It does so under the
//! receive lock, so that receiving and reaping never run concurrently.

#![forbid(unsafe_code)]

mod chunks;
mod draining;
mod ending;
mod outgoing;
mod receiving;
mod records;
mod report;
mod sending;
mod staging;
mod stream;
mod tracing;
mod traffic;
mod trimming;

use crate::{
    kapi::{
        net::{
            arrival::Arrival,
            hook::{
                Events,
                HookMemory,
                Hooked, //
            },
            sock::Socket, //
        },
        try_lock::TryLock,
        wq::{
            HasQueue,
            Queue, //
        },
    },
    rnbd_events::{
        Incarnation,
        Notice, //
    },
    rnbd_table::{
        Structured,
        Table, //
    }, //
};
use ending::{
    death_of_stream,
    DeathReport, //
};
use kernel::{
    impl_has_delayed_work,
    impl_has_work,
    new_delayed_work,
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        Arc,
        ArcBorrow,
        Completion,
        Mutex, //
    },
    workqueue::{
        DelayedWork,
        Work,
        WorkItem, //
    }, //
};
use receiving::WORKER_CALLS;
use report::Addresses;
use sending::Sending;
use stream::{
    Mode,
    Receive, //
};
use traffic::Traffic;

pub(crate) use report::Life;
pub(crate) use sending::Pace;
pub(crate) use stream::send_disconnect_on;

/// How often the receive work looks for more before it queues itself again, so that other work runs.
const ROUNDS: u32 = 8;

/// Commands can be queued on the connection.
const ALIVE: u32 = 0;
/// The server is shutting down, or another connection has taken the place of this one: no other command is
/// sent. See `rnbd_sock/draining.rs`.
const DRAINING: u32 = 1;
/// The connection was marked as dead: no sender starts any more. Bytes that were sent before may
/// still leave the socket.
const ENDING: u32 = 2;
/// The socket was shut down: bytes that it has not passed to the network device never leave it. The
/// connection is still to be reaped.
const ENDED: u32 = 3;
/// The connection was reaped.
const REAPED: u32 = 4;

/// Where a connection is in its session.
#[derive(Clone, Copy)]
pub(crate) struct Position {
    /// The index in the session's connections.
    pub(crate) index: u16,
    /// What the slots of its commands name it by. No other connection that was not reaped has the same.
    pub(crate) id: u16,
    /// How often the connection with this index had been replaced when this one took its place.
    pub(crate) reconnects: u32,
}

/// A connection of a session.
#[pin_data]
pub(crate) struct Connection {
    position: Position,
    table: Arc<Table>,
    socket: Socket,
    addresses: Addresses,
    state: Atomic<u32>,
    death: DeathReport,
    /// Another connection has taken the place of this one, which was alive ([`Connection::retire()`]).
    retired: Atomic<bool>,
    traffic: Traffic,
    /// The connection was reaped.
    is_gone: Atomic<bool>,
    /// Completed when the connection was reaped.
    #[pin]
    reaped: Completion,
    #[pin]
    hooked: Mutex<Option<Hooked<Connection>>>,
    #[pin]
    sending: Sending,
    receive: TryLock<Receive>,
    #[pin]
    receive_work: Work<Connection, 1>,
    #[pin]
    transmit_work: Work<Connection, 2>,
    #[pin]
    link_dead_work: Work<Connection, 3>,
    #[pin]
    retry_work: DelayedWork<Connection, 4>,
    #[pin]
    trim_work: DelayedWork<Connection, 5>,
}

impl_has_work! {
    impl HasWork<Self, 1> for Connection { self.receive_work }
}
impl_has_work! {
    impl HasWork<Self, 2> for Connection { self.transmit_work }
}
impl_has_work! {
    impl HasWork<Self, 3> for Connection { self.link_dead_work }
}
impl_has_delayed_work! {
    impl HasDelayedWork<Self, 4> for Connection { self.retry_work }
}
impl_has_delayed_work! {
    impl HasDelayedWork<Self, 5> for Connection { self.trim_work }
}

impl HasQueue for Connection {
    fn queue(&self) -> &Queue {
        &self.table.shared.io
    }
}

impl WorkItem<1> for Connection {
    type Pointer = Arc<Connection>;

    fn run(this: Arc<Connection>) {
        this.as_arc_borrow().receive_work();
    }
}

impl WorkItem<2> for Connection {
    type Pointer = Arc<Connection>;

    fn run(this: Arc<Connection>) {
        this.as_arc_borrow().transmit_work();
    }
}

impl WorkItem<3> for Connection {
    type Pointer = Arc<Connection>;

    /// Reports to user space that the connection is dead (`nbd_dead_link_work()`). It is not queued
    /// on the workqueue for I/O, because it may wait for memory.
    fn run(this: Arc<Connection>) {
        this.table.shared.events.link_dead(this.table.device);
    }
}

impl WorkItem<4> for Connection {
    type Pointer = Arc<Connection>;

    fn run(this: Arc<Connection>) {
        this.as_arc_borrow().transmit_work();
    }
}

impl WorkItem<5> for Connection {
    type Pointer = Arc<Connection>;

    fn run(this: Arc<Connection>) {
        this.as_arc_borrow().trim_work();
    }
}

impl Events for Connection {
    fn tcp_data_ready(this: ArcBorrow<'_, Self>, arrival: Arrival<'_>) {
        this.try_receive(|receive| this.receive_in_callback(receive, arrival));
    }

    fn sender_should_receive(&self) -> bool {
        // A single reply is received by the task that has sent it, since otherwise a worker would
        // have to be woken up for it. If there are more, a worker finds several of them at a time,
        // while the server continues.
        self.traffic.awaited() <= 1
    }

    fn sender_receives(this: Arc<Self>) {
        let connection = this.as_arc_borrow();
        connection.try_receive(|receive| connection.receive_in_sender(receive));
    }

    fn input_ready(this: ArcBorrow<'_, Self>) {
        // The holder of the receive lock looks again before it finishes.
        if !this.receive.mark_wanted() {
            this.queue_receive();
        }
    }

    fn state_changed(this: ArcBorrow<'_, Self>) {
        Self::input_ready(this);
        if this.awaits_space() {
            this.queue_transmit();
        }
    }

    fn awaits_space(&self) -> bool {
        self.sender_awaits_space()
    }

    fn write_space(this: ArcBorrow<'_, Self>) {
        this.queue_transmit();
    }
}

/// A connection that has not taken over its socket yet. All memory that this needs is allocated.
pub(crate) struct Prepared {
    connection: Arc<Connection>,
    memory: HookMemory<Connection>,
}

impl Prepared {
    /// Takes over the socket. The caller must call [`Connection::start_receiving()`] next.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: the socket is in use by another device or by another part of the kernel.
    /// - `ENOTCONN`: the socket is not connected, and never was.
    /// - `ENODEV`: the module is being unloaded.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn take_socket(self) -> Result<Arc<Connection>> {
        let Prepared { connection, memory } = self;
        // The connection can receive and die as soon as the hook is installed. The reaper waits for
        // this lock.
        connection.table.add_connection();
        let mut hooked = connection.hooked.lock();
        match connection.socket.hook(memory, connection.clone()) {
            Ok(hook) => {
                connection.trace_birth();
                *hooked = Some(hook);
            }
            Err(e) => {
                connection.table.remove_connection();
                return Err(e);
            }
        }
        drop(hooked);
        Ok(connection)
    }
}

impl Connection {
    /// Allocates a connection for a socket, which [`Prepared::take_socket()`] then takes over.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn prepare(
        position: Position,
        table: Arc<Table>,
        mut socket: Socket,
    ) -> Result<Prepared> {
        // TLS may have been set up since the socket was passed.
        socket.update_input();
        let memory = HookMemory::new()?;
        let notice = Notice::new(&table.origin)?;
        let addresses = Addresses::of(&socket);
        let sending = Sending::new()?;
        let receive = Receive::new(match table.structured {
            Structured::No => Mode::Simple,
            Structured::Possible | Structured::Required => Mode::Structured,
        })?;
        let connection = Arc::pin_init(
            pin_init!(Connection {
                position,
                table,
                socket,
                addresses,
                state: Atomic::new(ALIVE),
                death: DeathReport::new(notice),
                retired: Atomic::new(false),
                traffic: Traffic::new(),
                is_gone: Atomic::new(false),
                reaped <- Completion::new(),
                hooked <- new_mutex!(None),
                sending <- sending,
                receive: TryLock::new(receive),
                receive_work <- new_work!("rnbd::receive"),
                transmit_work <- new_work!("rnbd::transmit"),
                link_dead_work <- new_work!("rnbd::link_dead"),
                retry_work <- new_delayed_work!("rnbd::retry"),
                trim_work <- new_delayed_work!("rnbd::trim"),
            }),
            GFP_KERNEL,
        )?;
        Ok(Prepared { connection, memory })
    }

    /// Queues the receive work if data may have arrived before the callbacks were installed.
    pub(crate) fn start_receiving(self: ArcBorrow<'_, Self>) {
        // TLS may have decrypted some already, and keeps that in a queue of its own.
        if self.socket.has_input() || self.socket.has_upper_layer() {
            self.queue_receive();
        }
    }

    /// Returns whether commands can be queued on the connection.
    pub(crate) fn is_alive(&self) -> bool {
        self.state.load(Acquire) == ALIVE
    }

    /// Returns whether the connection was marked as dead.
    pub(crate) fn is_dead(&self) -> bool {
        self.state.load(Acquire) >= ENDING
    }

    /// Returns whether the connection was reaped. Its [number](Self::id) is free then.
    pub(crate) fn is_reaped(&self) -> bool {
        self.is_gone.load(Acquire)
    }

    /// Returns the index in the session's connections.
    pub(crate) fn index(&self) -> u16 {
        self.position.index
    }

    /// Returns what the slots of the connection's commands name it by.
    pub(crate) fn id(&self) -> u16 {
        self.position.id
    }

    /// Returns what tells the connection from those that had its index before.
    pub(crate) fn incarnation(&self) -> Incarnation {
        Incarnation {
            index: self.position.index,
            reconnects: self.position.reconnects,
        }
    }

    /// Returns the connection's counters.
    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Waits until the connection was reaped. It must have been marked as dead.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn wait_reaped(&self) {
        self.reaped.wait_for_completion();
    }

    /// Queues the receive work, which also reaps the connection once its socket was shut down.
    fn queue_receive(self: ArcBorrow<'_, Self>) {
        self.table.shared.io.enqueue_once::<Self, 1>(self);
    }

    /// Calls `receive` under the receive lock, unless another context holds it.
    ///
    /// The holder of the lock then learns that it was contended, and looks again. The receive work
    /// is queued if `receive` returns true, which means that it has left something, if the lock was
    /// contended meanwhile, or if the connection drains.
    fn try_receive(self: ArcBorrow<'_, Self>, receive: impl FnOnce(&mut Receive) -> bool) {
        if let Some((left, contended)) = self.receive.try_with(receive) {
            if left || contended || self.is_draining() {
                self.queue_receive();
            }
        }
    }

    /// Receives in a worker, or in the task that ends the session, and reaps the connection once its
    /// socket was shut down (`recv_work()`). Does nothing if another context is receiving.
    ///
    /// It also receives after the connection was marked as dead, so that replies which have arrived
    /// by then are honoured.
    ///
    /// # Context
    ///
    /// May sleep. The caller must hold neither the outbox nor `hooked`.
    pub(crate) fn receive_work(self: ArcBorrow<'_, Self>) {
        for _ in 0..ROUNDS {
            let received = |receive: &mut _| self.receive_or_reap(receive);
            match self.receive.try_with(received) {
                // The holder of the receive lock queues this work again.
                None => return,
                Some((true, _)) => break,
                Some((false, true)) => {}
                Some((false, false)) => return,
            }
        }
        self.queue_receive();
    }

    /// Receives within the worker's budget, and then reaps the connection if its socket was shut
    /// down. Returns whether anything may be left to receive.
    fn receive_or_reap(self: ArcBorrow<'_, Self>, receive: &mut Receive) -> bool {
        // The socket may have another user once the connection was reaped.
        if self.state.load(Acquire) == REAPED {
            return false;
        }
        match self.receive_up_to(receive, WORKER_CALLS, usize::MAX) {
            Ok(true) => {
                // What is left may be endless, and no reply.
                self.check_drained(receive);
                return true;
            }
            Ok(false) => self.check_drained(receive),
            Err(e) => {
                self.receive_failed(e);
                // What follows in the stream means nothing.
                receive.mode = Mode::Failed(e);
                self.mark_dead(death_of_stream(e));
            }
        }
        if self.state.cmpxchg(ENDED, REAPED, Full).is_ok() {
            self.reap(receive);
        }
        false
    }

    /// Removes the callbacks, gives back all commands, and releases the socket. Runs once.
    fn reap(self: ArcBorrow<'_, Self>, receive: &mut Receive) {
        let mut hooked = self.hooked.lock().take();
        if let Some(hooked) = &mut hooked {
            hooked.stop();
        }
        if let Some(payload) = receive.current.take() {
            self.table.give_up(payload.into_side());
        }
        self.give_back_unsent();
        self.end_trimming();
        // Nothing is sent any more, so the socket can be released to other users.
        drop(hooked);
        self.table.reclaim(self.id());
        // From here on another connection can take the number. Whoever hears of the death may bring one.
        self.is_gone.store(true, Release);
        if self.retired.load(Acquire) && !self.table.fate.snapshot().is_end_wanted() {
            self.report_death();
        }
        self.table.remove_connection();
        self.reaped.complete_all();
    }
}
