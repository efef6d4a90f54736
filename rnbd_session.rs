// SPDX-License-Identifier: GPL-2.0
//! One configured export that is connected: its connections, and how commands are spread over them.
//! (The part of nbd.c's `nbd_config` that the data path needs.)

use crate::{
    kapi::{
        mq::{NewRequest, Overdue, Queued, Request, Status, Verdict},
        sock::{Ending, Socket},
        task,
    },
    rnbd_proto::{self as proto, flags},
    rnbd_sock::{command_of, Connection},
    rnbd_table::Table,
};
use kernel::{prelude::*, sync::Arc};

/// See the module's documentation.
pub(crate) struct Session {
    table: Arc<Table>,
    connections: KVec<Arc<Connection>>,
    /// `NBD_FLAG_*`.
    flags: u32,
}

/// The hardware queues of a device.
pub(crate) struct Queues {
    pub(crate) count: u32,
    /// Tags of each.
    pub(crate) depth: u32,
}

/// A command's place in the table.
#[derive(Clone, Copy)]
struct Place {
    hw_queue: u32,
    tag: u32,
}

impl Session {
    /// Takes the sockets over. The first ones have a hardware queue each; the others, where there are more
    /// than the block layer makes queues for, stand by. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where a socket is in use elsewhere, `ENOMEM`.
    pub(crate) fn new(
        device: u32,
        sockets: &[Socket],
        queues: Queues,
        flags: u32,
        timeout_jiffies: u32,
    ) -> Result<Arc<Self>> {
        let table = Table::new(device, queues.count, queues.depth, timeout_jiffies)?;
        let mut session = Session {
            table: table.clone(),
            connections: KVec::with_capacity(sockets.len(), GFP_KERNEL)?,
            flags,
        };
        for (index, socket) in sockets.iter().enumerate() {
            let connected = u16::try_from(index)
                .map_err(|_| EINVAL)
                .and_then(|index| Connection::new(index, table.clone(), socket.clone()))
                .and_then(|c| Ok(session.connections.push(c, GFP_KERNEL)?));
            if let Err(e) = connected {
                session.end(Ending::Polite);
                return Err(e);
            }
        }
        Ok(Arc::new(session, GFP_KERNEL)?)
    }

    /// Starts to receive.
    pub(crate) fn begin(&self) {
        for connection in &self.connections {
            connection.begin();
        }
    }

    /// What all connections share.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Sends a disconnect on every connection. May sleep.
    pub(crate) fn say_goodbye(&self) {
        self.table.request_disconnect();
        for connection in &self.connections {
            connection.say_goodbye();
        }
    }

    /// Ends all connections; what is in flight fails (`sock_shutdown()`). Returns when nothing of the
    /// session runs any more. May sleep.
    pub(crate) fn end(&self, ending: Ending) {
        self.shut_down(ending);
        self.table.wait_gone();
    }

    /// Declares all connections dead, and the session with them. May sleep.
    fn shut_down(&self, ending: Ending) {
        if self.table.mark_disconnected() {
            pr_warn!("nbd{}: shutting down sockets\n", self.table.device);
        }
        for connection in &self.connections {
            connection.die(ending);
        }
    }

    /// `nbd_queue_rq()`: puts a request in flight. May sleep.
    pub(crate) fn queue_rq(&self, hw_queue: u32, rq: NewRequest, last: bool) -> Queued {
        let extent = rq.extent();
        let Some(command) = command_of(extent.op) else {
            return rq.refuse(Status::IOERR);
        };
        if extent.op.is_write() && self.flags & flags::READ_ONLY != 0 {
            if self.table.log.allow() {
                pr_err!("nbd{}: write on read-only\n", self.table.device);
            }
            return rq.refuse(Status::IOERR);
        }
        let Some(connection) = self.pick(hw_queue) else {
            self.no_connection_left();
            return rq.refuse(Status::IOERR);
        };
        let mut wire = proto::Request {
            command,
            flags: 0,
            cookie: 0,
            offset_bytes: extent.offset_bytes,
            len_bytes: extent.len_bytes,
        };
        if extent.fua {
            wire.flags |= proto::CMD_FLAG_FUA;
        }
        if extent.nounmap && command == proto::Command::WriteZeroes {
            wire.flags |= proto::CMD_FLAG_NO_HOLE;
        }
        let place = Place {
            hw_queue,
            tag: rq.tag(),
        };
        let (transmit, other, queued) = rq.start();
        self.dispatch(connection, place, wire, transmit, other, last);
        queued
    }

    /// Hands a request to a connection; to another one where that has just died.
    fn dispatch<'a>(
        &'a self,
        mut connection: &'a Arc<Connection>,
        place: Place,
        mut wire: proto::Request,
        mut transmit: Request,
        mut other: Request,
        last: bool,
    ) {
        let Some(slot) = self.table.slot(place.hw_queue, place.tag) else {
            // There is a slot for every tag of every queue, so this cannot be; both handles go, and
            // the request fails.
            return;
        };
        loop {
            let generation = slot.start(connection.index(), other);
            wire.cookie = self.table.cookie(generation, place.hw_queue, place.tag).0;
            let Err(back) = connection.push(transmit, wire) else {
                // `commit_rqs` names the hardware queue, which is another connection's here.
                if last || u32::from(connection.index()) != place.hw_queue {
                    connection.kick();
                }
                return;
            };
            transmit = back;
            // It has died since it was picked. Where it has already given the command back we have
            // nothing to do but to let go.
            let Ok(ours) = slot.claim(generation, connection.index()) else {
                return;
            };
            other = ours;
            match self.pick(place.hw_queue) {
                Some(next) => connection = next,
                None => {
                    self.no_connection_left();
                    other.decide(Verdict::Complete(Status::IOERR));
                    return;
                }
            }
        }
    }

    /// `nbd_commit_rqs`: what was queued without a `last` is sent. May sleep.
    pub(crate) fn commit_rqs(&self, hw_queue: u32) {
        if let Some(connection) = self.connections.get(hw_queue as usize) {
            connection.kick();
        }
    }

    /// The hardware queue's own connection, or one that lives (`find_fallback()`).
    fn pick(&self, hw_queue: u32) -> Option<&Arc<Connection>> {
        if self.table.is_disconnected() && !self.table.is_disconnect_requested() {
            return None;
        }
        let own = self.connections.get(hw_queue as usize);
        if let Some(own) = own.filter(|c| c.is_alive()) {
            return Some(own);
        }
        self.connections.iter().find(|c| c.is_alive())
    }

    fn no_connection_left(&self) {
        let wanted = self.table.is_disconnect_requested();
        if self.table.mark_disconnected() && !wanted {
            pr_err!(
                "nbd{}: no connection left, I/O fails until the device is connected anew\n",
                self.table.device
            );
        }
    }

    /// `nbd_xmit_timeout()`: a request's time is up. May sleep.
    pub(crate) fn timeout(&self, rq: Overdue<'_>) {
        let (hw_queue, tag) = rq.tag();
        let Some(slot) = self.table.slot(hw_queue, tag) else {
            return;
        };
        let (index, unclaimed) = slot.status();
        let Some(connection) = self.connections.get(usize::from(index)) else {
            return;
        };
        if !unclaimed && connection.progressed_within(rq.timeout_jiffies()) {
            // Its data is coming in, or it is just ending.
            return;
        }
        if self.connections.len() == 1 && self.table.timeout_jiffies() == 0 {
            return self.warn_of_stuck(&rq, connection);
        }
        if connection.is_alive() && self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {} timed out, retrying ({}/{} alive)\n",
                self.table.device,
                index,
                self.table.connections_alive() - 1,
                self.connections.len()
            );
        }
        // Whoever clears the connection away gives this request back too. What the server has not
        // read must not reach it later: the request may have been written again by then.
        connection.die(Ending::Reset);
    }

    fn warn_of_stuck(&self, rq: &Overdue<'_>, connection: &Connection) {
        let extent = rq.extent();
        if self.table.log.allow() {
            pr_info!(
                "nbd{}: possible stuck request: {} of {} bytes at {}; the server has sent nothing for {} seconds\n",
                self.table.device,
                command_of(extent.op).map_or("request", proto::Command::name),
                extent.len_bytes,
                extent.offset_bytes,
                connection.idle_jiffies() / task::HZ as usize
            );
        }
    }
}
