// SPDX-License-Identifier: GPL-2.0
//! What a connection says to trace events.

#![forbid(unsafe_code)]

use super::Connection;
use crate::{
    kapi::{
        block::request::{
            Side,
            Unanswered,
            Unsent, //
        },
        trace::{
            self,
            Link, //
        },
    },
    pure::proto::RequestHeader,
    rnbd_events::Death, //
};
use kernel::prelude::*;

impl Connection {
    fn link(&self) -> Link {
        let incarnation = self.incarnation();
        Link {
            device: self.table.device,
            connection: incarnation.index,
            reconnects: incarnation.reconnects,
        }
    }

    /// A request is staged, and `header` is that of its message.
    #[inline(always)]
    pub(super) fn trace_staged(&self, request: &Unsent, header: &RequestHeader) {
        if trace::is_staging_traced() {
            let (device, index) = (self.table.device, self.index());
            trace::request_staged(request, device, index, header.encode());
        }
    }

    /// All of the reply to a request was received.
    #[inline(always)]
    pub(super) fn trace_received(&self, request: &Unanswered) {
        trace::payload_received(request, || {
            let (hw_queue, tag) = request.tag();
            self.table
                .cookie(hw_queue, tag)
                .map_or(0, |cookie| cookie.0)
        });
    }

    /// The connection has taken over its socket.
    pub(super) fn trace_birth(&self) {
        trace::connection_born(self.link());
    }

    /// The connection was marked as dead.
    pub(super) fn trace_death(&self, death: Death) {
        trace::connection_dead(self.link(), death.reason.name(), death.errno);
    }

    /// The connection has taken the place of another one. `by` names what has brought it.
    pub(crate) fn trace_replacement(&self, by: &CStr) {
        trace::connection_replaced(self.link(), by);
    }
}
