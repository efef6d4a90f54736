// SPDX-License-Identifier: GPL-2.0
//! Reading from a TCP socket in its `sk_data_ready` callback, with `tcp_read_sock()`.
//!
//! C headers: [`include/net/tcp.h`](srctree/include/net/tcp.h),
//! [`include/linux/skbuff.h`](srctree/include/linux/skbuff.h)
//!
//! The use of `tcp_read_sock()` follows `drivers/scsi/iscsi_tcp.c`. Its documentation is in `net/ipv4/tcp.c`.

use super::{
    iov::IoPage,
    sock::has_data, //
};
use crate::kapi::{
    bindings,
    block::{
        payload::Payload,
        request::Unanswered, //
    },
};
use core::{
    marker::PhantomData,
    mem::MaybeUninit, //
};
use kernel::{
    error::to_result,
    prelude::*, //
};

/// The received data of a TCP socket, which can be read while the socket's `sk_data_ready` callback runs.
///
/// # Invariants
///
/// `sk` is a valid TCP socket without an upper layer protocol such as TLS, and its lock is held for `'a`.
pub(crate) struct Arrival<'a> {
    sk: *mut bindings::sock,
    _locked: PhantomData<&'a ()>,
}

impl Arrival<'_> {
    /// Returns the received data of `sk`. Returns nothing for a UNIX socket, or if there is an upper layer
    /// protocol on top of TCP.
    ///
    /// # Safety
    ///
    /// - Must be called by the `sk_data_ready` callback of `sk`, and the result must not be used after that
    ///   callback has returned.
    /// - If `sk` is a TCP socket without an upper layer protocol, the callback must have been called by TCP
    ///   itself.
    /// - A file must refer to the socket.
    pub(super) unsafe fn on(sk: *mut bindings::sock) -> Option<Self> {
        // INVARIANT: The socket is plain TCP, and TCP calls this callback with the socket's lock held.
        // SAFETY: By this function's safety requirements, `sk` is valid and a file refers to it.
        unsafe { is_plain_tcp(sk) }.then_some(Arrival {
            sk,
            _locked: PhantomData,
        })
    }

    /// Calls `each` for one segment of the stream after the other, until it returns `false` or nothing is
    /// left.
    ///
    /// What `each` leaves of a segment stays in the socket. So does what follows an urgent byte, which only
    /// `recvmsg()` gets past. Returns whether anything stayed.
    ///
    /// # Context
    ///
    /// In the `sk_data_ready` callback. `each` must not sleep.
    pub(crate) fn read<F: FnMut(&mut Segment<'_>) -> bool>(self, mut each: F) -> bool {
        // SAFETY: A `read_descriptor_t` consists of integers and a pointer, for which all zeroes is a
        // valid value.
        let mut desc: bindings::read_descriptor_t = unsafe { MaybeUninit::zeroed().assume_init() };
        desc.count = 1;
        desc.arg.data = (&raw mut each).cast();
        // The `struct sock` of `kernel::bindings` and ours are the same type in C.
        // SAFETY: By the type invariant, `sk` is a plain TCP socket, which is locked. `desc` holds a
        // pointer to an `F`, as `actor::<F>()` requires.
        unsafe { bindings::tcp_read_sock(self.sk.cast(), &mut desc, Some(actor::<F>)) };
        // SAFETY: By the type invariant, `sk` is valid.
        unsafe { has_data(self.sk) }
    }
}

/// `sk_read_actor_t`: called by `tcp_read_sock()` for each segment. Returns how many bytes were used.
///
/// # Safety
///
/// - `desc` must be the descriptor that [`Arrival::read()`] has made for an `F`, which must still be running.
/// - `skb` must be valid and hold `len` bytes from `offset` on.
unsafe extern "C" fn actor<F: FnMut(&mut Segment<'_>) -> bool>(
    desc: *mut bindings::read_descriptor_t,
    skb: *mut bindings::sk_buff,
    offset: u32,
    len: usize,
) -> i32 {
    // SAFETY: By this function's safety requirements, `desc` belongs to `read()`, which does not access
    // it before `tcp_read_sock()` has returned.
    let desc = unsafe { &mut *desc };
    // SAFETY: `read()` has stored a pointer to its `each` there, which is an `F` that it does not use itself.
    let each = unsafe { &mut *desc.arg.data.cast::<F>() };
    if desc.count == 0 {
        return 0;
    }
    // INVARIANT: By this function's safety requirements, `skb` holds `len` bytes from `offset` on.
    let mut segment = Segment {
        skb,
        offset,
        left_bytes: len,
        _skb: PhantomData,
    };
    if !each(&mut segment) {
        desc.count = 0;
    }
    (len - segment.left_bytes) as i32
}

/// A segment of the received stream, or what is left of it.
///
/// # Invariants
///
/// `skb` is valid for `'a` and holds `left_bytes` bytes from `offset` on.
pub(crate) struct Segment<'a> {
    skb: *mut bindings::sk_buff,
    offset: u32,
    left_bytes: usize,
    _skb: PhantomData<&'a ()>,
}

impl Segment<'_> {
    /// Returns the number of bytes that are left.
    pub(crate) fn left_bytes(&self) -> usize {
        self.left_bytes
    }

    /// Skips `bytes`, which must not be more than what is left.
    fn used(&mut self, bytes: usize) {
        self.offset += bytes as u32;
        self.left_bytes -= bytes;
    }

    /// Moves at most `bytes` bytes to `offset` of a page. Returns how many it has moved: at most what is
    /// left, and at most 64.
    ///
    /// # Errors
    ///
    /// `EINVAL` if they do not fit into the page.
    pub(crate) fn move_to_page(
        &mut self,
        page: &mut IoPage,
        offset: usize,
        bytes: usize,
    ) -> Result<usize> {
        let mut room = [0; 64];
        let bytes = bytes.min(self.left_bytes).min(room.len());
        let (to, _) = room.split_at_mut(bytes);
        // SAFETY: By the type invariant, `skb` holds `bytes` bytes from `offset` on. `to` has room for them.
        to_result(unsafe {
            bindings::skb_copy_bits(
                self.skb,
                self.offset as i32,
                to.as_mut_ptr().cast(),
                bytes as i32,
            )
        })?;
        page.write(offset, to)?;
        self.used(bytes);
        Ok(bytes)
    }

    /// Moves bytes to the current position of `payload` and advances that, until either the segment is
    /// used up or the payload is full.
    ///
    /// # Errors
    ///
    /// `EFAULT` if `skb_copy_bits()` fails, which it does not, because the bytes are there.
    pub(crate) fn move_to(&mut self, payload: &mut Payload<Unanswered>) -> Result {
        let (skb, offset) = (self.skb, self.offset);
        let bytes = payload.fill(self.left_bytes, |to, done, step| {
            // SAFETY: `to` has room for `step` bytes. All steps together are at most `left_bytes`, so by the
            // type invariant `skb` holds the bytes of this one.
            to_result(unsafe {
                bindings::skb_copy_bits(
                    skb,
                    (offset as usize + done) as i32,
                    to.cast(),
                    step as i32,
                )
            })
        })?;
        self.used(bytes);
        Ok(())
    }
}

/// Whether `sk` is a TCP socket without an upper layer protocol. Such a protocol, TLS for example,
/// replaces the socket's operations while it holds the socket's lock.
///
/// # Safety
///
/// `sk` must be a valid socket, and a file must refer to it during the call.
unsafe fn is_plain_tcp(sk: *mut bindings::sock) -> bool {
    // SAFETY: By this function's safety requirements, `sk` is valid.
    let socket = unsafe { (*sk).sk_socket }.cast::<bindings::socket>();
    // SAFETY: By this function's safety requirements, a file refers to `sk`, so it has its
    // `struct socket`, which always has operations.
    let read_sock = unsafe { (*(&raw const (*socket).ops).read_volatile()).read_sock };
    read_sock.is_some_and(|read_sock| read_sock as usize == bindings::tcp_read_sock as usize)
}
