// SPDX-License-Identifier: GPL-2.0
//! A handle says once how its request ends.

use crate::kapi::block::request::{Outcome, Status, Unanswered};

fn end(handle: Unanswered) {
    handle.finish(Outcome::Complete(Status::OK));
    handle.finish(Outcome::Requeue); //~ E0382
    //fix:
}
