// SPDX-License-Identifier: GPL-2.0
//! The ports of netlink sockets in user space, and the release of a socket.
//!
//! C headers: [`include/linux/netlink.h`](srctree/include/linux/netlink.h),
//! [`include/linux/notifier.h`](srctree/include/linux/notifier.h)
//!
//! The `kernel` crate (7.3) has neither ports nor notifiers.

use crate::kapi::bindings;
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi,
    prelude::*,
    sync::Refcount,
    types::Opaque, //
};

/// The port of a generic netlink socket that is being released.
///
/// A new socket may have got the same port before the notifier is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// The address of the `struct net`, which is only compared.
    net: usize,
    number: u32,
}

/// A reference to the generic netlink socket in user space that has sent a message.
///
/// It keeps the memory of the `struct sock`, but not the socket: user space can close that.
///
/// # Invariants
///
/// This owns a reference to `sk`, which is a netlink socket.
pub(crate) struct Sender {
    sk: NonNull<bindings::sock>,
    port: Port,
}

// SAFETY: Any task may hold and drop a reference to a socket.
unsafe impl Send for Sender {}
// SAFETY: `&Sender` only reads a flag and compares.
unsafe impl Sync for Sender {}

impl Sender {
    /// # Safety
    ///
    /// `sk` must be a netlink socket, to which the caller has a reference during the call.
    pub(super) unsafe fn new(
        sk: NonNull<bindings::sock>,
        net: *const bindings::net,
        number: u32,
    ) -> Self {
        // INVARIANT: The reference is taken here.
        let this = Sender {
            sk,
            port: Port {
                net: net as usize,
                number,
            },
        };
        this.references().inc();
        this
    }

    fn references(&self) -> &Refcount {
        // SAFETY: By the type invariant, `sk` is valid. A `Refcount` is a transparent `refcount_t`.
        unsafe { &*(&raw const (*self.sk.as_ptr()).__sk_common.skc_refcnt).cast() }
    }

    /// Returns whether this socket is the one that is being released at `port`.
    pub(crate) fn is_released_at(&self, port: Port) -> bool {
        // SAFETY: By the type invariant, `sk` is valid, and the field is at this offset. Other tasks may
        // change the flags at the same time, but a word is never read torn.
        let flags = unsafe {
            self.sk
                .as_ptr()
                .byte_add(bindings::OFFSET_SK_FLAGS)
                .cast::<usize>()
                .read_volatile()
        };
        // `netlink_release()` sets the flag before it calls the notifiers (`sock_orphan()`).
        self.port == port && flags & (1 << bindings::SOCK_DEAD) != 0
    }

    /// Returns whether both are the same socket.
    pub(crate) fn is(&self, other: &Sender) -> bool {
        self.sk == other.sk
    }
}

impl Drop for Sender {
    /// Drops the reference (`sock_put()`).
    fn drop(&mut self) {
        if self.references().dec_and_test() {
            // SAFETY: This was the last reference.
            unsafe { bindings::sk_free(self.sk.as_ptr()) };
        }
    }
}

/// Is told of each generic netlink socket that is released.
pub(crate) trait Released: Send + Sync + 'static {
    /// Called when the last descriptor of the socket with this port was closed.
    ///
    /// # Context
    ///
    /// Process context. May sleep, but every close of a netlink socket may wait meanwhile. It must not
    /// drop a [`Notifier`].
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
            block.target.released(Port {
                net: socket.net as usize,
                number: socket.portid,
            });
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
