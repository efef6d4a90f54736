// SPDX-License-Identifier: GPL-2.0
//! The lockdep classes of sockets' locks. Without `CONFIG_DEBUG_LOCK_ALLOC` all of this does nothing.
//!
//! C headers: [`include/linux/lockdep.h`](srctree/include/linux/lockdep.h),
//! [`include/net/tls.h`](srctree/include/net/tls.h)
//!
//! nbd.c (`nbd_reclassify_socket()`), nvme-tcp and sunrpc give their sockets classes, too, but never
//! restore the former ones.

use crate::kapi::bindings;
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
use {
    super::kind::tls_context,
    crate::kapi::barrier::smp_mb,
    core::ptr::NonNull,
    kernel::{
        prelude::*,
        sync::atomic::Full, //
    },
};

/// The lockdep classes that the locks of a socket had before it was hooked.
///
/// While a socket is hooked, its locks have classes of their own. They are taken when dirty memory is
/// written out, and a task may start to write out dirty memory while it holds the lock of another socket.
/// With the same class for all sockets lockdep would report a deadlock that cannot happen.
pub(super) struct LockClass {
    #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
    socket: bindings::lockdep_map,
    /// If TLS is on top of the socket: the lock that TLS takes for sending, around the lock of the socket.
    #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
    tls: Option<(NonNull<bindings::mutex>, bindings::lockdep_map)>,
}

// SAFETY: The copies and the pointer are only used by `restore()`, which any task may call.
unsafe impl Send for LockClass {}
// SAFETY: The only method on `&LockClass` is `restore()`, which takes the locks.
unsafe impl Sync for LockClass {}

#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
impl LockClass {
    /// Gives the locks of `sk` classes of their own. Returns the former ones.
    ///
    /// # Context
    ///
    /// Process context, without a lock of the socket. May sleep.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket.
    pub(super) unsafe fn give(sk: *mut bindings::sock) -> Self {
        // One class for each family, as in nbd.c: a task that holds the lock of a socket of one family
        // may take that of a socket of another, which TLS may use as its transport.
        // SAFETY: By this function's safety requirements, `sk` is valid.
        let (name, key) = match u32::from(unsafe { (*sk).__sk_common.skc_family }) {
            bindings::AF_INET => (c"sk_lock-AF_INET-RNBD", kernel::static_lock_class!()),
            bindings::AF_INET6 => (c"sk_lock-AF_INET6-RNBD", kernel::static_lock_class!()),
            bindings::AF_VSOCK => (c"sk_lock-AF_VSOCK-RNBD", kernel::static_lock_class!()),
            _ => (c"sk_lock-AF_UNIX-RNBD", kernel::static_lock_class!()),
        };
        // SAFETY: By this function's safety requirements, `sk` is valid.
        let tls = unsafe { tls_lock(sk) };
        // SAFETY: `sk` is valid, and `tls` is from `tls_lock()`.
        unsafe { lock_both(sk, tls) };
        // SAFETY: The lock is held.
        let socket = unsafe { Self::change(&raw mut (*sk).sk_lock.dep_map, name, key) };
        let tls_class = tls.map(|lock| {
            let key = kernel::static_lock_class!();
            // SAFETY: `tls_lock()` has returned a valid lock.
            let map = unsafe { &raw mut (*lock.as_ptr()).dep_map };
            // SAFETY: The lock is held.
            (lock, unsafe { Self::change(map, c"tls_tx_lock-RNBD", key) })
        });
        // SAFETY: Both locks were taken above.
        unsafe { unlock_both(sk, tls) };
        LockClass {
            socket,
            tls: tls_class,
        }
    }

    /// Gives the locks their former classes back. This is necessary because the socket may outlive the
    /// module, to which the names and keys of the other classes belong.
    ///
    /// # Context
    ///
    /// Process context, without a lock of the socket. May sleep.
    ///
    /// # Safety
    ///
    /// `sk` must be valid, and `self` must be from [`Self::give()`] with the same `sk`.
    pub(super) unsafe fn restore(&self, sk: *mut bindings::sock) {
        let tls = self.tls.map(|(lock, _)| lock);
        // SAFETY: By this function's safety requirements, `sk` is valid. TLS stays on top of a socket
        // until that is closed, so its lock is valid, too.
        unsafe { lock_both(sk, tls) };
        // SAFETY: The lock is held, and the copy is from the same lock.
        unsafe { Self::put_back(&raw mut (*sk).sk_lock.dep_map, &self.socket) };
        if let Some((lock, saved)) = &self.tls {
            // SAFETY: The lock of TLS is held, too, and the copy is from the same lock.
            unsafe { Self::put_back(&raw mut (*lock.as_ptr()).dep_map, saved) };
        }
        // SAFETY: Both locks were taken above.
        unsafe { unlock_both(sk, tls) };
    }

    /// Gives a lock another class. Returns a copy of its former `lockdep_map`.
    ///
    /// # Safety
    ///
    /// `map` must be the `lockdep_map` of a valid lock that the caller holds.
    unsafe fn change(
        map: *mut bindings::lockdep_map,
        name: &'static CStr,
        key: Pin<&'static kernel::sync::LockClassKey>,
    ) -> bindings::lockdep_map {
        // SAFETY: By this function's safety requirements, `map` is valid, and nobody else writes to it,
        // because the lock is held.
        let saved = unsafe { map.read() };
        // SAFETY: `map` is valid.
        unsafe { Self::hide(map) };
        // SAFETY: As for the read above. The name and the key live as long as the module, which restores
        // the former class before it is unloaded.
        unsafe {
            bindings::lockdep_init_map_type(
                map,
                name.as_char_ptr(),
                key.as_ptr(),
                0,
                saved.wait_type_inner,
                saved.wait_type_outer,
                saved.lock_type,
            );
        }
        saved
    }

    /// Undoes [`Self::change()`].
    ///
    /// # Safety
    ///
    /// As for [`Self::change()`], which must have returned `saved` for the same lock.
    unsafe fn put_back(map: *mut bindings::lockdep_map, saved: &bindings::lockdep_map) {
        // SAFETY: By this function's safety requirements, `map` is valid.
        unsafe { Self::hide(map) };
        // SAFETY: `saved` is a reference.
        let mut hidden = unsafe { (&raw const *saved).read() };
        hidden.key = (&raw mut bindings::__lockdep_no_validate__).cast();
        // SAFETY: By this function's safety requirements, the lock of `map` is held, so nobody else
        // writes to it.
        unsafe { map.write(hidden) };
        smp_mb(Full);
        // SAFETY: By this function's safety requirements, the lock of `map` is held.
        unsafe { (&raw mut (*map).key).write_volatile(saved.key) };
    }

    /// Makes lockdep ignore a lock while its class changes. Other tasks that have the descriptor may be
    /// waiting for the lock. Lockdep reads the class before it waits, and would warn if the name did not
    /// match the key.
    ///
    /// # Safety
    ///
    /// `map` must be the `lockdep_map` of a valid lock.
    unsafe fn hide(map: *mut bindings::lockdep_map) {
        // SAFETY: By this function's safety requirements, `map` is valid. Only the address of the key is
        // taken.
        unsafe {
            (&raw mut (*map).key)
                .write_volatile((&raw mut bindings::__lockdep_no_validate__).cast());
        }
        smp_mb(Full);
    }
}

/// Returns the lock that TLS takes for sending (`tx_lock` of `tls_get_ctx()`), if TLS is on top of the
/// socket.
///
/// # Safety
///
/// `sk` must be a valid socket.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
unsafe fn tls_lock(sk: *mut bindings::sock) -> Option<NonNull<bindings::mutex>> {
    // SAFETY: By this function's safety requirements, `sk` is valid.
    let context = unsafe { tls_context(sk) }?;
    // SAFETY: The pointer is that of a `struct tls_context`.
    Some(unsafe { context.add(bindings::OFFSET_TLS_TX_LOCK) }.cast())
}

/// Locks a socket. If `tls` is given, takes that lock before, in the same order as TLS. May sleep.
///
/// # Safety
///
/// `sk` must be valid, and `tls` must be from [`tls_lock()`] with the same `sk`.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
unsafe fn lock_both(sk: *mut bindings::sock, tls: Option<NonNull<bindings::mutex>>) {
    if let Some(lock) = tls {
        // SAFETY: By this function's safety requirements, the lock is valid.
        unsafe { bindings::mutex_lock(lock.as_ptr()) };
    }
    // SAFETY: By this function's safety requirements, `sk` is valid.
    unsafe { bindings::lock_sock_nested(sk.cast(), 0) };
}

/// Undoes [`lock_both()`].
///
/// # Safety
///
/// The caller must have called [`lock_both()`] with the same arguments.
#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
unsafe fn unlock_both(sk: *mut bindings::sock, tls: Option<NonNull<bindings::mutex>>) {
    // SAFETY: By this function's safety requirements, `lock_both()` has locked the socket.
    unsafe { bindings::release_sock(sk.cast()) };
    if let Some(lock) = tls {
        // SAFETY: By this function's safety requirements, `lock_both()` has taken this lock.
        unsafe { bindings::mutex_unlock(lock.as_ptr()) };
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
    pub(super) unsafe fn restore(&self, _sk: *mut bindings::sock) {}
}
