// SPDX-License-Identifier: GPL-2.0
//! The `kernel` crate's vectors, and what allocating takes. `tests/fuzz` has this file too.

#[derive(Debug)]
pub(crate) struct AllocError;

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
