// SPDX-License-Identifier: GPL-2.0
//! The module's workqueues. Mirrors `kernel::workqueue`, which (7.3) offers only the system's queues,
//! none of which may be relied on to write out dirty memory, or can be waited for when a module goes.

use super::bindings;
use kernel::{
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full},
    workqueue::Queue,
};

/// A workqueue of the module.
///
/// # Invariants
///
/// The pointer is null, or a workqueue that lives until the [`Running`] guard goes.
pub(crate) struct ModuleQueue(Atomic<*mut bindings::workqueue_struct>);

/// For sending, receiving and clearing away connections: gets on without memory.
pub(crate) static IO: ModuleQueue = ModuleQueue(Atomic::new(core::ptr::null_mut()));

/// For work that may wait for anything, such as removing a disk.
pub(crate) static SLOW: ModuleQueue = ModuleQueue(Atomic::new(core::ptr::null_mut()));

/// What a workqueue must be able to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Write out dirty memory: it has a rescuer.
    Reclaim,
    /// Nothing special.
    Plain,
}

impl ModuleQueue {
    /// Makes the workqueue. The module drops the guard when nothing is left that could queue work on
    /// it. May sleep.
    pub(crate) fn start(&'static self, name: &'static CStr, kind: Kind) -> Result<Running> {
        let mut flags = bindings::wq_flags_WQ_UNBOUND;
        if kind == Kind::Reclaim {
            flags |= bindings::wq_flags_WQ_MEM_RECLAIM;
        }
        // SAFETY: The name has no format in it; 0 asks for the default number of workers.
        let queue = unsafe { bindings::alloc_workqueue_noprof(name.as_char_ptr(), flags, 0) };
        if queue.is_null() {
            return Err(ENOMEM);
        }
        self.0.xchg(queue, Full);
        Ok(Running(self))
    }

    /// The workqueue; the system's while it is not there.
    pub(crate) fn get(&'static self) -> &'static Queue {
        let queue = self.0.load(Acquire);
        if queue.is_null() {
            return kernel::workqueue::system();
        }
        // SAFETY: By the type invariant it lives until the guard goes, which the module keeps for as
        // long as anything of it can call this.
        unsafe { Queue::from_raw(queue) }
    }
}

/// Keeps a workqueue of the module.
pub(crate) struct Running(&'static ModuleQueue);

impl Drop for Running {
    fn drop(&mut self) {
        let queue = self.0 .0.xchg(core::ptr::null_mut(), Full);
        // SAFETY: `start()` made it. This waits until all work in it is over.
        unsafe { bindings::destroy_workqueue(queue) };
    }
}
