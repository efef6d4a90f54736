// SPDX-License-Identifier: GPL-2.0
//! The current task, the module's own references, and time.

use super::bindings;
use kernel::prelude::*;

/// Whether the current task may administer the system (`capable(CAP_SYS_ADMIN)`).
pub(crate) fn may_administer() -> bool {
    // SAFETY: Looks at the current task only.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as i32) }
}

/// Which task this is. Only to be compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskId(pub(crate) usize);

impl TaskId {
    /// The current task.
    pub(crate) fn current() -> Self {
        TaskId(kernel::task::Task::current_raw().addr())
    }
}

/// How often the current task has gone to sleep, rather than been made to wait (`nvcsw`).
pub(crate) fn voluntary_switches() -> usize {
    // SAFETY: Only the task itself writes the number.
    unsafe { (*bindings::get_current()).nvcsw }
}

/// Whether the current task may sleep here, for certain (`preemptible()`, and outside of RCU readers). Where
/// that cannot be told it says no: in kernels that do not count what forbids it (`CONFIG_PREEMPT_COUNT`), and
/// on machines that nobody has written this for.
pub(crate) fn may_sleep() -> bool {
    preempt_count() == Some(0) && interrupts_are_on() && !in_rcu_reader()
}

/// Whether this is the handler of a hardware interrupt (`in_hardirq()`). No where that cannot be told.
pub(crate) fn in_hardirq() -> bool {
    // `HARDIRQ_MASK`: the four bits above eight for preemption and eight for softirqs.
    const HARDIRQ_MASK: u32 = 0xf << 16;
    preempt_count().is_some_and(|count| count & HARDIRQ_MASK != 0)
}

/// What forbids to sleep: disabled preemption, softirqs, interrupts (`preempt_count()`).
#[cfg(all(CONFIG_X86_64, not(CONFIG_UML), CONFIG_PREEMPT_COUNT))]
fn preempt_count() -> Option<u32> {
    // The top bit of the variable is PREEMPT_NEED_RESCHED, inverted.
    const COUNT_MASK: u32 = if cfg!(CONFIG_HAS_SEPARATE_PREEMPT_RESCHED_BITS) {
        // The variable has 64 bits then, of which the lower half is the count.
        u32::MAX
    } else {
        u32::MAX >> 1
    };
    let count: u32;
    // SAFETY: Reads the processor's own variable in one instruction, as C does. If the task is moved to another
    // processor before it is looked at, preemption was enabled on both.
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

/// In a Xen PV guest the flag is elsewhere and this always says yes. There, as everywhere, a socket's callback
/// must not be called with interrupts disabled, since it enables softirqs.
#[cfg(all(CONFIG_X86_64, not(CONFIG_UML), CONFIG_PREEMPT_COUNT))]
fn interrupts_are_on() -> bool {
    const INTERRUPT_FLAG: u64 = 1 << 9;
    let flags: u64;
    // SAFETY: Copies a register by way of the stack (`native_save_fl()`).
    unsafe {
        core::arch::asm!("pushfq", "pop {}", out(reg) flags, options(preserves_flags));
    }
    flags & INTERRUPT_FLAG != 0
}

#[cfg(not(all(CONFIG_X86_64, not(CONFIG_UML), CONFIG_PREEMPT_COUNT)))]
fn preempt_count() -> Option<u32> {
    None
}

#[cfg(not(all(CONFIG_X86_64, not(CONFIG_UML), CONFIG_PREEMPT_COUNT)))]
fn interrupts_are_on() -> bool {
    false
}

/// `rcu_preempt_depth() != 0`. Where readers cannot be preempted they count as disabled preemption.
fn in_rcu_reader() -> bool {
    #[cfg(CONFIG_PREEMPT_RCU)]
    // SAFETY: Only the task itself writes the number.
    return unsafe { (*bindings::get_current()).rcu_read_lock_nesting } != 0;
    #[cfg(not(CONFIG_PREEMPT_RCU))]
    false
}

/// The current task's number in the initial namespace (`task_pid_nr()`).
pub(crate) fn current_pid() -> i32 {
    current!().pid()
}

/// The time, in jiffies. Wraps.
pub(crate) fn jiffies() -> usize {
    // SAFETY: The timer interrupt writes it; a torn read is impossible.
    unsafe { (&raw const bindings::jiffies).read_volatile() }
}

/// Until when something is waited for.
pub(crate) struct Deadline(usize);

impl Deadline {
    /// So many seconds from now; at most as many as half the range of `jiffies` has.
    pub(crate) fn after_seconds(seconds: u32) -> Self {
        Deadline(jiffies().wrapping_add(seconds as usize * HZ as usize))
    }

    /// How many jiffies are left; 0 where it has passed.
    pub(crate) fn jiffies_left(&self) -> usize {
        let left = self.0.wrapping_sub(jiffies()) as isize;
        left.max(0) as usize
    }
}

/// Runs `f` so that no allocation in it waits for I/O (`memalloc_noio_save()`).
pub(crate) fn memalloc_noio<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: The current task changes its own flags, and puts them back.
    unsafe {
        let task = bindings::get_current();
        let had_noio = (*task).flags & bindings::PF_MEMALLOC_NOIO;
        (*task).flags |= bindings::PF_MEMALLOC_NOIO;
        let result = f();
        (*task).flags = (*task).flags & !bindings::PF_MEMALLOC_NOIO | had_noio;
        result
    }
}

/// How many jiffies a second has.
pub(crate) const HZ: u32 = bindings::HZ;

/// Keeps the module loaded.
pub(crate) struct ModuleRef(());

impl ModuleRef {
    /// Takes a reference, unless the module is about to go (`try_module_get(THIS_MODULE)`).
    pub(crate) fn get() -> Option<Self> {
        // SAFETY: The module exists while its code runs.
        let got =
            unsafe { bindings::try_module_get((&raw const bindings::__this_module).cast_mut()) };
        // Not made where it was not got, since it is put back when it is dropped.
        got.then(|| ModuleRef(()))
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: `get()` took the reference.
        unsafe { bindings::module_put((&raw const bindings::__this_module).cast_mut()) };
    }
}
