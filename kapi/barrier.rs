// SPDX-License-Identifier: GPL-2.0
//! Memory barriers.
//!
//! The same as `kernel::sync::barrier` of 7.3. That of 7.2 has the function without an argument.

use kernel::sync::atomic::Full;

/// A full memory barrier.
#[inline(always)]
pub(crate) fn smp_mb(_: Full) {
    // SAFETY: `smp_mb()` has no requirements. It is a barrier for the compiler at least, on a kernel without
    // `CONFIG_SMP`, too.
    unsafe { super::bindings::smp_mb() };
}
