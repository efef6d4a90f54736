// SPDX-License-Identifier: GPL-2.0
//! Whether a session goes on: `pure/fate.rs` by itself, in all interleavings.

use crate::{
    parts::{Fates, Parts, Snapshots, models},
    sync::atomic::{Acquire, Atomic, Release},
};
use loom::thread;
use std::sync::Arc;

/// A request looks for a connection while one comes back: it finds that one, or has failed before it came,
/// but it does not end the session. Here nobody waits for the requests that look.
pub(crate) fn a_connection_comes_back<P: Parts>() {
    let shared = Arc::new((P::Fate::new(), Atomic::new(false)));
    let reconnecting = {
        let shared = shared.clone();
        thread::spawn(move || {
            shared.1.store(true, Release);
            shared.0.revive();
        })
    };
    let (fate, connection_lives) = &*shared;
    // One that fails, and one that comes later.
    for _ in 0..2 {
        loop {
            let seen = fate.snapshot();
            let found = !seen.is_over() && connection_lives.load(Acquire);
            if found || fate.exhaust(seen) {
                break;
            }
        }
    }
    reconnecting.join().unwrap();
    let over = fate.snapshot().is_over();
    assert!(!over, "it is over although a connection lives");
}

/// What happens at the same time happens.
pub(crate) fn nothing_is_overwritten<P: Parts>() {
    let fate = Arc::new(P::Fate::new());
    assert!(fate.exhaust(fate.snapshot()));
    let user = {
        let fate = fate.clone();
        thread::spawn(move || fate.request_disconnect())
    };
    fate.revive();
    user.join().unwrap();
    let seen = fate.snapshot();
    let both = seen.is_end_wanted() && !seen.is_over();
    assert!(both, "a change is lost");
}

/// The session is ended once, whoever does it.
fn it_ends_once<P: Parts>() {
    let fate = Arc::new(P::Fate::new());
    let other = {
        let fate = fate.clone();
        thread::spawn(move || fate.end())
    };
    let news = fate.end();
    assert!(news != other.join().unwrap());
    assert!(fate.snapshot().is_over());
    assert!(!fate.end(), "it was ended before");
    // Whoever asks twice has asked.
    fate.request_disconnect();
    // A request to disconnect that comes then is fulfilled with the last connection, but once.
    fate.request_disconnect();
    assert!(fate.finish_disconnect());
    assert!(!fate.finish_disconnect());
    assert!(fate.snapshot().is_over());
}

models! {
    a_connection_comes_back,
    nothing_is_overwritten,
    it_ends_once,
}
