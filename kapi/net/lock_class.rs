// SPDX-License-Identifier: GPL-2.0
//! What lockdep calls the locks of sockets. Without lockdep nothing of this is there.
//!
//! Source: `include/linux/lockdep.h`, `include/net/tls.h`.

use crate::kapi::bindings;
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
use {
    super::sock::is_unix,
    core::ptr::NonNull,
    kernel::{
        prelude::*,
        sync::{
            atomic::Full,
            barrier::smp_mb, //
        },
    },
};

/// What lockdep knew of a socket's locks before it was hooked. While it is hooked they have classes
/// of their own (nbd.c's `nbd_reclassify_socket()`): writing out dirty memory takes them, and programs
/// make room in memory while they hold the locks of their sockets, which is no deadlock only because
/// those are others.
pub(super) struct LockClass {
    #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
    socket: bindings::lockdep_map,
    /// Where TLS is on top of the socket: the lock that its senders hold around that of the socket.
    #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
    tls: Option<(NonNull<bindings::mutex>, bindings::lockdep_map)>,
}

// SAFETY: It has copies that only `restore()` looks into, and a pointer that only it uses.
unsafe impl Send for LockClass {}
// SAFETY: Nothing can be done with `&LockClass` but `restore()`, which takes the locks.
unsafe impl Sync for LockClass {}

#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
impl LockClass {
    /// Gives the locks other classes. May sleep.
    ///
    /// # Safety
    ///
    /// `sk` must be a TCP or UNIX socket, valid during the call.
    pub(super) unsafe fn give(sk: *mut bindings::sock) -> Self {
        // One for each family, since one may hold the lock of another, as of the transport of TLS.
        // SAFETY: The caller promises that `sk` is valid.
        let (name, key) = match u32::from(unsafe { (*sk).__sk_common.skc_family }) {
            bindings::AF_INET => (c"sk_lock-AF_INET-RNBD", kernel::static_lock_class!()),
            bindings::AF_INET6 => (c"sk_lock-AF_INET6-RNBD", kernel::static_lock_class!()),
            _ => (c"sk_lock-AF_UNIX-RNBD", kernel::static_lock_class!()),
        };
        // SAFETY: The caller promises that `sk` is valid. The locks are held, so that nobody else is
        // within them. Names and keys live as long as the module, which restores the classes.
        unsafe {
            let tls = tls_lock(sk);
            lock_both(sk, tls);
            let socket = Self::change(&raw mut (*sk).sk_lock.dep_map, name, key);
            let tls = tls.map(|lock| {
                let map = &raw mut (*lock.as_ptr()).dep_map;
                let key = kernel::static_lock_class!();
                (lock, Self::change(map, c"tls_tx_lock-RNBD", key))
            });
            unlock_both(sk, tls.map(|(lock, _)| lock));
            LockClass { socket, tls }
        }
    }

    /// Gives the locks back the classes that they had: the socket may outlive the module. May sleep.
    ///
    /// # Safety
    ///
    /// As for [`Self::give()`], which must have been called with the same `sk`.
    pub(super) unsafe fn restore(&self, sk: *mut bindings::sock) {
        let tls = self.tls.map(|(lock, _)| lock);
        // SAFETY: The caller promises that `sk` is valid, and TLS stays on top of a socket until that
        // goes; they are locked as above.
        unsafe {
            lock_both(sk, tls);
            Self::put_back(&raw mut (*sk).sk_lock.dep_map, &self.socket);
            if let Some((lock, saved)) = &self.tls {
                Self::put_back(&raw mut (*lock.as_ptr()).dep_map, saved);
            }
            unlock_both(sk, tls);
        }
    }

    /// Gives a lock another class; returns what lockdep knew of it.
    ///
    /// # Safety
    ///
    /// `map` must be that of a lock that the caller holds.
    unsafe fn change(
        map: *mut bindings::lockdep_map,
        name: &'static CStr,
        key: Pin<&'static kernel::sync::LockClassKey>,
    ) -> bindings::lockdep_map {
        // SAFETY: The caller promises that nobody else is within the lock.
        unsafe {
            let saved = map.read();
            Self::hide(map);
            bindings::lockdep_init_map_type(
                map,
                name.as_char_ptr(),
                key.as_ptr(),
                0,
                saved.wait_type_inner,
                saved.wait_type_outer,
                saved.lock_type,
            );
            saved
        }
    }

    /// Undoes [`Self::change()`].
    ///
    /// # Safety
    ///
    /// As there; `saved` must be what it returned.
    unsafe fn put_back(map: *mut bindings::lockdep_map, saved: &bindings::lockdep_map) {
        // SAFETY: The copy is written back to where it was read.
        unsafe {
            Self::hide(map);
            let mut hidden = (&raw const *saved).read();
            hidden.key = (&raw mut bindings::__lockdep_no_validate__).cast();
            map.write(hidden);
            smp_mb(Full);
            (&raw mut (*map).key).write_volatile(saved.key);
        }
    }

    /// Has lockdep look away from a lock while its class changes: whoever has the descriptor too may want
    /// the lock just then, and lockdep looks at it before the socket is locked. It warns of a name that
    /// does not go with its key.
    ///
    /// # Safety
    ///
    /// `map` must be that of a lock, valid during the call.
    unsafe fn hide(map: *mut bindings::lockdep_map) {
        // SAFETY: The caller promises that `map` is valid; only the address of the key is taken.
        unsafe {
            (&raw mut (*map).key)
                .write_volatile((&raw mut bindings::__lockdep_no_validate__).cast());
        }
        smp_mb(Full);
    }
}

/// The lock that senders hold who use TLS on top of a socket, where it is there (`tls_get_ctx()`).
///
/// # Safety
///
/// `sk` must be a TCP or UNIX socket, valid during the call.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
unsafe fn tls_lock(sk: *mut bindings::sock) -> Option<NonNull<bindings::mutex>> {
    // SAFETY: The caller promises that `sk` is valid. A TCP socket is a `struct inet_connection_sock`;
    // what is put on top of it is put there once and stays, and its data is there before its name.
    unsafe {
        if is_unix(sk) {
            return None;
        }
        let field = |offset| sk.byte_add(offset).cast::<*mut u8>().read_volatile();
        let name = field(bindings::OFFSET_ULP_OPS);
        if name.is_null() {
            return None;
        }
        let name = name.add(bindings::OFFSET_ULP_NAME).cast::<[u8; 4]>();
        let context = field(bindings::OFFSET_ULP_DATA);
        if *name != *b"tls\0" || context.is_null() {
            return None;
        }
        NonNull::new(context.add(bindings::OFFSET_TLS_TX_LOCK).cast())
    }
}

/// Locks a socket and, where there is TLS, before that its senders' lock. May sleep.
///
/// # Safety
///
/// Both must be valid, `tls` what [`tls_lock()`] has found.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
unsafe fn lock_both(sk: *mut bindings::sock, tls: Option<NonNull<bindings::mutex>>) {
    // SAFETY: By this function's precondition both locks are valid; TLS, too, takes its own one first.
    unsafe {
        if let Some(lock) = tls {
            bindings::mutex_lock(lock.as_ptr());
        }
        bindings::lock_sock_nested(sk.cast(), 0);
    }
}

/// Undoes [`lock_both()`].
///
/// # Safety
///
/// As there, with the same arguments.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
unsafe fn unlock_both(sk: *mut bindings::sock, tls: Option<NonNull<bindings::mutex>>) {
    // SAFETY: By this function's precondition `lock_both()` has locked both.
    unsafe {
        bindings::release_sock(sk.cast());
        if let Some(lock) = tls {
            bindings::mutex_unlock(lock.as_ptr());
        }
    }
}

#[cfg(not(CONFIG_DEBUG_LOCK_ALLOC))]
impl LockClass {
    /// Without lockdep there is nothing to do.
    ///
    /// # Safety
    ///
    /// None.
    pub(super) unsafe fn give(_sk: *mut bindings::sock) -> Self {
        LockClass {}
    }

    /// As [`Self::give()`].
    ///
    /// # Safety
    ///
    /// None.
    pub(super) unsafe fn restore(&self, _sk: *mut bindings::sock) {}
}
