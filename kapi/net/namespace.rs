// SPDX-License-Identifier: GPL-2.0
//! References to network namespaces.
//!
//! C header: [`include/net/net_namespace.h`](srctree/include/net/net_namespace.h)
//!
//! The `kernel` crate (7.3) has none.

use crate::kapi::bindings;
use core::ptr::NonNull;
use kernel::{
    sync::Refcount,
    task::Task, //
};

/// A reference to a network namespace, which keeps it alive (`get_net()`).
///
/// # Invariants
///
/// `raw` is a valid network namespace, to which this owns a reference. The initial namespace exists always, and
/// its references are not counted.
pub(crate) struct Namespace {
    raw: NonNull<bindings::net>,
}

// SAFETY: Any task may hold and drop a reference to a network namespace.
unsafe impl Send for Namespace {}
// SAFETY: `&Namespace` only lends the pointer.
unsafe impl Sync for Namespace {}

impl Namespace {
    /// Takes a reference to the network namespace of the current task, or to the initial one if the task has
    /// none any more, because it exits.
    pub(crate) fn of_current() -> Self {
        // SAFETY: The current task is valid. Only the task itself changes its `nsproxy`, whose namespaces stay
        // valid meanwhile. `net_ns` is a pointer at this offset.
        let net = unsafe {
            let proxy = (*Task::current_raw()).nsproxy;
            match proxy.is_null() {
                true => core::ptr::null_mut(),
                false => proxy
                    .byte_add(bindings::OFFSET_NSPROXY_NET)
                    .cast::<*mut bindings::net>()
                    .read(),
            }
        };
        let net = NonNull::new(net).unwrap_or(initial());
        // SAFETY: Its `nsproxy` has a reference to the namespace, or it is the initial one.
        unsafe { Self::get(net) }
    }

    /// Takes a reference to a namespace (`get_net()`).
    ///
    /// # Safety
    ///
    /// `raw` must be the initial namespace, or somebody else must hold a reference to it during the call.
    pub(super) unsafe fn get(raw: NonNull<bindings::net>) -> Self {
        // INVARIANT: The reference is taken here.
        let this = Namespace { raw };
        if let Some(references) = this.references() {
            references.inc();
        }
        this
    }

    /// Returns the namespace, which stays valid as long as `self`.
    pub(super) fn as_ptr(&self) -> *mut bindings::net {
        self.raw.as_ptr()
    }

    /// Returns the number of references, if they are counted.
    fn references(&self) -> Option<&Refcount> {
        if !cfg!(CONFIG_NET_NS) || self.raw == initial() {
            return None;
        }
        // SAFETY: By the type invariant, the namespace is valid. It has a `refcount_t` at this offset, and a
        // `Refcount` is a transparent one.
        Some(unsafe {
            &*self
                .raw
                .as_ptr()
                .byte_add(bindings::OFFSET_NET_REFERENCES)
                .cast()
        })
    }
}

/// Returns the initial network namespace.
fn initial() -> NonNull<bindings::net> {
    // `&raw mut` makes no reference to the static, which C changes.
    let net = &raw mut bindings::init_net;
    // SAFETY: The address of a static is not null.
    unsafe { NonNull::new_unchecked(net) }
}

impl Drop for Namespace {
    /// Drops the reference (`put_net()`).
    fn drop(&mut self) {
        let last = self.references().is_some_and(Refcount::dec_and_test);
        #[cfg(CONFIG_NET_NS)]
        if last {
            // SAFETY: This was the last reference.
            unsafe { bindings::__put_net(self.raw.as_ptr()) };
        }
        #[cfg(not(CONFIG_NET_NS))]
        let _ = last;
    }
}
