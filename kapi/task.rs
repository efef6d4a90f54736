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
pub(crate) fn current_sleeps() -> usize {
    // SAFETY: Only the task itself writes the number.
    unsafe { (*bindings::get_current()).nvcsw }
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
pub(crate) fn without_io<R>(f: impl FnOnce() -> R) -> R {
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
