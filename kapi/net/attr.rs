// SPDX-License-Identifier: GPL-2.0
//! Netlink attributes: reading those of a message that was received, and building nested ones.
//!
//! C header: [`include/net/netlink.h`](srctree/include/net/netlink.h)
//!
//! The `kernel` crate (7.3) can write attributes (`kernel::net::netlink`), but not read them.

use crate::kapi::bindings;
use kernel::prelude::*;

/// An attribute of a received message.
///
/// # Invariants
///
/// `raw` points to an attribute that is valid for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Attr<'a> {
    pub(super) raw: *const bindings::nlattr,
    value: &'a [u8],
}

impl<'a> Attr<'a> {
    /// Makes an `Attr` from a pointer to an attribute.
    ///
    /// # Safety
    ///
    /// `raw` must point to an attribute whose length netlink has validated. The attribute must live for `'a`
    /// and must not change.
    pub(super) unsafe fn from_raw(raw: *const bindings::nlattr) -> Self {
        const HEADER: usize = size_of::<bindings::nlattr>();
        // SAFETY: By this function's safety requirements, `raw` points to an attribute.
        let len = usize::from(unsafe { (*raw).nla_len }).saturating_sub(HEADER);
        // SAFETY: By this function's safety requirements, netlink has validated that `len` bytes follow
        // the header.
        let value = unsafe { core::slice::from_raw_parts(raw.cast::<u8>().add(HEADER), len) };
        // INVARIANT: By this function's safety requirements, the attribute lives for `'a`.
        Attr { raw, value }
    }

    /// Returns the value as a `u32`, if it is long enough.
    pub(crate) fn u32(&self) -> Option<u32> {
        self.value.first_chunk().map(|b| u32::from_ne_bytes(*b))
    }

    /// Returns the value as a `u64`, if it is long enough.
    pub(crate) fn u64(&self) -> Option<u64> {
        self.value.first_chunk().map(|b| u64::from_ne_bytes(*b))
    }

    /// Returns the value.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.value
    }

    /// Returns the value as a string, without the zero bytes at its end, which `nla_strcmp()` ignores, too.
    pub(crate) fn string(&self) -> &'a [u8] {
        let len = self
            .value
            .iter()
            .rposition(|b| *b != 0)
            .map_or(0, |last| last + 1);
        self.value.get(..len).unwrap_or(&[])
    }

    /// Returns an iterator over the attributes that are nested in this one. It yields the type and the
    /// value of each, and ends before the first malformed one.
    pub(crate) fn nested(&self) -> Nested<'a> {
        Nested { rest: self.value }
    }
}

/// The value of a nested attribute, and an iterator over the attributes in it. See [`Attr::nested()`].
pub(crate) struct Nested<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Nested<'a> {
    type Item = (u16, Nested<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let ([l0, l1, t0, t1], _) = self.rest.split_first_chunk()?;
        let len = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let kind = u16::from_ne_bytes([*t0, *t1]) & bindings::NLA_TYPE_MASK as u16;
        let value = self.rest.get(size_of::<bindings::nlattr>()..len)?;
        let next = len.next_multiple_of(bindings::NLA_ALIGNTO as usize);
        self.rest = self.rest.get(next..).unwrap_or(&[]);
        Some((kind, Nested { rest: value }))
    }
}

impl Nested<'_> {
    /// Returns the value as a `u32`, if it is long enough.
    pub(crate) fn u32(&self) -> Option<u32> {
        self.rest.first_chunk().map(|b| u32::from_ne_bytes(*b))
    }
}

/// Appends an attribute and its padding to `to`, as `nla_put()` does to a message.
///
/// # Errors
///
/// - `EMSGSIZE`: `value` is too long for an attribute.
/// - `ENOMEM`: there is no memory.
///
/// # Context
///
/// Process context. May sleep.
pub(crate) fn put(to: &mut KVec<u8>, kind: u16, value: &[u8]) -> Result {
    let len = value.len() + size_of::<bindings::nlattr>();
    let len = u16::try_from(len).map_err(|_| EMSGSIZE)?;
    to.extend_from_slice(&len.to_ne_bytes(), GFP_KERNEL)?;
    to.extend_from_slice(&kind.to_ne_bytes(), GFP_KERNEL)?;
    to.extend_from_slice(value, GFP_KERNEL)?;
    while to.len() % bindings::NLA_ALIGNTO as usize != 0 {
        to.push(0, GFP_KERNEL)?;
    }
    Ok(())
}

/// Appends a string, with the zero byte at its end. The errors and the context are those of [`put()`].
pub(crate) fn put_string(to: &mut KVec<u8>, kind: u16, text: &[u8]) -> Result {
    let mut terminated = KVec::with_capacity(text.len() + 1, GFP_KERNEL)?;
    terminated.extend_from_slice(text, GFP_KERNEL)?;
    terminated.push(0, GFP_KERNEL)?;
    put(to, kind, &terminated)
}
