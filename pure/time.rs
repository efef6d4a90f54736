// SPDX-License-Identifier: GPL-2.0
//! Time in jiffies.

#![forbid(unsafe_code)]

/// Returns the time from `then` to `now` in jiffies, which wrap around. It is 0 if `then` is later: a task that
/// has read `now` may be interrupted, and another one may record `then` before the first one reads that.
pub(crate) fn elapsed(now: usize, then: usize) -> usize {
    usize::try_from(now.wrapping_sub(then) as isize).unwrap_or(0)
}
