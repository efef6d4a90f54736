// SPDX-License-Identifier: GPL-2.0
//! Stand-ins for `kapi::mq`: a request with its two handles, and the block layer behind it.
//!
//! What the driver synchronises with is loom's; what only the test remembers is `std`'s, which loom
//! does not see, so that it adds no interleavings.

use loom::{
    cell::UnsafeCell,
    sync::{
        Mutex, Notify,
        atomic::{AtomicU32, Ordering},
    },
};
use std::sync::Arc;

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nobody has said so: the last handle went without a decision.
    Undecided = 0,
    Complete,
    Fail,
    Requeue,
}

/// One tag of the block layer, and the request that has it: one after the other, many.
pub(crate) struct Tag {
    handles: AtomicU32,
    verdict: AtomicU32,
    /// Stands for the request's pages: loom objects to any two uses that nothing orders, so the end
    /// of a request must be ordered after all that the driver did to it.
    pages: UnsafeCell<()>,
    ended: AtomicU32,
    wake: Notify,
    history: std::sync::Mutex<History>,
}

// SAFETY: Only `pages` is not `Sync` by itself, and there is nothing in it: whether its uses are ordered
// is what loom is there to check.
unsafe impl Sync for Tag {}

#[derive(Default)]
struct History {
    in_flight: bool,
    verdicts: Vec<Verdict>,
}

impl Tag {
    pub(crate) fn new() -> Arc<Tag> {
        Arc::new(Tag {
            handles: AtomicU32::new(0),
            verdict: AtomicU32::new(0),
            pages: UnsafeCell::new(()),
            ended: AtomicU32::new(0),
            wake: Notify::new(),
            history: Default::default(),
        })
    }

    /// `NewRequest::start()`: one handle for the transmit side, one for the other side.
    pub(crate) fn start(self: &Arc<Self>) -> (Request, Request) {
        let mut history = self.history.lock().unwrap();
        assert!(!history.in_flight, "the tag was given away twice");
        history.in_flight = true;
        drop(history);
        self.pages.with_mut(|_| ());
        self.verdict
            .store(Verdict::Undecided as u32, Ordering::Relaxed);
        self.handles.store(2, Ordering::Release);
        (Request(self.clone()), Request(self.clone()))
    }

    /// The last handle is gone.
    fn end(&self) {
        self.pages.with_mut(|_| ());
        let verdict = match self.verdict.load(Ordering::Relaxed) {
            1 => Verdict::Complete,
            2 => Verdict::Fail,
            3 => Verdict::Requeue,
            _ => Verdict::Undecided,
        };
        {
            let mut history = self.history.lock().unwrap();
            assert!(history.in_flight, "ended twice");
            history.in_flight = false;
            history.verdicts.push(verdict);
        }
        self.ended.fetch_add(1, Ordering::Release);
        self.wake.notify();
    }

    /// Waits until as many requests have ended, and says how the last of them did. A request that is
    /// lost makes this wait for ever, which loom calls a deadlock.
    pub(crate) fn wait_ended(&self, count: u32) -> Verdict {
        while self.ended.load(Ordering::Acquire) < count {
            self.wake.wait();
        }
        *self.history().last().expect("it has just ended")
    }

    /// How each of its requests has ended.
    pub(crate) fn history(&self) -> Vec<Verdict> {
        self.history.lock().unwrap().verdicts.clone()
    }
}

/// `kapi::mq::Request`: a handle to a request in flight.
pub(crate) struct Request(Arc<Tag>);

impl Request {
    /// Reads the request's data: what sending a write does.
    pub(crate) fn read_pages(&self) {
        self.0.pages.with(|_| ());
    }

    /// Writes the request's data: what receiving the reply to a read does.
    pub(crate) fn write_pages(&self) {
        self.0.pages.with_mut(|_| ());
    }

    /// Says how the request ends, and lets go of it.
    pub(crate) fn decide(self, verdict: Verdict) {
        self.0.verdict.store(verdict as u32, Ordering::Relaxed);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // A model that has failed is over, and loom not to be asked again.
        if std::thread::panicking() {
            return;
        }
        if self.0.handles.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.end();
        }
    }
}

/// `kapi::mq::Parked`: room for one handle.
pub(crate) struct Parked(Mutex<Option<Request>>);

impl Parked {
    pub(crate) fn empty() -> Self {
        Parked(Mutex::new(None))
    }

    pub(crate) fn put(&self, request: Request) -> Option<Request> {
        self.0.lock().unwrap().replace(request)
    }

    pub(crate) fn take(&self) -> Option<Request> {
        self.0.lock().unwrap().take()
    }
}
