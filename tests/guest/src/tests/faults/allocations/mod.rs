// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail. A sweep has each one of a call fail in turn; whatever the call answers,
//! the next one without a fault succeeds, and its data is right. Each is swept until a call meets no
//! failing allocation any more.

mod commands;
mod ioctls;
mod loading;
mod transfers;

use crate::harness::{Guest, Test};
use crate::injection::{self, Allocations};

pub fn tests() -> Vec<Test> {
    [
        loading::tests(),
        ioctls::tests(),
        commands::tests(),
        transfers::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The driver's own allocations, and those of what it calls.
fn of_driver(guest: &Guest) -> Allocations {
    Allocations::of(&injection::code_of_module(guest.driver))
}
