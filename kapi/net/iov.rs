// SPDX-License-Identifier: GPL-2.0
//! Memory to send from and to receive into.
//!
//! Source: `include/linux/bvec.h`.

use crate::kapi::{
    bindings,
    block::{
        payload::Payload,
        request::{
            Unanswered,
            Unsent, //
        },
    },
};
use kernel::{
    alloc::AllocError,
    page::Page,
    prelude::*, //
};

/// A page of memory for headers. Its bytes are copied in and out, never referred to, so a socket may
/// read and write them too.
pub(crate) struct IoPage(Page);

impl IoPage {
    /// How much it holds.
    pub(crate) const BYTES: usize = bindings::PAGE_SIZE;

    /// A page. May sleep.
    pub(crate) fn new() -> core::result::Result<Self, AllocError> {
        Ok(IoPage(Page::alloc_page(GFP_KERNEL)?))
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    ///
    /// `EINVAL` where that is not within the page.
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) -> Result {
        // SAFETY: `bytes` is that long. The page is exclusively ours.
        unsafe { self.0.write_raw(bytes.as_ptr(), offset, bytes.len()) }
    }

    /// Copies from `offset` to `bytes`.
    ///
    /// # Errors
    ///
    /// `EINVAL` where that is not within the page.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result {
        // SAFETY: `bytes` is that long. No socket call writes to the page: it would have a
        // `RecvIov` that borrows the page mutably.
        unsafe { self.0.read_raw(bytes.as_mut_ptr(), offset, bytes.len()) }
    }

    /// Copies from `offset` to the current position of `payload` and moves that on, as far as both
    /// reach, at most `bytes`. Returns how much it was.
    ///
    /// # Errors
    ///
    /// `EINVAL` where that is not within the page.
    pub(crate) fn copy_to(
        &self,
        offset: usize,
        bytes: usize,
        payload: &mut Payload<Unanswered>,
    ) -> Result<usize> {
        payload.fill(bytes, |to, done, step| {
            // SAFETY: `fill()` gives `step` bytes of room.
            unsafe { self.0.read_raw(to, offset + done, step) }
        })
    }
}

/// Room for the description of one transfer, kept so that none needs an allocation.
pub(crate) struct Pieces(KVec<bindings::bio_vec>);

// SAFETY: It is empty but while an `Iov` borrows it.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Room for `count` pieces. May sleep.
    pub(crate) fn new(count: usize) -> core::result::Result<Self, AllocError> {
        Ok(Pieces(KVec::with_capacity(count, GFP_KERNEL)?))
    }
}

/// Memory that a transfer touches.
///
/// # Invariants
///
/// `pieces` describe memory that lives for `'a`, `bytes` in all.
pub(super) struct Iov<'a> {
    pieces: &'a mut KVec<bindings::bio_vec>,
    bytes: usize,
}

impl<'a> Iov<'a> {
    fn new(room: &'a mut Pieces) -> Self {
        room.0.clear();
        // INVARIANT: There is nothing yet.
        Iov {
            pieces: &mut room.0,
            bytes: 0,
        }
    }

    /// The description.
    pub(super) fn pieces(&self) -> &[bindings::bio_vec] {
        self.pieces
    }

    /// How much it describes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn push(&mut self, piece: bindings::bio_vec) -> bool {
        let len = piece.bv_len as usize;
        let pushed = self.pieces.push_within_capacity(piece).is_ok();
        if pushed {
            self.bytes += len;
        }
        pushed
    }

    fn push_page(&mut self, page: *mut bindings::page, offset: usize, len: usize) -> bool {
        offset + len <= IoPage::BYTES
            && self.push(bindings::bio_vec {
                bv_page: page,
                bv_len: len as u32,
                bv_offset: offset as u32,
            })
    }
}

/// Memory to send from.
pub(crate) struct SendIov<'a>(Iov<'a>);

impl<'a> SendIov<'a> {
    /// Nothing yet.
    pub(crate) fn new(room: &'a mut Pieces) -> Self {
        SendIov(Iov::new(room))
    }

    /// How much there is to send.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Appends what is left of a write's data. Returns whether all of it found room.
    pub(crate) fn push_payload(&mut self, payload: &'a Payload<Unsent>) -> bool {
        payload.for_each_piece(|piece| self.0.push(piece))
    }

    /// Appends `len` bytes of a page from `offset`. Returns whether they are in the page and found room.
    pub(crate) fn push_bytes(&mut self, page: &'a IoPage, offset: usize, len: usize) -> bool {
        self.0.push_page(page.0.as_ptr(), offset, len)
    }

    pub(super) fn into_inner(self) -> Iov<'a> {
        self.0
    }
}

/// Memory to receive into, which nobody else may touch meanwhile.
pub(crate) struct RecvIov<'a>(Iov<'a>);

impl<'a> RecvIov<'a> {
    /// Nothing yet.
    pub(crate) fn new(room: &'a mut Pieces) -> Self {
        RecvIov(Iov::new(room))
    }

    /// How much there is room for.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Appends what is left of a read's data. Returns whether all of it found room.
    pub(crate) fn push_payload(&mut self, payload: &'a mut Payload<Unanswered>) -> bool {
        payload.for_each_piece(|piece| self.0.push(piece))
    }

    /// Appends `len` bytes of a page from `offset`. Returns whether they are in the page and found room.
    pub(crate) fn push_room(&mut self, page: &'a mut IoPage, offset: usize, len: usize) -> bool {
        self.0.push_page(page.0.as_ptr(), offset, len)
    }

    pub(super) fn into_inner(self) -> Iov<'a> {
        self.0
    }
}
