// SPDX-License-Identifier: GPL-2.0
//! A workqueue is not borrowed for ever.

use crate::{kapi::wq::Queue, rnbd_shared::Shared};

fn keep(shared: &Shared) -> &'static Queue { //fix: fn keep(shared: &Shared) -> &Queue {
    &shared.io //~ lifetime may not live long enough
    //fix: &shared.io
}
