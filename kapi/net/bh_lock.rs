// SPDX-License-Identifier: GPL-2.0
//! Locks that are held with softirqs disabled: `sk_callback_lock`, and the spin lock of a socket.
//!
//! The locks of the `kernel` crate (7.3) leave softirqs enabled.
//!
//! On PREEMPT_RT the functions of C are inline, and a task that has to wait for one of these locks sleeps. In a
//! callback it does so as an RCU reader, on which unloading relies (`Hooks`): see `InCallback`.
//!
//! C headers: [`include/linux/rwlock.h`](srctree/include/linux/rwlock.h),
//! [`include/linux/rwlock_rt.h`](srctree/include/linux/rwlock_rt.h),
//! [`include/linux/spinlock_rt.h`](srctree/include/linux/spinlock_rt.h)

use crate::kapi::bindings::{
    self,
    rwlock_t,
    spinlock_t, //
};

/// `local_bh_disable()`.
///
/// # Safety
///
/// This task must call [`local_bh_enable()`] later.
#[cfg(CONFIG_PREEMPT_RT)]
unsafe fn local_bh_disable() {
    // The address only tells lockdep and tracers who the caller is.
    let ip = local_bh_disable as usize;
    // SAFETY: By this function's safety requirements, softirqs are enabled again.
    unsafe { bindings::__local_bh_disable_ip(ip, bindings::SOFTIRQ_DISABLE_OFFSET) };
}

/// `local_bh_enable()`.
///
/// # Safety
///
/// This task must have called [`local_bh_disable()`].
#[cfg(CONFIG_PREEMPT_RT)]
unsafe fn local_bh_enable() {
    let ip = local_bh_enable as usize;
    // SAFETY: By this function's safety requirements, this task has disabled softirqs once more than it has
    // enabled them.
    unsafe { bindings::__local_bh_enable_ip(ip, bindings::SOFTIRQ_DISABLE_OFFSET) };
}

/// `read_lock_bh()`.
///
/// # Safety
///
/// - `lock` must be valid until this task calls [`read_unlock_bh()`].
/// - The task must not hold the lock. Until it calls that, it must not sleep, other than for a spin lock on
///   PREEMPT_RT.
pub(super) unsafe fn read_lock_bh(lock: *mut rwlock_t) {
    #[cfg(not(CONFIG_PREEMPT_RT))]
    // SAFETY: By this function's safety requirements.
    unsafe {
        bindings::_raw_read_lock_bh(lock)
    };
    #[cfg(CONFIG_PREEMPT_RT)]
    // SAFETY: By this function's safety requirements. `read_unlock_bh()` enables softirqs again.
    unsafe {
        local_bh_disable();
        bindings::rt_read_lock(lock);
    };
}

/// `read_unlock_bh()`.
///
/// # Safety
///
/// This task must have called [`read_lock_bh()`] with this lock.
pub(super) unsafe fn read_unlock_bh(lock: *mut rwlock_t) {
    #[cfg(not(CONFIG_PREEMPT_RT))]
    // SAFETY: By this function's safety requirements.
    unsafe {
        bindings::_raw_read_unlock_bh(lock)
    };
    #[cfg(CONFIG_PREEMPT_RT)]
    // SAFETY: By this function's safety requirements, `read_lock_bh()` has disabled softirqs and taken the
    // lock.
    unsafe {
        bindings::rt_read_unlock(lock);
        local_bh_enable();
    };
}

/// `write_lock_bh()`.
///
/// # Safety
///
/// - `lock` must be valid until this task calls [`write_unlock_bh()`].
/// - The task must not hold the lock. Until it calls that, it must not sleep, other than for a spin lock on
///   PREEMPT_RT.
pub(super) unsafe fn write_lock_bh(lock: *mut rwlock_t) {
    #[cfg(not(CONFIG_PREEMPT_RT))]
    // SAFETY: By this function's safety requirements.
    unsafe {
        bindings::_raw_write_lock_bh(lock)
    };
    #[cfg(CONFIG_PREEMPT_RT)]
    // SAFETY: By this function's safety requirements. `write_unlock_bh()` enables softirqs again.
    unsafe {
        local_bh_disable();
        bindings::rt_write_lock(lock);
    };
}

/// `write_unlock_bh()`.
///
/// # Safety
///
/// This task must have called [`write_lock_bh()`] with this lock.
pub(super) unsafe fn write_unlock_bh(lock: *mut rwlock_t) {
    #[cfg(not(CONFIG_PREEMPT_RT))]
    // SAFETY: By this function's safety requirements.
    unsafe {
        bindings::_raw_write_unlock_bh(lock)
    };
    #[cfg(CONFIG_PREEMPT_RT)]
    // SAFETY: By this function's safety requirements, `write_lock_bh()` has disabled softirqs and taken the
    // lock.
    unsafe {
        bindings::rt_write_unlock(lock);
        local_bh_enable();
    };
}

/// `spin_lock_bh()`.
///
/// # Safety
///
/// - `lock` must be valid until this task calls [`spin_unlock_bh()`].
/// - The task must not hold the lock. Until it calls that, it must not sleep, other than for a spin lock on
///   PREEMPT_RT.
pub(super) unsafe fn spin_lock_bh(lock: *mut spinlock_t) {
    #[cfg(not(CONFIG_PREEMPT_RT))]
    // SAFETY: By this function's safety requirements.
    unsafe {
        bindings::_raw_spin_lock_bh(lock.cast())
    };
    #[cfg(CONFIG_PREEMPT_RT)]
    // SAFETY: By this function's safety requirements. `spin_unlock_bh()` enables softirqs again.
    unsafe {
        local_bh_disable();
        bindings::rt_spin_lock(lock);
    };
}

/// `spin_unlock_bh()`.
///
/// # Safety
///
/// This task must have called [`spin_lock_bh()`] with this lock.
pub(super) unsafe fn spin_unlock_bh(lock: *mut spinlock_t) {
    #[cfg(not(CONFIG_PREEMPT_RT))]
    // SAFETY: By this function's safety requirements.
    unsafe {
        bindings::_raw_spin_unlock_bh(lock.cast())
    };
    #[cfg(CONFIG_PREEMPT_RT)]
    // SAFETY: By this function's safety requirements, `spin_lock_bh()` has disabled softirqs and taken the
    // lock.
    unsafe {
        bindings::rt_spin_unlock(lock);
        local_bh_enable();
    };
}
