// SPDX-License-Identifier: GPL-2.0
//! An attribute goes with its message.

use crate::kapi::net::{attr::Attr, genl::Info};

struct Kept(Option<Attr<'static>>);

fn run(kept: &mut Kept, info: &Info<'_>) {
    kept.0 = info.attr(1); //~ E0521
    //fix: let _ = info.attr(1);
}
