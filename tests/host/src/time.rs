// SPDX-License-Identifier: GPL-2.0
//! Time that wraps around, and that another processor has recorded later.

use crate::pure::time::elapsed;

#[test]
fn passes() {
    assert_eq!(elapsed(7, 7), 0);
    assert_eq!(elapsed(1007, 7), 1000);
    assert_eq!(elapsed(3, usize::MAX - 1), 5);
}

/// It would be an age otherwise, after which nobody waits any more.
#[test]
fn has_not_passed_if_it_was_recorded_later() {
    assert_eq!(elapsed(7, 8), 0);
    assert_eq!(elapsed(usize::MAX, 0), 0);
    assert_eq!(elapsed(0, 1000), 0);
}
