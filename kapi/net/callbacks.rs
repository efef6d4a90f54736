// SPDX-License-Identifier: GPL-2.0
//! The callbacks of a socket that is hooked.
//!
//! Source: `include/net/sock.h`; the use of the callbacks follows `drivers/nvme/host/tcp.c` and
//! `net/sunrpc/xprtsock.c`.

use super::{
    arrival::Arrival,
    owner::{
        Events,
        Hook, //
    },
    saved::{
        self,
        call,
        Callback,
        Callbacks,
        SocketId, //
    },
    sock::{
        has_upper_layer,
        is_unix, //
    },
};
use crate::kapi::{
    bindings,
    task, //
};
use kernel::sync::Arc;

/// Whether [`Hooks`](super::hook::Hooks) can wait for a task that sleeps, or loses its processor, in a callback.
const CAN_WAIT_FOR_TASKS: bool = cfg!(any(CONFIG_TASKS_RCU, not(CONFIG_PREEMPTION)));

/// Those that a socket has while it is hooked.
pub(super) fn hook_callbacks<T: Events>() -> Callbacks {
    Callbacks {
        state_change: Some(state_change::<T>),
        data_ready: Some(data_ready::<T>),
        write_space: Some(write_space::<T>),
        error_report: Some(error_report::<T>),
    }
}

/// What a callback finds out about its socket.
struct Found<'a, T: Events> {
    /// The hook, unless it was stopped.
    hook: Option<&'a Hook<T>>,
    /// Nobody else has taken the socket over.
    is_ours: bool,
    /// The callbacks that the socket had before it got ours.
    had: Callbacks,
}

impl<'a, T: Events> Found<'a, T> {
    /// # Safety
    ///
    /// `sk` must be a socket with `sk_callback_lock` held for `'a`.
    unsafe fn on(sk: *mut bindings::sock) -> Self {
        // SAFETY: The caller promises that `sk` is valid and its lock held.
        if let Some(hook) = unsafe { Hook::<T>::in_user_data(sk) } {
            return Found {
                hook: Some(hook),
                is_ours: true,
                had: hook.had,
            };
        }
        // SAFETY: The caller promises that `sk` is valid.
        let (id, has_upper) = unsafe { (SocketId::of(sk), has_upper_layer(sk)) };
        let (had, hook) = saved::find(id, has_upper).unwrap_or((Callbacks::NONE, None));
        // SAFETY: A socket with a hook is not freed, so a hook that was noted of this address is this one's. It
        // is forgotten before it goes, with the lock held for writing, and therefore stays for `'a`.
        let hook = hook.and_then(|hook| unsafe { Hook::for_socket(hook.cast().as_ptr(), sk) });
        Found {
            hook,
            is_ours: false,
            had,
        }
    }

    fn input_ready(&self) {
        if let Some(hook) = self.hook {
            T::input_ready(hook.owner.as_arc_borrow());
        }
    }
}

/// Calls `f` with what is to be known of a socket, which does not change meanwhile.
///
/// # Safety
///
/// To be called by a callback that was installed for `T`, with its `sk`.
unsafe fn with_hook<T: Events, R>(sk: *mut bindings::sock, f: impl FnOnce(Found<'_, T>) -> R) -> R {
    // SAFETY: `sk` is valid during its callback, which nobody calls with this lock held.
    unsafe { bindings::_raw_read_lock_bh(&raw mut (*sk).sk_callback_lock) };
    // SAFETY: `sk` is valid, and the lock is held while `f` has what was found.
    let result = f(unsafe { Found::on(sk) });
    // SAFETY: It was locked above.
    unsafe { bindings::_raw_read_unlock_bh(&raw mut (*sk).sk_callback_lock) };
    result
}

/// `sk_data_ready`
///
/// # Safety
///
/// To be called as the callback of a socket that was hooked for a `T`.
unsafe extern "C" fn data_ready<T: Events>(sk: *mut bindings::sock) {
    // Looked at before anything is locked here.
    // SAFETY: `sk` is valid during its callback.
    let from_task = CAN_WAIT_FOR_TASKS && unsafe { is_unix(sk) } && task::may_sleep();
    let in_hook = |found: Found<'_, T>| -> (Option<Arc<T>>, Callback) {
        let hook = match found.hook {
            Some(hook) if found.is_ours => hook,
            // Whoever calls this, it may not be the protocol.
            _ => {
                found.input_ready();
                return (None, found.had.data_ready);
            }
        };
        let owner = hook.owner.as_arc_borrow();
        // SAFETY: The socket is ours alone, so the protocol has called this. The hook holds the file.
        if let Some(arrival) = unsafe { Arrival::on(sk) } {
            T::tcp_data_ready(owner, arrival);
        } else if from_task && owner.sender_should_receive() {
            return (Some(owner.into()), None);
        } else {
            T::input_ready(owner);
        }
        (None, None)
    };
    // SAFETY: This is the callback for `T`, called as this callback is.
    let (receiver, forward) = unsafe { with_hook(sk, in_hook) };
    // SAFETY: It is a callback that this socket had.
    unsafe { call(forward, sk) };
    // What is taken to receive is what `recvmsg()` takes. `unix_stream_sendmsg()` holds none of it.
    if let Some(owner) = receiver {
        T::sender_receives(owner);
    }
}

/// `sk_write_space`
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn write_space<T: Events>(sk: *mut bindings::sock) {
    let in_hook = |found: Found<'_, T>| {
        let Some(hook) = found.hook else {
            return found.had.write_space;
        };
        if T::write_space(hook.owner.as_arc_borrow()) {
            // SAFETY: `sk` has its socket while it is hooked, since the hook holds the file. The next send
            // that finds no room sets the bit again.
            unsafe {
                let socket = (*sk).sk_socket;
                bindings::clear_bit(bindings::SOCK_NOSPACE as usize, &raw mut (*socket).flags);
            }
        }
        // TLS may have taken more than there was room for, and now sends the rest.
        // SAFETY: `sk` is valid during its callback.
        let below_tls = unsafe { has_upper_layer(sk) };
        (below_tls || !found.is_ours)
            .then_some(found.had.write_space)
            .flatten()
    };
    // SAFETY: This is the callback for `T`, called as this callback is.
    let forward = unsafe { with_hook::<T, _>(sk, in_hook) };
    // SAFETY: It is a callback that this socket had.
    unsafe { call(forward, sk) };
}

/// `sk_state_change`
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn state_change<T: Events>(sk: *mut bindings::sock) {
    let in_hook = |found: Found<'_, T>| {
        found.input_ready();
        found.had.state_change
    };
    // SAFETY: This is the callback for `T`, called as this callback is.
    let forward = unsafe { with_hook::<T, _>(sk, in_hook) };
    // SAFETY: It is a callback that this socket had.
    unsafe { call(forward, sk) };
}

/// `sk_error_report`
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn error_report<T: Events>(sk: *mut bindings::sock) {
    // Some network drivers report a time stamp from their interrupt handler, which is no error and nothing to
    // the owner. No lock of ours can be taken there.
    if task::in_hardirq() {
        return;
    }
    let in_hook = |found: Found<'_, T>| {
        found.input_ready();
        // SAFETY: `sk` is valid during its callback.
        let closed = unsafe { (*sk).__sk_common.skc_state } == bindings::TCP_CLOSE;
        // Whoever has the descriptor too can have it listen now, and its children inherit what it has then:
        // see `was_connected()`. The locks cannot be taken here. But nothing but ours is replaced, and
        // `stop()`, which takes them, finds out who has kept ours, or does so just now.
        if closed && found.hook.is_some() {
            // SAFETY: `sk` is valid, and it had these.
            unsafe { hook_callbacks::<T>().replace(sk, &found.had) };
        }
        found.had.error_report
    };
    // SAFETY: This is the callback for `T`, called as this callback is.
    let forward = unsafe { with_hook::<T, _>(sk, in_hook) };
    // SAFETY: It is a callback that this socket had.
    unsafe { call(forward, sk) };
}
