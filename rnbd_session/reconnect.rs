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
        net::sock::Socket,
        task, //
    },
    rnbd_sock::Connection, //
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

impl Session {
    /// Replaces a dead connection by one over `socket` (`nbd_genl_reconnect_sock_cb()`).
    ///
    /// If no connection is dead and `stuck_jiffies` is not 0, replaces one whose server has owed
    /// replies, and sent nothing, for that long. Returns false if there is nothing to replace.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: the socket is in use by another device or by another part of the kernel.
    /// - `ENOTCONN`: the socket is not connected.
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
        let mut connections = self.connections.lock();
        // Requests stop waiting for the new connection even if this fails.
        let _replaced = ScopeGuard::new(|| self.replacing.store(false, Release));
        let Some(index) = Self::find_replaceable(&connections, stuck_jiffies) else {
            return Ok(false);
        };
        let places = connections.get_mut(index).zip(self.slots.get(index));
        let (place, slot) = places.ok_or(EINVAL)?;
        let number = place.connection.index();
        // Memory is allocated before a connection that still works is shut down. The allocations
        // must not wait for writeback, which may be waiting for this very connection.
        let prepared = task::memalloc_noio(|| {
            Connection::prepare(number, self.table.clone(), socket.clone())
        })?;
        self.end_stuck(&place.connection, socket)?;
        // The new connection has the same index as the old one, so nothing may be in flight under
        // it.
        place.connection.wait_reaped();
        let end_was_wanted = self.table.fate.snapshot().is_end_wanted();
        let new = task::memalloc_noio(|| prepared.take_socket())?;
        slot.replace(disk, new.clone())
            .inspect_err(|_| new.as_arc_borrow().mark_dead())?;
        place.connection = new.clone();
        place.reconnects = place.reconnects.saturating_add(1);
        self.waiting_since.store(0, Relaxed);
        // This comes last: a request that sees the session revived also finds the new connection,
        // and waits again if that has died by then.
        self.table.fate.revive();
        if end_was_wanted && !new.is_alive() && !self.table.fate.snapshot().is_end_wanted() {
            // It has died while the user wanted the session to end, so it was not reported.
            new.as_arc_borrow().queue_link_dead();
        }
        new.as_arc_borrow().start_receiving();
        drop(connections);
        disk.run_queues();
        pr_info!("nbd{}: reconnected socket\n", self.table.device);
        Ok(true)
    }

    /// Returns the index of the connection to replace: the first dead one, or else the one that has
    /// been stuck longest and for at least `stuck_jiffies`, unless that is 0.
    fn find_replaceable(places: &[Place], stuck_jiffies: usize) -> Option<usize> {
        let dead = places.iter().position(|place| !place.connection.is_alive());
        if dead.is_some() || stuck_jiffies == 0 {
            return dead;
        }
        let stuck = |place: &Place| place.connection.traffic().stuck_jiffies();
        let by_time = places.iter().map(stuck).enumerate();
        let longest = by_time.max_by_key(|(_, jiffies)| *jiffies);
        let (index, _) = longest.filter(|(_, jiffies)| *jiffies >= stuck_jiffies)?;
        Some(index)
    }

    /// Marks a stuck connection as dead, which is to be replaced by one over `socket`. Does nothing
    /// if it is dead already.
    ///
    /// # Errors
    ///
    /// `EBUSY` and `ENOTCONN`: `socket` cannot be used, and the stuck connection was kept.
    fn end_stuck(&self, connection: &Arc<Connection>, socket: &Socket) -> Result {
        if !connection.is_alive() {
            return Ok(());
        }
        // A connection that may still work is not shut down for a socket that cannot be used.
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
        connection.as_arc_borrow().mark_dead_for_replacement();
        Ok(())
    }
}
