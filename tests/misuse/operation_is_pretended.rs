// SPDX-License-Identifier: GPL-2.0
//! Only kapi says that one is in an operation.

use crate::kapi::block::mq::{Dispatch, InQueue};

fn pretend(cx: &Dispatch<'_>) {
    let queue = cx.queue();
    struct Pretended;
    impl InQueue for Pretended { //~ E0200
        //fix: impl Pretended {
        fn queue(&self) -> *mut kernel::bindings::request_queue {
            core::ptr::null_mut()
        }
    }
}
