// SPDX-License-Identifier: GPL-2.0
//! What a dispatch looks at is not borrowed any more when its owner goes.

use crate::kapi::block::{mq::Dispatch, published::Dispatched};

fn look(connection: Dispatched<u32>, cx: &Dispatch<'_>) -> u32 {
    let seen = connection.get(cx);
    drop(connection); //~ E0505
    //fix:
    seen.map_or(0, |seen| *seen)
}
