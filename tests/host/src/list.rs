// SPDX-License-Identifier: GPL-2.0
//! The list of what waits to be sent, `kapi/llist.rs`, in all interleavings: two append, one takes out
//! and closes.

use crate::{
    blk_mq::{Tag, Unsent, Verdict},
    parts::{Batches, Lists, Parts, models},
};
use loom::thread::{self, JoinHandle};
use std::sync::Arc;

/// A list, and what is appended to it.
struct Shared<P: Parts> {
    list: P::List,
    tags: Vec<Arc<Tag>>,
}

impl<P: Parts> Shared<P> {
    fn new(tags: usize) -> Arc<Self> {
        Arc::new(Shared {
            list: P::List::new(),
            tags: (0..tags).map(Tag::numbered).collect(),
        })
    }

    /// Appends a new request; returns whether the list has taken it. It completes where it has.
    fn append(&self, tag: usize) -> bool {
        let (unsent, unanswered) = self.tags[tag].start();
        unanswered.finish(Verdict::Complete);
        let refused = self
            .list
            .push(unsent)
            .map_err(|r| r.overrule(Verdict::Fail));
        refused.is_ok()
    }

    /// Appends these, from the first on; returns how many the list has taken.
    fn append_all(self: &Arc<Self>, tags: std::ops::Range<usize>) -> JoinHandle<usize> {
        let shared = self.clone();
        thread::spawn(move || tags.filter(|tag| shared.append(*tag)).count())
    }
}

/// Takes all out of a batch; returns their numbers.
fn numbers(mut batch: impl Batches) -> Vec<usize> {
    let mut numbers = Vec::new();
    while let Some(Unsent(handle)) = batch.pop() {
        handle.read_pages();
        numbers.push(handle.tag().number);
    }
    assert!(batch.is_empty());
    numbers
}

/// Whatever two append comes out once, what the same one has appended in its order.
pub(crate) fn all_comes_out<P: Parts>() {
    let shared = Shared::<P>::new(3);
    let other = shared.append_all(0..2);
    assert!(shared.append(2));
    let mut out = numbers(shared.list.take());
    assert_eq!(other.join().unwrap(), 2);
    out.extend(numbers(shared.list.take()));
    assert!(shared.list.is_empty());
    let position = |number| out.iter().position(|n| *n == number).expect("one is lost");
    assert!(position(0) < position(1), "in another order");
    assert!(position(2) < 3);
    assert_eq!(out.len(), 3, "one came out twice");
}

/// The list is closed while something is appended: that comes out, or is refused, and what comes later is
/// refused, even after somebody has looked for more.
pub(crate) fn nothing_gets_in_when_it_is_closed<P: Parts>() {
    let shared = Shared::<P>::new(3);
    let other = shared.append_all(0..2);
    let mut out = numbers(shared.list.take());
    out.extend(numbers(shared.list.close()));
    assert!(numbers(shared.list.take()).is_empty());
    assert!(!shared.append(2), "it got into a closed list");
    assert_eq!(other.join().unwrap(), out.len(), "one is lost");
    assert!(numbers(shared.list.close()).is_empty());
    assert!(shared.list.is_empty());
    let ends = [0, 1].map(|tag| shared.tags[tag].history());
    let taken = [0, 1].map(|tag| {
        if out.contains(&tag) {
            Verdict::Complete
        } else {
            Verdict::Fail
        }
    });
    assert_eq!(ends, taken.map(|verdict| vec![verdict]));
}

/// What is still in a batch or in a list when that is dropped is dropped with it.
pub(crate) fn nothing_is_leaked<P: Parts>() {
    let tags = [0, 1, 2].map(Tag::numbered);
    let list = P::List::new();
    let append = |tag: &Arc<Tag>| {
        let (unsent, unanswered) = tag.start();
        unanswered.finish(Verdict::Complete);
        assert!(list.push(unsent).is_ok());
    };
    tags[..2].iter().for_each(append);
    drop(list.take());
    append(&tags[2]);
    drop(list);
    for tag in &tags {
        assert_eq!(tag.history(), [Verdict::Complete], "an item is lost");
    }
}

models! {
    all_comes_out,
    nothing_is_leaked,
    nothing_gets_in_when_it_is_closed,
}
