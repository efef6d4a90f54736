// SPDX-License-Identifier: GPL-2.0
//! Receives what a server sends over TLS that is no data: alerts, session tickets, key updates.
//!
//! `recvmsg()` fails with `EIO` if the next record is none of data and there is no room for control messages.
//! The record stays. It is then received by another call, into memory of its own, as sunrpc and nvme-tcp do: what
//! is no data must never be taken for a request's data.
//!
//! After a key update the kernel decrypts nothing until user space has given the socket the next key, which
//! nobody here could do in time: what was handed over is the socket, not the secrets. So no reply to a request in
//! flight can be read any more, and the connection is dead, with a reason of its own. Its socket is reset and its
//! requests are sent again, as with any other death. All replies before the key update were received by then.

#![forbid(unsafe_code)]

use super::{
    stream::Receive,
    Connection, //
};
use crate::{
    kapi::errno::{
        EKEYEXPIRED,
        EREMOTEIO, //
    },
    pure::tls::{
        Alert,
        Meaning,
        Unexpected, //
    },
};
use kernel::prelude::*;

impl Connection {
    /// Receives a record that is no data, or the next part of it, after `recvmsg()` has failed with `EIO`.
    ///
    /// It does not count as something that was received: a server must not be able to put off a timeout without
    /// a reply.
    ///
    /// # Errors
    ///
    /// Nothing more can be received after any of them.
    ///
    /// - `EPIPE`: the server has closed the connection.
    /// - `EREMOTEIO`: the server has sent an alert.
    /// - `EKEYEXPIRED`: the server uses another key from here on.
    /// - `EPROTO`: the server must not send this.
    /// - `EIO`: there is no such record.
    /// - Those of the socket.
    ///
    /// # Context
    ///
    /// May sleep for the socket's lock.
    #[cold]
    pub(super) fn receive_record(&self, receive: &mut Receive) -> Result {
        match receive.take_record(&self.socket)? {
            Meaning::Nothing => Ok(()),
            Meaning::Closed => Err(EPIPE),
            Meaning::Alert(alert) => {
                self.report_alert(alert);
                Err(EREMOTEIO.into())
            }
            Meaning::KeyUpdate => Err(EKEYEXPIRED.into()),
            Meaning::Unexpected(what) => Err(self.report_unexpected(what)),
        }
    }

    /// Logs an alert, because of which the connection is closed, unless the end was expected.
    fn report_alert(&self, alert: Alert) {
        let expected = self.table.fate.snapshot().is_end_wanted() || !self.is_alive();
        if !expected && self.table.log.allow() {
            pr_err!(
                "nbd{}: connection {}: the server has sent the TLS alert {} ({}, {}), closing it\n",
                self.table.device,
                self.index(),
                alert.name(),
                alert.description,
                alert.level_name()
            );
        }
    }

    /// Logs a record that no server sends. Returns `EPROTO`.
    fn report_unexpected(&self, what: Unexpected) -> Error {
        match what {
            Unexpected::Record(kind) => {
                self.report_violation(format_args!("unexpected TLS record (type {kind})"))
            }
            Unexpected::AlertSize => {
                self.report_violation(format_args!("TLS alert of a wrong size"))
            }
            Unexpected::Empty => self.report_violation(format_args!("empty TLS handshake record")),
            Unexpected::Handshake(kind) => self.report_violation(format_args!(
                "unexpected TLS handshake message (type {kind})"
            )),
        }
    }
}
