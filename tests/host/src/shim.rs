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
        use loom::sync::atomic::{AtomicU64, Ordering, fence};
        use std::{marker::PhantomData, thread::panicking};

        pub(crate) struct Acquire;
        pub(crate) struct Relaxed;
        pub(crate) struct Release;
        pub(crate) struct Full;

        /// What orders a read.
        pub(crate) trait Loading {
            const ORDERING: Ordering;
        }

        impl Loading for Acquire {
            const ORDERING: Ordering = Ordering::Acquire;
        }

        impl Loading for Relaxed {
            const ORDERING: Ordering = Ordering::Relaxed;
        }

        /// What orders a write.
        pub(crate) trait Storing {
            const ORDERING: Ordering;
        }

        impl Storing for Release {
            const ORDERING: Ordering = Ordering::Release;
        }

        impl Storing for Relaxed {
            const ORDERING: Ordering = Ordering::Relaxed;
        }

        /// What orders a read and a write.
        pub(crate) trait Exchanging {
            const ORDERING: Ordering;
            /// What else is ordered where it has succeeded.
            fn order() {}
        }

        impl Exchanging for Acquire {
            const ORDERING: Ordering = Ordering::Acquire;
        }

        impl Exchanging for Release {
            const ORDERING: Ordering = Ordering::Release;
        }

        impl Exchanging for Relaxed {
            const ORDERING: Ordering = Ordering::Relaxed;
        }

        // loom has no sequentially consistent accesses, only fences. One is enough: in loom nothing
        // comes between an access and the fence after it.
        impl Exchanging for Full {
            const ORDERING: Ordering = Ordering::AcqRel;

            fn order() {
                fence(Ordering::SeqCst);
            }
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

        impl Number for u32 {
            fn pack(self) -> u64 {
                self.into()
            }

            fn unpack(packed: u64) -> u32 {
                packed as u32
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

        impl Number for bool {
            fn pack(self) -> u64 {
                self.into()
            }

            fn unpack(packed: u64) -> bool {
                packed != 0
            }
        }

        impl<T> Number for *mut T {
            fn pack(self) -> u64 {
                self.expose_provenance() as u64
            }

            fn unpack(packed: u64) -> *mut T {
                std::ptr::with_exposed_provenance_mut(packed as usize)
            }
        }

        // As the kernel's it is `Send` and `Sync` whatever it holds.
        pub(crate) struct Atomic<T>(AtomicU64, PhantomData<fn() -> T>);

        impl<T: Number> Atomic<T> {
            pub(crate) fn new(value: T) -> Self {
                Atomic(AtomicU64::new(value.pack()), PhantomData)
            }

            pub(crate) fn load<O: Loading>(&self, _: O) -> T {
                // A model that has failed is over, and loom not to be asked again by what is dropped.
                if panicking() {
                    return T::unpack(0);
                }
                T::unpack(self.0.load(O::ORDERING))
            }

            pub(crate) fn store<O: Storing>(&self, value: T, _: O) {
                if !panicking() {
                    self.0.store(value.pack(), O::ORDERING);
                }
            }

            pub(crate) fn xchg<O: Exchanging>(&self, value: T, _: O) -> T {
                if panicking() {
                    return T::unpack(0);
                }
                let old = self.0.swap(value.pack(), O::ORDERING);
                O::order();
                T::unpack(old)
            }

            /// One that fails orders nothing in the kernel's memory model.
            pub(crate) fn cmpxchg<O: Exchanging>(&self, old: T, new: T, _: O) -> Result<T, T> {
                if panicking() {
                    return Ok(old);
                }
                self.0
                    .compare_exchange(old.pack(), new.pack(), O::ORDERING, Ordering::Relaxed)
                    .inspect(|_| O::order())
                    .map(T::unpack)
                    .map_err(T::unpack)
            }
        }
    }

    /// `kernel::sync::barrier`
    pub(crate) mod barrier {
        use super::atomic::Full;

        pub(crate) fn smp_mb(_: Full) {
            loom::sync::atomic::fence(loom::sync::atomic::Ordering::SeqCst);
        }
    }
}
