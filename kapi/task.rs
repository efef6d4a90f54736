// SPDX-License-Identifier: GPL-2.0
//! The current task, and time.

use super::bindings;
use kernel::prelude::*;

/// Whether the current task may administer the system (`capable(CAP_SYS_ADMIN)`).
pub(crate) fn may_administer() -> bool {
    // SAFETY: Looks at the current task only.
    unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as i32) }
}

/// Which task this is. Only to be compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskId(usize);

impl TaskId {
    /// The current task.
    pub(crate) fn current() -> Self {
        TaskId(kernel::task::Task::current_raw().addr())
    }
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

/// How many jiffies a second has.
pub(crate) const HZ: u32 = bindings::HZ;
