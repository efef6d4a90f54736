// SPDX-License-Identifier: GPL-2.0
//! A session: the connections of a device that was started (nbd.c's `nbd_config`, as far as the
//! data path uses it).

#![forbid(unsafe_code)]

mod dispatch;
pub(crate) mod handover;
mod reconnect;
mod retiring;
mod timeout;

use crate::{
    kapi::{
        block::{
            disk::DiskRef,
            published::Dispatched, //
        },
        net::sock::Socket, //
    },
    rnbd_events::{
        Connected,
        Death,
        Event,
        Notice,
        Origin,
        Reason, //
    },
    rnbd_shared::Shared,
    rnbd_sock::{
        Connection,
        Position, //
    },
    rnbd_table::{
        Structured,
        Table, //
    }, //
};
use kernel::{
    new_delayed_work,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    },
    workqueue::DelayedWork, //
};
use retiring::Retiring;

/// A session. It exists from the start of a device to the last put of its configuration.
#[pin_data]
pub(crate) struct Session {
    table: Arc<Table>,
    /// The connections, as `queue_rq` and `commit_rqs` read them.
    slots: KVec<Dispatched<Connection>>,
    /// The connections, for everything else. They are the same ones.
    #[pin]
    connections: Mutex<KVec<Place>>,
    /// The server's transmission flags (`NBD_FLAG_*`).
    flags: u32,
    /// A program waits in `NBD_DO_IT` until the last connection was reaped, and only that starts the session again.
    by_ioctl: bool,
    /// The time in jiffies for which requests wait for a new connection (`dead_conn_timeout`).
    dead_timeout_jiffies: Atomic<u64>,
    /// The time in jiffies, with the lowest bit set, since which requests have been waiting for a
    /// connection; 0 if none waits.
    waiting_since: Atomic<usize>,
    /// A stuck connection is being replaced, and requests wait for the new one.
    replacing: Atomic<bool>,
    #[pin]
    retire_work: DelayedWork<Session, 1>,
}

/// A place for a connection.
struct Place {
    connection: Arc<Connection>,
    /// The connection that was replaced by a handover, until some time after it was reaped.
    retiring: Option<Retiring>,
}

impl Place {
    /// Returns the connection that a handover has replaced here, unless it was reaped.
    fn retiring(&self) -> Option<&Arc<Connection>> {
        let retiring = self.retiring.as_ref().map(|r| &r.connection);
        retiring.filter(|connection| !connection.is_reaped())
    }

    /// Returns the connections that have this place.
    fn all(&self) -> impl Iterator<Item = &Arc<Connection>> {
        let retiring = self.retiring();
        Iterator::chain(core::iter::once(&self.connection), retiring)
    }
}

/// The parameters of a session.
pub(crate) struct Options {
    /// Whom events are for, and what they say of the session.
    pub(crate) origin: Arc<Origin>,
    /// The resources that all devices share.
    pub(crate) shared: Shared,
    /// The number of hardware queues, and the number of tags of each.
    pub(crate) hw_queues: u32,
    pub(crate) depth: u32,
    /// The server's transmission flags (`NBD_FLAG_*`).
    pub(crate) flags: u32,
    /// Whether the server sends structured replies.
    pub(crate) structured: Structured,
    /// `NBD_DO_IT` starts the session.
    pub(crate) by_ioctl: bool,
    /// The request timeout in jiffies, 0 if none is set.
    pub(crate) timeout_jiffies: u32,
    /// The time in jiffies for which requests wait for a new connection (`dead_conn_timeout`).
    pub(crate) dead_timeout_jiffies: u64,
}

impl Session {
    /// Takes the sockets over.
    ///
    /// Each hardware queue uses the connection of the same index. If there are more sockets than
    /// hardware queues, because the block layer limits the latter to the number of CPUs, the others
    /// are spares.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: a socket is in use by another device or by another part of the kernel.
    /// - `ENOTCONN`: a socket is not connected, and never was.
    /// - `EINVAL`: there are more sockets than the table can number.
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(disk: &DiskRef, sockets: &[Socket], options: Options) -> Result<Arc<Self>> {
        let table = Table::new(
            options.origin,
            options.shared,
            options.hw_queues,
            options.depth,
            options.timeout_jiffies,
            options.structured,
        )?;
        let mut connections = KVec::with_capacity(sockets.len(), GFP_KERNEL)?;
        let session = Self::connect(&table, sockets, &mut connections).and_then(|()| {
            let mut slots = KVec::with_capacity(connections.len(), GFP_KERNEL)?;
            let mut places = KVec::with_capacity(connections.len(), GFP_KERNEL)?;
            for connection in &connections {
                slots.push(disk.dispatched(connection.clone()), GFP_KERNEL)?;
                let place = Place {
                    connection: connection.clone(),
                    retiring: None,
                };
                places.push(place, GFP_KERNEL)?;
            }
            let table = table.clone();
            Arc::pin_init(
                pin_init!(Session {
                    table,
                    slots,
                    connections <- new_mutex!(places),
                    flags: options.flags,
                    by_ioctl: options.by_ioctl,
                    dead_timeout_jiffies: Atomic::new(options.dead_timeout_jiffies),
                    waiting_since: Atomic::new(0),
                    replacing: Atomic::new(false),
                    retire_work <- new_delayed_work!("rnbd::retire"),
                }),
                GFP_KERNEL,
            )
        });
        session.inspect_err(|_| {
            table.fate.end();
            for connection in &connections {
                let ended = Death::of(Reason::Ended);
                connection.as_arc_borrow().mark_dead(ended);
            }
            table.wait_all_reaped();
        })
    }

    /// Takes over each socket, and appends its connection to `connections`. The errors are those of
    /// [`Self::new()`].
    fn connect(
        table: &Arc<Table>,
        sockets: &[Socket],
        connections: &mut KVec<Arc<Connection>>,
    ) -> Result {
        for (index, socket) in sockets.iter().enumerate() {
            let index = u16::try_from(index).map_err(|_| EINVAL)?;
            let position = Position {
                index,
                id: index,
                reconnects: 0,
            };
            // There is room in the vector, so a connection that was made is never lost.
            let prepared = Connection::prepare(position, table.clone(), socket.clone())?;
            connections.push(prepared.take_socket()?, GFP_KERNEL)?;
        }
        Ok(())
    }

    /// Makes all connections receive.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn start_receiving(&self) {
        for place in &*self.connections.lock() {
            place.connection.as_arc_borrow().start_receiving();
        }
    }

    /// Has listeners told of the session, and from now on of the deaths of its connections and of its end. The
    /// notices are for its beginning and its end.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn announce(&self, connected: Connected, [begin, end]: [Notice; 2]) {
        let news = (begin, Event::Connected(connected));
        self.table.will_report_end(Some(news), end);
        for place in &*self.connections.lock() {
            place.connection.as_arc_borrow().announce();
        }
    }

    /// Returns the state that all connections share.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Returns whether requests can be sent now. The answer may be outdated immediately.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn is_served(&self) -> bool {
        let alive = |place: &Place| place.connection.is_alive();
        !self.table.fate.snapshot().is_over() && self.connections.lock().iter().any(alive)
    }

    /// Returns the server's transmission flags.
    pub(crate) fn flags(&self) -> u32 {
        self.flags
    }

    /// Sends a disconnect on each connection (`send_disconnects()`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn send_disconnect(&self) {
        self.table.fate.request_disconnect();
        for connection in self.connections.lock().iter().flat_map(Place::all) {
            connection.as_arc_borrow().send_disconnect();
        }
    }

    /// Shuts all connections down, and waits until all commands in flight have failed
    /// (`sock_shutdown()`). Requests that wait for a connection fail soon after.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn end(&self, disk: &DiskRef) {
        if self.table.fate.end() {
            pr_warn!("nbd{}: shutting down sockets\n", self.table.device);
        }
        for connection in self.connections.lock().iter().flat_map(Place::all) {
            let ended = Death::of(Reason::Ended);
            connection.as_arc_borrow().mark_dead(ended);
        }
        // A worker reaps each, and so does this task, which need not wait for a worker then.
        for index in 0..self.slots.len() {
            if let Some((connection, retiring)) = self.connections_at(index) {
                for connection in Iterator::chain(core::iter::once(&connection), &retiring) {
                    connection.as_arc_borrow().receive_work();
                }
            }
        }
        self.table.wait_all_reaped();
        self.table.report_end();
        // The block layer keeps the requests that wait, and would dispatch them up to 100 ms later. One
        // that it is dispatching right now may be kept that long all the same: only those of the work item
        // that reads the partition table can then meet the next session, and nobody uses what they read.
        disk.run_queues();
    }

    /// Returns the connection that has this index now, and the one that it has replaced by a handover, unless that
    /// was reaped.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn connections_at(
        &self,
        index: usize,
    ) -> Option<(Arc<Connection>, Option<Arc<Connection>>)> {
        let places = self.connections.lock();
        let place = places.get(index)?;
        Some((place.connection.clone(), place.retiring().cloned()))
    }

    /// Returns the number of connections, and how many of them are alive.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn count(&self) -> (usize, usize) {
        let connections = self.connections.lock();
        let alive = connections.iter().filter(|p| p.connection.is_alive());
        (connections.len(), alive.count())
    }

    /// Returns the time in jiffies for which requests wait for a new connection.
    pub(crate) fn dead_timeout_jiffies(&self) -> u64 {
        self.dead_timeout_jiffies.load(Relaxed)
    }

    /// Writes a line for each connection: its index, and `name=value` pairs.
    pub(crate) fn describe_connections(
        &self,
        f: &mut kernel::fmt::Formatter<'_>,
    ) -> kernel::fmt::Result {
        for connection in self.connections.lock().iter().flat_map(Place::all) {
            let incarnation = connection.incarnation();
            write!(f, "{} ", incarnation.index)?;
            connection.describe(f)?;
            writeln!(f, " reconnects={}", incarnation.reconnects)?;
        }
        Ok(())
    }

    /// Sets the time in jiffies for which requests wait for a new connection.
    pub(crate) fn set_dead_timeout_jiffies(&self, jiffies: u64) {
        self.dead_timeout_jiffies.store(jiffies, Relaxed);
    }
}
