// SPDX-License-Identifier: GPL-2.0
//! As much of the `kernel` crate as the module's pure files use.

/// `kernel::alloc`
pub(crate) mod alloc {
    pub(crate) use crate::memory::AllocError;
}

/// `kernel::prelude`
pub(crate) mod prelude {
    pub(crate) use crate::memory::{GFP_KERNEL, KVVec};
}

/// `kernel::sync`
pub(crate) mod sync {
    /// The kernel's atomics on top of loom's, so that `atomic.rs` itself, with the orderings that it
    /// asks for, is part of what is checked.
    pub(crate) mod atomic {
        use loom::sync::atomic::{AtomicU64, Ordering};
        use std::marker::PhantomData;

        pub(crate) struct Acquire;
        pub(crate) struct Release;
        pub(crate) struct Full;

        /// What orders a read and a write.
        pub(crate) trait Exchanging {
            const ORDERING: Ordering;
        }

        impl Exchanging for Acquire {
            const ORDERING: Ordering = Ordering::Acquire;
        }

        impl Exchanging for Full {
            const ORDERING: Ordering = Ordering::SeqCst;
        }

        /// A number, kept as a `u64`.
        pub(crate) trait Number {
            fn pack(self) -> u64;
            fn unpack(packed: u64) -> Self;
        }

        impl Number for u64 {
            fn pack(self) -> u64 {
                self
            }

            fn unpack(packed: u64) -> u64 {
                packed
            }
        }

        impl Number for i32 {
            fn pack(self) -> u64 {
                self as u64
            }

            fn unpack(packed: u64) -> i32 {
                packed as i32
            }
        }

        pub(crate) struct Atomic<T>(AtomicU64, PhantomData<T>);

        impl<T: Number> Atomic<T> {
            pub(crate) fn new(value: T) -> Self {
                Atomic(AtomicU64::new(value.pack()), PhantomData)
            }

            pub(crate) fn load(&self, _: Acquire) -> T {
                T::unpack(self.0.load(Ordering::Acquire))
            }

            pub(crate) fn store(&self, value: T, _: Release) {
                self.0.store(value.pack(), Ordering::Release);
            }

            pub(crate) fn xchg(&self, value: T, _: Full) -> T {
                T::unpack(self.0.swap(value.pack(), Ordering::SeqCst))
            }

            /// One that fails orders nothing in the kernel's memory model.
            pub(crate) fn cmpxchg<O: Exchanging>(&self, old: T, new: T, _: O) -> Result<T, T> {
                self.0
                    .compare_exchange(old.pack(), new.pack(), O::ORDERING, Ordering::Relaxed)
                    .map(T::unpack)
                    .map_err(T::unpack)
            }
        }
    }
}
