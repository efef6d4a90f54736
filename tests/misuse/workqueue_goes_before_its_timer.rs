// SPDX-License-Identifier: GPL-2.0
//! What is queued for later keeps its workqueue.

use crate::kapi::wq::{self, HasQueue, Queue};
use kernel::{
    impl_has_delayed_work,
    prelude::*,
    sync::Arc,
    time::msecs_to_jiffies,
    workqueue::{DelayedWork, WorkItem},
};

#[pin_data]
struct Later {
    queue: Arc<Queue>,
    #[pin]
    work: DelayedWork<Later>,
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self> for Later { self.work }
}

impl WorkItem for Later {
    type Pointer = Arc<Later>;

    fn run(_this: Arc<Later>) {}
}

//fix: impl HasQueue for Later { fn queue(&self) -> &Queue { &self.queue } }
fn queue(later: Arc<Later>) {
    let _ = wq::enqueue_delayed(later, msecs_to_jiffies(1)); //~ E0277
    //fix: let _ = wq::enqueue_delayed(later, msecs_to_jiffies(1));
}
