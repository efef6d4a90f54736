// SPDX-License-Identifier: GPL-2.0
//! Sends and receives over a socket.
//!
//! C header: [`include/linux/net.h`](srctree/include/linux/net.h)

use super::{
    context::in_io_context,
    iov::{
        Iov,
        RecvIov,
        SendIov, //
    },
    kind::Kind,
    page_frag::{
        FragPool,
        PageFrag, //
    },
    sock::Socket, //
};
use crate::kapi::{
    bindings,
    errno::ENOBUFS, //
};
use core::mem::MaybeUninit;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// What the caller will send next (`MSG_MORE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// More data, immediately. A segment that is not full waits for it.
    More,
    /// Nothing that is known yet.
    Nothing,
}

/// A TLS record that was received, or a part of it.
pub(crate) struct Record {
    /// The type of the record (`TLS_RECORD_TYPE_*`).
    pub(crate) kind: u8,
    /// The number of bytes that were received.
    pub(crate) bytes: usize,
}

/// Room for the control message by which TLS tells the type of a record (`CMSG_SPACE(sizeof(u8))`).
#[repr(C)]
#[derive(Default)]
struct RecordType {
    header: bindings::cmsghdr,
    kind: u8,
}

impl RecordType {
    /// Returns the type of the record, if there is one (`tls_get_record_type()`).
    fn get(&self) -> Option<u8> {
        let is_told = self.header.cmsg_level == bindings::SOL_TLS as i32
            && self.header.cmsg_type == bindings::TLS_GET_RECORD_TYPE as i32;
        is_told.then_some(self.kind)
    }
}

impl Socket {
    /// Sends as much of `data` as the socket has room for, and returns the number of bytes. A protocol copies
    /// it to `frags`.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: there is no room, or no memory.
    /// - `EINTR`, `ERESTARTSYS`: a socket with TLS was interrupted by a signal.
    /// - Anything else: the connection is broken.
    ///
    /// # Context
    ///
    /// Process context. Does not wait for room, but may sleep to get the socket's lock.
    pub(crate) fn send(
        &self,
        data: SendIov<'_>,
        frags: &mut FragPool,
        next: Next,
    ) -> Result<usize> {
        let bytes = data.bytes();
        let data = data.into_inner();
        let mut msg = MaybeUninit::uninit();
        let msg = init_message(&mut msg, &data, bindings::ITER_SOURCE);
        // SAFETY: `msg` describes `bytes` bytes of memory, which lives during the call.
        let sent = in_io_context(|| unsafe { self.send_message(msg, bytes, frags, next) });
        // If there is no memory, TCP and MPTCP return EAGAIN. A UNIX or vsock socket returns these errors, and
        // has accepted nothing.
        sent.map_err(|e| match e {
            e if e == ENOBUFS || e == ENOMEM => EAGAIN,
            e => e,
        })
    }

    /// Sends a message of `bytes` bytes, with one call for each page fragment that its data is copied to.
    ///
    /// # Safety
    ///
    /// `msg` must describe so many bytes of memory, which must live during the call.
    unsafe fn send_message(
        &self,
        msg: &mut bindings::msghdr,
        bytes: usize,
        frags: &mut FragPool,
        next: Next,
    ) -> Result<usize> {
        // MPTCP also puts headers of its own into the fragments, and TLS whole records.
        let keeps_frags = self.kind() == Kind::Tcp && !self.has_upper_layer();
        let mut sent = 0;
        loop {
            let left = bytes - sent;
            let part = match keeps_frags {
                true => left.min(frags.choose(left)),
                false => left,
            };
            let next = if part < left { Next::More } else { next };
            // SAFETY: By this function's safety requirements, the memory lives. `part` bytes of it are left.
            match frags.lend(|| unsafe { self.send_part(msg, part, next) }) {
                // A socket reports an error only once. If there is one already, the next call reports it.
                Ok(got) if got < left && got == part && !self.has_error() => sent += got,
                Ok(got) => return Ok(sent + got),
                // The next call fails, too. If the error has come since the check, that reports `EPIPE` instead.
                Err(_) if sent > 0 => return Ok(sent),
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether the socket is to report an error (`sk_err`).
    fn has_error(&self) -> bool {
        // SAFETY: By the type invariant, `sk` is valid. C reads this field without a lock, too.
        unsafe { (&raw const (*self.sk()).sk_err).read_volatile() != 0 }
    }

    /// Sends `bytes` bytes of what is left of a message.
    ///
    /// # Safety
    ///
    /// `msg` must describe at least so many bytes of memory, which must live during the call.
    unsafe fn send_part(
        &self,
        msg: &mut bindings::msghdr,
        bytes: usize,
        next: Next,
    ) -> Result<usize> {
        msg.msg_flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
        if next == Next::More {
            msg.msg_flags |= bindings::MSG_MORE;
        }
        // As `iov_iter_truncate()` and `iov_iter_reexpand()` do.
        // SAFETY: `iov_iter_bvec()` has initialised this field of the union.
        unsafe { msg.msg_iter.__bindgen_anon_1.__bindgen_anon_1.as_mut() }.count = bytes;
        // SAFETY: By the type invariant, the socket is valid, and by this function's safety requirements, so is
        // what `msg` describes.
        let sent = unsafe { bindings::sock_sendmsg(self.as_ptr(), msg) };
        to_result(sent)?;
        Ok(sent as usize)
    }

    /// Receives at most as many bytes as `data` has room for, and returns their number. With TLS, that may be 0, which
    /// says nothing about what follows.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: there is nothing to receive.
    /// - `EPIPE`: the stream has ended.
    /// - Anything else: the connection is broken.
    ///
    /// # Context
    ///
    /// Process context. Does not wait for data, but may sleep to get the socket's lock.
    pub(crate) fn receive(&self, data: RecvIov<'_>) -> Result<usize> {
        let data = data.into_inner();
        let mut msg = MaybeUninit::uninit();
        let msg = init_message(&mut msg, &data, bindings::ITER_DEST);
        // SAFETY: `msg` describes memory that lives during the call.
        match unsafe { self.receive_message(msg)? } {
            // There was a record of TLS, but an empty one, with one that is no data behind it. Other sockets set
            // the flag at the end of the stream, too, if they have been asked for control messages.
            0 if self.is_decrypted() && msg.msg_flags & bindings::MSG_CTRUNC != 0 => Ok(0),
            0 => Err(EPIPE),
            got => Ok(got),
        }
    }

    /// Receives a TLS record that is no data, or as much of it as `data` has room for. The next call returns the
    /// rest. To be called after [`Self::receive()`] has failed with `EIO`, because such a record is next.
    ///
    /// # Errors
    ///
    /// - `EIO`: no such record is next.
    /// - Anything else: the connection is broken.
    ///
    /// # Context
    ///
    /// As for [`Self::receive()`].
    pub(crate) fn receive_record(&self, data: RecvIov<'_>) -> Result<Record> {
        let data = data.into_inner();
        let mut msg = MaybeUninit::uninit();
        let msg = init_message(&mut msg, &data, bindings::ITER_DEST);
        let mut control = RecordType::default();
        msg.__bindgen_anon_1.msg_control = (&raw mut control).cast();
        msg.msg_controllen = size_of::<RecordType>();
        // SAFETY: `msg` describes memory that lives during the call. So does `control`, which has that size.
        let got = match unsafe { self.receive_message(msg) } {
            Err(e) if e == EAGAIN => return Err(EIO),
            got => got?,
        };
        let kind = control.get().ok_or(EIO)?;
        Ok(Record { kind, bytes: got })
    }

    /// Receives a message, and returns the number of bytes. Does not wait for data.
    ///
    /// # Safety
    ///
    /// What `msg` points to must live during the call.
    unsafe fn receive_message(&self, msg: &mut bindings::msghdr) -> Result<usize> {
        let flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
        let receive = || {
            // SAFETY: By the type invariant, the socket is valid, and by this function's safety requirements, so
            // is what `msg` describes.
            unsafe { bindings::sock_recvmsg(self.as_ptr(), msg, flags as i32) }
        };
        // It sends at most an acknowledgement, but must not meet the fragment of the task either.
        let got = in_io_context(|| PageFrag::empty().lend(receive));
        to_result(got)?;
        Ok(got as usize)
    }
}

/// Makes `msg` describe the memory of a transfer. It must not be used any longer than `data`. It is not returned
/// by value, since it would be copied.
fn init_message<'a>(
    msg: &'a mut MaybeUninit<bindings::msghdr>,
    data: &Iov<'_>,
    direction: u32,
) -> &'a mut bindings::msghdr {
    // SAFETY: A `struct msghdr` consists of integers and pointers, for which all zeroes is a valid value.
    let msg = msg.write(unsafe { MaybeUninit::zeroed().assume_init() });
    // SAFETY: By the type invariant of `Iov`, the pieces describe so many bytes of memory.
    unsafe {
        bindings::iov_iter_bvec(
            &mut msg.msg_iter,
            direction,
            data.pieces().as_ptr(),
            data.pieces().len(),
            data.bytes(),
        )
    };
    msg
}
