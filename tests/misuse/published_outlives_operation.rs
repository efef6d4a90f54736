// SPDX-License-Identifier: GPL-2.0
//! What an operation has borrowed is not used after it.

use crate::kapi::block::{mq::Dispatch, published::Published};

fn look<'a>(
    session: &'a Published<u32>,
    cx: &Dispatch<'_>, //fix: cx: &'a Dispatch<'_>,
) -> Option<&'a u32> {
    session.get(cx) //~ E0621
    //fix: session.get(cx)
}
