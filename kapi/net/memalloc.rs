// SPDX-License-Identifier: GPL-2.0
//! The allocation settings of sockets over which dirty memory is written out (`SOCK_MEMALLOC`).
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)
//!
//! The settings are those of `drivers/block/nbd.c`, but for `sk_use_task_frag`, which `page_frag.rs` makes
//! unnecessary. The flag is set as `sk_set_memalloc()` in `net/core/sock.c` sets it. That function itself is
//! not called: it increments the static key for each socket, for which it takes a lock that has to wait while a
//! CPU is being taken offline. Here the key is incremented once, when the module is loaded.

use super::bh_lock::{
    spin_lock_bh,
    spin_unlock_bh, //
};
use crate::kapi::bindings;
#[cfg(not(CONFIG_JUMP_LABEL))]
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// Keeps `memalloc_socks_key` enabled until it is dropped. Without it, the network stack does not check
/// whether a socket may use the memory reserves.
pub(super) struct MemallocSockets(());

impl MemallocSockets {
    /// Enables the key.
    ///
    /// # Context
    ///
    /// Process context. May sleep, and waits while a CPU is being taken offline.
    pub(super) fn begin() -> Self {
        // SAFETY: The key is a static variable of the kernel.
        #[cfg(CONFIG_JUMP_LABEL)]
        unsafe {
            bindings::static_key_slow_inc(memalloc_key())
        };
        #[cfg(not(CONFIG_JUMP_LABEL))]
        enabled().fetch_add(1, Relaxed);
        MemallocSockets(())
    }
}

impl Drop for MemallocSockets {
    fn drop(&mut self) {
        // SAFETY: The key is a static variable of the kernel, and `begin()` has incremented it.
        #[cfg(CONFIG_JUMP_LABEL)]
        unsafe {
            bindings::static_key_slow_dec(memalloc_key())
        };
        #[cfg(not(CONFIG_JUMP_LABEL))]
        enabled().fetch_sub(1, Relaxed);
    }
}

fn memalloc_key() -> *mut bindings::static_key {
    // The `struct static_key` of `kernel::bindings` and ours are the same type in C.
    (&raw mut bindings::memalloc_socks_key).cast()
}

/// Returns the counter of the key, which is all that a static key is without jump labels.
#[cfg(not(CONFIG_JUMP_LABEL))]
fn enabled() -> &'static Atomic<i32> {
    // SAFETY: The key is a static variable of the kernel, and C accesses the counter only atomically.
    unsafe { Atomic::from_ptr(&raw mut (*memalloc_key()).enabled.counter) }
}

/// The settings that a socket had before [`Self::change()`], to be restored later.
pub(super) struct Settings {
    allocation: u32,
    is_memalloc: bool,
    low_water_bytes: i32,
}

const ALLOCATION: u32 = bindings::GFP_NOIO | bindings::__GFP_MEMALLOC;
const MEMALLOC_FLAG: usize = 1 << bindings::SOCK_MEMALLOC;

/// Returns the address of `sk_flags`.
fn flags_of(sk: *mut bindings::sock) -> *mut usize {
    sk.wrapping_byte_add(bindings::OFFSET_SK_FLAGS).cast()
}

impl Settings {
    /// Sets a socket up for writing out dirty memory. Returns the previous settings.
    ///
    /// - The socket may use the memory reserves, and its allocations never wait for I/O, as in nbd.c's
    ///   `__sock_xmit()` and `nbd_start_device()`. [`MemallocSockets`] must exist for this to have its
    ///   full effect. The subflows of an MPTCP socket do not get these settings, and vsock ignores them.
    /// - It announces every byte that is received, whatever `SO_RCVLOWAT` was.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket that the caller has locked.
    pub(super) unsafe fn change(sk: *mut bindings::sock) -> Self {
        let flags = flags_of(sk);
        // SAFETY: By this function's safety requirements, `sk` is valid. Only the address of a field is
        // taken.
        let low_water = unsafe { &raw mut (*sk).sk_rcvlowat };
        // SAFETY: By this function's safety requirements, `sk` is valid and locked, and these fields are
        // written only with that lock.
        let was = unsafe {
            Settings {
                allocation: (*sk).sk_allocation,
                is_memalloc: *flags & MEMALLOC_FLAG != 0,
                low_water_bytes: *low_water,
            }
        };
        // SAFETY: `sk` is valid and locked. `sk_flags` is also read without the lock, so the access is volatile.
        unsafe { flags.write_volatile(*flags | MEMALLOC_FLAG) };
        // SAFETY: `sk` is valid and locked. UNIX sockets also read `sk_allocation` without the lock, as a
        // word, which is never read torn.
        unsafe { (*sk).sk_allocation = ALLOCATION };
        // SAFETY: `sk` is valid and locked. `sk_rcvlowat` is also read without the lock, so the access is volatile.
        unsafe { low_water.write_volatile(1) };
        was
    }

    /// Restores the settings that the socket had, except those that another user of the socket has
    /// changed since.
    ///
    /// `SOCK_MEMALLOC` allows a socket to exceed the limits of its buffers. Unlike `sk_clear_memalloc()`,
    /// this does not correct the accounting if it has: the socket has been shut down by now, so nothing
    /// waits for room in it.
    ///
    /// # Safety
    ///
    /// - `sk` must be a valid socket that the caller has locked, and `self` must be from a
    ///   [`Self::change()`] of the same socket.
    /// - The caller must not hold `sk_callback_lock`.
    pub(super) unsafe fn restore(&self, sk: *mut bindings::sock) {
        let flags = flags_of(sk);
        // SAFETY: By this function's safety requirements, `sk` is valid. Only the address of a field is
        // taken.
        let low_water = unsafe { &raw mut (*sk).sk_rcvlowat };
        if !self.is_memalloc {
            // Packets in the backlog, where softirqs put them while the socket is locked, may have been
            // allocated from the reserves. The flag must then stay set (`__sk_backlog_rcv()`). The spin
            // lock keeps softirqs from adding more packets in the meantime.
            // SAFETY: `sk` is valid, so the result is within it.
            let spin_lock = unsafe { sk.byte_add(bindings::OFFSET_SK_SLOCK) }.cast();
            // SAFETY: `sk` is valid, and a task that has locked a socket does not hold its spin lock.
            unsafe { spin_lock_bh(spin_lock) };
            // SAFETY: `sk` is valid, and its spin lock, which protects the backlog, is held.
            if unsafe { (*sk).sk_backlog.tail.is_null() } {
                // SAFETY: By this function's safety requirements, `sk` is valid and locked.
                unsafe { flags.write_volatile(*flags & !MEMALLOC_FLAG) };
            }
            // SAFETY: The lock was taken above.
            unsafe { spin_unlock_bh(spin_lock) };
        }
        // SAFETY: By this function's safety requirements, `sk` is valid and locked, as in `change()`.
        unsafe {
            if (*sk).sk_allocation == ALLOCATION {
                (*sk).sk_allocation = self.allocation;
            }
        }
        // SAFETY: `sk` is valid and locked. `sk_rcvlowat` is also read without the lock, so the access is
        // volatile.
        unsafe {
            if *low_water == 1 {
                low_water.write_volatile(self.low_water_bytes);
            }
        }
    }
}
