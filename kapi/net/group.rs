// SPDX-License-Identifier: GPL-2.0
//! Multicast groups of generic netlink families.
//!
//! C header: [`include/net/genetlink.h`](srctree/include/net/genetlink.h)

use super::message::{
    Destination,
    Message, //
};
use crate::kapi::bindings;
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi,
    new_mutex,
    prelude::*,
    sync::{
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
    /// The family that has this group.
    #[pin]
    family: Mutex<Option<Registered>>,
}

/// A registered family.
///
/// # Invariants
///
/// The family is registered.
#[derive(PartialEq, Eq)]
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
                family <- new_mutex!(None),
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
        let Some(Registered(family)) = &*family else {
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

    /// Gives the group to a family.
    ///
    /// # Errors
    ///
    /// `EBUSY` if another family has it.
    pub(super) fn bind(&self, family: Registered) -> Result {
        let mut bound = self.family.lock();
        if bound.is_some() {
            return Err(EBUSY);
        }
        *bound = Some(family);
        Ok(())
    }

    /// Takes the group away from the family, if that has it. After this, no messages are sent for the family.
    pub(super) fn unbind(&self, family: NonNull<bindings::genl_family>) {
        let mut bound = self.family.lock();
        if *bound == Some(Registered(family)) {
            *bound = None;
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
