// SPDX-License-Identifier: GPL-2.0
//! Planned handover: new connections take the place of others that may be alive.
//!
//! The new connections are installed first. Each old one is then *retired*: it drains as if its server was
//! shutting down (`rnbd_sock/draining.rs`), so it is sent no other request, awaits its replies, and is sent a
//! disconnect. What it still owes when its time is over is sent again, after its socket was reset.
//!
//! While both exist, the slots of their commands name them by different numbers ([`Connection::id()`]).

#![forbid(unsafe_code)]

use super::{
    retiring::Retiring,
    Place,
    Session, //
};
use crate::{
    kapi::{
        block::disk::DiskRef,
        errno::ENOTCONN,
        net::sock::Socket, //
    },
    pure::proto::flags,
    rnbd_events::{
        Event,
        Notice, //
    },
    rnbd_sock::{
        Connection,
        Position,
        Prepared, //
    }, //
};
use kernel::{
    alloc::AllocError,
    prelude::*,
    sync::{
        atomic::Relaxed,
        Arc, //
    },
    time::msecs_to_jiffies, //
};

/// Which connections are to be replaced.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// The one with this index.
    One(u32),
    All,
}

/// What a refusal is about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum About {
    Device,
    Connection,
    Sockets,
    Backend,
}

/// Why a handover is refused. Nothing was changed.
pub(crate) struct Refusal {
    pub(crate) error: Error,
    pub(crate) about: About,
    pub(crate) words: &'static CStr,
}

impl Refusal {
    /// Returns a refusal for a reason that `words` tell.
    pub(crate) fn new(error: impl Into<Error>, about: About, words: &'static CStr) -> Self {
        Refusal {
            error: error.into(),
            about,
            words,
        }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let words = match error {
            e if e == ENOMEM => c"there is not enough memory",
            _ => c"the device cannot be handed over",
        };
        Refusal::new(error, About::Device, words)
    }
}

impl From<AllocError> for Refusal {
    fn from(error: AllocError) -> Self {
        Error::from(error).into()
    }
}

/// A connection that is to take a place.
struct Successor {
    prepared: Prepared,
    /// For the event that it has.
    notice: Notice,
}

impl Place {
    /// Returns the position of a connection that takes this place, of `count` places.
    ///
    /// Its number is that of the connection which has the place if that is dead and so will have been reaped,
    /// and otherwise one that no connection has.
    ///
    /// # Errors
    ///
    /// `EBUSY`: an earlier handover has not finished. `EINVAL`: there are too many places.
    fn successor(&self, count: usize) -> Result<Position, Refusal> {
        let current = &self.connection;
        let mut position = self.next_position();
        if current.is_dead() {
            return Ok(position);
        }
        if self.retiring().is_some() {
            return Err(Refusal::new(
                EBUSY,
                About::Connection,
                c"an earlier handover of the connection has not finished",
            ));
        }
        position.id = other_id(position.id, count).ok_or_else(|| {
            let words = c"the device has too many connections";
            Refusal::new(EINVAL, About::Device, words)
        })?;
        Ok(position)
    }
}

/// Returns the other one of the two numbers that connections at a place can have, of `count` places.
fn other_id(id: u16, count: usize) -> Option<u16> {
    let id = usize::from(id);
    let other = match id.checked_sub(count) {
        Some(lower) => lower,
        None => id + count,
    };
    // All others have to fit as well.
    u16::try_from(2 * count - 1).ok()?;
    u16::try_from(other).ok()
}

impl Session {
    /// Replaces connections by ones over `sockets`, in the order of their indices, dead or alive.
    ///
    /// The connections that were alive drain for at most `drain_ms` milliseconds; this does not wait for them.
    ///
    /// # Errors
    ///
    /// A refusal with one of these errors changes nothing but the sockets, which may have been shut down.
    ///
    /// - `EINVAL`: the server does not allow several connections, or there is no such connection, or the number of
    ///   sockets is not that of the connections, or there are too many of these, or `disk` is not the session's.
    /// - `EBUSY`: a socket is in use by a device or by another part of the kernel, or an earlier handover has
    ///   not finished.
    /// - `ENOTCONN`: a socket is not connected, or no connection is left and only `NBD_DO_IT` starts the session
    ///   again.
    /// - `ENODEV`: the module is being unloaded.
    /// - `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep. The caller holds the configuration lock, and has made sure that nobody wants the session to end,
    /// and that allocations do not wait for writeback, which may be waiting for this very device.
    pub(crate) fn hand_over(
        self: &Arc<Self>,
        disk: &DiskRef,
        which: Which,
        sockets: &[Socket],
        drain_ms: u32,
    ) -> Result<(), Refusal> {
        // This comes first: if the last connection is reaped after the check, the count changes.
        let losses = self.table.losses();
        self.check_usable()?;
        let first = self.check_count(which, sockets.len())?;
        sockets.iter().try_for_each(check_socket)?;
        let ended = Notice::new(&self.table.origin)?;
        let successors = self.prepare_successors(first, sockets)?;
        let room = KVec::with_capacity(sockets.len(), GFP_KERNEL)?;
        let mut places = self.connections.lock();
        let taken = take_sockets(&places, first, successors, room)?;
        if self.by_ioctl && self.table.losses() != losses {
            // `NBD_DO_IT` is about to tell its program that they are lost.
            give_up(taken);
            return Err(lost());
        }
        let drain_jiffies = msecs_to_jiffies(drain_ms) as usize;
        let installed = self.install(disk, &mut places, taken, drain_jiffies);
        drop(places);
        self.table.will_report_end(None, ended);
        disk.run_queues();
        self.end_retired(drain_jiffies);
        installed?;
        pr_info!(
            "nbd{}: handed over {} of {} connections\n",
            self.table.device,
            sockets.len(),
            self.slots.len()
        );
        Ok(())
    }

    /// Checks that the session can use two connections at a place, and that new ones keep it running.
    ///
    /// # Errors
    ///
    /// `EINVAL` and `ENOTCONN`; see [`Self::hand_over()`].
    fn check_usable(&self) -> Result<(), Refusal> {
        if self.flags & flags::CAN_MULTI_CONN == 0 {
            // A flush on the new connection need not cover what was acknowledged on the old one.
            let words = c"the server does not allow several connections (NBD_FLAG_CAN_MULTI_CONN)";
            return Err(Refusal::new(EINVAL, About::Device, words));
        }
        if self.by_ioctl && !self.is_served() {
            return Err(lost());
        }
        Ok(())
    }

    /// Returns the index of the first connection to be replaced.
    ///
    /// # Errors
    ///
    /// `EINVAL`; see [`Self::hand_over()`].
    fn check_count(&self, which: Which, sockets: usize) -> Result<usize, Refusal> {
        let count = self.slots.len();
        let (first, wanted) = match which {
            Which::All => (0, count),
            Which::One(index) if (index as usize) < count => (index as usize, 1),
            Which::One(_) => {
                let words = c"the device has no connection with this index";
                return Err(Refusal::new(EINVAL, About::Connection, words));
            }
        };
        if sockets != wanted {
            let words = match which {
                Which::All => c"there must be as many sockets as the device has connections",
                Which::One(_) => c"one connection needs one socket",
            };
            return Err(Refusal::new(EINVAL, About::Sockets, words));
        }
        Ok(first)
    }

    /// Allocates the connections that take the places from `first` on. This is done without the lock of the
    /// connections, which the timeout handler takes; while the configuration lock is held, nobody else replaces
    /// any.
    ///
    /// # Errors
    ///
    /// `EBUSY`, `EINVAL` and `ENOMEM`; see [`Self::hand_over()`].
    fn prepare_successors(
        &self,
        first: usize,
        sockets: &[Socket],
    ) -> Result<KVec<Successor>, Refusal> {
        let mut successors = KVec::with_capacity(sockets.len(), GFP_KERNEL)?;
        for (index, socket) in (first..).zip(sockets) {
            let places = self.connections.lock();
            let place = places.get(index).ok_or(EINVAL)?;
            let position = place.successor(places.len())?;
            drop(places);
            let prepared = Connection::prepare(position, self.table.clone(), socket.clone())?;
            let notice = Notice::new(&self.table.origin)?;
            successors.push(Successor { prepared, notice }, GFP_KERNEL)?;
        }
        Ok(successors)
    }

    /// Puts new connections in their places, and keeps those that had these, unless they are dead. The caller
    /// holds the lock of `places`.
    ///
    /// # Errors
    ///
    /// `EINVAL`: `disk` is not the session's. Nothing was changed then.
    fn install(
        &self,
        disk: &DiskRef,
        places: &mut [Place],
        taken: KVec<(Arc<Connection>, Notice)>,
        drain_jiffies: usize,
    ) -> Result<(), Refusal> {
        let mut failed = None;
        for (new, notice) in taken {
            let index = usize::from(new.index());
            let pair = places.get_mut(index).zip(self.slots.get(index));
            let installed = match pair {
                Some((place, slot)) => slot.replace(disk, new.clone()).map(|()| place),
                None => Err(EINVAL),
            };
            match installed {
                Ok(place) => {
                    // That the old one is dead is told after this.
                    self.announce_successor(&new, notice);
                    place.install(new, drain_jiffies);
                }
                Err(e) => {
                    // This cannot happen: there are as many slots, and it is the session's disk.
                    new.as_arc_borrow().mark_dead_for_replacement();
                    failed = Some(e);
                }
            }
        }
        failed.map_or(Ok(()), |e| Err(Refusal::from(e)))
    }

    /// Continues the session with a connection that was installed.
    fn announce_successor(&self, new: &Arc<Connection>, notice: Notice) {
        self.waiting_since.store(0, Relaxed);
        // This comes after the new connection was installed: a request that sees the session revived finds it.
        self.table.fate.revive();
        new.trace_replacement(c"handover");
        let event = Event::Reconnected(new.incarnation());
        self.table.shared.news.post(notice, event);
        new.as_arc_borrow().announce();
        new.as_arc_borrow().start_receiving();
    }
}

impl Place {
    /// Puts a new connection in this place. One that had it and is not dead begins to drain, for so many jiffies
    /// at most.
    fn install(&mut self, new: Arc<Connection>, drain_jiffies: usize) {
        let old = core::mem::replace(&mut self.connection, new);
        old.as_arc_borrow().retire();
        if old.id() != self.connection.id() {
            self.retiring = Some(Retiring::new(old, drain_jiffies));
        }
    }
}

/// Takes the sockets over, all or none. `taken` is empty, with room for all. The caller holds the lock of
/// `places`.
///
/// # Errors
///
/// `EBUSY`, `ENOTCONN` and `ENODEV`; see [`Session::hand_over()`].
fn take_sockets(
    places: &[Place],
    first: usize,
    successors: KVec<Successor>,
    mut taken: KVec<(Arc<Connection>, Notice)>,
) -> Result<KVec<(Arc<Connection>, Notice)>, Refusal> {
    for (place, successor) in places.iter().skip(first).zip(successors) {
        if place.connection.is_dead() {
            // The new connection may have its number, under which nothing may be in flight.
            place.connection.wait_reaped();
        }
        let Successor { prepared, notice } = successor;
        match prepared.take_socket() {
            // There is room in the vector, so a connection that was made is never lost.
            Ok(new) => taken.push((new, notice), GFP_KERNEL)?,
            Err(e) => {
                give_up(taken);
                return Err(unusable(e));
            }
        }
    }
    if taken.iter().any(|(new, _)| !new.is_alive()) {
        give_up(taken);
        return Err(unusable(ENOTCONN.into()));
    }
    Ok(taken)
}

/// Returns the refusal of a session whose connections are lost.
fn lost() -> Refusal {
    let words = c"the device has lost its connections, and only NBD_DO_IT starts it again";
    Refusal::new(ENOTCONN, About::Device, words)
}

/// Ends connections that were not installed.
fn give_up(taken: KVec<(Arc<Connection>, Notice)>) {
    for (new, _) in &taken {
        new.as_arc_borrow().mark_dead_for_replacement();
    }
    for (new, _) in &taken {
        new.wait_reaped();
    }
}

/// Checks that a socket can be used now.
///
/// # Errors
///
/// `EBUSY` and `ENOTCONN`; see [`Session::hand_over()`].
fn check_socket(socket: &Socket) -> Result<(), Refusal> {
    if socket.is_hooked() {
        return Err(unusable(EBUSY));
    }
    if !socket.is_connected() {
        return Err(unusable(ENOTCONN.into()));
    }
    Ok(())
}

/// Returns the refusal of a socket that cannot be taken over because of `error`.
fn unusable(error: Error) -> Refusal {
    let words = match error {
        e if e == EBUSY => c"a socket is in use",
        e if e == ENOTCONN => c"a socket is not connected",
        _ => c"a socket cannot be used",
    };
    Refusal::new(error, About::Sockets, words)
}
