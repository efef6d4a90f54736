// SPDX-License-Identifier: GPL-2.0
//! What an operation has borrowed cannot be stored.

use crate::kapi::block::{mq::Expiry, published::Published};

struct Kept(Option<&'static u32>);

fn keep(to: &mut Kept, session: &'static Published<u32>, cx: &Expiry<'_>) {
    to.0 = session.get(cx); //~ E0521
    //fix: let _ = session.get(cx);
}
