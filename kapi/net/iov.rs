// SPDX-License-Identifier: GPL-2.0
//! Memory to send from and to receive into, as lists of `struct bio_vec`.
//!
//! C header: [`include/linux/bvec.h`](srctree/include/linux/bvec.h)
//!
//! One list describes the headers and the data of a transfer, as in sunrpc's `svc_tcp_sendmsg()`
//! (`net/sunrpc/svcsock.c`).

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
use core::ptr::NonNull;
use kernel::{
    alloc::AllocError,
    page::Page,
    prelude::*, //
};

#[cfg(CONFIG_HIGHMEM)]
compile_error!("pages have no lasting address on a kernel with CONFIG_HIGHMEM");

/// A page of memory for protocol headers. Rust code copies its bytes in and out, but has no references to
/// them, so that a socket may read and write them, too.
///
/// # Invariants
///
/// `address` is that of the page's first byte, and valid as long as the page.
pub(crate) struct IoPage {
    page: Page,
    address: NonNull<u8>,
}

// SAFETY: The page belongs to the `IoPage`, and can be accessed from everywhere.
unsafe impl Send for IoPage {}

impl IoPage {
    /// The size of a page, in bytes.
    pub(crate) const BYTES: usize = bindings::PAGE_SIZE;

    /// Allocates a page. May sleep.
    pub(crate) fn new() -> core::result::Result<Self, AllocError> {
        let page = Page::alloc_page(GFP_KERNEL)?;
        // SAFETY: The page is valid.
        let address = unsafe { bindings::kmap_local_page(page.as_ptr().cast()) };
        // INVARIANT: Without CONFIG_HIGHMEM, `kmap_local_page()` maps nothing, but returns the address that
        // the page has all the time.
        Ok(IoPage {
            page,
            address: NonNull::new(address.cast()).ok_or(AllocError)?,
        })
    }

    /// Returns the address of `len` bytes from `offset` of the page.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the page does not have so many bytes there.
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8> {
        if offset > Self::BYTES || len > Self::BYTES - offset {
            return Err(EINVAL);
        }
        // SAFETY: By the type invariant, and because of the check above, the bytes lie within the page.
        Ok(unsafe { self.address.as_ptr().add(offset) })
    }

    /// Copies `bytes` to `offset` of the page.
    ///
    /// # Errors
    ///
    /// `EINVAL` if they do not fit into the page.
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) -> Result {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: `at()` has checked that the bytes fit. `&mut self` is exclusive, and no `Iov` borrows the page.
        // No Rust reference leads to the page's memory, so the two do not overlap.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies from `offset` of the page to `bytes`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the page does not have so many bytes there.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result {
        let from = self.at(offset, bytes.len())?;
        // SAFETY: `at()` has checked that the bytes are there. No socket writes to the page at the same time,
        // because a `RecvIov` would have to borrow the page mutably. The two do not overlap, as in `write()`.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Copies at most `bytes` bytes from `offset` of the page to the current position of `payload`, and
    /// advances that. Returns how many it has copied, which is less if the payload has less room.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the page does not have so many bytes there.
    pub(crate) fn copy_to(
        &self,
        offset: usize,
        bytes: usize,
        payload: &mut Payload<Unanswered>,
    ) -> Result<usize> {
        payload.fill(bytes, |to, done, step| {
            let from = self.at(offset + done, step)?;
            // SAFETY: `to` has room for `step` bytes, in memory of a request, and `at()` has checked that they are
            // there. No socket writes to the page at the same time, as in `read()`.
            unsafe { from.copy_to_nonoverlapping(to, step) };
            Ok(())
        })
    }
}

/// An allocated list of `struct bio_vec`, which is reused so that a transfer allocates nothing.
pub(crate) struct Pieces(KVec<bindings::bio_vec>);

// SAFETY: The pointers in the list are only used by an `Iov`, and each `Iov` begins with an empty list.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Allocates room for `count` pieces of memory. May sleep.
    pub(crate) fn new(count: usize) -> core::result::Result<Self, AllocError> {
        Ok(Pieces(KVec::with_capacity(count, GFP_KERNEL)?))
    }
}

/// The memory of one transfer.
///
/// # Invariants
///
/// `pieces` describe memory that lives for `'a`, of `bytes` bytes in total.
pub(super) struct Iov<'a> {
    pieces: &'a mut KVec<bindings::bio_vec>,
    bytes: usize,
}

impl<'a> Iov<'a> {
    fn new(room: &'a mut Pieces) -> Self {
        room.0.clear();
        // INVARIANT: The list is empty.
        Iov {
            pieces: &mut room.0,
            bytes: 0,
        }
    }

    /// Returns the pieces of memory.
    pub(super) fn pieces(&self) -> &[bindings::bio_vec] {
        self.pieces
    }

    /// Returns the total size of the pieces, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends a piece, which must live for `'a`. Returns whether there was room for it.
    fn push(&mut self, piece: bindings::bio_vec) -> bool {
        let len = piece.bv_len as usize;
        let pushed = self.pieces.push_within_capacity(piece).is_ok();
        if pushed {
            self.bytes += len;
        }
        pushed
    }

    /// As [`Self::push()`], for `len` bytes from `offset` of a page. Returns `false` as well if they are
    /// not within the page.
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
    /// Makes an empty list in `room`.
    pub(crate) fn new(room: &'a mut Pieces) -> Self {
        SendIov(Iov::new(room))
    }

    /// Returns the number of bytes to send.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Appends what is left of a write request's data. Returns whether there was room for all of it.
    pub(crate) fn push_payload(&mut self, payload: &'a Payload<Unsent>) -> bool {
        payload.for_each_piece(|piece| self.0.push(piece))
    }

    /// Appends `len` bytes from `offset` of a page. Returns whether they are within the page and there
    /// was room.
    pub(crate) fn push_bytes(&mut self, page: &'a IoPage, offset: usize, len: usize) -> bool {
        self.0.push_page(page.page.as_ptr(), offset, len)
    }

    pub(super) fn into_inner(self) -> Iov<'a> {
        self.0
    }
}

/// Memory to receive into. It is borrowed mutably, so that nothing else accesses it in the meantime.
pub(crate) struct RecvIov<'a>(Iov<'a>);

impl<'a> RecvIov<'a> {
    /// Makes an empty list in `room`.
    pub(crate) fn new(room: &'a mut Pieces) -> Self {
        RecvIov(Iov::new(room))
    }

    /// Returns the number of bytes that there is room for.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Appends what is left of a read request's memory. Returns whether there was room for all of it.
    pub(crate) fn push_payload(&mut self, payload: &'a mut Payload<Unanswered>) -> bool {
        payload.for_each_piece(|piece| self.0.push(piece))
    }

    /// Appends `len` bytes from `offset` of a page. Returns whether they are within the page and there
    /// was room.
    pub(crate) fn push_room(&mut self, page: &'a mut IoPage, offset: usize, len: usize) -> bool {
        self.0.push_page(page.page.as_ptr(), offset, len)
    }

    pub(super) fn into_inner(self) -> Iov<'a> {
        self.0
    }
}
