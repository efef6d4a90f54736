// SPDX-License-Identifier: GPL-2.0
//! One connection: its birth, what the socket tells of, its death. How it sends and receives is in
//! `rnbd_sock/`.
//!
//! No thread waits for a connection. What is to be sent is sent by whoever queues it, or by a work item
//! when the socket was full; what comes in is received where the socket tells of it, if it is little, or
//! by a work item. Death is declared by anybody, who also ends the socket; then that work item clears the
//! connection away, with the lock for receiving, so that receiving and reaping never run at the same time.

#![forbid(unsafe_code)]

mod receiving;
mod sending;
mod stream;
mod traffic;

use crate::{
    kapi::{
        net::{
            arrival::Arrival,
            hook::{
                Events,
                HookMemory,
                Hooked, //
            },
            sock::{
                Ending,
                Socket, //
            },
        },
        try_lock::TryLock,
        wq::{
            HasQueue,
            Queue, //
        },
    },
    rnbd_table::Table, //
};
use kernel::{
    fmt,
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
use sending::Sending;
use stream::Receive;
use traffic::Traffic;

pub(crate) use sending::Pace;
pub(crate) use stream::send_disconnect_on;

/// How often the work item looks again, where something has come in meanwhile, before it lets others
/// run.
const ROUNDS: u32 = 8;

/// Commands can be given to it.
const ALIVE: u32 = 0;
/// It was declared dead: nobody begins to send any more. What was sent before may still leave.
const ENDING: u32 = 1;
/// Its socket was ended: what it has not handed to the network device yet never leaves. The work item has
/// yet to clear it away.
const ENDED: u32 = 2;
/// It was cleared away.
const REAPED: u32 = 3;

/// See the module's documentation.
#[pin_data]
pub(crate) struct Connection {
    /// Which of the session's connections it is.
    index: u16,
    table: Arc<Table>,
    socket: Socket,
    state: Atomic<u32>,
    traffic: Traffic,
    /// Completes when it has been cleared away.
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

    /// Tells user space that the connection is dead. Not on the queue of the I/O: it may wait for memory.
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

impl Events for Connection {
    fn tcp_data_ready(this: ArcBorrow<'_, Self>, arrival: Arrival<'_>) {
        this.try_receive(|receive| this.receive_in_callback(receive, arrival));
    }

    fn sender_should_receive(&self) -> bool {
        // One by one a worker would be woken up for each. Of many it finds several at a time, while the
        // server goes on.
        self.traffic.awaited() <= 1
    }

    fn sender_receives(this: Arc<Self>) {
        let connection = this.as_arc_borrow();
        connection.try_receive(|receive| connection.receive_in_sender(receive));
    }

    fn input_ready(this: ArcBorrow<'_, Self>) {
        // Who receives just now looks again.
        if !this.receive.mark_wanted() {
            this.queue_receive();
        }
    }

    fn write_space(this: ArcBorrow<'_, Self>) -> bool {
        this.write_space()
    }
}

/// A connection that does not have its socket yet: what needs memory is done.
pub(crate) struct Prepared {
    connection: Arc<Connection>,
    memory: HookMemory<Connection>,
}

impl Prepared {
    /// Takes the socket over. [`Connection::start_receiving()`] must follow. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where another device, or another part of the kernel, uses the socket; `ENOTCONN` where it is
    /// no connection, and was none; `ENODEV` where the module is about to go.
    pub(crate) fn take_socket(self) -> Result<Arc<Connection>> {
        let Prepared { connection, memory } = self;
        // From the hook on it can receive, and die: whoever reaps it waits for the lock.
        connection.table.add_connection();
        let mut hooked = connection.hooked.lock();
        match connection.socket.hook(memory, connection.clone()) {
            Ok(hook) => *hooked = Some(hook),
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
    /// Makes a connection for a socket, which [`Prepared::take_socket()`] takes over. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn prepare(index: u16, table: Arc<Table>, socket: Socket) -> Result<Prepared> {
        let memory = HookMemory::new()?;
        let sending = Sending::new()?;
        let receive = Receive::new()?;
        let connection = Arc::pin_init(
            pin_init!(Connection {
                index,
                table,
                socket,
                state: Atomic::new(ALIVE),
                traffic: Traffic::new(),
                reaped <- Completion::new(),
                hooked <- new_mutex!(None),
                sending <- sending,
                receive: TryLock::new(receive),
                receive_work <- new_work!("rnbd::receive"),
                transmit_work <- new_work!("rnbd::transmit"),
                link_dead_work <- new_work!("rnbd::link_dead"),
                retry_work <- new_delayed_work!("rnbd::retry"),
            }),
            GFP_KERNEL,
        )?;
        Ok(Prepared { connection, memory })
    }

    /// Starts to receive: what came in before there was a callback too.
    pub(crate) fn start_receiving(self: ArcBorrow<'_, Self>) {
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

    /// What has gone over it.
    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Writes its state and what has gone over it, as `name=value` pairs.
    pub(crate) fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_alive() {
            "state=alive "
        } else {
            "state=dead "
        })?;
        self.traffic.describe(f)
    }

    /// Waits until it has been cleared away. It must have been declared dead. May sleep.
    pub(crate) fn wait_reaped(&self) {
        self.reaped.wait_for_completion();
    }

    /// Declares the connection dead, and ends its socket (`nbd_mark_nsock_dead()`). What is in flight on
    /// it is given back soon after, but not before: it may be sent again elsewhere or be reported as
    /// failed, so nothing of it may leave the socket afterwards. User space is told, unless it wanted the
    /// session to end. May sleep.
    pub(crate) fn mark_dead(self: ArcBorrow<'_, Self>) {
        if self.state.cmpxchg(ALIVE, ENDING, Full).is_err() {
            return;
        }
        if !self.table.fate.snapshot().is_end_wanted() {
            self.queue_link_dead();
        }
        self.end_socket();
    }

    /// As [`Self::mark_dead()`], for a connection that user space replaces, and therefore need not be told of.
    pub(crate) fn mark_dead_for_replacement(self: ArcBorrow<'_, Self>) {
        if self.state.cmpxchg(ALIVE, ENDING, Full).is_ok() {
            self.end_socket();
        }
    }

    /// The rest of a death, for whoever has declared it.
    fn end_socket(self: ArcBorrow<'_, Self>) {
        // Where nothing is owed a disconnect may be on its way, which is still to be delivered.
        let ending = if self.nothing_outstanding() {
            Ending::Polite
        } else {
            Ending::Reset
        };
        self.socket.end(ending);
        self.state.store(ENDED, Release);
        self.queue_receive();
    }

    /// Tells user space, soon, that the connection is dead.
    pub(crate) fn queue_link_dead(self: ArcBorrow<'_, Self>) {
        let _ = self.table.shared.slow.enqueue::<Arc<Self>, 3>(self.into());
    }

    fn queue_receive(self: ArcBorrow<'_, Self>) {
        // Where it is queued already it will see whatever we have seen.
        let _ = self.table.shared.io.enqueue::<Arc<Self>, 1>(self.into());
    }

    /// Runs `receive`, unless somebody receives just now, who then looks again. Has the work item go on
    /// where it leaves something, or somebody else was turned away meanwhile.
    fn try_receive(self: ArcBorrow<'_, Self>, receive: impl FnOnce(&mut Receive) -> bool) {
        if let Some((left, contended)) = self.receive.try_with(receive) {
            if left || contended {
                self.queue_receive();
            }
        }
    }

    /// The work item. Also after the connection was declared dead, so that replies that are already
    /// here count.
    fn receive_work(self: ArcBorrow<'_, Self>) {
        for _ in 0..ROUNDS {
            if self.state.load(Acquire) == REAPED {
                return;
            }
            let received = |receive: &mut _| self.receive_or_reap(receive);
            match self.receive.try_with(received) {
                // Who receives just now has this queued again.
                None => return,
                Some((true, _)) => break,
                Some((false, true)) => {}
                Some((false, false)) => return,
            }
        }
        self.queue_receive();
    }

    /// Returns whether something is left.
    fn receive_or_reap(self: ArcBorrow<'_, Self>, receive: &mut Receive) -> bool {
        match self.receive_up_to(receive, WORKER_CALLS, usize::MAX) {
            Ok(true) => return true,
            Ok(false) => {}
            Err(e) => {
                self.receive_failed(e);
                self.mark_dead();
            }
        }
        if self.state.cmpxchg(ENDED, REAPED, Full).is_ok() {
            self.reap(receive);
        }
        false
    }

    /// Clears the connection away: stops the callbacks, and gives back all that it holds. Runs once.
    fn reap(&self, receive: &mut Receive) {
        let mut hooked = self.hooked.lock().take();
        if let Some(hooked) = &mut hooked {
            hooked.stop();
        }
        if let Some(payload) = receive.current.take() {
            payload
                .into_side()
                .finish(self.table.lost_command_outcome());
        }
        self.give_back_unsent();
        // Nobody sends any more: the socket is anybody's.
        drop(hooked);
        self.table.reclaim(self.index);
        self.table.remove_connection();
        self.reaped.complete_all();
    }
}
