// SPDX-License-Identifier: GPL-2.0
//! New connections in the place of dead ones, or of one that is stuck.

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
        let Some(index) = Self::find_replaceable(&connections, stuck_jiffies) else {
            return Ok(false);
        };
        let places = connections.get_mut(index).zip(self.slots.get(index));
        let (place, slot) = places.ok_or(EINVAL)?;
        let number = place.connection.index();
        // Before anything ends that works. What an allocation would have written out to make room may wait
        // for this very connection.
        let prepared = task::memalloc_noio(|| {
            Connection::prepare(number, self.table.clone(), socket.clone())
        })?;
        self.end_stuck(&place.connection, socket)?;
        // The new one has the old one's number: nothing may be in flight under it.
        place.connection.wait_reaped();
        let end_was_wanted = self.table.fate.snapshot().is_end_wanted();
        let new = task::memalloc_noio(|| prepared.take_socket())?;
        slot.replace(disk, new.clone())
            .inspect_err(|_| new.as_arc_borrow().mark_dead())?;
        place.connection = new.clone();
        place.reconnects = place.reconnects.saturating_add(1);
        self.waiting_since.store(0, Relaxed);
        // After that: who sees that something has come back finds it, and waits anew where it has died.
        self.table.fate.revive();
        if end_was_wanted && !new.is_alive() && !self.table.fate.snapshot().is_end_wanted() {
            // It has died while nobody was to be told of that.
            new.as_arc_borrow().queue_link_dead();
        }
        new.as_arc_borrow().start_receiving();
        drop(connections);
        disk.run_queues();
        pr_info!("nbd{}: reconnected socket\n", self.table.device);
        Ok(true)
    }

    /// Which place a new connection is put into: the first whose connection is dead, or else that of the
    /// one that has been stuck longest, and at least for `stuck_jiffies`, where that is not 0.
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
        connection.as_arc_borrow().mark_dead_for_replacement();
        Ok(())
    }
}
