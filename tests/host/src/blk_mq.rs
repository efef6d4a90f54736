// SPDX-License-Identifier: GPL-2.0
//! Stand-ins for `kapi::block::request`: a request with its two handles, and the block layer behind it.
//!
//! What the driver synchronises with is loom's; what only the test remembers is `std`'s, which loom
//! does not see, so that it adds no interleavings.

use crate::sync::atomic::{Atomic, Full};
use loom::{
    cell::UnsafeCell,
    sync::{
        Condvar,
        atomic::{AtomicU32, Ordering},
    },
};
use std::{
    mem::ManuallyDrop,
    ptr,
    sync::{Arc, Mutex},
};

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nobody has said so: the last handle went without a decision.
    Undecided = 0,
    Complete,
    Fail,
    Requeue,
}

impl Verdict {
    fn of(stored: &AtomicU32) -> Self {
        match stored.load(Ordering::Relaxed) {
            1 => Verdict::Complete,
            2 => Verdict::Fail,
            3 => Verdict::Requeue,
            _ => Verdict::Undecided,
        }
    }
}

/// One tag of the block layer, and the request that has it: one after the other, many.
pub(crate) struct Tag {
    /// Which one it is.
    pub(crate) number: usize,
    handles: AtomicU32,
    verdict: AtomicU32,
    overruled: AtomicU32,
    /// Stands for the request's pages: loom objects to any two uses that nothing orders, so the end
    /// of a request must be ordered after all that the driver did to it.
    pages: UnsafeCell<()>,
    /// The next one in a list.
    next: Atomic<*mut Tag>,
    /// Changes with each end. It orders nothing: it tells loom who depends on whether that has come.
    ended: AtomicU32,
    /// How many ends were not waited for.
    told: loom::sync::Mutex<usize>,
    tell: Condvar,
    history: Mutex<History>,
}

// SAFETY: Only `pages` and the channel are not `Sync` by themselves. There is nothing in `pages`: whether
// its uses are ordered is what loom is there to check. loom runs one thread at a time.
unsafe impl Sync for Tag {}
// SAFETY: As for `Sync`.
unsafe impl Send for Tag {}

#[derive(Default)]
struct History {
    in_flight: bool,
    verdicts: Vec<Verdict>,
}

impl Tag {
    pub(crate) fn new() -> Arc<Tag> {
        Self::numbered(0)
    }

    pub(crate) fn numbered(number: usize) -> Arc<Tag> {
        Arc::new(Tag {
            number,
            handles: AtomicU32::new(0),
            verdict: AtomicU32::new(0),
            overruled: AtomicU32::new(0),
            next: Atomic::new(ptr::null_mut()),
            pages: UnsafeCell::new(()),
            ended: AtomicU32::new(0),
            told: loom::sync::Mutex::new(0),
            tell: Condvar::new(),
            history: Default::default(),
        })
    }

    /// `NewRequest::start()`
    pub(crate) fn start(self: &Arc<Self>) -> (Unsent, Unanswered) {
        let mut history = self.history.lock().unwrap();
        assert!(!history.in_flight, "the tag was given away twice");
        history.in_flight = true;
        drop(history);
        self.pages.with_mut(|_| ());
        self.verdict
            .store(Verdict::Undecided as u32, Ordering::Relaxed);
        self.overruled
            .store(Verdict::Undecided as u32, Ordering::Relaxed);
        self.handles.store(2, Ordering::Release);
        (
            Unsent(Handle(self.clone())),
            Unanswered(Handle(self.clone())),
        )
    }

    /// The last handle is gone.
    fn end(&self) {
        self.pages.with_mut(|_| ());
        let verdict = match Verdict::of(&self.overruled) {
            Verdict::Undecided => Verdict::of(&self.verdict),
            overruled => overruled,
        };
        self.ended.fetch_add(1, Ordering::Relaxed);
        {
            let mut history = self.history.lock().unwrap();
            assert!(history.in_flight, "ended twice");
            history.in_flight = false;
            history.verdicts.push(verdict);
        }
        *self.told.lock().unwrap() += 1;
        self.tell.notify_one();
    }

    /// Waits until the next request has ended, and says how it did. A request that is lost makes this
    /// wait for ever, which loom calls a deadlock.
    pub(crate) fn wait_ended(&self) -> Verdict {
        let mut told = self.told.lock().unwrap();
        while *told == 0 {
            told = self.tell.wait(told).unwrap();
        }
        *told -= 1;
        drop(told);
        *self.history().last().expect("it has just ended")
    }

    /// How each of its requests has ended.
    pub(crate) fn history(&self) -> Vec<Verdict> {
        self.history.lock().unwrap().verdicts.clone()
    }

    /// Which of the tag's requests is in flight, or comes next.
    pub(crate) fn use_number(&self) -> usize {
        self.history.lock().unwrap().verdicts.len()
    }

    /// Whether the block layer has got back one of the tag's requests that was not answered.
    pub(crate) fn was_given_up(&self, use_number: usize) -> bool {
        self.ended.fetch_add(0, Ordering::Relaxed);
        let ended = self.history().get(use_number).copied();
        ended.is_some_and(|verdict| verdict != Verdict::Complete)
    }
}

/// `kapi::block::request::Handle`: one of the two handles of a request in flight.
pub(crate) struct Handle(Arc<Tag>);

impl Handle {
    /// The request's tag.
    pub(crate) fn tag(&self) -> &Arc<Tag> {
        &self.0
    }

    /// Reads the request's data: what sending a write does.
    pub(crate) fn read_pages(&self) {
        self.0.pages.with(|_| ());
    }

    /// Writes the request's data: what receiving the reply to a read does.
    pub(crate) fn write_pages(&self) {
        self.0.pages.with_mut(|_| ());
    }

    fn into_raw(self) -> *mut Tag {
        let handle = ManuallyDrop::new(self);
        // SAFETY: The handle is not used again, so its reference moves to the pointer.
        Arc::into_raw(unsafe { ptr::read(&handle.0) }).cast_mut()
    }

    /// # Safety
    ///
    /// `raw` must have come from [`Self::into_raw()`], once for each call of this.
    unsafe fn from_raw(raw: *mut Tag) -> Self {
        // SAFETY: `into_raw()` has given the reference up, which the caller does not use again.
        Handle(unsafe { Arc::from_raw(raw) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // A model that has failed is over, and loom not to be asked again.
        if std::thread::panicking() {
            return;
        }
        if self.0.handles.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.end();
        }
    }
}

/// `kapi::block::request::Unsent`
pub(crate) struct Unsent(pub(crate) Handle);

impl Unsent {
    /// The request was not wholly sent: it ends so, whatever the other side says.
    pub(crate) fn overrule(self, verdict: Verdict) {
        self.0.0.overruled.store(verdict as u32, Ordering::Relaxed);
    }

    /// `Linked::into_raw()`
    pub(crate) fn into_raw(self) -> *mut Tag {
        self.0.into_raw()
    }

    /// `Linked::from_raw()`
    ///
    /// # Safety
    ///
    /// As of [`Handle::from_raw()`].
    pub(crate) unsafe fn from_raw(raw: *mut Tag) -> Self {
        // SAFETY: The caller promises what is asked for.
        Unsent(unsafe { Handle::from_raw(raw) })
    }

    /// `Linked::next()`
    ///
    /// # Safety
    ///
    /// `raw` must have come from [`Self::into_raw()`] and not have been taken back in `'a`.
    pub(crate) unsafe fn next<'a>(raw: *mut Tag) -> &'a Atomic<*mut Tag> {
        // SAFETY: The reference that `into_raw()` has given up keeps the tag.
        &unsafe { &*raw }.next
    }
}

/// `kapi::block::request::Unanswered`
pub(crate) struct Unanswered(pub(crate) Handle);

impl Unanswered {
    /// Says how the request ends, and lets go of it.
    pub(crate) fn finish(self, verdict: Verdict) {
        self.0.0.verdict.store(verdict as u32, Ordering::Relaxed);
    }
}

/// `kapi::block::parked::Parked`: room for one handle.
pub(crate) struct Parked(Atomic<*mut Tag>);

impl Parked {
    pub(crate) fn empty() -> Self {
        Parked(Atomic::new(ptr::null_mut()))
    }

    fn exchange(&self, new: *mut Tag) -> Option<Unanswered> {
        let old = self.0.xchg(new, Full);
        // SAFETY: It came from `put()`, and nobody else takes it out.
        (!old.is_null()).then(|| Unanswered(unsafe { Handle::from_raw(old) }))
    }

    pub(crate) fn put(&self, request: Unanswered) -> Option<Unanswered> {
        self.exchange(request.0.into_raw())
    }

    pub(crate) fn take(&self) -> Option<Unanswered> {
        self.exchange(ptr::null_mut())
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        drop(self.take());
    }
}
