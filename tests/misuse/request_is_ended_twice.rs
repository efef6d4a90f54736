// SPDX-License-Identifier: GPL-2.0
//! A handle says once how its request ends.

use crate::kapi::block::request::{Outcome, Status, Unanswered};

fn end(handle: Unanswered) {
    handle.decide(Outcome::Complete(Status::OK));
    handle.decide(Outcome::Requeue); //~ E0382
    //fix:
}
