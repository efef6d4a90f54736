// SPDX-License-Identifier: GPL-2.0
//! The lockdep classes of sockets' locks. Without `CONFIG_DEBUG_LOCK_ALLOC` all of this does nothing.
//!
//! C headers: [`include/linux/lockdep.h`](srctree/include/linux/lockdep.h),
//! [`include/net/tls.h`](srctree/include/net/tls.h)
//!
//! nbd.c (`nbd_reclassify_socket()`), nvme-tcp and sunrpc give their sockets classes, too, but never
//! restore the former ones.
//!
//! They also give the locks other names. Here the name stays, and only the pointer to the key changes,
//! with one store. Other tasks may have the socket's descriptor, or may handle its packets, and lockdep
//! reads the name and the key of a lock before it waits for it. If both changed, it could read a key and
//! the name that belongs to another one, and would warn (`look_up_lock_class()`). In lockdep's reports the locks
//! have a number behind the name, such as `sk_lock-AF_INET#2`.

use crate::kapi::bindings;
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
use {
    super::kind::tls_context,
    core::ptr::{
        null_mut,
        NonNull, //
    },
    kernel::{
        prelude::*,
        sync::{
            LockClassKey,
            SetOnce, //
        }, //
    },
};

/// The lockdep classes that the locks of a socket had before it was hooked.
///
/// While a socket is hooked, its locks have classes of their own. They are taken when dirty memory is
/// written out, and a task may start to write out dirty memory while it holds the lock of another socket.
/// With the same class for all sockets lockdep would report a deadlock that cannot happen.
pub(super) struct LockClass {
    #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
    socket: Option<Change>,
    /// The lock that TLS takes for sending, around the lock of the socket, if TLS is on top of it.
    #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
    tls: Option<Change>,
}

// SAFETY: The pointers are only used by `restore()`, which any task may call.
unsafe impl Send for LockClass {}
// SAFETY: The only method on `&LockClass` is `restore()`, which writes single words with volatile stores.
unsafe impl Sync for LockClass {}

/// The change of one lock's class.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
struct Change {
    map: NonNull<bindings::lockdep_map>,
    former: *mut bindings::lock_class_key,
    given: *mut bindings::lock_class_key,
}

/// The class of hooked locks that have the same name.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
struct Class {
    /// The address of the name. Lockdep allows only one for each key.
    name: usize,
    key: &'static LockClassKey,
}

/// The classes. Each family of sockets has another name, and so has the lock of TLS, which changes whenever
/// its module is loaded again. The locks of sockets for which no class is left keep theirs.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
static CLASSES: [SetOnce<Class>; 16] = [const { SetOnce::new() }; 16];

#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
impl LockClass {
    /// Gives the locks of `sk` classes of their own. Returns the former ones.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket.
    pub(super) unsafe fn give(sk: *mut bindings::sock) -> Self {
        // SAFETY: By this function's safety requirements, `sk` is valid.
        let socket = unsafe { Change::make(&raw mut (*sk).sk_lock.dep_map) };
        // SAFETY: By this function's safety requirements, `sk` is valid.
        let tls = unsafe { tls_context(sk) }.and_then(|context| {
            // SAFETY: The pointer is that of a `struct tls_context`, which has a mutex at this offset. It
            // stays until the socket is closed.
            unsafe {
                let lock = context
                    .add(bindings::OFFSET_TLS_TX_LOCK)
                    .cast::<bindings::mutex>();
                Change::make(&raw mut (*lock.as_ptr()).dep_map)
            }
        });
        LockClass { socket, tls }
    }

    /// Gives the locks their former classes back, because they are no longer taken when dirty memory is written
    /// out.
    ///
    /// # Safety
    ///
    /// The socket with which [`Self::give()`] has made `self` must still be valid.
    pub(super) unsafe fn restore(&self) {
        for change in [&self.socket, &self.tls].into_iter().flatten() {
            // SAFETY: By this function's safety requirements, the socket is valid, and with it its lock.
            // TLS stays on top of a socket until that is closed, so its lock is valid, too.
            unsafe { change.undo() };
        }
    }
}

#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
impl Class {
    /// Returns the key for locks with the name at this address, if there is memory for it.
    ///
    /// Its memory is never freed: tasks that hold a lock, or wait for it, refer to the class that it had when they
    /// asked for it, even if the module is unloaded meanwhile.
    fn key_for(name: usize) -> Option<&'static LockClassKey> {
        for class in &CLASSES {
            if class.as_ref().is_none() {
                let key = KBox::pin_init(LockClassKey::new_dynamic(), GFP_KERNEL).ok()?;
                // SAFETY: The box is leaked, so the key stays where it is.
                let key = KBox::leak(unsafe { Pin::into_inner_unchecked(key) });
                class.populate(Class { name, key });
            }
            match class.as_ref() {
                Some(class) if class.name == name => return Some(class.key),
                _ => {}
            }
        }
        None
    }
}

#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
impl Change {
    /// Gives a lock the class for its name.
    ///
    /// # Safety
    ///
    /// `map` must be the `lockdep_map` of a valid lock, which stays valid until [`Self::undo()`].
    unsafe fn make(map: *mut bindings::lockdep_map) -> Option<Self> {
        // SAFETY: By this function's safety requirements, `map` is valid. A word is never read torn. The two
        // belong together, unless another part of the kernel gives the lock a class at this very moment.
        let (name, former) = unsafe {
            (
                (&raw const (*map).name).read_volatile(),
                (&raw const (*map).key).read_volatile(),
            )
        };
        let given = Class::key_for(name.addr())?.as_ptr();
        let map = NonNull::new(map)?;
        // SAFETY: By this function's safety requirements, `map` is valid. The key is never freed, and no other
        // name is used with it.
        unsafe { set_key(map, given) };
        Some(Change { map, former, given })
    }

    /// Gives the lock its former class back, unless somebody else has given it another one.
    ///
    /// # Safety
    ///
    /// The lock must still be valid.
    unsafe fn undo(&self) {
        // SAFETY: By this function's safety requirements, the lock is valid. A word is never read torn.
        let seen = unsafe { (&raw const (*self.map.as_ptr()).key).read_volatile() };
        if seen == self.given {
            // SAFETY: By this function's safety requirements, the lock is valid. It had this key and this name
            // before.
            unsafe { set_key(self.map, self.former) };
        }
    }
}

/// Gives a lock another key. The lock may be held, and others may wait for it: lockdep notes the class when
/// a task asks for the lock, and finds that note by the address of the lock when it is released. (If the task
/// releases a lock that it has taken before this one, lockdep notes the class anew.)
///
/// # Safety
///
/// `map` must be the `lockdep_map` of a valid lock, and `key` a key for locks with the same name, which stays
/// valid as long as the lock has it.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
unsafe fn set_key(map: NonNull<bindings::lockdep_map>, key: *mut bindings::lock_class_key) {
    // SAFETY: By this function's safety requirements, `map` is valid. Lockdep reads and writes these words
    // without a lock, too, and none is written torn. A class that lockdep has noted in the lock is either cleared
    // here or, if lockdep notes it afterwards, still valid.
    unsafe {
        (&raw mut (*map.as_ptr()).key).write_volatile(key);
        for class in 0..bindings::NR_LOCKDEP_CACHING_CLASSES as usize {
            (&raw mut (*map.as_ptr()).class_cache)
                .cast::<*mut bindings::lock_class>()
                .add(class)
                .write_volatile(null_mut());
        }
    }
}

#[cfg(not(CONFIG_DEBUG_LOCK_ALLOC))]
impl LockClass {
    /// Does nothing, because there is no lockdep.
    ///
    /// # Safety
    ///
    /// There are no requirements. The function is `unsafe` only to match the one for lockdep.
    pub(super) unsafe fn give(_sk: *mut bindings::sock) -> Self {
        LockClass {}
    }

    /// Does nothing, as [`Self::give()`].
    ///
    /// # Safety
    ///
    /// There are no requirements, as for [`Self::give()`].
    pub(super) unsafe fn restore(&self) {}
}
