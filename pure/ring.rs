// SPDX-License-Identifier: GPL-2.0
//! A queue with a fixed capacity, which does not allocate memory when items are added.

#![forbid(unsafe_code)]

use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// A first-in, first-out queue with a fixed capacity.
pub(crate) struct Ring<T> {
    places: KVVec<Option<T>>,
    head: usize,
    len: usize,
}

impl<T> Ring<T> {
    /// Returns an empty ring with this capacity.
    ///
    /// # Errors
    ///
    /// [`AllocError`]: there is not enough memory.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(capacity: usize) -> Result<Self, AllocError> {
        let mut places = KVVec::with_capacity(capacity, GFP_KERNEL)?;
        for _ in 0..capacity {
            places.push(None, GFP_KERNEL)?;
        }
        Ok(Ring {
            places,
            head: 0,
            len: 0,
        })
    }

    /// Returns the number of items.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the ring is empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the index of the `nth` item.
    fn place(&self, nth: usize) -> usize {
        let place = self.head + nth;
        if place < self.places.len() {
            place
        } else {
            place - self.places.len()
        }
    }

    /// Appends `item`.
    ///
    /// # Errors
    ///
    /// Returns the item if the ring is full.
    pub(crate) fn push_back(&mut self, item: T) -> Result<(), T> {
        if self.len == self.places.len() {
            return Err(item);
        }
        let tail = self.place(self.len);
        match self.places.get_mut(tail) {
            Some(place) => *place = Some(item),
            None => return Err(item),
        }
        self.len += 1;
        Ok(())
    }

    /// Removes the first item.
    pub(crate) fn pop_front(&mut self) -> Option<T> {
        let item = self.places.get_mut(self.head)?.take()?;
        self.head = self.place(1);
        self.len -= 1;
        Some(item)
    }

    /// Returns the first item.
    pub(crate) fn front_mut(&mut self) -> Option<&mut T> {
        self.places.get_mut(self.head)?.as_mut()
    }

    /// Iterates over the items in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        (0..self.len).filter_map(|nth| self.places.get(self.place(nth))?.as_ref())
    }
}
