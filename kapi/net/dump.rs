// SPDX-License-Identifier: GPL-2.0
//! Answers to a netlink command that consist of many messages (`NLM_F_DUMP`).
//!
//! C headers: [`include/linux/netlink.h`](srctree/include/linux/netlink.h),
//! [`include/net/genetlink.h`](srctree/include/net/genetlink.h)

use super::attr::Attr;
use crate::kapi::bindings;
use core::marker::PhantomData;
use kernel::{
    error::to_result,
    ffi,
    prelude::*, //
};

/// The bytes of the headers of a message.
const HEADERS_BYTES: usize = size_of::<bindings::nlmsghdr>() + size_of::<bindings::genlmsghdr>();

/// Returns the description of the command that is answered.
///
/// # Safety
///
/// `callback` must be what generic netlink has passed to `dumpit`.
pub(super) unsafe fn info_of(
    callback: *mut bindings::netlink_callback,
) -> *mut bindings::genl_info {
    // SAFETY: By this function's safety requirements, the callback is valid, and its data is a valid
    // `struct genl_dumpit_info`, in which the description is at this offset.
    unsafe {
        (*callback)
            .data
            .byte_add(bindings::OFFSET_DUMPIT_INFO)
            .cast()
    }
}

/// A part of an answer: messages are added until it is full. Netlink asks for the next part when user space
/// has received this one, until a part is empty.
///
/// # Invariants
///
/// - `part` and `callback` are what netlink has passed to `dumpit` for `'a`, and are valid for as long. The
///   message is not shared, and has no fragments.
/// - The `data` of the callback is a valid `struct genl_dumpit_info`, whose attributes are null or an array of
///   `max + 1` pointers.
pub(crate) struct Dump<'a> {
    part: *mut bindings::sk_buff,
    callback: *mut bindings::netlink_callback,
    max: u16,
    _call: PhantomData<&'a ()>,
}

impl<'a> Dump<'a> {
    /// # Safety
    ///
    /// The arguments must satisfy the type invariants.
    pub(super) unsafe fn new(
        part: *mut bindings::sk_buff,
        callback: *mut bindings::netlink_callback,
        max: u16,
    ) -> Self {
        // INVARIANT: By this function's safety requirements.
        Dump {
            part,
            callback,
            max,
            _call: PhantomData,
        }
    }

    fn info(&self) -> &bindings::genl_info {
        // SAFETY: By the type invariant, the callback satisfies the requirements of the function, and the
        // result is valid as long as that.
        unsafe { &*info_of(self.callback) }
    }

    /// Returns the number of the command that is answered.
    pub(super) fn command(&self) -> u8 {
        // SAFETY: Generic netlink has set the header of the message, which lives as long as the dump.
        unsafe { (*self.info().genlhdr).cmd }
    }

    /// Returns the bytes in this part.
    pub(super) fn len(&self) -> u32 {
        // SAFETY: By the type invariant, the message is valid.
        unsafe { (*self.part).len }
    }

    /// Returns an attribute of the command, if it has that.
    pub(crate) fn attr(&self, kind: u16) -> Option<Attr<'_>> {
        let attrs = self.info().attrs;
        if kind > self.max || attrs.is_null() {
            return None;
        }
        // SAFETY: By the type invariant, the array has a pointer with this index.
        let attr = unsafe { *attrs.add(usize::from(kind)) };
        // SAFETY: Netlink has validated the attributes. They are part of the message that was received, which
        // lives as long as the dump.
        (!attr.is_null()).then(|| unsafe { Attr::from_raw(attr) })
    }

    /// Returns where this part begins: what [`Self::set_position()`] was called with last, or zeroes in the
    /// first part.
    pub(crate) fn position(&self) -> [usize; 2] {
        // SAFETY: By the type invariant, the callback is valid. Generic netlink leaves these words to the
        // family, and they are zero in the beginning.
        let [first, second, ..] = unsafe { (*self.callback).__bindgen_anon_1.args };
        [first as usize, second as usize]
    }

    /// Sets where the next part begins.
    pub(crate) fn set_position(&mut self, [first, second]: [usize; 2]) {
        // SAFETY: By the type invariant, the callback is valid, and nobody else writes these words.
        let args = unsafe { &mut (*self.callback).__bindgen_anon_1.args };
        args[0] = first as ffi::c_long;
        args[1] = second as ffi::c_long;
    }

    /// Adds a message with `attributes`, which were made by [`attr::put()`](super::attr::put).
    ///
    /// # Errors
    ///
    /// `EMSGSIZE`: there is no room left in this part.
    pub(crate) fn add(&mut self, attributes: &[u8]) -> Result {
        let bytes = HEADERS_BYTES + attributes.len().next_multiple_of(4);
        // As `skb_tailroom()`.
        // SAFETY: By the type invariant, the message is valid, and has no fragments. `tail` and `end` are
        // offsets from `head`, as on all 64-bit machines.
        let room =
            unsafe { ((*self.part).end as usize).saturating_sub((*self.part).tail as usize) };
        if bytes > room {
            return Err(EMSGSIZE);
        }
        let info = self.info();
        // SAFETY: By the type invariant, the message is valid. The family is registered: a dump holds a
        // reference to its module.
        let header = unsafe {
            bindings::genlmsg_put(
                self.part,
                info.snd_portid,
                info.snd_seq,
                info.family,
                bindings::NLM_F_MULTI as ffi::c_int,
                self.command(),
            )
        };
        if header.is_null() {
            return Err(EMSGSIZE);
        }
        // SAFETY: By the type invariant, the message is valid. `attributes` has that many bytes. There is
        // room, so this does not fail, and no message stays that has a header only.
        to_result(unsafe {
            bindings::nla_append(
                self.part,
                attributes.len() as ffi::c_int,
                attributes.as_ptr().cast(),
            )
        })?;
        // SAFETY: `genlmsg_put()` has returned the header for this message.
        unsafe { bindings::genlmsg_end(self.part, header) };
        Ok(())
    }
}
