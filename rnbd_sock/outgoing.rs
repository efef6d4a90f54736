// SPDX-License-Identifier: GPL-2.0
//! A message that is being sent: what is left of it.

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        block::{
            payload::Payload,
            request::Unsent, //
        },
        net::iov::IoPage,
        trace, //
    },
    pure::proto::{
        COOKIE_AT,
        REQUEST_BYTES, //
    },
};

/// A message that is being sent.
pub(super) struct Outgoing {
    /// The offset of the unsent rest of the header in the page, and its length.
    pub(super) header_at: usize,
    pub(super) header_left: usize,
    /// The request and its data; `None` for a disconnect.
    pub(super) payload: Option<Payload<Unsent>>,
}

impl Outgoing {
    /// Advances by at most `bytes`. Returns how many of them belong to the next message.
    pub(super) fn advance(&mut self, bytes: usize) -> usize {
        let header = bytes.min(self.header_left);
        self.header_at += header;
        self.header_left -= header;
        let Some(payload) = &mut self.payload else {
            return bytes - header;
        };
        let data = (bytes - header).min(payload.left_bytes());
        payload.advance(data);
        bytes - header - data
    }

    /// Traces what is complete once `bytes` more were sent, which must not have been counted yet.
    #[cold]
    #[inline(never)]
    pub(super) fn trace(&self, bytes: usize, headers: &IoPage) {
        let Some(payload) = &self.payload else {
            return;
        };
        let header_at = (self.header_at + self.header_left).saturating_sub(REQUEST_BYTES);
        let mut cookie = [0; size_of::<u64>()];
        // This cannot fail: the header is in the page as long as its message is staged.
        let _ = headers.read(header_at + COOKIE_AT, &mut cookie);
        let cookie = u64::from_be_bytes(cookie);
        if self.header_left > 0 && bytes >= self.header_left {
            trace::header_sent(payload.side(), cookie);
        }
        if bytes >= self.header_left + payload.left_bytes() {
            trace::payload_sent(payload.side(), cookie);
        }
    }

    /// Returns whether all of the message was sent.
    pub(super) fn is_sent(&self) -> bool {
        self.header_left == 0 && self.payload.as_ref().is_none_or(|p| p.left_bytes() == 0)
    }
}
