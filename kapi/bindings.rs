// SPDX-License-Identifier: GPL-2.0
//! The C declarations that kapi uses.
//!
//! These are the bindings of the `kernel` crate, and those that it lacks, which Kbuild generates
//! from `kapi/bindings.h`.

#![allow(
    clippy::all,
    clippy::as_underscore,
    clippy::borrow_as_ptr,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

#[doc(no_inline)]
pub(crate) use kernel::bindings::*;
use kernel::ffi;

/// Declares C types to which declarations only point, and into which no code here looks.
macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub struct $name { _unused: [u8; 0] }
    )* };
}
opaque!(
    inet_timewait_death_row,
    nbd_request,
    numa_drop_counters,
    proto,
    sk_filter,
    sock_reuseport
);

include!(env!("RNBD_BINDINGS"));

#[cfg(rnbd_lacks_genetlink)]
mod genetlink;
#[cfg(rnbd_lacks_genetlink)]
pub(crate) use genetlink::*;

/// Returns the `genl_sock` of a network namespace, whose fields are not known in 7.2.
///
/// # Safety
///
/// `net` must be valid.
pub(crate) unsafe fn genl_sock(net: *mut net) -> *mut kernel::bindings::sock {
    // SAFETY: By this function's safety requirements, `net` is valid. It has such a pointer at this offset.
    unsafe {
        net.byte_add(OFFSET_GENL_SOCK)
            .cast::<*mut kernel::bindings::sock>()
            .read()
    }
}
