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

use crate::kapi::bindings;
use core::ptr;

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
