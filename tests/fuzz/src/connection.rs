// SPDX-License-Identifier: GPL-2.0
//! A connection as far as `rnbd_sock/receiving.rs` and `rnbd_sock/chunks.rs` use it: what it counts and says, and what
//! they find in it.

use crate::{
    OURS,
    kapi::{block::request::Unanswered, net::sock::Socket},
    prelude::*,
    rnbd_events::Incarnation,
    rnbd_table::{Structured, Table},
    stream::Receive,
    sync::atomic::Atomic,
};
use std::cell::Cell;

/// The states of a connection.
const ALIVE: u64 = 0;
pub(crate) const REAPED: u64 = 4;

/// What is counted.
#[derive(Default)]
pub(crate) struct Traffic {
    pub(crate) received: Cell<usize>,
}

impl Traffic {
    pub(crate) fn received(&self, bytes: usize) {
        assert!(bytes > 0, "nothing is wanted");
        self.received.set(self.received.get() + bytes);
    }

    pub(crate) fn replied(&self) {}
    pub(crate) fn failed(&self) {}
}

pub(crate) struct Connection {
    pub(crate) table: Table,
    pub(crate) traffic: Traffic,
    pub(crate) socket: Socket,
    pub(crate) state: Atomic<u64>,
}

impl Connection {
    pub(crate) fn new(structured: Structured) -> Self {
        Connection {
            table: Table::new(structured),
            traffic: Traffic::default(),
            socket: Socket::default(),
            state: Atomic::new(ALIVE),
        }
    }

    pub(crate) fn id(&self) -> u16 {
        OURS
    }

    pub(crate) fn index(&self) -> u16 {
        OURS
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        Incarnation
    }

    pub(crate) fn is_alive(&self) -> bool {
        true
    }

    /// It goes on receiving.
    pub(crate) fn drain(&self) {}

    pub(crate) fn trace_received(&self, _request: &Unanswered) {}

    /// There is no TLS.
    pub(crate) fn receive_record(&self, _receive: &mut Receive) -> Result {
        Err(EIO)
    }
}
