// SPDX-License-Identifier: GPL-2.0
//! As much of the `kernel` crate as the files that are fuzzed use.

pub(crate) mod kapi;

/// `kernel::alloc`
pub(crate) mod alloc {
    pub(crate) use crate::memory::AllocError;
}

/// `kernel::fmt`
pub(crate) mod fmt {
    pub(crate) use std::fmt::{Display, Formatter, Result};
}

/// `kernel::prelude`
pub(crate) mod prelude {
    use super::alloc::AllocError;

    pub(crate) use crate::memory::{GFP_KERNEL, KVVec};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Error(i32);
    pub(crate) const EIO: Error = Error(5);
    pub(crate) const EAGAIN: Error = Error(11);
    pub(crate) const EINVAL: Error = Error(22);
    pub(crate) const EPIPE: Error = Error(32);

    impl Error {
        pub(super) const fn new(number: i32) -> Self {
            Error(number)
        }
    }

    impl From<AllocError> for Error {
        fn from(_: AllocError) -> Self {
            Error(12)
        }
    }

    pub(crate) type Result<T = (), E = Error> = core::result::Result<T, E>;

    /// A message for the log is one line, whatever a server has sent.
    macro_rules! log {
        ($($message:tt)*) => {{
            let message = format!($($message)*);
            let line = message.strip_suffix('\n').expect("a line");
            assert!(!line.contains(char::is_control), "{line:?}");
        }};
    }
    pub(crate) use {log as pr_err, log as pr_warn};
}

/// `kernel::sync`
pub(crate) mod sync {
    pub(crate) type ArcBorrow<'a, T> = &'a T;

    pub(crate) mod atomic {
        use std::marker::PhantomData;
        use std::sync::atomic::{AtomicU64, Ordering};

        pub(crate) struct Acquire;
        pub(crate) struct Release;
        pub(crate) struct Full;

        pub(crate) struct Atomic<T>(AtomicU64, PhantomData<T>);

        impl Atomic<u64> {
            pub(crate) fn new(value: u64) -> Self {
                Atomic(AtomicU64::new(value), PhantomData)
            }

            pub(crate) fn load(&self, _: Acquire) -> u64 {
                self.0.load(Ordering::Acquire)
            }

            pub(crate) fn store(&self, value: u64, _: Release) {
                self.0.store(value, Ordering::Release);
            }

            pub(crate) fn cmpxchg(&self, old: u64, new: u64, _: Full) -> Result<u64, u64> {
                self.0
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed)
            }
        }
    }
}
