// SPDX-License-Identifier: GPL-2.0
//! One configured export that is connected: its connections, and how commands are spread over them.
//! (The part of nbd.c's `nbd_config` that the data path needs.)

#![forbid(unsafe_code)]

mod dispatch;
mod reconnect;
mod timeout;

use crate::{
    kapi::{
        block::{
            disk::DiskRef,
            published::Dispatched, //
        },
        net::sock::Socket, //
    },
    rnbd_shared::Shared,
    rnbd_sock::Connection,
    rnbd_table::Table, //
};
use kernel::{
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
};

/// See the module's documentation.
#[pin_data]
pub(crate) struct Session {
    table: Arc<Table>,
    /// The connections, as dispatches see them.
    slots: KVec<Dispatched<Connection>>,
    /// The connections, for everybody else, and how often each was put in a dead one's place.
    #[pin]
    connections: Mutex<KVec<Place>>,
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
struct Place {
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
            let mut places = KVec::with_capacity(connections.len(), GFP_KERNEL)?;
            for connection in &connections {
                slots.push(disk.dispatched(connection.clone()), GFP_KERNEL)?;
                let place = Place {
                    connection: connection.clone(),
                    reconnects: 0,
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
                connection.as_arc_borrow().mark_dead();
            }
            table.wait_all_reaped();
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
    pub(crate) fn start_receiving(&self) {
        for place in &*self.connections.lock() {
            place.connection.as_arc_borrow().start_receiving();
        }
    }

    /// What all connections share.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Sends a disconnect on every connection. May sleep.
    pub(crate) fn send_disconnect(&self) {
        self.table.fate.request_disconnect();
        for place in &*self.connections.lock() {
            place.connection.as_arc_borrow().send_disconnect();
        }
    }

    /// Ends all connections; what is in flight fails (`sock_shutdown()`). Returns when all of it has
    /// failed. May sleep.
    pub(crate) fn end(&self) {
        if self.table.fate.end() {
            pr_warn!("nbd{}: shutting down sockets\n", self.table.device);
        }
        for place in &*self.connections.lock() {
            place.connection.as_arc_borrow().mark_dead();
        }
        self.table.wait_all_reaped();
    }

    /// Writes a line for each connection: its number, and `name=value` pairs.
    pub(crate) fn describe_connections(
        &self,
        f: &mut kernel::fmt::Formatter<'_>,
    ) -> kernel::fmt::Result {
        for place in &*self.connections.lock() {
            write!(f, "{} ", place.connection.index())?;
            place.connection.describe(f)?;
            writeln!(f, " reconnects={}", place.reconnects)?;
        }
        Ok(())
    }

    /// Sets how long requests wait for a dead connection to come back.
    pub(crate) fn set_dead_timeout_jiffies(&self, jiffies: u64) {
        self.dead_timeout_jiffies.store(jiffies, Relaxed);
    }
}
