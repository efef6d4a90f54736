// SPDX-License-Identifier: GPL-2.0
//! Multicast groups of generic netlink families.
//!
//! C header: [`include/net/genetlink.h`](srctree/include/net/genetlink.h)

use super::{
    message::{
        Destination,
        Message, //
    },
    namespace::Namespace, //
};
use crate::kapi::{
    bindings,
    errno::ENOBUFS, //
};
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex, //
    }, //
};

/// A multicast group. It is reference-counted and can live longer than its family, so that messages may
/// be sent to it at any time. While no family has the group, it has no listeners and messages are
/// discarded.
#[pin_data]
pub(crate) struct Group {
    /// The `mcgrps` of the family points to this.
    pub(super) raw: bindings::genl_multicast_group,
    /// The number of the group, 0 while no family has it.
    number: Atomic<u32>,
    /// The family that has this group.
    #[pin]
    family: Mutex<Owner>,
}

/// The family that has a group.
enum Owner {
    Nobody,
    /// A family that is being registered.
    Claimed,
    Family(Registered),
}

/// The group is kept for a family that is about to be registered. Dropping this without [`Self::bind()`] gives
/// the group up.
pub(super) struct Claim(Option<Arc<Group>>);

/// A registered family.
///
/// # Invariants
///
/// The family is registered.
pub(super) struct Registered(pub(super) NonNull<bindings::genl_family>);

// SAFETY: Any task may send messages of a registered family.
unsafe impl Send for Registered {}

impl Group {
    /// Makes a group that no family has yet. At most 15 bytes of the name are used.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn new(name: &CStr) -> Result<Arc<Self>> {
        let mut raw: bindings::genl_multicast_group = pin_init::zeroed();
        copy_name(&mut raw.name, name);
        Arc::pin_init(
            pin_init!(Group {
                raw,
                number: Atomic::new(0),
                family <- new_mutex!(Owner::Nobody),
            }),
            GFP_KERNEL,
        )
    }

    /// Sends a message with one attribute to all listeners in the initial network namespace. Succeeds if
    /// there are none, in particular while no family has the group.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory.
    /// - `ENOBUFS`: a listener has not received the message.
    /// - `EMSGSIZE`: `value` is too long.
    ///
    /// # Context
    ///
    /// Process context. May sleep, but does not wait for I/O.
    pub(crate) fn multicast(&self, command: u8, kind: u16, value: &[u8]) -> Result {
        let family = self.family.lock();
        let Owner::Family(Registered(family)) = &*family else {
            return Ok(());
        };
        let to = Destination {
            port: 0,
            sequence: 0,
        };
        // SAFETY: By the type invariant of `Registered`, the family is registered. It stays so, because
        // it is not unregistered before `unbind()`, which needs the lock that is held here.
        let message = unsafe {
            Message::new(
                family.as_ptr(),
                to,
                command,
                value.len(),
                bindings::GFP_NOIO,
            )?
        };
        let skb = message.finish(kind, value)?;
        // SAFETY: The family is registered, for the same reason. Ownership of the message is passed on.
        let sent =
            unsafe { bindings::genlmsg_multicast(family.as_ptr(), skb, 0, 0, bindings::GFP_NOIO) };
        // ESRCH: there are no listeners.
        match to_result(sent) {
            Err(e) if e == ESRCH => Ok(()),
            result => result,
        }
    }

    /// Sends a message to all listeners in a network namespace, with `attributes`, which were made by
    /// [`attr::put()`](super::attr::put). Succeeds if there are none, in particular while no family has the group.
    ///
    /// If it fails, those listeners whose message was lost get `ENOBUFS` from the next `recv()`.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory. No listener has received the message.
    /// - `ENOBUFS`: a listener has not received the message.
    /// - `EMSGSIZE`: the attributes are too long.
    ///
    /// # Context
    ///
    /// Process context. May sleep, but does not wait for I/O.
    pub(crate) fn multicast_in(
        &self,
        namespace: &Namespace,
        command: u8,
        attributes: &[u8],
    ) -> Result {
        let family = self.family.lock();
        let Owner::Family(family) = &*family else {
            return Ok(());
        };
        let message = family.message(command, attributes);
        let skb = message.inspect_err(|_| family.report_lost(namespace))?;
        // SAFETY: The namespace is referenced, so it has this socket. The family is registered: by the type
        // invariant of `Registered`, and until `unbind()`, which needs the lock that is held here.
        // The control buffer of a message is netlink's (`NETLINK_CB()`). Ownership of the message is passed on.
        let sent = unsafe {
            let group = family.group();
            (*(&raw mut (*skb).cb).cast::<bindings::netlink_skb_parms>()).dst_group = group;
            let socket = bindings::genl_sock(namespace.as_ptr());
            bindings::netlink_broadcast(socket, skb, 0, group, bindings::GFP_NOIO)
        };
        // ESRCH: there are no listeners.
        match to_result(sent) {
            Err(e) if e == ESRCH => Ok(()),
            result => result,
        }
    }

    /// Returns whether anybody listens to the group, in any network namespace (`genl_has_listeners()`).
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(crate) fn has_listeners(&self, namespace: &Namespace) -> bool {
        let group = self.number.load(Relaxed);
        if group == 0 {
            return false;
        }
        // SAFETY: The namespace is referenced, so it has this socket, which is one of the kernel. The number is
        // compared with that of the last group, and may be out of use.
        unsafe {
            let socket = bindings::genl_sock(namespace.as_ptr());
            bindings::netlink_has_listeners(socket.cast(), group) != 0
        }
    }

    /// Tells all listeners in a network namespace that a message was lost: their next `recv()` fails with
    /// `ENOBUFS`.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn report_lost(&self, namespace: &Namespace) {
        if let Owner::Family(family) = &*self.family.lock() {
            family.report_lost(namespace);
        }
    }

    /// Keeps the group for a family that is about to be registered.
    ///
    /// # Errors
    ///
    /// `EBUSY` if another family has it.
    pub(super) fn claim(self: &Arc<Self>) -> Result<Claim> {
        let mut owner = self.family.lock();
        let Owner::Nobody = *owner else {
            return Err(EBUSY);
        };
        *owner = Owner::Claimed;
        Ok(Claim(Some(self.clone())))
    }

    /// Takes the group away from the family, if that has it. After this, no messages are sent for the family.
    pub(super) fn unbind(&self, family: NonNull<bindings::genl_family>) {
        let mut owner = self.family.lock();
        if matches!(&*owner, Owner::Family(Registered(bound)) if *bound == family) {
            self.number.store(0, Relaxed);
            *owner = Owner::Nobody;
        }
    }
}

impl Claim {
    /// Gives the group to the family, which was registered.
    pub(super) fn bind(mut self, family: Registered) {
        if let Some(group) = self.0.take() {
            group.number.store(family.group(), Relaxed);
            *group.family.lock() = Owner::Family(family);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(group) = self.0.take() {
            *group.family.lock() = Owner::Nobody;
        }
    }
}

impl Registered {
    /// Returns the number of the family's group.
    fn group(&self) -> u32 {
        // SAFETY: By the type invariant, the family is registered. The number was set by then.
        unsafe { (*self.0.as_ptr()).mcgrp_offset }
    }

    /// Makes a message of the family.
    ///
    /// # Errors
    ///
    /// `ENOMEM` and `EMSGSIZE`.
    fn message(&self, command: u8, attributes: &[u8]) -> Result<*mut bindings::sk_buff> {
        let to = Destination {
            port: 0,
            sequence: 0,
        };
        let len = attributes.len();
        // SAFETY: By the type invariant, the family is registered.
        let message =
            unsafe { Message::new(self.0.as_ptr(), to, command, len, bindings::GFP_NOIO)? };
        message.finish_with(attributes)
    }

    /// Sets the error `ENOBUFS` on the sockets of all listeners in a namespace (`genl_set_err()`).
    fn report_lost(&self, namespace: &Namespace) {
        // SAFETY: The namespace is referenced, so it has this socket. By the type invariant, the family is
        // registered, and the group is one of its.
        unsafe {
            let socket = bindings::genl_sock(namespace.as_ptr());
            let error = kernel::error::Error::from(ENOBUFS).to_errno();
            bindings::netlink_set_err(socket.cast(), 0, self.group(), error);
        }
    }
}

/// Copies at most 15 bytes of a name.
pub(super) fn copy_name(to: &mut [ffi::c_char; 16], name: &CStr) {
    // The last byte stays zero, as the terminator.
    for (to, from) in to.iter_mut().take(15).zip(name.to_bytes()) {
        *to = *from as ffi::c_char;
    }
}
