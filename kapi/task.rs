// SPDX-License-Identifier: GPL-2.0
//! The current task, its context and flags; time in jiffies; references to the module.
//!
//! Extends `kernel::task`, which (7.3) has neither capabilities nor the preemption count nor the
//! allocation flags of a task; `kernel::time`, which cannot read the jiffies counter; and
//! `kernel::ThisModule`, which has no reference count.
//!
//! C header: [`include/linux/sched.h`](srctree/include/linux/sched.h)
//! C header: [`include/linux/preempt.h`](srctree/include/linux/preempt.h)
//! C header: [`include/linux/jiffies.h`](srctree/include/linux/jiffies.h)

use super::bindings;
use kernel::{
    prelude::*,
    task::Task, //
};

/// Returns whether the current task may administer the system (`capable(CAP_SYS_ADMIN)`).
pub(crate) fn may_administer() -> bool {
    // SAFETY: `capable()` only looks at the current task.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as i32) }
}

/// The identity of a task. It is only meant to be compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskId(pub(crate) usize);

impl TaskId {
    /// Returns the identity of the current task.
    pub(crate) fn current() -> Self {
        TaskId(Task::current_raw().addr())
    }

    /// Returns the identity of the current process: that of its first thread.
    pub(crate) fn current_process() -> Self {
        // SAFETY: The current task is valid, and so is the leader of its thread group while it runs.
        TaskId(unsafe { (*Task::current_raw()).group_leader }.addr())
    }
}

/// Returns whether the current task was killed and does not return to user space any more
/// (`fatal_signal_pending()`).
pub(crate) fn is_killed() -> bool {
    // SAFETY: The current task is valid. Others set bits of the pending signals meanwhile; C reads
    // them without a lock, too.
    let pending = unsafe {
        let task = Task::current_raw();
        (&raw const (*task).pending.signal.sig[0]).read_volatile()
    };
    pending & (1 << (bindings::SIGKILL - 1)) != 0
}

/// Returns whether the current task is exiting (`PF_EXITING`), as it is when its files are closed
/// at its end.
pub(crate) fn is_exiting() -> bool {
    // SAFETY: The current task is valid. Only the task itself changes its flags, and softirqs that
    // interrupt it, which restore them.
    unsafe { (*Task::current_raw()).flags & bindings::PF_EXITING != 0 }
}

/// Returns how many times the current task has gone to sleep by itself, as opposed to being
/// preempted (`nvcsw`). On PREEMPT_RT this includes waits for spin locks.
pub(crate) fn voluntary_switches() -> usize {
    // SAFETY: The current task is valid, and nothing but the task itself writes this counter.
    unsafe { (*bindings::get_current()).nvcsw }
}

/// Returns whether the current context is certainly allowed to sleep: it is preemptible
/// (`preemptible()`) and outside of any RCU read-side critical section.
///
/// Returns false if that is unknown: in kernels without a preemption count
/// (`CONFIG_PREEMPT_COUNT`), and on architectures other than x86-64.
pub(crate) fn may_sleep() -> bool {
    preempt_count() == Some(0) && interrupts_are_on() && !in_rcu_reader()
}

/// Returns whether this is the handler of a hardware interrupt (`in_hardirq()`); false if that is
/// unknown.
pub(crate) fn in_hardirq() -> bool {
    preempt_count().is_some_and(|count| count & bindings::HARDIRQ_MASK != 0)
}

/// Returns `preempt_count()`, which is not 0 where preemption is disabled, and in softirq,
/// interrupt and NMI context; `None` if it is unknown.
#[cfg(all(CONFIG_X86_64, not(CONFIG_UML), CONFIG_PREEMPT_COUNT))]
fn preempt_count() -> Option<u32> {
    // The most significant bit of the variable is `PREEMPT_NEED_RESCHED`, inverted.
    const COUNT_MASK: u32 = if cfg!(CONFIG_HAS_SEPARATE_PREEMPT_RESCHED_BITS) {
        // Here the variable has 64 bits, and its lower half is the count.
        u32::MAX
    } else {
        u32::MAX >> 1
    };
    let count: u32;
    // SAFETY: Reads a per-CPU variable in a single instruction, as the C function does. If the task
    // migrates to another CPU before it uses the value, preemption was enabled, so the count is 0
    // on both.
    unsafe {
        core::arch::asm!(
            "mov {:e}, dword ptr gs:[rip + {}]",
            out(reg) count,
            sym bindings::__preempt_count,
            options(nostack, preserves_flags, readonly)
        );
    }
    Some(count & COUNT_MASK)
}

/// Returns whether interrupts are enabled (`!irqs_disabled()`).
///
/// A Xen PV guest keeps this flag elsewhere, so here the function always returns true. That does no
/// harm: a socket's callback must not be called with interrupts disabled anyway, on any machine,
/// since it enables softirqs.
#[cfg(all(CONFIG_X86_64, not(CONFIG_UML), CONFIG_PREEMPT_COUNT))]
fn interrupts_are_on() -> bool {
    const INTERRUPT_FLAG: u64 = 1 << 9;
    let flags: u64;
    // SAFETY: Copies the flags register by way of the stack, as `native_save_fl()` does.
    unsafe {
        core::arch::asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags));
    }
    flags & INTERRUPT_FLAG != 0
}

/// Returns `preempt_count()`, as on x86-64.
#[cfg(all(CONFIG_ARM64, CONFIG_PREEMPT_COUNT))]
fn preempt_count() -> Option<u32> {
    // SAFETY: The current task is valid. Only the task itself and interrupts that interrupt it, which restore
    // it, write its count.
    Some(unsafe {
        let info = &raw const (*bindings::get_current()).thread_info;
        (&raw const (*info).__bindgen_anon_1.preempt.count).read_volatile()
    })
}

#[cfg(not(all(
    any(CONFIG_ARM64, all(CONFIG_X86_64, not(CONFIG_UML))),
    CONFIG_PREEMPT_COUNT
)))]
fn preempt_count() -> Option<u32> {
    None
}

#[cfg(not(all(CONFIG_X86_64, not(CONFIG_UML), CONFIG_PREEMPT_COUNT)))]
fn interrupts_are_on() -> bool {
    false
}

/// Returns whether this is an RCU read-side critical section (`rcu_preempt_depth() != 0`). If
/// readers are not preemptible, they count as disabled preemption instead.
fn in_rcu_reader() -> bool {
    #[cfg(CONFIG_PREEMPT_RCU)]
    // SAFETY: The current task is valid, and nothing but the task itself writes this counter.
    return unsafe { (*bindings::get_current()).rcu_read_lock_nesting } != 0;
    #[cfg(not(CONFIG_PREEMPT_RCU))]
    false
}

/// Returns the current task's PID in the initial PID namespace (`task_pid_nr()`).
pub(crate) fn current_pid() -> i32 {
    current!().pid()
}

/// Returns the time in jiffies, which wraps around.
pub(crate) fn jiffies() -> usize {
    // SAFETY: `jiffies` is always valid. The timer interrupt writes it, but a word is never read
    // torn.
    unsafe { (&raw const bindings::jiffies).read_volatile() }
}

/// Returns a number of jiffies in milliseconds.
pub(crate) fn jiffies_to_ms(jiffies: usize) -> u64 {
    (jiffies as u64).saturating_mul(1000) / u64::from(HZ)
}

/// Converts seconds to jiffies.
pub(crate) fn seconds_to_jiffies(seconds: u64) -> u64 {
    seconds.saturating_mul(u64::from(HZ))
}

/// Converts milliseconds to jiffies, rounding up.
pub(crate) fn ms_to_jiffies(ms: u64) -> u64 {
    ms.saturating_mul(u64::from(HZ)).div_ceil(1000)
}

/// A point in time at which a wait ends, in jiffies.
pub(crate) struct Deadline(usize);

impl Deadline {
    /// Returns the time `seconds` from now. That must be less than half the range of `jiffies`.
    pub(crate) fn after_seconds(seconds: u32) -> Self {
        Deadline(jiffies().wrapping_add(seconds as usize * HZ as usize))
    }

    /// Returns the number of jiffies left; 0 if the deadline has passed.
    pub(crate) fn jiffies_left(&self) -> usize {
        let left = self.0.wrapping_sub(jiffies()) as isize;
        left.max(0) as usize
    }
}

/// Runs `f` so that its memory allocations do not wait for I/O.
///
/// Takes the place of `memalloc_noio_save()` and `memalloc_noio_restore()` around `f`.
pub(crate) fn memalloc_noio<R>(f: impl FnOnce() -> R) -> R {
    let flags = memalloc_noio_save();
    let result = f();
    memalloc_noio_restore(flags);
    result
}

/// Runs `f` so that its memory allocations may use the memory reserves, and fail instead of starting
/// reclaim.
///
/// Takes the place of `memalloc_noreclaim_save()` and `memalloc_noreclaim_restore()` around `f`.
pub(crate) fn memalloc_noreclaim<R>(f: impl FnOnce() -> R) -> R {
    let task = Task::current_raw();
    // SAFETY: The current task is valid. Only the task itself changes its flags, and softirqs that
    // interrupt it, which restore them.
    let had = unsafe {
        let had = (*task).flags & bindings::PF_MEMALLOC;
        (*task).flags |= bindings::PF_MEMALLOC;
        had
    };
    let result = f();
    // SAFETY: The current task is still valid and the same. Only it changes its flags, and softirqs that
    // interrupt it, which restore them.
    unsafe { (*task).flags = (*task).flags & !bindings::PF_MEMALLOC | had };
    result
}

/// Keeps memory allocations of the current task from waiting for I/O (`memalloc_noio_save()`).
///
/// Returns the state to be passed to [`memalloc_noio_restore()`].
pub(super) fn memalloc_noio_save() -> u32 {
    let task = Task::current_raw();
    // SAFETY: The current task is valid. Only the task itself changes its flags, and softirqs that
    // interrupt it, which restore them.
    unsafe {
        let old = (*task).flags & bindings::PF_MEMALLOC_NOIO;
        (*task).flags |= bindings::PF_MEMALLOC_NOIO;
        old
    }
}

/// Restores what [`memalloc_noio_save()`] changed. The same task must call it.
pub(super) fn memalloc_noio_restore(old: u32) {
    let task = Task::current_raw();
    // SAFETY: As in `memalloc_noio_save()`.
    unsafe { (*task).flags = (*task).flags & !bindings::PF_MEMALLOC_NOIO | old };
}

/// The number of jiffies per second.
pub(crate) const HZ: u32 = bindings::HZ;

/// A reference to this module, which keeps it loaded.
pub(crate) struct ModuleRef(());

impl ModuleRef {
    /// Takes a reference, unless the module is being unloaded (`try_module_get(THIS_MODULE)`).
    pub(crate) fn get() -> Option<Self> {
        // SAFETY: The module exists while its code runs.
        let got =
            unsafe { bindings::try_module_get((&raw const bindings::__this_module).cast_mut()) };
        // Dropping a `ModuleRef` drops a reference, so one must not be created, not even for a
        // moment, where no reference was taken.
        got.then(|| ModuleRef(()))
    }
}

impl Clone for ModuleRef {
    fn clone(&self) -> Self {
        // SAFETY: `self` holds a reference, so the module is not being unloaded.
        unsafe { bindings::__module_get((&raw const bindings::__this_module).cast_mut()) };
        ModuleRef(())
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: `get()` took the reference.
        unsafe { bindings::module_put((&raw const bindings::__this_module).cast_mut()) };
    }
}
