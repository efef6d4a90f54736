// SPDX-License-Identifier: GPL-2.0
//! What has come in on a TCP socket, read where it arrives.
//!
//! Source: `tcp_read_sock()` in `net/ipv4/tcp.c`; the use of it follows `drivers/scsi/iscsi_tcp.c`.

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

/// What has come in on a TCP socket, to be read without leaving the callback that told of it.
///
/// # Invariants
///
/// `sk` is a TCP socket without an upper layer protocol such as TLS, and its lock is held for `'a`.
pub(crate) struct Arrival<'a> {
    sk: *mut bindings::sock,
    _locked: PhantomData<&'a ()>,
}

impl Arrival<'_> {
    /// # Safety
    ///
    /// To be called by the `sk_data_ready` of `sk`, which TCP itself must have called if it is its socket,
    /// and used within it only. A file must refer to the socket.
    pub(super) unsafe fn on(sk: *mut bindings::sock) -> Option<Self> {
        // INVARIANT: TCP calls this callback with the lock held.
        // SAFETY: The caller promises that `sk` is valid and has its socket.
        unsafe { is_plain_tcp(sk) }.then_some(Arrival {
            sk,
            _locked: PhantomData,
        })
    }

    /// Calls `each` with one piece of the stream after the other until it returns false or nothing is
    /// left. What it leaves of a piece stays in the socket; so does what follows an urgent byte, which only
    /// `recvmsg` gets past. Returns whether something stayed.
    pub(crate) fn read<F: FnMut(&mut Segment<'_>) -> bool>(self, mut each: F) -> bool {
        // SAFETY: It consists of numbers, for which zeroes are fine.
        let mut desc: bindings::read_descriptor_t = unsafe { MaybeUninit::zeroed().assume_init() };
        desc.count = 1;
        desc.arg.data = (&raw mut each).cast();
        // SAFETY: By the type invariant the socket is TCP's and locked. The actor is the one for `F`.
        // kernel::bindings' and our `struct sock` are the same type in C.
        unsafe { bindings::tcp_read_sock(self.sk.cast(), &mut desc, Some(actor::<F>)) };
        // SAFETY: By the type invariant `sk` is valid.
        unsafe { has_data(self.sk) }
    }
}

/// `sk_read_actor_t`
///
/// # Safety
///
/// `desc` must be that of [`Arrival::read::<F>()`], and `len` bytes be in `skb` from `offset`.
unsafe extern "C" fn actor<F: FnMut(&mut Segment<'_>) -> bool>(
    desc: *mut bindings::read_descriptor_t,
    skb: *mut bindings::sk_buff,
    offset: u32,
    len: usize,
) -> i32 {
    // SAFETY: `desc` is that of `read()`, which waits for `tcp_read_sock()` and touches it no more before.
    let desc = unsafe { &mut *desc };
    // SAFETY: `read()` has put a pointer to its `each` there, an `F` that nobody else uses meanwhile.
    let each = unsafe { &mut *desc.arg.data.cast::<F>() };
    if desc.count == 0 {
        return 0;
    }
    // INVARIANT: The caller promises that `len` bytes are in `skb` from `offset`.
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

/// A piece of the stream that has come in.
///
/// # Invariants
///
/// `left_bytes` bytes are in `skb` from `offset`.
pub(crate) struct Segment<'a> {
    skb: *mut bindings::sk_buff,
    offset: u32,
    left_bytes: usize,
    _skb: PhantomData<&'a ()>,
}

impl Segment<'_> {
    /// What is left of it.
    pub(crate) fn left_bytes(&self) -> usize {
        self.left_bytes
    }

    fn used(&mut self, bytes: usize) {
        self.offset += bytes as u32;
        self.left_bytes -= bytes;
    }

    /// Moves `bytes`, at most what is left, to `offset` of a page. Returns how much it was.
    ///
    /// # Errors
    ///
    /// `EINVAL` where that is not within the page.
    pub(crate) fn move_to_page(
        &mut self,
        page: &mut IoPage,
        offset: usize,
        bytes: usize,
    ) -> Result<usize> {
        let mut room = [0; 64];
        let bytes = bytes.min(self.left_bytes).min(room.len());
        let (to, _) = room.split_at_mut(bytes);
        // SAFETY: By the type invariant so much is there, and `to` has room for it.
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

    /// Moves as much as both have to the current position of `payload`, which moves on.
    ///
    /// # Errors
    ///
    /// `EFAULT`, which cannot be.
    pub(crate) fn move_to(&mut self, payload: &mut Payload<Unanswered>) -> Result {
        let (skb, offset) = (self.skb, self.offset);
        let bytes = payload.fill(self.left_bytes, |to, done, step| {
            // SAFETY: `fill()` gives `step` bytes of room, and asks for no more than is left in all,
            // which by the type invariant is there.
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

/// Whether it is a TCP socket without an upper layer protocol, such as TLS, which replaces the operations
/// under the socket's lock.
///
/// # Safety
///
/// `sk` must be a socket that a file refers to during the call.
unsafe fn is_plain_tcp(sk: *mut bindings::sock) -> bool {
    // SAFETY: The caller promises that `sk` is valid.
    let socket = unsafe { (*sk).sk_socket }.cast::<bindings::socket>();
    // SAFETY: The socket is there as long as a file refers to it, and has operations from its making on.
    let read_sock = unsafe { (*(&raw const (*socket).ops).read_volatile()).read_sock };
    read_sock.is_some_and(|read_sock| read_sock as usize == bindings::tcp_read_sock as usize)
}
