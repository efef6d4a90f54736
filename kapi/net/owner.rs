// SPDX-License-Identifier: GPL-2.0
//! The owner of a hooked socket, and how a callback finds it: [`Events`] and [`Hook`].
//!
//! This is the second of the four parts that `hook.rs` describes. While a socket is hooked, its
//! `sk_user_data` points to a [`Hook`], which refers to the owner. Other users of sockets store pointers to
//! their own objects there, and one of them (`drivers/scsi/iscsi_tcp.c`) overwrites a pointer that is
//! already there. So a callback does not trust the pointer. [`Hook::in_user_data()`] accepts it only if:
//!
//! - its low bits are exactly `SK_USER_DATA_NOCOPY`, which most other users leave clear;
//! - the object begins with the address of [`MARK`], which no other object in the kernel begins with;
//! - the hook is one for this socket and for this type of owner, and has not been stopped.
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)

use super::{
    arrival::Arrival,
    saved::Callbacks, //
};
use crate::kapi::bindings;
use core::{
    any::TypeId,
    ptr::NonNull, //
};
use kernel::sync::{
    atomic::{
        Atomic,
        Relaxed, //
    },
    Arc,
    ArcBorrow, //
};

/// The events of a hooked socket, implemented by the socket's owner.
///
/// # Context
///
/// All methods but [`Self::sender_receives()`] are called from a callback of the socket, with
/// `sk_callback_lock` held for reading and softirqs disabled: in softirq context, or in any task that uses
/// the socket or its peer. They must not sleep. Several of them may run at the same time.
pub(crate) trait Events: Send + Sync + 'static {
    /// A TCP socket has received something, which can be read from `arrival` before this returns. Called
    /// instead of [`Self::input_ready()`].
    ///
    /// # Context
    ///
    /// As for [`Events`], and with the socket locked: by TCP's receive path in softirq context, or by a task
    /// that processes the socket's backlog.
    fn tcp_data_ready(this: ArcBorrow<'_, Self>, arrival: Arrival<'_>);

    /// Whether the current task is to receive what it has just sent. The task has sent to this UNIX socket
    /// through its peer and is still in `sendmsg()`.
    ///
    /// If this returns `true`, [`Self::sender_receives()`] is called next, in the same task. Otherwise
    /// [`Self::input_ready()`] is.
    fn sender_should_receive(&self) -> bool;

    /// Receives, in the task that has sent, on its way out of `sendmsg()` on the peer of this UNIX socket.
    /// The hook may have been stopped in the meantime, and the socket may have been given up.
    ///
    /// # Context
    ///
    /// Process context, outside of `sk_callback_lock`. May sleep, but should return soon, because the task
    /// belongs to somebody else. The task holds no lock of the socket, and no other lock that must not be
    /// held in `recvmsg()`.
    fn sender_receives(this: Arc<Self>);

    /// There may be something to receive: data, the end of the stream, or an error. May be called without a
    /// reason.
    fn input_ready(this: ArcBorrow<'_, Self>);

    /// The connection has changed its state, or has an error. There may be something to receive, as for
    /// [`Self::input_ready()`], and a send that waits for room may have to fail instead: no
    /// [`Self::write_space()`] may follow.
    fn state_changed(this: ArcBorrow<'_, Self>);

    /// There may be room in the send buffer. Returns whether there is, and the owner was waiting for it.
    ///
    /// The caller then clears `SOCK_NOSPACE`, so that the socket does not call `sk_write_space` again before
    /// it is asked to, and calls [`Self::write_space()`], in this order: the owner may ask at once.
    fn awaits_space(&self) -> bool;

    /// There is room in the send buffer that the owner was waiting for.
    fn write_space(this: ArcBorrow<'_, Self>);
}

/// All flags that the low bits of `sk_user_data` can hold.
const ALL_TAGS: usize =
    bindings::SK_USER_DATA_NOCOPY | bindings::SK_USER_DATA_BPF | bindings::SK_USER_DATA_PSOCK;

/// Identifies a [`Hook`]: each begins with this address, and no other object in the kernel does.
pub(super) static MARK: u8 = 0;

/// What `sk_user_data` points to while a socket is hooked.
///
/// # Invariants
///
/// - `mark` is the address of [`MARK`].
/// - The hook is installed on `sk`, or is not shared yet.
/// - After it was installed, only `stopped` changes.
/// - After it was installed, it is freed only when the record of the socket does not refer to it any more
///   ([`forget()`](super::saved::forget) or [`forget_hook()`](super::saved::forget_hook)), when
///   `sk_user_data` does not either, and when `sk_callback_lock` was held for writing in between.
#[repr(C)]
pub(super) struct Hook<T: Events> {
    pub(super) mark: *const u8,
    /// The socket that this hook is for.
    pub(super) sk: *mut bindings::sock,
    /// The `TypeId` of `T`.
    pub(super) kind: TypeId,
    /// The callbacks that the socket had before.
    pub(super) had: Callbacks,
    /// The owner must not be called any more.
    pub(super) stopped: Atomic<bool>,
    pub(super) owner: Arc<T>,
}

// SAFETY: The pointers are only compared, and `Arc<T>` is `Send` because `T` is `Send` and `Sync`.
unsafe impl<T: Events> Send for Hook<T> {}
// SAFETY: By the type invariant only the atomic `stopped` changes while the hook is shared, and `Arc<T>` is
// `Sync` because `T` is `Send` and `Sync`.
unsafe impl<T: Events> Sync for Hook<T> {}

impl<T: Events> Hook<T> {
    /// Returns the value of `sk_user_data` that stands for this hook. Its flag keeps connections that are
    /// cloned from the socket from inheriting it.
    pub(super) fn tagged(&self) -> *mut core::ffi::c_void {
        let hook = (&raw const *self).wrapping_byte_add(bindings::SK_USER_DATA_NOCOPY);
        hook.cast_mut().cast()
    }

    pub(super) fn as_ptr(&self) -> NonNull<()> {
        NonNull::from(self).cast()
    }

    /// Returns the hook in `sk_user_data`, if there is one, it is for `sk` and for a `T`, and it has not been
    /// stopped.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket, whose `sk_callback_lock` is held for `'a`.
    pub(super) unsafe fn in_user_data<'a>(sk: *mut bindings::sock) -> Option<&'a Self> {
        // SAFETY: By this function's safety requirements, `sk` is valid.
        let user_data = unsafe { (&raw const (*sk).sk_user_data).read_volatile() };
        if user_data.addr() & ALL_TAGS != bindings::SK_USER_DATA_NOCOPY {
            return None;
        }
        let hook: *const Self = user_data
            .wrapping_byte_sub(bindings::SK_USER_DATA_NOCOPY)
            .cast();
        // SAFETY: A pointer with this tag points to an object of the socket's user, who clears the pointer
        // with `sk_callback_lock` held before the object is freed. By this function's safety requirements,
        // that lock is held.
        let mark = unsafe { (&raw const (*hook).mark).read() };
        if mark != &raw const MARK {
            return None;
        }
        // SAFETY: The object begins with the mark, so it is a hook. By its type invariant it stays while
        // `sk_callback_lock` is held, which it is for `'a`.
        unsafe { Self::for_socket(hook, sk) }
    }

    /// Returns a reference to `hook`, if it is for `sk` and for a `T`, and has not been stopped.
    ///
    /// # Safety
    ///
    /// `hook` must point to a hook for any type of owner, which must live for `'a`.
    pub(super) unsafe fn for_socket<'a>(
        hook: *const Self,
        sk: *mut bindings::sock,
    ) -> Option<&'a Self> {
        // SAFETY: By this function's safety requirements, this is a hook. With `repr(C)` both fields have the
        // same offset whatever the type of the owner is.
        let (whose, kind) = unsafe { ((*hook).sk, (*hook).kind) };
        if whose != sk || kind != TypeId::of::<T>() {
            return None;
        }
        // SAFETY: It is a hook for `T`, and by this function's safety requirements it lives for `'a`.
        let hook = unsafe { &*hook };
        (!hook.stopped.load(Relaxed)).then_some(hook)
    }
}
