// SPDX-License-Identifier: GPL-2.0
//! What the bindings of a crate without generic netlink (7.2) lack and bindgen cannot make of
//! `genetlink.h`: its inline functions, and what the crate's bindings implement for its types.
//!
//! The functions are copies of those in [`include/net/genetlink.h`](srctree/include/net/genetlink.h) and
//! [`include/net/netlink.h`](srctree/include/net/netlink.h), and have the safety requirements of these.

use super::*;
use core::ptr::null;

opaque!(
    genl_ops,
    genl_split_ops,
    netlink_range_validation,
    netlink_range_validation_signed
);

// SAFETY: It consists of integers and pointers, for which all zeroes is a valid value.
unsafe impl pin_init::Zeroable for nla_policy {}
// SAFETY: It consists of integers, pointers and optional functions, for which all zeroes is a valid value.
unsafe impl pin_init::Zeroable for genl_family {}
// SAFETY: It consists of integers, for which all zeroes is a valid value.
unsafe impl pin_init::Zeroable for genl_multicast_group {}
// SAFETY: It consists of integers and optional functions, for which all zeroes is a valid value.
unsafe impl pin_init::Zeroable for genl_small_ops {}

/// The size of the headers of a message. It is a multiple of `NLMSG_ALIGNTO`.
const HEADERS_BYTES: usize = size_of::<nlmsghdr>() + size_of::<genlmsghdr>();

/// `genlmsg_new()`.
pub(crate) unsafe fn genlmsg_new(payload: usize, flags: gfp_t) -> *mut sk_buff {
    let Ok(bytes) = u32::try_from((HEADERS_BYTES + payload).next_multiple_of(4)) else {
        return core::ptr::null_mut();
    };
    // SAFETY: `__alloc_skb()` accepts any size and any flags.
    unsafe { __alloc_skb(bytes, flags, 0, NUMA_NO_NODE) }
}

/// `nlmsg_free()`.
pub(crate) unsafe fn nlmsg_free(skb: *mut sk_buff) {
    let reason = skb_drop_reason_SKB_DROP_REASON_NOT_SPECIFIED;
    // SAFETY: By this function's safety requirements, the message is valid and owned by the caller. The
    // socket may be null.
    unsafe { sk_skb_reason_drop(null(), skb, reason) };
}

/// `genlmsg_end()`.
pub(crate) unsafe fn genlmsg_end(skb: *mut sk_buff, header: *mut ffi::c_void) {
    // SAFETY: By this function's safety requirements, `header` is what `genlmsg_put()` has returned for
    // this message: it follows both headers. `tail` is an offset from `head`, as on all 64-bit machines.
    unsafe {
        let first: *mut nlmsghdr = header.byte_sub(HEADERS_BYTES).cast();
        let tail = (*skb).head.add((*skb).tail as usize);
        (*first).nlmsg_len = (tail.addr() - first.addr()) as u32;
    }
}

/// `genlmsg_multicast()`.
pub(crate) unsafe fn genlmsg_multicast(
    family: *const genl_family,
    skb: *mut sk_buff,
    port: u32,
    group: u32,
    flags: gfp_t,
) -> ffi::c_int {
    // SAFETY: By this function's safety requirements, the family is registered, and `group` is one of its
    // groups.
    let group = unsafe { (*family).mcgrp_offset } + group;
    // SAFETY: By this function's safety requirements, the message is valid and owned by the caller. Its
    // control buffer is netlink's (`NETLINK_CB()`).
    unsafe { (*(&raw mut (*skb).cb).cast::<netlink_skb_parms>()).dst_group = group };
    // SAFETY: The initial network namespace exists always, and has this socket while a family is registered.
    // Ownership of the message is passed on.
    unsafe { netlink_broadcast(genl_sock(&raw mut init_net), skb, port, group, flags).min(0) }
}
