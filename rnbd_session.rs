// SPDX-License-Identifier: GPL-2.0
//! One configured export that is connected: its connections, and how commands are spread over them.
//! (The part of nbd.c's `nbd_config` that the data path needs.)

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        disk::DiskRef,
        mq::{
            Dispatch, Expired, Extent, NewRequest, Op, Outcome, Overdue, Queued, Status,
            Unanswered, Unsent,
        },
        published::Dispatched,
        sock::Socket,
        task,
    },
    pure::fate::{Exhausted, Seen},
    pure::proto::flags,
    rnbd_shared::Shared,
    rnbd_sock::Connection,
    rnbd_table::Table,
    rnbd_translate::{command_of, Described},
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        Arc, ArcBorrow, Mutex,
    },
    types::ScopeGuard,
};

/// How often requests that wait for a connection check whether `dead_conn_timeout` is over. A connection
/// that comes back runs the queues at once.
const LOOK_AGAIN_MS: u32 = 100;

/// Reads from this size on are sent at once: to send one alone costs little beside its data, less than
/// to have a worker woken up for it.
const LONG_READ_BYTES: u32 = 64 << 10;

/// See the module's documentation.
#[pin_data]
pub(crate) struct Session {
    table: Arc<Table>,
    /// The connections, as dispatches see them.
    slots: KVec<Dispatched<Connection>>,
    /// The connections, for everybody else, and how often each was put in a dead one's place.
    #[pin]
    connections: Mutex<KVec<Owned>>,
    /// `NBD_FLAG_*`.
    flags: u32,
    /// How long requests wait for a dead connection to come back, in jiffies (`dead_conn_timeout`).
    dead_timeout_jiffies: Atomic<u64>,
    /// Since when requests have been waiting, in jiffies with the lowest bit set; 0: none waits.
    waiting_since: Atomic<usize>,
    /// A connection that was stuck is being replaced: requests wait for the new one.
    replacing: Atomic<bool>,
}

/// A place of the session: its connection, and how many have been there before.
struct Owned {
    connection: Arc<Connection>,
    reconnects: u32,
}

/// How a session is to be.
pub(crate) struct Options {
    /// The device's index.
    pub(crate) device: u32,
    /// What all devices share.
    pub(crate) shared: Shared,
    /// The device's hardware queues, and the tags of each.
    pub(crate) hw_queues: u32,
    pub(crate) depth: u32,
    /// `NBD_FLAG_*`.
    pub(crate) flags: u32,
    /// How long a request may take; 0: for ever.
    pub(crate) timeout_jiffies: u32,
    /// How long requests wait for a dead connection to come back.
    pub(crate) dead_timeout_jiffies: u64,
}

/// A command's place in the table.
#[derive(Clone, Copy)]
struct Place {
    hw_queue: u32,
    tag: u32,
}

impl Session {
    /// Takes the sockets over. The first ones have a hardware queue each; the others, where there are
    /// more than the block layer makes queues for, stand by. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where a socket is in use elsewhere, `ENOMEM`.
    pub(crate) fn new(disk: &DiskRef, sockets: &[Socket], options: Options) -> Result<Arc<Self>> {
        let table = Table::new(
            options.device,
            options.shared,
            options.hw_queues,
            options.depth,
            options.timeout_jiffies,
        )?;
        let mut connections = KVec::with_capacity(sockets.len(), GFP_KERNEL)?;
        let session = Self::connect(&table, sockets, &mut connections).and_then(|()| {
            let mut slots = KVec::with_capacity(connections.len(), GFP_KERNEL)?;
            let mut owners = KVec::with_capacity(connections.len(), GFP_KERNEL)?;
            for connection in &connections {
                slots.push(disk.dispatched(connection.clone()), GFP_KERNEL)?;
                let owned = Owned {
                    connection: connection.clone(),
                    reconnects: 0,
                };
                owners.push(owned, GFP_KERNEL)?;
            }
            let table = table.clone();
            Arc::pin_init(
                pin_init!(Session {
                    table,
                    slots,
                    connections <- new_mutex!(owners),
                    flags: options.flags,
                    dead_timeout_jiffies: Atomic::new(options.dead_timeout_jiffies),
                    waiting_since: Atomic::new(0),
                    replacing: Atomic::new(false),
                }),
                GFP_KERNEL,
            )
        });
        session.inspect_err(|_| {
            table.fate.end();
            for connection in &connections {
                connection.as_arc_borrow().die();
            }
            table.wait_gone();
        })
    }

    fn connect(
        table: &Arc<Table>,
        sockets: &[Socket],
        connections: &mut KVec<Arc<Connection>>,
    ) -> Result {
        for (index, socket) in sockets.iter().enumerate() {
            let index = u16::try_from(index).map_err(|_| EINVAL)?;
            // There is room, so what was made is never lost.
            let prepared = Connection::prepare(index, table.clone(), socket.clone())?;
            connections.push(prepared.take_socket()?, GFP_KERNEL)?;
        }
        Ok(())
    }

    /// Starts to receive. May sleep.
    pub(crate) fn begin(&self) {
        for owned in &*self.connections.lock() {
            owned.connection.as_arc_borrow().begin();
        }
    }

    /// What all connections share.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Sends a disconnect on every connection. May sleep.
    pub(crate) fn say_goodbye(&self) {
        self.table.fate.request_disconnect();
        for owned in &*self.connections.lock() {
            owned.connection.as_arc_borrow().say_goodbye();
        }
    }

    /// Ends all connections; what is in flight fails (`sock_shutdown()`). Returns when all of it has
    /// failed. May sleep.
    pub(crate) fn end(&self) {
        if self.table.fate.end() {
            pr_warn!("nbd{}: shutting down sockets\n", self.table.device);
        }
        for owned in &*self.connections.lock() {
            owned.connection.as_arc_borrow().die();
        }
        self.table.wait_gone();
    }

    /// Puts a socket in the place of a dead connection (`nbd_genl_reconnect_sock_cb()`), or else of one
    /// that has owed replies for `stuck_jiffies` and sent nothing, where that is not 0. Returns whether
    /// there was one. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where the socket is in use elsewhere, `ENOTCONN` where it is not connected, `ENODEV` where the
    /// module is about to go, `ENOMEM`.
    pub(crate) fn reconnect(
        &self,
        disk: &DiskRef,
        socket: &Socket,
        stuck_jiffies: usize,
    ) -> Result<bool> {
        let mut connections = self.connections.lock();
        // Whatever comes of it, nobody waits any longer.
        let _replaced = ScopeGuard::new(|| self.replacing.store(false, Release));
        let Some(index) = Self::replaceable(&connections, stuck_jiffies) else {
            return Ok(false);
        };
        let places = connections.get_mut(index).zip(self.slots.get(index));
        let (place, slot) = places.ok_or(EINVAL)?;
        let number = place.connection.index();
        // Before anything ends that works. What an allocation would have written out to make room may wait
        // for this very connection.
        let prepared =
            task::without_io(|| Connection::prepare(number, self.table.clone(), socket.clone()))?;
        self.end_stuck(&place.connection, socket)?;
        // The new one has the old one's number: nothing may be in flight under it.
        place.connection.wait_reaped();
        let was_over = self.table.fate.see().is_end_wanted();
        let new = task::without_io(|| prepared.take_socket())?;
        slot.replace(disk, new.clone())
            .inspect_err(|_| new.as_arc_borrow().die())?;
        place.connection = new.clone();
        place.reconnects = place.reconnects.saturating_add(1);
        self.waiting_since.store(0, Relaxed);
        // After that: who sees that something has come back finds it, and waits anew where it has died.
        self.table.fate.revive();
        if was_over && !new.is_alive() && !self.table.fate.see().is_end_wanted() {
            // It has died while nobody was to be told of that.
            new.as_arc_borrow().queue_link_dead();
        }
        new.as_arc_borrow().begin();
        drop(connections);
        disk.run_queues();
        pr_info!("nbd{}: reconnected socket\n", self.table.device);
        Ok(true)
    }

    /// Which place a new connection is put into: the first whose connection is dead, or else that of the
    /// one that has been stuck longest, and at least for `stuck_jiffies`, where that is not 0.
    fn replaceable(places: &[Owned], stuck_jiffies: usize) -> Option<usize> {
        let dead = places.iter().position(|place| !place.connection.is_alive());
        if dead.is_some() || stuck_jiffies == 0 {
            return dead;
        }
        let stuck = |place: &Owned| place.connection.traffic().stuck_jiffies();
        let by_time = places.iter().map(stuck).enumerate();
        let longest = by_time.max_by_key(|(_, jiffies)| *jiffies);
        let (index, _) = longest.filter(|(_, jiffies)| *jiffies >= stuck_jiffies)?;
        Some(index)
    }

    /// Declares `connection` dead, if it is not, since it is stuck. `socket` is to come in its place.
    fn end_stuck(&self, connection: &Arc<Connection>, socket: &Socket) -> Result {
        if !connection.is_alive() {
            return Ok(());
        }
        // Nothing that works is ended for a socket that cannot be used.
        if socket.is_hooked() {
            return Err(EBUSY);
        }
        if !socket.is_connected() {
            pr_err!(
                "nbd{}: the socket to replace a stuck connection is not connected\n",
                self.table.device
            );
            return Err(ENOTCONN);
        }
        pr_warn!(
            "nbd{}: connection {}: stuck for {} seconds, replacing it\n",
            self.table.device,
            connection.index(),
            connection.traffic().stuck_jiffies() / task::HZ as usize
        );
        self.replacing.store(true, Release);
        connection.as_arc_borrow().die_replaced();
        Ok(())
    }

    /// Writes a line for each connection: its number, and `name=value` pairs.
    pub(crate) fn describe_connections(
        &self,
        f: &mut kernel::fmt::Formatter<'_>,
    ) -> kernel::fmt::Result {
        for owned in &*self.connections.lock() {
            write!(f, "{} ", owned.connection.index())?;
            owned.connection.describe(f)?;
            writeln!(f, " reconnects={}", owned.reconnects)?;
        }
        Ok(())
    }

    /// Sets how long requests wait for a dead connection to come back.
    pub(crate) fn set_dead_timeout_jiffies(&self, jiffies: u64) {
        self.dead_timeout_jiffies.store(jiffies, Relaxed);
    }

    /// `nbd_queue_rq()`: puts a request in flight. May sleep.
    pub(crate) fn queue_rq(&self, cx: &Dispatch<'_>, rq: NewRequest, last: bool) -> Queued {
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
        let place = Place {
            hw_queue: cx.hw_queue(),
            tag: rq.tag(),
        };
        let urgent = is_long_read(&extent);
        let (transmit, other, queued) = rq.start();
        self.dispatch(cx, connection, place, (transmit, other), last, urgent);
        queued
    }

    /// Hands a request to a connection; to another one where that has just died.
    fn dispatch<'a>(
        &'a self,
        cx: &'a Dispatch<'_>,
        mut connection: ArcBorrow<'a, Connection>,
        place: Place,
        (mut transmit, mut other): (Unsent, Unanswered),
        last: bool,
        urgent: bool,
    ) {
        let Some(slot) = self.table.slot(place.hw_queue, place.tag) else {
            // There is a slot for every tag of every queue, so this cannot be; both handles go, and
            // the request fails.
            return;
        };
        loop {
            let generation = slot.start(connection.index(), other);
            let Err(back) = connection.push(transmit) else {
                // `commit_rqs` names the hardware queue, which is another connection's here.
                if last || u32::from(connection.index()) != place.hw_queue {
                    connection.kick(urgent);
                }
                return;
            };
            transmit = back;
            // It has died since it was picked.
            let Ok(ours) = slot.claim(generation, connection.index()) else {
                // It has given the command back. What was not sent was not done, whatever a reply
                // that came first may say.
                transmit.overrule(Outcome::Requeue);
                return;
            };
            other = ours;
            match self.pick(cx, self.table.fate.see()) {
                Some(next) => connection = next,
                None => {
                    // It was started, so it cannot be left to the block layer: once around.
                    other.decide(Outcome::Requeue);
                    return;
                }
            }
        }
    }

    /// `nbd_commit_rqs`: what was queued without a `last` is sent. May sleep.
    pub(crate) fn commit_rqs(&self, cx: &Dispatch<'_>) {
        if let Some(connection) = self.connection(cx, cx.hw_queue() as usize) {
            connection.kick(false);
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
            let fate = self.table.fate.see();
            if let Some(connection) = self.pick(cx, fate) {
                return Ok(connection);
            }
            if let Some(status) = self.wait_or_fail(cx, fate) {
                return Err(status);
            }
        }
    }

    /// The hardware queue's own connection, or one that lives (`find_fallback()`).
    fn pick<'a>(&'a self, cx: &'a Dispatch<'_>, fate: Seen) -> Option<ArcBorrow<'a, Connection>> {
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
    fn wait_or_fail(&self, cx: &Dispatch<'_>, fate: Seen) -> Option<Status> {
        let waits = self.replacing.load(Acquire) || (!fate.is_disconnected() && self.is_patient());
        if waits {
            cx.run_again(LOOK_AGAIN_MS);
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
    fn is_patient(&self) -> bool {
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

    /// `nbd_xmit_timeout()`: a request's time is up. May sleep.
    pub(crate) fn timeout(&self, rq: Overdue<'_>) -> Expired {
        let (hw_queue, tag) = rq.tag();
        let Some(slot) = self.table.slot(hw_queue, tag) else {
            return Expired::Waits;
        };
        // Before the slot is looked at: a connection is replaced with the lock held and after its commands
        // were given back, so that the one in the place is the one that the slot names.
        let connections = self.connections.lock();
        let (index, unclaimed) = slot.status();
        let count = connections.len();
        let Some(place) = connections.get(usize::from(index)) else {
            return Expired::Waits;
        };
        let connection = place.connection.clone();
        drop(connections);
        if !unclaimed && connection.traffic().idle_jiffies() < rq.timeout_jiffies() as usize {
            // Its data is coming in, or it is just ending.
            return Expired::Waits;
        }
        if count == 1 && self.table.timeout_jiffies() == 0 {
            self.warn_of_stuck(&rq, &connection);
            return Expired::Waits;
        }
        if connection.is_alive() && self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {} timed out, retrying ({}/{} alive)\n",
                self.table.device,
                index,
                self.table.connections_alive().saturating_sub(1),
                count
            );
        }
        // Whoever clears the connection away gives this request back too.
        connection.as_arc_borrow().die();
        Expired::Ends
    }

    fn warn_of_stuck(&self, rq: &Overdue<'_>, connection: &Connection) {
        if !self.table.log.allow() {
            return;
        }
        pr_info!(
            "nbd{}: possible stuck request: {}; nothing came from the server for {} seconds\n",
            self.table.device,
            Described(&rq.extent()),
            connection.traffic().idle_jiffies() / task::HZ as usize
        );
    }
}

fn is_long_read(extent: &Extent) -> bool {
    extent.op == Op::Read && extent.len_bytes >= LONG_READ_BYTES
}
