// SPDX-License-Identifier: GPL-2.0
//! The module's workqueues. Mirrors `kernel::workqueue`, which (7.3) offers only the system's queues,
//! none of which may be relied on to write out dirty memory, or can be waited for when a module goes.

use super::bindings;
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::{
        Arc,
        Completion, //
    },
    time::Jiffies,
    workqueue::{
        HasDelayedWork,
        RawWorkItem,
        WorkItem, //
    },
};

/// What a workqueue must be able to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Write out dirty memory: it has a rescuer.
    Reclaim,
    /// Nothing special.
    Plain,
}

/// A workqueue. Whoever may queue work holds a reference.
///
/// # Invariants
///
/// `raw` is a workqueue that is destroyed only after `released` has completed, which `drop` does.
pub(crate) struct Queue {
    raw: NonNull<bindings::workqueue_struct>,
    released: Arc<Completion>,
}

// SAFETY: Every task may queue work, and let go of a workqueue.
unsafe impl Send for Queue {}
// SAFETY: Several tasks may queue work at a time; the workqueue's own locks protect it.
unsafe impl Sync for Queue {}

impl Queue {
    /// Queues work; gives it back where it is queued already.
    pub(crate) fn enqueue<W, const ID: u64>(&self, work: W) -> W::EnqueueOutput
    where
        W: RawWorkItem<ID> + Send + 'static,
    {
        self.raw().enqueue(work)
    }

    fn raw(&self) -> &kernel::workqueue::Queue {
        // SAFETY: By the type invariant it is not destroyed before `self` is dropped.
        unsafe { kernel::workqueue::Queue::from_raw(self.raw.as_ptr()) }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.released.complete_all();
    }
}

/// What can be queued for later: it knows its workqueue, and so keeps it until then.
pub(crate) trait HasQueue {
    /// The workqueue.
    fn queue(&self) -> &Queue;
}

/// Queues work on its workqueue in `delay`; gives it back where it is queued already.
pub(crate) fn enqueue_delayed<T, const ID: u64>(
    work: Arc<T>,
    delay: Jiffies,
) -> core::result::Result<(), Arc<T>>
where
    T: HasQueue + HasDelayedWork<T, ID> + WorkItem<ID, Pointer = Arc<T>> + Send + Sync + 'static,
{
    let queue = work.queue().raw.as_ptr();
    // SAFETY: A timer refers to the workqueue until the work is due, and until then owns a reference to
    // the `T`. `HasQueue::queue()` has lent the `Queue` for as long as there is one, and by the type
    // invariant the workqueue is not destroyed before the `Queue` is dropped.
    let queue = unsafe { kernel::workqueue::Queue::from_raw(queue) };
    queue.enqueue_delayed(work, delay)
}

/// Keeps a workqueue. When it goes, it waits until nobody has a [`Queue`] of it any more and all work is
/// over. So it must not go in work of that queue, or where a reference is held: it would wait for ever.
pub(crate) struct OwnedQueue {
    // It goes before the workqueue, which waits for that.
    queue: Arc<Queue>,
    _workqueue: Workqueue,
}

impl OwnedQueue {
    /// Makes a workqueue, which goes with the guard that is returned. May sleep.
    pub(crate) fn new(name: &CStr, kind: Kind) -> Result<Self> {
        let released = Arc::pin_init(Completion::new(), GFP_KERNEL)?;
        let mut flags = bindings::wq_flags_WQ_UNBOUND;
        if kind == Kind::Reclaim {
            flags |= bindings::wq_flags_WQ_MEM_RECLAIM;
        }
        let format = c"%s".as_char_ptr();
        // SAFETY: The format asks for one string, which follows 0 for the default number of workers.
        let raw = unsafe { bindings::alloc_workqueue_noprof(format, flags, 0, name.as_char_ptr()) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        // INVARIANT: It was made just now, and only the guard destroys it, when `released` has completed.
        // Where there is no memory for the `Queue`, that is dropped.
        let workqueue = Workqueue {
            raw,
            released: released.clone(),
        };
        let queue = Arc::new(Queue { raw, released }, GFP_KERNEL)?;
        Ok(OwnedQueue {
            queue,
            _workqueue: workqueue,
        })
    }

    /// The workqueue.
    pub(crate) fn queue(&self) -> Arc<Queue> {
        self.queue.clone()
    }
}

/// A workqueue that is destroyed when this goes. Not by the last [`Queue`]: that may go anywhere, also in
/// work of the workqueue itself, which could not wait for its own end.
///
/// # Invariants
///
/// `raw` is a workqueue that is destroyed only here; `released` completes when the only [`Queue`] of it
/// is dropped.
struct Workqueue {
    raw: NonNull<bindings::workqueue_struct>,
    released: Arc<Completion>,
}

// SAFETY: Every task may destroy a workqueue.
unsafe impl Send for Workqueue {}
// SAFETY: `&Workqueue` offers nothing.
unsafe impl Sync for Workqueue {}

impl Drop for Workqueue {
    fn drop(&mut self) {
        self.released.wait_for_completion();
        // SAFETY: By the type invariant nobody has destroyed it, and nobody can queue work on it any more
        // or has it queued later, since the `Queue` was dropped. This waits for the work that is queued.
        unsafe { bindings::destroy_workqueue(self.raw.as_ptr()) };
    }
}
