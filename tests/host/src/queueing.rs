// SPDX-License-Identifier: GPL-2.0
//! Work that is queued already is not queued again, and nevertheless sees what its caller has done:
//! `kapi/wq.rs`'s `Queue::enqueue_once()`, whose steps are repeated here, against the workqueue's.

use crate::parts::explore;
use loom::{
    sync::atomic::{
        AtomicBool,
        Ordering::{AcqRel, Relaxed, SeqCst},
        fence,
    },
    thread,
};
use std::sync::Arc;

/// A work item that is queued, and what is to be done.
struct Queued {
    pending: AtomicBool,
    to_do: AtomicBool,
}

impl Queued {
    /// Runs the work item (`set_work_pool_and_clear_pending()`). Returns whether it has seen what is to be done.
    fn run(&self) -> bool {
        self.pending.store(false, Relaxed);
        fence(SeqCst);
        self.to_do.load(Relaxed)
    }

    /// Returns whether the work item was queued once more.
    fn enqueue_once(&self, with_barrier: bool) -> bool {
        if with_barrier {
            fence(SeqCst);
        }
        !self.pending.load(Relaxed) && !self.pending.swap(true, AcqRel)
    }
}

fn what_was_done_is_seen(with_barrier: bool) {
    let queued = Arc::new(Queued {
        pending: AtomicBool::new(true),
        to_do: AtomicBool::new(false),
    });
    let worker = {
        let queued = queued.clone();
        thread::spawn(move || queued.run())
    };
    queued.to_do.store(true, Relaxed);
    let again = queued.enqueue_once(with_barrier);
    let seen = worker.join().unwrap();
    assert!(seen || again, "nobody looks");
}

#[test]
fn is_seen_by_who_runs() {
    explore(|| what_was_done_is_seen(true), None);
}

#[test]
#[should_panic(expected = "nobody looks")]
fn a_barrier_must_come_first() {
    explore(|| what_was_done_is_seen(false), None);
}
