// SPDX-License-Identifier: GPL-2.0
//! Workqueues that belong to the module.
//!
//! Mirrors `kernel::workqueue`, which (7.3) offers only the system's workqueues. Those have no
//! rescuer (`WQ_MEM_RECLAIM`), so code that writes out dirty memory must not depend on them, and a
//! module cannot wait for its own work on them when it is unloaded.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use super::{
    barrier::smp_mb,
    bindings, //
};
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::{
        atomic::Full,
        Arc,
        ArcBorrow,
        Completion, //
    },
    time::Jiffies,
    workqueue::{
        HasDelayedWork,
        HasWork,
        RawWorkItem,
        Work,
        WorkItem, //
    },
};

/// What a workqueue is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// For writing out dirty memory: the workqueue has a rescuer (`WQ_MEM_RECLAIM`).
    Reclaim,
    /// For anything else.
    Plain,
}

/// A workqueue of the module. Code that queues work holds a reference to it.
///
/// # Invariants
///
/// `raw` is a valid workqueue, which is destroyed only after `released` was completed. `drop()`
/// completes it.
pub(crate) struct Queue {
    raw: NonNull<bindings::workqueue_struct>,
    released: Arc<Completion>,
}

// SAFETY: Any task may queue work, and drop a `Queue`.
unsafe impl Send for Queue {}
// SAFETY: Several tasks may queue work at the same time; the locks of the workqueue serialise them.
unsafe impl Sync for Queue {}

impl Queue {
    /// Queues a work item; returns it if it is already queued.
    pub(crate) fn enqueue<W, const ID: u64>(&self, work: W) -> W::EnqueueOutput
    where
        W: RawWorkItem<ID> + Send + 'static,
    {
        self.raw().enqueue(work)
    }

    /// Queues a work item of `object`, unless it is queued already. What the caller has done before is seen when
    /// the work runs, in either case.
    ///
    /// This costs less than [`Self::enqueue()`] where the work is queued already: no reference is taken, and
    /// interrupts stay enabled.
    ///
    /// # Context
    ///
    /// Any context.
    pub(crate) fn enqueue_once<T, const ID: u64>(&self, object: ArcBorrow<'_, T>)
    where
        T: HasWork<T, ID> + WorkItem<ID, Pointer = Arc<T>> + Send + Sync + 'static,
    {
        // As the failing `test_and_set_bit()` of `queue_work()`. Pairs with the barrier behind the clearing of
        // the bit, in `set_work_pool_and_clear_pending()` of kernel/workqueue.c, before the work runs.
        smp_mb(Full);
        if !is_pending::<T, ID>(&object) {
            // If it was queued meanwhile, it will run.
            let _ = self.enqueue::<Arc<T>, ID>(object.into());
        }
    }

    fn raw(&self) -> &kernel::workqueue::Queue {
        // SAFETY: By the type invariant, the workqueue is not destroyed before `self` is dropped.
        unsafe { kernel::workqueue::Queue::from_raw(self.raw.as_ptr()) }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.released.complete_all();
    }
}

/// Returns whether a work item of an object is queued and does not run yet (`work_pending()`).
fn is_pending<T: HasWork<T, ID>, const ID: u64>(object: &T) -> bool {
    // SAFETY: The pointer is that of a valid object.
    let work = unsafe { T::raw_get_work(core::ptr::from_ref(object).cast_mut()) };
    // SAFETY: `work` is a field of the object.
    let work = unsafe { Work::raw_get(work) };
    // SAFETY: `work` is valid. C reads this word without a lock, too, and a word is never read torn.
    let data = unsafe { (&raw const (*work).data.counter).read_volatile() };
    data & (1 << bindings::work_bits_WORK_STRUCT_PENDING_BIT) != 0
}

/// An object with delayed work. It owns a reference to the workqueue, and so keeps the workqueue
/// alive until its timer has expired.
pub(crate) trait HasQueue {
    /// Returns the workqueue on which the object's delayed work is queued.
    fn queue(&self) -> &Queue;
}

/// Queues delayed work of an object on that object's workqueue, after `delay`; returns the object
/// if the work is already queued.
pub(crate) fn enqueue_delayed<T, const ID: u64>(
    work: Arc<T>,
    delay: Jiffies,
) -> core::result::Result<(), Arc<T>>
where
    T: HasQueue + HasDelayedWork<T, ID> + WorkItem<ID, Pointer = Arc<T>> + Send + Sync + 'static,
{
    let queue = work.queue().raw.as_ptr();
    // SAFETY: Until the work is due, its timer refers to the workqueue, and owns a reference to the
    // `T`. `HasQueue::queue()` lends the `Queue` for as long as the `T` exists. By the invariant of
    // `Queue`, the workqueue is not destroyed before that.
    let queue = unsafe { kernel::workqueue::Queue::from_raw(queue) };
    queue.enqueue_delayed(work, delay)
}

/// Cancels delayed work of an object, if its time has not come (`cancel_delayed_work()`). Does not wait for it
/// if it runs already.
pub(crate) fn cancel_delayed<T, const ID: u64>(object: Arc<T>)
where
    T: HasDelayedWork<T, ID> + WorkItem<ID, Pointer = Arc<T>>,
{
    let object = Arc::into_raw(object);
    // SAFETY: The pointer is valid, since the reference is given back only below.
    let work = unsafe { Work::raw_get(T::raw_get_work(object.cast_mut())) };
    // SAFETY: By the safety requirements of `HasDelayedWork`, this is the field `work` of a `struct
    // delayed_work` of the object.
    let cancelled = unsafe {
        bindings::cancel_delayed_work(kernel::container_of!(work, bindings::delayed_work, work))
    };
    // SAFETY: `Arc::into_raw()` has returned the pointer.
    drop(unsafe { Arc::from_raw(object) });
    if cancelled {
        // SAFETY: Whoever queues the work gives it an `Arc` of its object, because that is its `Pointer`. The
        // work would have taken it back, and does not run.
        drop(unsafe { Arc::from_raw(object) });
    }
}

/// The owner of a workqueue, which is destroyed when its owner is dropped.
///
/// # Context
///
/// Dropping it sleeps until all references to the [`Queue`] were dropped and all work is done. It
/// deadlocks if it is dropped by a work item of the same workqueue, or by code that holds such a
/// reference.
pub(crate) struct OwnedQueue {
    // This reference must be dropped before `_workqueue`, which waits for that.
    queue: Arc<Queue>,
    _workqueue: Workqueue,
}

impl OwnedQueue {
    /// Creates a workqueue.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is not enough memory.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(name: &CStr, kind: Kind) -> Result<Self> {
        let released = Arc::pin_init(Completion::new(), GFP_KERNEL)?;
        let mut flags = bindings::wq_flags_WQ_UNBOUND;
        if kind == Kind::Reclaim {
            flags |= bindings::wq_flags_WQ_MEM_RECLAIM;
        }
        let format = c"%s".as_char_ptr();
        // SAFETY: The format takes one string, which follows the 0 that stands for the default
        // limit of concurrent work items.
        let raw = unsafe { bindings::alloc_workqueue_noprof(format, flags, 0, name.as_char_ptr()) };
        let raw = NonNull::new(raw).ok_or(ENOMEM)?;
        // INVARIANT: The workqueue was just created. Only `Workqueue` destroys it, after `released`
        // was completed. If the allocation of the `Queue` fails, the `Queue` is dropped, which
        // completes it.
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

    /// Returns a reference to the workqueue.
    pub(crate) fn queue(&self) -> Arc<Queue> {
        self.queue.clone()
    }
}

/// Destroys a workqueue when it is dropped.
///
/// The last reference to the [`Queue`] cannot do that: it may be dropped in any context, including
/// a work item of the same workqueue, which cannot wait for itself to finish.
///
/// # Invariants
///
/// `raw` is a valid workqueue, which is destroyed only by `drop()`. `released` is completed when
/// the only [`Queue`] that refers to it is dropped.
struct Workqueue {
    raw: NonNull<bindings::workqueue_struct>,
    released: Arc<Completion>,
}

// SAFETY: Any task may destroy a workqueue.
unsafe impl Send for Workqueue {}
// SAFETY: `&Workqueue` has no methods.
unsafe impl Sync for Workqueue {}

impl Drop for Workqueue {
    fn drop(&mut self) {
        self.released.wait_for_completion();
        // SAFETY: By the type invariant, the workqueue is valid. The `Queue` was dropped, so
        // nothing can queue more work, and no delayed work is pending. This call waits for the work
        // that is queued.
        unsafe { bindings::destroy_workqueue(self.raw.as_ptr()) };
    }
}
