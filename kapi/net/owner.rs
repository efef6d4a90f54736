// SPDX-License-Identifier: GPL-2.0
//! Who owns a socket: what its callbacks call, and how `sk_user_data` leads them to it.
//!
//! Source: `include/net/sock.h`.

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

/// What a socket tells its owner. Called in any context, also in softirq: must not sleep, but for
/// [`Self::sender_receives()`].
pub(crate) trait Events: Send + Sync + 'static {
    /// As [`Self::input_ready()`], where what came in can be read at once.
    fn tcp_data_ready(this: ArcBorrow<'_, Self>, arrival: Arrival<'_>);

    /// As [`Self::input_ready()`], for what another task of this machine has sent. Returns whether that
    /// task is to receive it here, which [`Self::sender_receives()`] does then.
    fn sender_should_receive(&self) -> bool;

    /// Called by a task that has sent something, on its way out of `sendmsg()`. It holds no lock of the
    /// socket's, and no other that a task may not hold in `recvmsg()`: may sleep, shortly. The socket may have
    /// been given up meanwhile.
    fn sender_receives(this: Arc<Self>);

    /// There may be something to receive: data, the end of the stream, an error.
    fn input_ready(this: ArcBorrow<'_, Self>);

    /// There may be room to send. Returns whether it was waited for.
    fn write_space(this: ArcBorrow<'_, Self>) -> bool;
}

/// What can be in the low bits of `sk_user_data`.
const ALL_TAGS: usize =
    bindings::SK_USER_DATA_NOCOPY | bindings::SK_USER_DATA_BPF | bindings::SK_USER_DATA_PSOCK;

/// What every [`Hook`] begins with, and nothing else in the kernel.
pub(super) static MARK: u8 = 0;

/// What `sk_user_data` points to while a socket is hooked.
///
/// # Invariants
///
/// It was installed on `sk`, or is not shared yet. Once it was, only `stopped` changes, and it goes only
/// after [`forget()`](super::saved::forget) and when it is not in `sk_user_data` any more, with `sk_callback_lock` held
/// for writing in between.
#[repr(C)]
pub(super) struct Hook<T: Events> {
    /// Points to [`MARK`].
    pub(super) mark: *const u8,
    /// Whose hook it is.
    pub(super) sk: *mut bindings::sock,
    /// `T`
    pub(super) kind: TypeId,
    /// The callbacks that the socket had.
    pub(super) had: Callbacks,
    /// Nobody is to be told any more.
    pub(super) stopped: Atomic<bool>,
    pub(super) owner: Arc<T>,
}

// SAFETY: Its pointers are only compared.
unsafe impl<T: Events> Send for Hook<T> {}
// SAFETY: What is shared is the owner, which can be, and what does not change.
unsafe impl<T: Events> Sync for Hook<T> {}

impl<T: Events> Hook<T> {
    /// What `sk_user_data` is for this hook: a pointer that connections to the socket do not inherit.
    pub(super) fn tagged(&self) -> *mut core::ffi::c_void {
        let hook = (&raw const *self).wrapping_byte_add(bindings::SK_USER_DATA_NOCOPY);
        hook.cast_mut().cast()
    }

    pub(super) fn as_ptr(&self) -> NonNull<()> {
        NonNull::from(self).cast()
    }

    /// The hook that is `sk`'s `sk_user_data`, if that is one that tells of `sk` to a `T`.
    ///
    /// # Safety
    ///
    /// `sk` must be a socket with `sk_callback_lock` held for `'a`.
    pub(super) unsafe fn in_user_data<'a>(sk: *mut bindings::sock) -> Option<&'a Self> {
        // SAFETY: The caller promises that `sk` is valid.
        let user_data = unsafe { (&raw const (*sk).sk_user_data).read_volatile() };
        if user_data.addr() & ALL_TAGS != bindings::SK_USER_DATA_NOCOPY {
            return None;
        }
        let hook: *const Self = user_data
            .wrapping_byte_sub(bindings::SK_USER_DATA_NOCOPY)
            .cast();
        // SAFETY: What has this tag points to somebody's object, and is taken away under the lock before
        // that goes.
        let mark = unsafe { (&raw const (*hook).mark).read() };
        if mark != &raw const MARK {
            return None;
        }
        // SAFETY: It begins with the mark, so it is a hook, and by the type invariant it stays while the
        // lock is held.
        unsafe { Self::for_socket(hook, sk) }
    }

    /// A hook, if it is one that tells of `sk` to a `T`.
    ///
    /// # Safety
    ///
    /// `hook` must be a hook for whatever type, and stay for `'a`.
    pub(super) unsafe fn for_socket<'a>(
        hook: *const Self,
        sk: *mut bindings::sock,
    ) -> Option<&'a Self> {
        // SAFETY: The caller promises that it is one, and these are in the same place in all of them.
        let (whose, kind) = unsafe { ((*hook).sk, (*hook).kind) };
        if whose != sk || kind != TypeId::of::<T>() {
            return None;
        }
        // SAFETY: It is one for `T`, and the caller promises that it stays.
        let hook = unsafe { &*hook };
        (!hook.stopped.load(Relaxed)).then_some(hook)
    }
}
