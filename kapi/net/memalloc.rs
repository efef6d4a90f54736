// SPDX-License-Identifier: GPL-2.0
//! Sockets that memory is written out over: what they may allocate, and how.
//!
//! Source: `sk_set_memalloc()` in `net/core/sock.c`. It is not called itself, because it takes the lock of
//! the static key for each socket, which waits while a processor is being taken away.

use crate::kapi::bindings;
#[cfg(not(CONFIG_JUMP_LABEL))]
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// Has the network stack look for sockets that may dip into the reserves of memory
/// (`memalloc_socks_key`), until it is dropped.
pub(super) struct MemallocSockets(());

impl MemallocSockets {
    /// May sleep, and wait for a processor that is being taken away.
    pub(super) fn begin() -> Self {
        // SAFETY: The key lives as long as the kernel.
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
        // SAFETY: `begin()` has counted up.
        #[cfg(CONFIG_JUMP_LABEL)]
        unsafe {
            bindings::static_key_slow_dec(memalloc_key())
        };
        #[cfg(not(CONFIG_JUMP_LABEL))]
        enabled().fetch_sub(1, Relaxed);
    }
}

fn memalloc_key() -> *mut bindings::static_key {
    // kernel::bindings' and our `struct static_key` are the same type in C.
    (&raw mut bindings::memalloc_socks_key).cast()
}

/// What a static key is without jump labels.
#[cfg(not(CONFIG_JUMP_LABEL))]
fn enabled() -> &'static Atomic<i32> {
    // SAFETY: The key lives as long as the kernel, and C uses the counter atomically only.
    unsafe { Atomic::from_ptr(&raw mut (*memalloc_key()).enabled.counter) }
}

/// How a socket was before it was made fit for its owner.
pub(super) struct Settings {
    allocation: u32,
    uses_task_frag: bool,
    is_memalloc: bool,
    low_water_bytes: i32,
}

const ALLOCATION: u32 = bindings::GFP_NOIO | bindings::__GFP_MEMALLOC;
const MEMALLOC_FLAG: usize = 1 << bindings::SOCK_MEMALLOC;

/// `sk_flags`
fn flags_of(sk: *mut bindings::sock) -> *mut usize {
    sk.wrapping_byte_add(bindings::OFFSET_SK_FLAGS).cast()
}

impl Settings {
    /// Makes a socket fit for its owner. It is to write out dirty memory, so it may dip into the reserves,
    /// and its allocations never wait for I/O (as nbd.c's `__sock_xmit()` and `nbd_start_device()`). It
    /// tells of every byte, whatever `SO_RCVLOWAT` was. [`MemallocSockets`] must be there for all of it to
    /// have an effect.
    ///
    /// # Safety
    ///
    /// `sk` must be a socket that the caller has locked.
    pub(super) unsafe fn change(sk: *mut bindings::sock) -> Self {
        // SAFETY: The caller promises that `sk` is valid and locked, as it is for whoever else changes these.
        // `sk_flags` and `sk_rcvlowat` are read without the lock, too.
        unsafe {
            let flags = flags_of(sk);
            let low_water = &raw mut (*sk).sk_rcvlowat;
            let was = Settings {
                allocation: (*sk).sk_allocation,
                uses_task_frag: (*sk).sk_use_task_frag,
                is_memalloc: *flags & MEMALLOC_FLAG != 0,
                low_water_bytes: *low_water,
            };
            flags.write_volatile(*flags | MEMALLOC_FLAG);
            (*sk).sk_allocation = ALLOCATION;
            (*sk).sk_use_task_frag = false;
            low_water.write_volatile(1);
            was
        }
    }

    /// Gives a socket back what it had, but for what somebody else has changed since. A socket that has
    /// taken more than it may hold keeps that: it is ended by now, so nothing waits for room in it.
    ///
    /// # Safety
    ///
    /// As for [`Self::change()`], which must have returned this for the same `sk`. `sk_callback_lock` must not
    /// be held.
    pub(super) unsafe fn restore(&self, sk: *mut bindings::sock) {
        // SAFETY: The caller promises that `sk` is valid and locked, as in `change()`. Its spin lock is not held
        // by a task that has locked it.
        unsafe {
            let flags = flags_of(sk);
            let low_water = &raw mut (*sk).sk_rcvlowat;
            if !self.is_memalloc {
                // What softirqs have put aside because the socket is locked may be from the reserves, and
                // then the flag has to stay (`__sk_backlog_rcv()`). They put nothing there meanwhile.
                let spin_lock = sk.byte_add(bindings::OFFSET_SK_SLOCK).cast();
                bindings::_raw_spin_lock_bh(spin_lock);
                if (*sk).sk_backlog.tail.is_null() {
                    flags.write_volatile(*flags & !MEMALLOC_FLAG);
                }
                bindings::_raw_spin_unlock_bh(spin_lock);
            }
            if (*sk).sk_allocation == ALLOCATION {
                (*sk).sk_allocation = self.allocation;
            }
            (*sk).sk_use_task_frag = self.uses_task_frag;
            if *low_water == 1 {
                low_water.write_volatile(self.low_water_bytes);
            }
        }
    }
}
