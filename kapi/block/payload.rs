// SPDX-License-Identifier: GPL-2.0
//! The data of a request: its bios' memory, piece by piece. Source: `include/linux/bvec.h`.

use super::request::{
    Side,
    Unanswered, //
};
use crate::kapi::bindings;
use kernel::prelude::*;

/// A position in the data of a request.
///
/// # Invariants
///
/// `bio` is null or one of the request's bios; `index` and `done_bytes` are a position in it as
/// `struct bvec_iter` has it; `bio_left_bytes` are left in this bio from there, `left_bytes` in the
/// request.
#[derive(Clone, Copy)]
struct Position {
    bio: *mut bindings::bio,
    index: usize,
    done_bytes: u32,
    bio_left_bytes: u32,
    left_bytes: usize,
}

impl Position {
    /// The start of `left_bytes` of data.
    ///
    /// # Safety
    ///
    /// `bio` must be the first bio of a request that is in flight while the position is used.
    unsafe fn start(bio: *mut bindings::bio, left_bytes: usize) -> Self {
        let mut position = Position {
            bio,
            index: 0,
            done_bytes: 0,
            bio_left_bytes: 0,
            left_bytes,
        };
        if left_bytes > 0 {
            position.enter_bio();
        }
        position
    }

    /// Takes over the start position of the current bio.
    fn enter_bio(&mut self) {
        if self.bio.is_null() {
            self.left_bytes = 0;
            return;
        }
        // SAFETY: By the type invariant `bio` is one of the request's bios; the block layer does not
        // advance it while the request is in flight. Its iterator is packed, so it is read by value.
        unsafe {
            let iter = (&raw const (*self.bio).bi_iter).read_unaligned();
            self.index = iter.bi_idx as usize;
            self.done_bytes = iter.bi_offset;
            self.bio_left_bytes = iter.bi_size;
        }
    }

    /// The piece of memory here, or `None` at the end.
    fn piece(&self) -> Option<bindings::bio_vec> {
        if self.left_bytes == 0 || self.bio_left_bytes == 0 {
            return None;
        }
        // SAFETY: By the type invariant `index` is within the bio's vector while data is left in it.
        let vec = unsafe { &*(*self.bio).bi_io_vec.add(self.index) };
        Some(bindings::bio_vec {
            bv_page: vec.bv_page,
            bv_len: (vec.bv_len - self.done_bytes).min(self.bio_left_bytes),
            bv_offset: vec.bv_offset + self.done_bytes,
        })
    }

    /// Moves on by `bytes`, which must lie within the current piece.
    fn step(&mut self, bytes: u32) {
        self.left_bytes -= bytes as usize;
        self.bio_left_bytes -= bytes;
        self.done_bytes += bytes;
        if self.bio_left_bytes == 0 {
            // SAFETY: By the type invariant `bio` is one of the request's bios.
            self.bio = unsafe { (*self.bio).bi_next };
            if self.left_bytes > 0 {
                self.enter_bio();
            }
            return;
        }
        // SAFETY: As in `piece()`.
        let len = unsafe { (*(*self.bio).bi_io_vec.add(self.index)).bv_len };
        if self.done_bytes == len {
            self.done_bytes = 0;
            self.index += 1;
        }
    }
}

/// One side's handle of a request, and a position in the data that this side moves: that of a write for
/// the side that sends, that of a read for the side that receives.
pub(crate) struct Payload<S: Side> {
    side: S,
    position: Position,
}

// SAFETY: The bios belong to the request, whose handle this owns and which may be sent.
unsafe impl<S: Side + Send> Send for Payload<S> {}

impl<S: Side> Payload<S> {
    /// The request's data, from the start; none where this side has none to move.
    pub(crate) fn new(side: S) -> Self {
        let extent = side.extent();
        let left_bytes = if extent.op == S::MOVES {
            extent.len_bytes as usize
        } else {
            0
        };
        // SAFETY: The request is in flight while this holds its handle, and it has the bios of so much data
        // where it is a read or a write, which are all that are moved.
        let position = unsafe { Position::start((*side.rq().as_ptr()).bio, left_bytes) };
        Payload { side, position }
    }

    /// What is left of the data.
    pub(crate) fn left_bytes(&self) -> usize {
        self.position.left_bytes
    }

    /// The request's handle.
    pub(crate) fn into_side(self) -> S {
        self.side
    }

    /// Moves on by `bytes`, at most to the end.
    pub(crate) fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let Some(piece) = self.position.piece() else {
                return;
            };
            let step = bytes.min(piece.bv_len as usize) as u32;
            self.position.step(step);
            bytes -= step as usize;
        }
    }

    /// Calls `each` with the pieces from here on until it returns false or the data ends. Returns
    /// whether the end was reached. The position stays.
    pub(in crate::kapi) fn for_each_piece(
        &self,
        mut each: impl FnMut(bindings::bio_vec) -> bool,
    ) -> bool {
        let mut position = self.position;
        while let Some(piece) = position.piece() {
            let len = piece.bv_len;
            if !each(piece) {
                return false;
            }
            position.step(len);
        }
        true
    }
}

impl Payload<Unanswered> {
    /// Fills at most `bytes` of the memory from here on and moves on by that. `copy` is given where to
    /// copy to, how much came before, and how much is to come. Returns how much it was.
    ///
    /// # Errors
    ///
    /// Those of `copy`.
    pub(in crate::kapi) fn fill(
        &mut self,
        bytes: usize,
        mut copy: impl FnMut(*mut u8, usize, usize) -> Result,
    ) -> Result<usize> {
        let mut done = 0;
        while done < bytes {
            let Some(piece) = self.position.piece() else {
                break;
            };
            // A piece may span pages that follow one another.
            let at = piece.bv_offset as usize;
            let in_page = at % bindings::PAGE_SIZE;
            let step = (bytes - done)
                .min(piece.bv_len as usize)
                .min(bindings::PAGE_SIZE - in_page);
            // SAFETY: The piece lies within the data of a request in flight, which is a read, since this side
            // moves no other data; the mapping is used within this block.
            unsafe {
                let page = piece.bv_page.add(at / bindings::PAGE_SIZE);
                let mapped = bindings::kmap_local_page(page).cast::<u8>();
                let result = copy(mapped.add(in_page), done, step);
                bindings::kunmap_local(mapped.cast());
                result?;
            }
            self.position.step(step as u32);
            done += step;
        }
        Ok(done)
    }
}
