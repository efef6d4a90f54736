// SPDX-License-Identifier: GPL-2.0
//! As much of the `kernel` crate as the module's pure files use.

/// `kernel::alloc`
pub(crate) mod alloc {
    #[derive(Debug)]
    pub(crate) struct AllocError;
}

/// `kernel::prelude`
pub(crate) mod prelude {
    use super::alloc::AllocError;

    pub(crate) struct Flags;
    pub(crate) const GFP_KERNEL: Flags = Flags;

    /// A vector that says so when there is no memory. Here there is.
    pub(crate) struct KVVec<T>(Vec<T>);

    impl<T> KVVec<T> {
        pub(crate) fn with_capacity(capacity: usize, _: Flags) -> Result<Self, AllocError> {
            Ok(KVVec(Vec::with_capacity(capacity)))
        }

        pub(crate) fn push(&mut self, item: T, _: Flags) -> Result<(), AllocError> {
            self.0.push(item);
            Ok(())
        }
    }

    impl<T> std::ops::Deref for KVVec<T> {
        type Target = [T];

        fn deref(&self) -> &[T] {
            &self.0
        }
    }

    impl<T> std::ops::DerefMut for KVVec<T> {
        fn deref_mut(&mut self) -> &mut [T] {
            &mut self.0
        }
    }
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

            /// One that fails orders nothing in the kernel's memory model.
            pub(crate) fn cmpxchg(&self, old: u64, new: u64, _: Full) -> Result<u64, u64> {
                self.0
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed)
            }
        }
    }
}
