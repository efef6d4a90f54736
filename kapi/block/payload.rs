// SPDX-License-Identifier: GPL-2.0
//! The data of a request: the memory of its bios, segment by segment.
//!
//! The `kernel` crate (7.3) gives no access to the data of a request.
//!
//! C header: [`include/linux/bvec.h`](srctree/include/linux/bvec.h)

use super::request::{
    NewRequest,
    Op,
    Side,
    Unanswered, //
};
use crate::kapi::bindings;
use kernel::prelude::*;

/// A position in the data of a request.
///
/// # Invariants
///
/// - `bio` is null or one of the request's bios.
/// - `index` and `done_bytes` are a position in that bio, as in `struct bvec_iter`.
/// - From there, `left_bytes` are left of what the position is to pass, and `bio_left_bytes` of these are in the bio.
#[derive(Clone, Copy)]
struct Position {
    bio: *mut bindings::bio,
    index: usize,
    done_bytes: u32,
    bio_left_bytes: u32,
    left_bytes: usize,
}

impl Position {
    /// Creates the position at the start of `left_bytes` of data.
    ///
    /// # Safety
    ///
    /// `bio` must be a bio of a request, from which at least `left_bytes` are left. The driver must own the
    /// request as long as the position is used.
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

    /// Moves to the start of the current bio.
    fn enter_bio(&mut self) {
        if self.bio.is_null() {
            self.left_bytes = 0;
            return;
        }
        // SAFETY: By the type invariant, `bio` is one of the request's bios, which the block layer
        // does not change while the request is in flight. The iterator is packed, so it is read by
        // value.
        unsafe {
            let iter = (&raw const (*self.bio).bi_iter).read_unaligned();
            self.index = iter.bi_idx as usize;
            #[cfg(not(rnbd_lacks_bi_offset))]
            {
                self.done_bytes = iter.bi_offset;
            }
            #[cfg(rnbd_lacks_bi_offset)]
            {
                self.done_bytes = iter.bi_bvec_done;
            }
            // The last bio may hold more than the position is to pass.
            self.bio_left_bytes = iter
                .bi_size
                .min(u32::try_from(self.left_bytes).unwrap_or(u32::MAX));
        }
    }

    /// Returns the contiguous piece of memory at this position, or `None` at the end.
    fn piece(&self) -> Option<bindings::bio_vec> {
        if self.left_bytes == 0 || self.bio_left_bytes == 0 {
            return None;
        }
        // SAFETY: By the type invariant, `index` lies within the bio's vector while data is left in
        // it.
        let vec = unsafe { &*(*self.bio).bi_io_vec.add(self.index) };
        Some(bindings::bio_vec {
            bv_page: vec.bv_page,
            bv_len: (vec.bv_len - self.done_bytes).min(self.bio_left_bytes),
            bv_offset: vec.bv_offset + self.done_bytes,
        })
    }

    /// Moves on by `bytes`, which must not exceed the current piece.
    fn step(&mut self, bytes: u32) {
        self.left_bytes -= bytes as usize;
        self.bio_left_bytes -= bytes;
        self.done_bytes += bytes;
        if self.bio_left_bytes == 0 {
            // SAFETY: By the type invariant, `bio` is one of the request's bios.
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

/// A handle of a request, and a position in the data that this handle gives access to.
///
/// That is the data of a write for [`Unsent`](super::request::Unsent), and of a read for
/// [`Unanswered`].
pub(crate) struct Payload<S: Side> {
    side: S,
    position: Position,
}

// SAFETY: The bios belong to the request, which stays in flight through the handle. The handle is
// `Send`.
unsafe impl<S: Side + Send> Send for Payload<S> {}

impl<S: Side> Payload<S> {
    /// Creates a payload at the start of the request's data. It is empty if this handle gives no
    /// access to the data.
    pub(crate) fn new(side: S) -> Self {
        let extent = side.extent();
        let left_bytes = if extent.op == S::MOVES {
            extent.len_bytes as usize
        } else {
            0
        };
        // SAFETY: Only a read or a write has data here, and the bios of these hold `left_bytes`.
        unsafe { Self::of_first(side, left_bytes) }
    }

    /// Creates a payload for the first `left_bytes` of the request's data.
    ///
    /// # Safety
    ///
    /// The request's bios must hold so much data.
    unsafe fn of_first(side: S, left_bytes: usize) -> Self {
        // SAFETY: The request is in flight as long as `side` exists, and by this function's safety requirements its
        // bios hold `left_bytes`.
        let position = unsafe { Position::start((*side.rq().as_ptr()).bio, left_bytes) };
        Payload { side, position }
    }

    /// Returns the handle.
    pub(crate) fn side(&self) -> &S {
        &self.side
    }

    /// Returns the number of bytes that are left.
    pub(crate) fn left_bytes(&self) -> usize {
        self.position.left_bytes
    }

    /// Returns the handle.
    pub(crate) fn into_side(self) -> S {
        self.side
    }

    /// Moves on by `bytes`, but not beyond the end.
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

    /// Calls `each` with one piece of memory after the other, from the current position, until it
    /// returns false or the data ends.
    ///
    /// Returns whether the end was reached. The position does not change.
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
    /// Creates a payload for `len_bytes` of a read's data, from `offset_bytes` on.
    ///
    /// # Errors
    ///
    /// Returns the handle if the request is no read, or does not have so much data there.
    pub(crate) fn within(
        side: Unanswered,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> core::result::Result<Self, Unanswered> {
        let extent = side.extent();
        let end_bytes = offset_bytes.checked_add(u64::from(len_bytes));
        if extent.op != Op::Read || end_bytes.is_none_or(|end| end > u64::from(extent.len_bytes)) {
            return Err(side);
        }
        let end_bytes = offset_bytes as usize + len_bytes as usize;
        // SAFETY: The request is a read, whose bios hold at least `end_bytes`.
        let mut payload = unsafe { Self::of_first(side, end_bytes) };
        payload.advance(offset_bytes as usize);
        Ok(payload)
    }

    /// Fills the rest with zeroes.
    ///
    /// # Context
    ///
    /// Any context. It takes about as long as copying so much.
    pub(crate) fn zero(&mut self) {
        // `fill()` passes on the errors of the closure, which has none.
        let _ = self.fill(self.left_bytes(), |to, _, step| {
            // SAFETY: `to` has room for `step` bytes, in memory of a request.
            unsafe { to.write_bytes(0, step) };
            Ok(())
        });
    }

    /// Fills up to `bytes` of memory from the current position, and moves on by that amount.
    ///
    /// The arguments of `copy` are: where to copy to, how much was copied before, and how much to
    /// copy. Returns how much was filled.
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
            // A piece may span several contiguous pages.
            let at = piece.bv_offset as usize;
            let in_page = at % bindings::PAGE_SIZE;
            let step = (bytes - done)
                .min(piece.bv_len as usize)
                .min(bindings::PAGE_SIZE - in_page);
            // SAFETY: The piece lies within the memory of a request in flight.
            let mapped = unsafe {
                let page = piece.bv_page.add(at / bindings::PAGE_SIZE);
                bindings::kmap_local_page(page).cast::<u8>()
            };
            // SAFETY: The offset lies within the page. The request is a read, since this handle
            // gives access to no other data, so `copy` may write to its memory.
            let result = copy(unsafe { mapped.add(in_page) }, done, step);
            // SAFETY: The page was mapped above, and `copy` has returned.
            unsafe { bindings::kunmap_local(mapped.cast()) };
            result?;
            self.position.step(step as u32);
            done += step;
        }
        Ok(done)
    }
}

impl NewRequest {
    /// Returns whether the memory of the request is in the page cache of its disk, and it is no file
    /// system's metadata (`REQ_META`). That is so for a read of the device file that is not direct, and when
    /// the block layer reads the partition table.
    ///
    /// Only the first page of each bio is looked at. If that is not the first page of its folio, it is not
    /// recognised; so it may be when a large folio is read block by block.
    pub(crate) fn is_for_page_cache(&self) -> bool {
        let rq = self.rq.as_ptr();
        // SAFETY: By the type invariant, the driver owns the request.
        if unsafe { (*rq).cmd_flags } & (1 << bindings::req_flag_bits___REQ_META) != 0 {
            return false;
        }
        // SAFETY: By the type invariant, the driver owns the request, so its queue and disk exist, and with
        // the disk its first block device.
        let cache = unsafe { (*(*(*(*rq).q).disk).part0).bd_mapping };
        // SAFETY: By the type invariant, the driver owns the request, and with it its bios.
        let mut bio = unsafe { (*rq).bio };
        while !bio.is_null() {
            // SAFETY: The driver owns the request, and so this bio, as long as the position is used.
            let position = unsafe { Position::start(bio, 1) };
            if position
                .piece()
                .is_some_and(|piece| mapping_of(&piece) == cache)
            {
                return true;
            }
            // SAFETY: `bio` is one of the request's bios.
            bio = unsafe { (*bio).bi_next };
        }
        false
    }
}

/// Returns the page cache that the first page of a piece of memory belongs to. It is only to be compared.
fn mapping_of(piece: &bindings::bio_vec) -> *mut bindings::address_space {
    // SAFETY: The page of a piece of a request's memory is valid. If it is not in a page cache, or not the
    // first of its folio, the field holds another value. A word is never read torn.
    unsafe {
        let mapping = piece.bv_page.byte_add(bindings::OFFSET_PAGE_MAPPING);
        mapping
            .cast::<*mut bindings::address_space>()
            .read_volatile()
    }
}
