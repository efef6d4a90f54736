// SPDX-License-Identifier: GPL-2.0
//! What is published is not borrowed any more when its owner goes.

use crate::kapi::block::{mq::Dispatch, published::Published};

fn look(session: Published<u32>, cx: &Dispatch<'_>) -> u32 {
    let seen = session.get(cx);
    drop(session); //~ E0505
    //fix:
    seen.copied().unwrap_or(0)
}
