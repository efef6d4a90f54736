// SPDX-License-Identifier: GPL-2.0
//! The module's workqueue. Mirrors `kernel::workqueue`, which (7.3) offers only the system's queues,
//! none of which may be relied on to write out dirty memory.

use super::bindings;
use kernel::{
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full},
    workqueue::Queue,
};

static QUEUE: Atomic<*mut bindings::workqueue_struct> = Atomic::new(core::ptr::null_mut());

/// Keeps the module's workqueue. The module drops it last: when nothing is left that could queue work.
pub(crate) struct ModuleQueue(());

impl ModuleQueue {
    /// Makes the workqueue, with a rescuer so that it gets on without memory. May sleep.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        let flags = bindings::wq_flags_WQ_MEM_RECLAIM
            | bindings::wq_flags_WQ_HIGHPRI
            | bindings::wq_flags_WQ_UNBOUND;
        // SAFETY: The name has no format in it; 0 asks for the default number of workers.
        let queue = unsafe { bindings::alloc_workqueue_noprof(name.as_char_ptr(), flags, 0) };
        if queue.is_null() {
            return Err(ENOMEM);
        }
        QUEUE.xchg(queue, Full);
        Ok(ModuleQueue(()))
    }
}

impl Drop for ModuleQueue {
    fn drop(&mut self) {
        let queue = QUEUE.xchg(core::ptr::null_mut(), Full);
        // SAFETY: `new()` made it. This waits until all work in it is over.
        unsafe { bindings::destroy_workqueue(queue) };
    }
}

/// The module's workqueue; the system's while there is none.
pub(crate) fn queue() -> &'static Queue {
    let queue = QUEUE.load(Acquire);
    if queue.is_null() {
        return kernel::workqueue::system();
    }
    // SAFETY: It lives until the module goes, and whoever calls this is gone before that.
    unsafe { Queue::from_raw(queue) }
}
