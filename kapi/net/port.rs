// SPDX-License-Identifier: GPL-2.0
//! The ports of netlink sockets in user space, and the release of a socket.
//!
//! C headers: [`include/linux/netlink.h`](srctree/include/linux/netlink.h),
//! [`include/linux/notifier.h`](srctree/include/linux/notifier.h)
//!
//! The `kernel` crate (7.3) has neither ports nor notifiers.

use crate::kapi::bindings;
use kernel::{
    error::to_result,
    ffi,
    prelude::*,
    types::Opaque, //
};

/// The identity of a generic netlink socket in user space: its network namespace and its port number.
///
/// It is only compared. Once a socket was released, another one may have the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// The address of the `struct net`.
    net: usize,
    number: u32,
}

impl Port {
    pub(super) fn new(net: *const bindings::net, number: u32) -> Self {
        Port {
            net: net as usize,
            number,
        }
    }
}

/// Is told of each generic netlink socket that is released.
pub(crate) trait Released: Send + Sync + 'static {
    /// Called when the last descriptor of the socket with this port was closed.
    ///
    /// # Context
    ///
    /// Process context. May sleep, but every close of a netlink socket may wait meanwhile.
    fn released(&self, port: Port);
}

/// A notifier block together with the object that it notifies.
#[pin_data]
struct Block<T> {
    #[pin]
    raw: Opaque<bindings::notifier_block>,
    target: T,
}

/// A registered notifier. Dropping it unregisters it, and waits for calls that are running.
///
/// # Invariants
///
/// The block is registered with the netlink notifier chain.
pub(crate) struct Notifier<T: Released>(Pin<KBox<Block<T>>>);

// SAFETY: Any task may unregister a notifier, and `T` is `Send`.
unsafe impl<T: Released> Send for Notifier<T> {}
// SAFETY: `&Notifier` has no methods.
unsafe impl<T: Released> Sync for Notifier<T> {}

impl<T: Released> Notifier<T> {
    /// Registers `target` (`netlink_register_notifier()`).
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn register(target: T) -> Result<Self> {
        let mut raw: bindings::notifier_block = pin_init::zeroed();
        raw.notifier_call = Some(Self::call);
        let block = KBox::pin_init(
            pin_init!(Block {
                raw: Opaque::new(raw),
                target,
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The block is pinned, and is unregistered before it is freed.
        to_result(unsafe { bindings::netlink_register_notifier(block.raw.get()) })?;
        // INVARIANT: The block was registered above.
        Ok(Notifier(block))
    }

    /// Implements `notifier_block.notifier_call`.
    ///
    /// # Safety
    ///
    /// Must be called by the netlink notifier chain, for a block of this type.
    unsafe extern "C" fn call(
        block: *mut bindings::notifier_block,
        event: ffi::c_ulong,
        data: *mut ffi::c_void,
    ) -> ffi::c_int {
        if event != bindings::NETLINK_URELEASE as ffi::c_ulong {
            return bindings::NOTIFY_DONE as ffi::c_int;
        }
        // SAFETY: By this function's safety requirements, `data` is the argument of this event.
        let socket = unsafe { &*data.cast::<bindings::netlink_notify>() };
        if socket.protocol == bindings::NETLINK_GENERIC as i32 {
            let block: *const Opaque<bindings::notifier_block> = block.cast();
            // SAFETY: Each block that has this function is the field of a `Block<T>`.
            let block = unsafe { kernel::container_of!(block, Block<T>, raw) };
            // SAFETY: The block is not freed while it is registered, and unregistering it waits for
            // this call.
            let block = unsafe { &*block };
            block.target.released(Port::new(socket.net, socket.portid));
        }
        bindings::NOTIFY_DONE as ffi::c_int
    }
}

impl<T: Released> Drop for Notifier<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the block is registered. It is not used after this: the chain's
        // lock is held for reading during calls.
        unsafe { bindings::netlink_unregister_notifier(self.0.raw.get()) };
    }
}
