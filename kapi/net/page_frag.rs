// SPDX-License-Identifier: GPL-2.0
//! Page fragments: memory into which a protocol copies what it sends (`struct page_frag`).
//!
//! C headers: [`include/net/sock.h`](srctree/include/net/sock.h) (`sk_page_frag()`),
//! [`include/linux/mm_types_task.h`](srctree/include/linux/mm_types_task.h)
//!
//! TCP and MPTCP use the fragment of the current task, unless `sk_use_task_frag` is false. A task may be in the
//! middle of a send on another socket when it submits a request: to copy from user memory can fault, and the
//! fault can start memory reclaim, which writes to the device. The send that is interrupted must find the
//! fragment as it was. nbd.c therefore makes its sockets use a fragment of their own (`sk_frag`). This does not
//! work with MPTCP: `mptcp_disconnect()` (7.3) does not release that fragment, and a socket that is
//! disconnected and then listens passes it on to each socket that it accepts, without a reference to its page.
//! So here a sender brings a fragment, which takes the place of the task's during the call.
//!
//! A fragment that is full is not given up, as `skb_page_frag_refill()` does, but kept in a [`FragPool`] until the
//! network has let go of it. To allocate another means to clear it, where `init_on_alloc` is on.

use crate::kapi::bindings;
use core::ptr;
use kernel::{
    alloc::AllocError,
    prelude::*, //
};

/// The smallest room of a fragment that a protocol uses (`sk_page_frag_refill()`).
const MIN_ROOM_BYTES: usize = 32;
/// What is left of a fragment is not used for part of a longer transfer if it is less than this.
const MIN_PART_BYTES: usize = 8 << 10;
/// The size of the fragments that are allocated here. TCP makes packets of up to 64 KiB. The protocols allocate
/// smaller ones, or single pages.
const FRAG_BYTES: usize = if bindings::PAGE_SIZE < 64 << 10 {
    64 << 10
} else {
    2 * bindings::PAGE_SIZE
};
/// The number of full fragments that are looked at for one that can be filled again. The network lets go of the
/// oldest first, unless somebody keeps a packet.
const LOOKED_AT: usize = 4;

/// A page fragment.
///
/// # Invariants
///
/// If `page` is not null, this holds a reference to it, and it is a compound page of `size` bytes, or a single
/// page (`skb_page_frag_refill()`).
pub(super) struct PageFrag(bindings::page_frag);

// SAFETY: The reference to the page may be used and given up by any task.
unsafe impl Send for PageFrag {}

impl PageFrag {
    /// Returns a fragment without a page. A protocol allocates one when it needs it.
    pub(super) fn empty() -> Self {
        // INVARIANT: There is no page.
        PageFrag(bindings::page_frag {
            page: ptr::null_mut(),
            offset: 0,
            size: 0,
        })
    }

    /// Allocates a fragment of [`FRAG_BYTES`], but neither frees memory for it nor uses the reserves.
    fn alloc() -> Option<Self> {
        let order = (FRAG_BYTES / bindings::PAGE_SIZE).trailing_zeros();
        // SAFETY: With these flags, `alloc_pages()` may be called in any context.
        let page = unsafe { bindings::alloc_pages(bindings::GFP_FRAG, order) };
        // INVARIANT: If there is a page, it is a compound page of that order, and the reference is taken over.
        (!page.is_null()).then(|| {
            PageFrag(bindings::page_frag {
                page,
                offset: 0,
                size: FRAG_BYTES as u32,
            })
        })
    }

    /// Returns the size of the page in bytes, 0 if there is none. A protocol that could not allocate one has
    /// left the size of the last.
    fn size_bytes(&self) -> usize {
        match self.0.page.is_null() {
            true => 0,
            false => self.0.size as usize,
        }
    }

    /// Returns whether there is a page and nobody else refers to it. Then all of it may be written to again, by the same
    /// rule as in `skb_page_frag_refill()`.
    fn is_unused(&self) -> bool {
        if self.0.page.is_null() {
            return false;
        }
        // SAFETY: By the type invariant, the page is valid. `page_ref_count()` is such a read, too.
        let references = unsafe {
            let count = self.0.page.byte_add(bindings::OFFSET_PAGE_REFCOUNT);
            count.cast::<i32>().read_volatile()
        };
        references == 1
    }

    /// Returns how many bytes a protocol copies into the fragment at most before it allocates another one. The
    /// number grows when the network lets go of the page.
    fn room_bytes(&self) -> usize {
        let size = self.size_bytes();
        if self.is_unused() {
            return size;
        }
        match size.saturating_sub(self.0.offset as usize) {
            room if room < MIN_ROOM_BYTES => 0,
            room => room,
        }
    }

    /// Runs `f` with this fragment in the place of the current task's. `f` must not panic.
    pub(super) fn lend<R>(&mut self, f: impl FnOnce() -> R) -> R {
        // SAFETY: The current task is valid. Only the task itself uses its fragment, and only in process
        // context. Both fragments meet the type invariant, and each is back in its place when this returns.
        unsafe {
            let of_task = &raw mut (*bindings::get_current()).task_frag;
            ptr::swap(of_task, &raw mut self.0);
            let result = f();
            ptr::swap(of_task, &raw mut self.0);
            result
        }
    }
}

impl Drop for PageFrag {
    fn drop(&mut self) {
        if self.0.page.is_null() {
            return;
        }
        let order = (self.0.size as usize / bindings::PAGE_SIZE).trailing_zeros();
        // As `put_page()`, which is an inline function in C.
        // SAFETY: By the type invariant, this holds a reference to a page of that order, which is given up
        // here.
        unsafe { bindings::__free_pages(self.0.page, order) };
    }
}

/// The fragments of a sender: one that is being filled, and those that are full, until the network has let go
/// of them and they can be filled again.
pub(crate) struct FragPool {
    current: PageFrag,
    /// The oldest is the first. The list does not grow beyond what was allocated for it.
    full: KVec<PageFrag>,
}

impl FragPool {
    /// Returns a pool that has no pages yet, and keeps at most `capacity` full fragments. May sleep.
    pub(crate) fn new(capacity: usize) -> core::result::Result<Self, AllocError> {
        Ok(FragPool {
            current: PageFrag::empty(),
            full: KVec::with_capacity(capacity, GFP_KERNEL)?,
        })
    }

    /// Chooses the fragment for the next call, with `bytes` left to send. Returns how many of them that call
    /// should send at most, so that the protocol does not give the fragment up.
    pub(super) fn choose(&mut self, bytes: usize) -> usize {
        let room = self.current.room_bytes();
        if room >= bytes.min(MIN_PART_BYTES) {
            return room;
        }
        let Some(next) = self.next(bytes) else {
            // The protocol gives the current one up and allocates another.
            return usize::MAX;
        };
        let full = core::mem::replace(&mut self.current, next);
        // Those of the protocols are not kept: they may be single pages, or come from the reserves.
        if full.size_bytes() == FRAG_BYTES {
            let _ = self.full.push_within_capacity(full);
        }
        self.current.room_bytes()
    }

    /// Returns the next fragment: one that the network has let go of, or a new one.
    fn next(&mut self, bytes: usize) -> Option<PageFrag> {
        if let Some(unused) = self.take_unused(LOOKED_AT) {
            return Some(unused);
        }
        if self.full.len() == self.full.capacity() {
            // Somebody may keep it for long.
            let _ = self.full.remove(0);
        }
        // A sender of one short message after the other gets by with what the protocol allocates.
        if bytes < FRAG_BYTES / 2 && self.current.size_bytes() == 0 {
            return None;
        }
        PageFrag::alloc().or_else(|| self.take_unused(usize::MAX))
    }

    /// Takes one that the network has let go of out of the `count` oldest fragments.
    fn take_unused(&mut self, count: usize) -> Option<PageFrag> {
        let mut oldest = self.full.iter().take(count);
        let index = oldest.position(PageFrag::is_unused)?;
        self.full.remove(index).ok()
    }

    /// Returns whether there are any pages.
    pub(crate) fn has_pages(&self) -> bool {
        self.current.size_bytes() > 0 || !self.full.is_empty()
    }

    /// Returns the size of all pages, in bytes.
    pub(crate) fn size_bytes(&self) -> usize {
        let full: usize = self.full.iter().map(PageFrag::size_bytes).sum();
        full + self.current.size_bytes()
    }

    /// Gives up half of the full fragments that the network has let go of.
    pub(crate) fn trim(&mut self) {
        let unused = self.full.iter().filter(|frag| frag.is_unused()).count();
        for _ in 0..unused.div_ceil(2) {
            drop(self.take_unused(usize::MAX));
        }
    }

    /// Gives all pages up.
    pub(crate) fn clear(&mut self) {
        self.current = PageFrag::empty();
        self.full.clear();
    }

    /// Runs `f` with the chosen fragment in the place of the current task's; see [`PageFrag::lend()`].
    pub(super) fn lend<R>(&mut self, f: impl FnOnce() -> R) -> R {
        self.current.lend(f)
    }
}
