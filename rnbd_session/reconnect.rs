// SPDX-License-Identifier: GPL-2.0
//! Replaces connections that are dead or stuck.

#![forbid(unsafe_code)]

use super::{
    Place,
    Session, //
};
use crate::{
    kapi::{
        block::disk::DiskRef,
        errno::ENOTCONN,
        net::sock::Socket,
        task, //
    },
    rnbd_events::{
        Death,
        Event,
        Notice,
        Reason, //
    },
    rnbd_sock::{
        Connection,
        Position, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Relaxed,
            Release, //
        },
        Arc, //
    },
    types::ScopeGuard, //
};

impl Place {
    /// Returns the position of a connection that takes this place when its connection was reaped.
    pub(super) fn next_position(&self) -> Position {
        let connection = &self.connection;
        Position {
            index: connection.index(),
            id: connection.id(),
            reconnects: connection.incarnation().reconnects.saturating_add(1),
        }
    }
}

impl Session {
    /// Replaces a dead connection by one over `socket` (`nbd_genl_reconnect_sock_cb()`).
    ///
    /// If no connection is dead, replaces one whose server is shutting down. Its commands in flight
    /// are given back. If there is none either and `stuck_jiffies` is not 0, replaces one whose server
    /// has not replied, or not read, for that long. Returns false if there is nothing to replace.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: the socket is in use by another device or by another part of the kernel.
    /// - `ENOTCONN`: the socket is not connected.
    ///
    ///   After either a stuck connection was kept, unless somebody took or shut down the socket at
    ///   this very moment; then user space is told that the connection is dead.
    /// - `EINVAL`: `disk` is not the session's.
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn reconnect(
        &self,
        disk: &DiskRef,
        socket: &Socket,
        stuck_jiffies: usize,
    ) -> Result<bool> {
        let origin = &self.table.origin;
        let notice = || task::memalloc_noio(|| Notice::new(origin));
        let (reconnected, ended) = (notice()?, notice()?);
        let (mut connections, index, prepared) = loop {
            let places = self.connections.lock();
            let Some(index) = Self::find_replaceable(&places, stuck_jiffies) else {
                return Ok(false);
            };
            let position = places.get(index).ok_or(EINVAL)?.next_position();
            drop(places);
            // Memory is allocated before a connection that still works is shut down, and without
            // the lock, which the timeout handler takes. The allocations must not wait for
            // writeback, which may be waiting for this very connection.
            let prepared = task::memalloc_noio(|| {
                Connection::prepare(position, self.table.clone(), socket.clone())
            })?;
            let connections = self.connections.lock();
            // Meanwhile a stuck connection may have recovered, or another one may have died.
            if Self::find_replaceable(&connections, stuck_jiffies) == Some(index) {
                break (connections, index, prepared);
            }
        };
        // Requests stop waiting for the new connection even if this fails.
        let _replaced = ScopeGuard::new(|| self.replacing.store(false, Release));
        let places = connections.get_mut(index).zip(self.slots.get(index));
        let (place, slot) = places.ok_or(EINVAL)?;
        let unreported = self.end_usable(&place.connection, socket)?;
        // The new connection has the same index as the old one, so nothing may be in flight under
        // it.
        place.connection.wait_reaped();
        let end_was_wanted = self.table.fate.snapshot().is_end_wanted();
        let new = task::memalloc_noio(|| prepared.take_socket());
        let new = new.and_then(|new| {
            let failed = Death::of(Reason::ReplacementFailed);
            slot.replace(disk, new.clone())
                .inspect_err(|_| new.as_arc_borrow().mark_dead(failed))?;
            Ok(new)
        });
        let new = new.inspect_err(|_| {
            if unreported {
                // It is lost after all.
                let old = place.connection.as_arc_borrow();
                old.queue_link_dead();
                old.change_death(Death::of(Reason::ReplacementFailed));
                old.report_death();
            }
        })?;
        if unreported {
            place.connection.report_death();
        }
        place.connection = new.clone();
        self.waiting_since.store(0, Relaxed);
        // This comes last: a request that sees the session revived also finds the new connection,
        // and waits again if that has died by then.
        self.table.fate.revive();
        if end_was_wanted && !new.is_alive() && !self.table.fate.snapshot().is_end_wanted() {
            // It has died while the user wanted the session to end, so it was not reported.
            new.as_arc_borrow().queue_link_dead();
            new.report_death();
        }
        new.trace_replacement(c"reconnect");
        let news = (reconnected, Event::Reconnected(new.incarnation()));
        self.table.will_report_end(Some(news), ended);
        new.as_arc_borrow().announce();
        new.as_arc_borrow().start_receiving();
        drop(connections);
        disk.run_queues();
        pr_info!("nbd{}: reconnected socket\n", self.table.device);
        Ok(true)
    }

    /// Returns the index of the connection to replace: the first dead one, or else the first that
    /// drains, or else the one that has been stuck longest and for at least `stuck_jiffies`, unless
    /// that is 0.
    fn find_replaceable(places: &[Place], stuck_jiffies: usize) -> Option<usize> {
        let dead = places.iter().position(|place| place.connection.is_dead());
        let unused = || places.iter().position(|p| !p.connection.is_alive());
        let unused = dead.or_else(unused);
        if unused.is_some() || stuck_jiffies == 0 {
            return unused;
        }
        let stuck = |place: &Place| place.connection.stuck_jiffies();
        let by_time = places.iter().map(stuck).enumerate();
        let longest = by_time.max_by_key(|(_, jiffies)| *jiffies);
        let (index, _) = longest.filter(|(_, jiffies)| *jiffies >= stuck_jiffies)?;
        Some(index)
    }

    /// Marks a connection as dead that is stuck or drains, and is to be replaced by one over `socket`.
    /// Returns whether its death is still to be reported if that fails.
    ///
    /// # Errors
    ///
    /// `EBUSY` and `ENOTCONN`: `socket` cannot be used, and the connection was kept.
    fn end_usable(&self, connection: &Arc<Connection>, socket: &Socket) -> Result<bool> {
        if connection.is_dead() {
            return Ok(false);
        }
        // A connection that may still work is not shut down for a socket that cannot be used.
        if socket.is_hooked() {
            return Err(EBUSY);
        }
        if !socket.is_connected() {
            pr_err!(
                "nbd{}: the socket to replace connection {} is not connected\n",
                self.table.device,
                connection.index()
            );
            return Err(ENOTCONN.into());
        }
        if connection.is_alive() {
            pr_warn!(
                "nbd{}: connection {}: stuck for {} seconds, replacing it\n",
                self.table.device,
                connection.index(),
                connection.stuck_jiffies() / task::HZ as usize
            );
        }
        self.replacing.store(true, Release);
        Ok(connection.as_arc_borrow().mark_dead_for_replacement())
    }
}
