// SPDX-License-Identifier: GPL-2.0
//! Tracepoints, which `rnbd_trace.c` defines.
//!
//! Mirrors `kernel::declare_trace!`, which (7.3) finds only tracepoints of the `kernel` crate's own bindings.
//!
//! C header: [`include/linux/tracepoint.h`](srctree/include/linux/tracepoint.h)

/// Returns whether a tracepoint has users. A static key decides: as long as there are none, this is a `nop`.
macro_rules! is_on {
    ($name:ident) => {{
        #[cfg(CONFIG_TRACEPOINTS)]
        // SAFETY: `rnbd_trace.c` defines the tracepoint and so its static key.
        let on = unsafe {
            ::kernel::macros::paste! {
                ::kernel::jump_label::static_branch_unlikely!(
                    $crate::kapi::bindings::[<__tracepoint_ $name>],
                    $crate::kapi::bindings::tracepoint,
                    key
                )
            }
        };
        #[cfg(not(CONFIG_TRACEPOINTS))]
        let on = false;
        on
    }};
}

/// Calls the users of a tracepoint. `rnbd_trace.h` and `include/trace/events/nbd.h` have the arguments.
///
/// # Safety
///
/// Pointers among the arguments must be valid.
macro_rules! do_trace {
    ($name:ident($($argument:expr),* $(,)?)) => {{
        #[cfg(CONFIG_TRACEPOINTS)]
        ::kernel::macros::paste! {
            $crate::kapi::bindings::[<rust_do_trace_ $name>]($($argument),*)
        }
        #[cfg(not(CONFIG_TRACEPOINTS))]
        {
            $(let _ = $argument;)*
        }
    }};
}

pub(super) use do_trace;
pub(super) use is_on;
