// SPDX-License-Identifier: GPL-2.0
//! Generic netlink messages that are being built.
//!
//! C header: [`include/net/genetlink.h`](srctree/include/net/genetlink.h)

use crate::kapi::bindings;
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi,
    prelude::*, //
};

/// The port that a message is sent to, and the sequence number of the message that it replies to.
pub(super) struct Destination {
    pub(super) port: u32,
    pub(super) sequence: u32,
}

/// A message that is being built.
///
/// # Invariants
///
/// `skb` is a valid message that this owns. `header` is the header that `genlmsg_put()` has added to it.
pub(super) struct Message {
    skb: NonNull<bindings::sk_buff>,
    header: NonNull<ffi::c_void>,
}

impl Message {
    /// Makes a message with room for an attribute of `len` bytes.
    ///
    /// # Errors
    ///
    /// - `EMSGSIZE`: `len` is too large for an attribute.
    /// - `ENOMEM`: there is no memory.
    ///
    /// # Safety
    ///
    /// `family` must point to a registered family.
    pub(super) unsafe fn new(
        family: *const bindings::genl_family,
        to: Destination,
        command: u8,
        len: usize,
        flags: u32,
    ) -> Result<Self> {
        if len > usize::from(u16::MAX) - size_of::<bindings::nlattr>() {
            return Err(EMSGSIZE);
        }
        let room = (len + size_of::<bindings::nlattr>()).next_multiple_of(4);
        // SAFETY: `genlmsg_new()` accepts any size and any flags.
        let skb = unsafe { bindings::genlmsg_new(room, flags) };
        let skb = NonNull::new(skb).ok_or(ENOMEM)?;
        let (port, sequence) = (to.port, to.sequence);
        // SAFETY: `skb` is a new message. By this function's safety requirements, the family is registered.
        let header =
            unsafe { bindings::genlmsg_put(skb.as_ptr(), port, sequence, family, 0, command) };
        let Some(header) = NonNull::new(header) else {
            // SAFETY: The message was made above, and nothing else refers to it.
            unsafe { bindings::nlmsg_free(skb.as_ptr()) };
            return Err(EMSGSIZE);
        };
        // INVARIANT: The message was made above, and `genlmsg_put()` has added the header to it.
        Ok(Message { skb, header })
    }

    /// Appends an attribute and completes the message. The caller becomes its owner, and must send or
    /// free it.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` if there is no room for the attribute.
    pub(super) fn finish(self, kind: u16, value: &[u8]) -> Result<*mut bindings::sk_buff> {
        let skb = self.skb.as_ptr();
        let len = i32::try_from(value.len())?;
        // SAFETY: By the type invariant, the message is valid and owned. `value` has `len` bytes.
        to_result(unsafe { bindings::nla_put(skb, i32::from(kind), len, value.as_ptr().cast()) })?;
        // SAFETY: By the type invariant, the header belongs to this message.
        unsafe { bindings::genlmsg_end(skb, self.header.as_ptr()) };
        core::mem::forget(self);
        Ok(skb)
    }
}

impl Message {
    /// Appends attributes that were made by [`attr::put()`](super::attr::put), and completes the message. The
    /// caller becomes its owner, and must send or free it.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` if there is no room for them.
    pub(super) fn finish_with(self, attributes: &[u8]) -> Result<*mut bindings::sk_buff> {
        let skb = self.skb.as_ptr();
        let len = i32::try_from(attributes.len())?;
        // SAFETY: By the type invariant, the message is valid and owned. `attributes` has `len` bytes.
        to_result(unsafe { bindings::nla_append(skb, len, attributes.as_ptr().cast()) })?;
        // SAFETY: By the type invariant, the header belongs to this message.
        unsafe { bindings::genlmsg_end(skb, self.header.as_ptr()) };
        core::mem::forget(self);
        Ok(skb)
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the message is owned and not used after this.
        unsafe { bindings::nlmsg_free(self.skb.as_ptr()) };
    }
}
