// SPDX-License-Identifier: GPL-2.0
//! A queue with a fixed number of places, so that using it needs no allocation.

#![forbid(unsafe_code)]

use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// First in, first out.
pub(crate) struct Ring<T> {
    places: KVVec<Option<T>>,
    head: usize,
    len: usize,
}

impl<T> Ring<T> {
    /// A ring with `capacity` places. May sleep.
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

    /// How many are in it.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether none is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn place(&self, nth: usize) -> usize {
        let place = self.head + nth;
        if place < self.places.len() {
            place
        } else {
            place - self.places.len()
        }
    }

    /// Appends `item`; gives it back where there is no place.
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

    /// Takes the first one out.
    pub(crate) fn pop_front(&mut self) -> Option<T> {
        let item = self.places.get_mut(self.head)?.take()?;
        self.head = self.place(1);
        self.len -= 1;
        Some(item)
    }

    /// The first one.
    pub(crate) fn front_mut(&mut self) -> Option<&mut T> {
        self.places.get_mut(self.head)?.as_mut()
    }

    /// All, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        (0..self.len).filter_map(|nth| self.places.get(self.place(nth))?.as_ref())
    }
}
