// SPDX-License-Identifier: GPL-2.0
//! The callbacks of a hooked socket: `sk_data_ready`, `sk_write_space`, `sk_state_change` and
//! `sk_error_report`.
//!
//! This is the third of the four parts that `hook.rs` describes. Each callback takes `sk_callback_lock` for
//! reading, finds the hook, and calls the owner ([`Events`]). It finds the hook in one of two ways:
//!
//! - through `sk_user_data` ([`Hook::in_user_data()`]), which is the normal case;
//! - through the socket's record (`saved.rs`), where another part of the kernel has taken `sk_user_data` over
//!   but still calls these callbacks. The record may be a tombstone: then there is no owner to call any more.
//!
//! A callback then calls the one that it has replaced, if that still has work to do:
//!
//! - `sk_state_change` and `sk_error_report`: always, because they wake up tasks that wait on the socket;
//! - `sk_write_space`: where there is TLS, which sends the rest of a record in its own callback;
//! - all of them: where another part of the kernel has taken the socket over.
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)
//!
//! The first three callbacks follow `drivers/nvme/host/tcp.c`, also in what they lock. `sk_error_report` is
//! replaced as in `net/sunrpc/xprtsock.c`.

use super::{
    arrival::Arrival,
    bh_lock::{
        read_lock_bh,
        read_unlock_bh, //
    },
    kind::{
        has_upper_layer,
        Kind, //
    },
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
};
use crate::kapi::{
    bindings,
    task, //
};
#[cfg(CONFIG_PREEMPT_RT)]
use kernel::sync::rcu;
use kernel::sync::Arc;

/// Whether a callback may sleep, other than for a spin lock on PREEMPT_RT: if dropping
/// [`Hooks`](super::hook::Hooks) waits for a task that is preempted after it has slept in a callback.
///
/// On PREEMPT_RT, it does not: such a task may be the last user of its owner, and may sleep to free that.
const MAY_SLEEP: bool = cfg!(all(
    not(CONFIG_PREEMPT_RT),
    any(CONFIG_TASKS_RCU, not(CONFIG_PREEMPTION))
));

/// What a task holds during a callback, from its first to its last instructions.
#[cfg(not(CONFIG_PREEMPT_RT))]
struct InCallback;

/// What a task holds during a callback, from its first to its last instructions. Wherever the callback waits
/// for a spin lock, the task is an RCU reader, for which [`Hooks`](super::hook::Hooks) can wait.
#[cfg(CONFIG_PREEMPT_RT)]
struct InCallback {
    _reader: rcu::Guard,
}

impl InCallback {
    fn begin() -> Self {
        InCallback {
            #[cfg(CONFIG_PREEMPT_RT)]
            _reader: rcu::read_lock(),
        }
    }
}

/// Returns the callbacks that a socket has while it is hooked.
pub(super) fn hook_callbacks<T: Events>() -> Callbacks {
    Callbacks {
        state_change: Some(state_change::<T>),
        data_ready: Some(data_ready::<T>),
        write_space: Some(write_space::<T>),
        error_report: Some(error_report::<T>),
    }
}

/// What a callback knows about its socket.
struct Found<'a, T: Events> {
    /// The hook. `None` if it was stopped.
    hook: Option<&'a Hook<T>>,
    /// `sk_user_data` still points to the hook: no other part of the kernel has taken it over.
    is_ours: bool,
    /// The callbacks that the socket had before it was hooked.
    had: Callbacks,
}

impl<'a, T: Events> Found<'a, T> {
    /// Looks the hook of `sk` up.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket, whose `sk_callback_lock` is held for `'a`.
    #[inline]
    unsafe fn on(sk: *mut bindings::sock) -> Self {
        // SAFETY: By this function's safety requirements, `sk` is valid and `sk_callback_lock` is held.
        if let Some(hook) = unsafe { Hook::<T>::in_user_data(sk) } {
            return Found {
                hook: Some(hook),
                is_ours: true,
                had: hook.had,
            };
        }
        // SAFETY: By this function's safety requirements.
        unsafe { Self::taken_over(sk) }
    }

    /// Looks the hook of `sk` up, if `sk_user_data` does not point to it.
    ///
    /// # Safety
    ///
    /// As for [`Self::on()`].
    #[cold]
    unsafe fn taken_over(sk: *mut bindings::sock) -> Self {
        // SAFETY: By this function's safety requirements, `sk` is valid.
        let (id, has_upper) = unsafe { (SocketId::of(sk), has_upper_layer(sk)) };
        let (had, hook) = saved::find(id, has_upper).unwrap_or((Callbacks::NONE, None));
        // SAFETY: A hook keeps its socket from being freed, so a hook that is recorded for this address
        // is for this socket. By the type invariant of `Hook` the record stops referring to it, and then
        // `sk_callback_lock` is held for writing, before it is freed. So it lives for `'a`.
        let hook = hook.and_then(|hook| unsafe { Hook::for_socket(hook.cast().as_ptr(), sk) });
        Found {
            hook,
            is_ours: false,
            had,
        }
    }

    /// Tells the owner that there may be input.
    fn input_ready(&self) {
        if let Some(hook) = self.hook {
            T::input_ready(hook.owner.as_arc_borrow());
        }
    }

    /// Tells the owner that the connection has changed its state or has an error.
    fn state_changed(&self) {
        if let Some(hook) = self.hook {
            T::state_changed(hook.owner.as_arc_borrow());
        }
    }
}

/// Calls `f` with what is known about a socket, while `sk_callback_lock` is held for reading, so that it
/// stays true.
///
/// # Safety
///
/// Must be called by a callback of [`hook_callbacks::<T>()`](hook_callbacks), with the `sk` that it was
/// called with.
unsafe fn with_hook<T: Events, R>(sk: *mut bindings::sock, f: impl FnOnce(Found<'_, T>) -> R) -> R {
    // SAFETY: `sk` is valid during its callback. No caller of a callback holds `sk_callback_lock`.
    unsafe { read_lock_bh(&raw mut (*sk).sk_callback_lock) };
    // SAFETY: `sk` is valid, and the lock is held until `f` returns.
    let result = f(unsafe { Found::on(sk) });
    // SAFETY: The lock was taken above.
    unsafe { read_unlock_bh(&raw mut (*sk).sk_callback_lock) };
    result
}

/// `sk_data_ready`: something was received.
///
/// # Safety
///
/// Must be called as the callback of a socket that was hooked for a `T`.
unsafe extern "C" fn data_ready<T: Events>(sk: *mut bindings::sock) {
    let _in_callback = InCallback::begin();
    // Must be asked before `with_hook()` takes its lock. `sk_data_ready` of a UNIX socket is called by
    // the task that sends.
    // SAFETY: `sk` is valid during its callback.
    let is_unix = unsafe { Kind::of(sk) } == Some(Kind::Unix);
    // vsock calls it in a task, too, but with the socket locked.
    let from_task = MAY_SLEEP && is_unix && task::may_sleep();
    let in_hook = |found: Found<'_, T>| -> (Option<Arc<T>>, Callback) {
        let hook = match found.hook {
            Some(hook) if found.is_ours => hook,
            // The caller may be the part of the kernel that has taken the socket over, instead of the
            // protocol. So the socket may not be locked here, and the task may hold any lock.
            _ => {
                found.input_ready();
                return (None, found.had.data_ready);
            }
        };
        let owner = hook.owner.as_arc_borrow();
        // SAFETY: `sk_user_data` is ours, so the caller is the protocol itself, or TLS on top of it, which
        // `on()` refuses. `arrival` is used only in this callback. The hook holds a reference to the file.
        if let Some(arrival) = unsafe { Arrival::on(sk) } {
            T::tcp_data_ready(owner, arrival);
        } else if from_task && owner.sender_should_receive() {
            return (Some(owner.into()), None);
        } else {
            T::input_ready(owner);
        }
        (None, None)
    };
    // SAFETY: This is such a callback, and by its safety requirements `sk` was hooked for a `T`.
    let (receiver, forward) = unsafe { with_hook(sk, in_hook) };
    // SAFETY: `sk` had this callback before it was hooked, and is valid during this one.
    unsafe { call(forward, sk) };
    // Only now, without `sk_callback_lock`, because receiving takes the sleeping locks of `recvmsg()`. The
    // caller, `unix_stream_sendmsg()`, holds none of them.
    if let Some(owner) = receiver {
        T::sender_receives(owner);
    }
}

/// `sk_write_space`: there is room to send.
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn write_space<T: Events>(sk: *mut bindings::sock) {
    let _in_callback = InCallback::begin();
    let in_hook = |found: Found<'_, T>| {
        let Some(hook) = found.hook else {
            return found.had.write_space;
        };
        if hook.owner.awaits_space() {
            // As `sk_stream_write_space()` does. Whoever finds no room next sets the bit again.
            // SAFETY: The hook holds a reference to the file, so `sk` has its `struct socket`.
            unsafe {
                let socket = (*sk).sk_socket;
                bindings::clear_bit(bindings::SOCK_NOSPACE as usize, &raw mut (*socket).flags);
            }
            T::write_space(hook.owner.as_arc_borrow());
        }
        // TLS may have accepted more of a record than the socket had room for. It sends the rest in its own
        // callback.
        // SAFETY: `sk` is valid during its callback.
        let below_tls = unsafe { has_upper_layer(sk) };
        (below_tls || !found.is_ours)
            .then_some(found.had.write_space)
            .flatten()
    };
    // SAFETY: This is such a callback, and by its safety requirements `sk` was hooked for a `T`.
    let forward = unsafe { with_hook::<T, _>(sk, in_hook) };
    // SAFETY: `sk` had this callback before it was hooked, and is valid during this one.
    unsafe { call(forward, sk) };
}

/// `sk_state_change`: the connection has changed its state.
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn state_change<T: Events>(sk: *mut bindings::sock) {
    let _in_callback = InCallback::begin();
    let in_hook = |found: Found<'_, T>| {
        found.state_changed();
        found.had.state_change
    };
    // SAFETY: This is such a callback, and by its safety requirements `sk` was hooked for a `T`.
    let forward = unsafe { with_hook::<T, _>(sk, in_hook) };
    // SAFETY: `sk` had this callback before it was hooked, and is valid during this one.
    unsafe { call(forward, sk) };
}

/// `sk_error_report`: there is an error, or something else in the error queue.
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn error_report<T: Events>(sk: *mut bindings::sock) {
    let _in_callback = InCallback::begin();
    // Some network drivers report a transmit timestamp from their interrupt handler, where `sk_callback_lock`
    // must not be taken. It is no error, and of no interest to the owner.
    if task::in_hardirq() {
        return;
    }
    let in_hook = |found: Found<'_, T>| {
        found.state_changed();
        // SAFETY: `sk` is valid during its callback.
        let closed = unsafe { (*sk).__sk_common.skc_state } == bindings::TCP_CLOSE;
        // From now on any process that has the descriptor can make the socket listen, and the connections
        // that it then accepts would inherit our callbacks; see `was_connected()`. So they are removed
        // here already. Neither lock that protects them can be taken for writing here, but `replace()`
        // exchanges each callback only where it is ours. `Hooked::stop()` takes both locks and finds out
        // whether another part of the kernel has kept one of ours.
        if closed && found.hook.is_some() {
            // SAFETY: `sk` is valid during its callback, and had these callbacks before.
            unsafe { hook_callbacks::<T>().replace(sk, &found.had) };
        }
        found.had.error_report
    };
    // SAFETY: This is such a callback, and by its safety requirements `sk` was hooked for a `T`.
    let forward = unsafe { with_hook::<T, _>(sk, in_hook) };
    // SAFETY: `sk` had this callback before it was hooked, and is valid during this one.
    unsafe { call(forward, sk) };
}
