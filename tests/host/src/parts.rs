// SPDX-License-Identifier: GPL-2.0
//! What the models are run over: the module's own files, or one of them spoilt (`mutants`).

use crate::blk_mq::{Unanswered, Unsent};
use loom::model::Builder;
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// `Slot` of `pure/cmd.rs`, or of a variant of it.
pub(crate) trait Commands: Send + Sync + 'static {
    fn new() -> Self;
    fn start(&self, connection: u16, other: Unanswered) -> u32;
    fn claim(&self, generation: u32, connection: u16) -> Option<Unanswered>;
    fn reclaim(&self, connection: u16) -> Option<Unanswered>;
    fn unclaim(&self, other: Unanswered) -> Option<Unanswered>;
    fn withdraw(&self, connection: u16) -> Option<Unanswered>;
    fn generation(&self) -> u32;
    /// Which connection the command is in flight on, and whether it is still unclaimed.
    fn status(&self) -> (u16, bool);
}

/// `Fate` of `pure/fate.rs`, or of a variant of it.
pub(crate) trait Fates: Send + Sync + 'static {
    type Snapshot: Snapshots;
    fn new() -> Self;
    fn snapshot(&self) -> Self::Snapshot;
    fn request_disconnect(&self);
    fn end(&self) -> bool;
    fn finish_disconnect(&self) -> bool;
    /// Whether the session is over; nothing where the caller has to look again.
    fn exhaust(&self, seen: Self::Snapshot) -> bool;
    fn revive(&self);
}

/// Its `Snapshot`.
pub(crate) trait Snapshots: Copy {
    fn is_over(self) -> bool;
    fn is_disconnected(self) -> bool;
    fn is_end_wanted(self) -> bool;
}

/// `List` of `kapi/llist.rs`, or of a variant of it.
pub(crate) trait Lists: Send + Sync + 'static {
    type Batch: Batches;
    fn new() -> Self;
    fn push(&self, request: Unsent) -> Result<(), Unsent>;
    fn take(&self) -> Self::Batch;
    fn close(&self) -> Self::Batch;
    fn is_empty(&self) -> bool;
}

/// Its `Batch`.
pub(crate) trait Batches: Send + 'static {
    fn empty() -> Self;
    fn is_empty(&self) -> bool;
    fn pop(&mut self) -> Option<Unsent>;
}

/// Implements [`Commands`] for the `Slot` of a module like `cmd`.
macro_rules! commands {
    ($module:ident) => {
        impl $module::Parking for crate::blk_mq::Parked {
            type Item = crate::blk_mq::Unanswered;

            fn put(&self, request: Self::Item) -> Option<Self::Item> {
                crate::blk_mq::Parked::put(self, request)
            }

            fn take(&self) -> Option<Self::Item> {
                crate::blk_mq::Parked::take(self)
            }
        }

        impl crate::parts::Commands for $module::Slot<crate::blk_mq::Parked> {
            fn new() -> Self {
                $module::Slot::new(crate::blk_mq::Parked::empty())
            }

            fn start(&self, connection: u16, other: crate::blk_mq::Unanswered) -> u32 {
                self.start(connection, other)
            }

            fn claim(&self, generation: u32, connection: u16) -> Option<crate::blk_mq::Unanswered> {
                self.claim(generation, connection).ok()
            }

            fn reclaim(&self, connection: u16) -> Option<crate::blk_mq::Unanswered> {
                self.reclaim(connection)
            }

            fn unclaim(
                &self,
                other: crate::blk_mq::Unanswered,
            ) -> Option<crate::blk_mq::Unanswered> {
                self.unclaim(other)
            }

            fn withdraw(&self, connection: u16) -> Option<crate::blk_mq::Unanswered> {
                self.withdraw(connection)
            }

            fn generation(&self) -> u32 {
                self.generation()
            }

            fn status(&self) -> (u16, bool) {
                self.status()
            }
        }
    };
}
pub(crate) use commands;

/// Implements [`Fates`] for the `Fate` of a module like `fate`.
macro_rules! fates {
    ($module:ident) => {
        impl crate::parts::Fates for $module::Fate {
            type Snapshot = $module::Snapshot;

            fn new() -> Self {
                $module::Fate::new()
            }

            fn snapshot(&self) -> Self::Snapshot {
                self.snapshot()
            }

            fn request_disconnect(&self) {
                self.request_disconnect()
            }

            fn end(&self) -> bool {
                self.end()
            }

            fn finish_disconnect(&self) -> bool {
                self.finish_disconnect()
            }

            fn exhaust(&self, seen: Self::Snapshot) -> bool {
                self.exhaust(seen) != $module::Exhausted::Changed
            }

            fn revive(&self) {
                self.revive()
            }
        }

        impl crate::parts::Snapshots for $module::Snapshot {
            fn is_over(self) -> bool {
                self.is_over()
            }

            fn is_disconnected(self) -> bool {
                self.is_disconnected()
            }

            fn is_end_wanted(self) -> bool {
                self.is_end_wanted()
            }
        }
    };
}
pub(crate) use fates;

/// Implements [`Lists`] for the `List` of a module like `llist`.
macro_rules! lists {
    ($module:ident) => {
        // SAFETY: The pointer comes back as it was, a tag has one `Unsent`, and a `Tag` is aligned.
        unsafe impl $module::Linked for crate::blk_mq::Unsent {
            type Raw = crate::blk_mq::Tag;

            fn into_raw(self) -> *mut Self::Raw {
                self.into_raw()
            }

            unsafe fn from_raw(raw: *mut Self::Raw) -> Self {
                // SAFETY: The caller promises what is asked for.
                unsafe { Self::from_raw(raw) }
            }

            unsafe fn next<'a>(
                raw: *mut Self::Raw,
            ) -> &'a crate::sync::atomic::Atomic<*mut Self::Raw> {
                // SAFETY: The caller promises what is asked for.
                unsafe { Self::next(raw) }
            }
        }

        impl crate::parts::Lists for $module::List<crate::blk_mq::Unsent> {
            type Batch = $module::Batch<crate::blk_mq::Unsent>;

            fn new() -> Self {
                $module::List::new()
            }

            fn push(&self, request: crate::blk_mq::Unsent) -> Result<(), crate::blk_mq::Unsent> {
                self.push(request)
            }

            fn take(&self) -> Self::Batch {
                self.take()
            }

            fn close(&self) -> Self::Batch {
                self.close()
            }

            fn is_empty(&self) -> bool {
                self.is_empty()
            }
        }

        impl crate::parts::Batches for $module::Batch<crate::blk_mq::Unsent> {
            fn empty() -> Self {
                $module::Batch::empty()
            }

            fn is_empty(&self) -> bool {
                self.is_empty()
            }

            fn pop(&mut self) -> Option<crate::blk_mq::Unsent> {
                self.pop()
            }
        }
    };
}
pub(crate) use lists;

/// A choice of them.
pub(crate) trait Parts: 'static {
    type Slot: Commands;
    type Fate: Fates;
    type List: Lists;
}

/// Makes a choice.
macro_rules! parts {
    ($name:ident, $slots:ident, $fates:ident, $lists:ident) => {
        pub(crate) struct $name;

        impl crate::parts::Parts for $name {
            type Slot = $slots::Slot<crate::blk_mq::Parked>;
            type Fate = $fates::Fate;
            type List = $lists::List<crate::blk_mq::Unsent>;
        }
    };
}
pub(crate) use parts;

use crate::{
    llist,
    pure::{cmd, fate},
};
commands!(cmd);
fates!(fate);
lists!(llist);
parts!(Module, cmd, fate, llist);

/// Runs `model` once for each interleaving; where `preemptions` are given, for each in which no more
/// threads than that are interrupted by another one where they could have gone on. The environment
/// variable `PREEMPTIONS` can only lower that, for tools/mutants.
pub(crate) fn explore(model: fn(), preemptions: Option<usize>) {
    let wanted = std::env::var("PREEMPTIONS").ok();
    let wanted = wanted.map(|number| number.parse().expect("PREEMPTIONS must be a number"));
    let preemptions = preemptions.into_iter().chain(wanted).min();
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{} interleavings", runs.load(Ordering::Relaxed));
}

/// Tests that run models over the module's files.
macro_rules! models {
    ($($model:ident $(within $preemptions:literal preemptions)?),+ $(,)?) => {
        mod hold {
            $(
                #[test]
                fn $model() {
                    let preemptions: &[usize] = &[$($preemptions)?];
                    crate::parts::explore(
                        super::$model::<crate::parts::Module>,
                        preemptions.first().copied(),
                    );
                }
            )+
        }
    };
}
pub(crate) use models;

/// A test that passes when `model` fails with `complaint` over what the others of the module's files and
/// a spoilt one make up.
macro_rules! fails {
    ($name:ident, $($model:ident)::+ $(within $preemptions:literal preemptions)?, $complaint:literal) => {
        #[test]
        #[should_panic(expected = $complaint)]
        fn is_found() {
            let preemptions: &[usize] = &[$($preemptions)?];
            crate::parts::explore(crate::$($model)::+::<$name>, preemptions.first().copied());
        }
    };
}
pub(crate) use fails;
