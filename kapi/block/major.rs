// SPDX-License-Identifier: GPL-2.0
//! Major numbers of block devices.
//!
//! C header: [`include/linux/blkdev.h`](srctree/include/linux/blkdev.h)

use crate::kapi::bindings;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// A registered major number of block devices.
///
/// # Invariants
///
/// `major` is registered under `name`.
pub(crate) struct Major {
    major: u32,
    name: &'static CStr,
}

impl Major {
    /// Registers `major` under `name`.
    ///
    /// # Errors
    ///
    /// - `EBUSY` if the number is already registered.
    /// - `EINVAL` if it is out of range.
    /// - `ENOMEM` if there is not enough memory.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn register(major: u32, name: &'static CStr) -> Result<Self> {
        // SAFETY: `name` is a NUL-terminated string of static lifetime. There is no probe function.
        to_result(unsafe { bindings::__register_blkdev(major, name.as_char_ptr(), None) })?;
        // INVARIANT: The number was registered above.
        Ok(Major { major, name })
    }
}

impl Drop for Major {
    fn drop(&mut self) {
        // SAFETY: By the type invariant, the number is registered under this name.
        unsafe { bindings::unregister_blkdev(self.major, self.name.as_char_ptr()) };
    }
}
