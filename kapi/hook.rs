// SPDX-License-Identifier: GPL-2.0
//! What a socket tells its owner of: its callbacks.
//!
//! Source: `include/net/sock.h`; the use of the callbacks follows
//! `drivers/nvme/host/tcp.c` and `net/sunrpc/xprtsock.c`.

use super::{
    arrival::Arrival,
    bindings,
    lock_class::LockClass,
    memalloc::Settings,
    sock::{has_upper_layer, is_unix, Socket},
    task::{self, ModuleRef},
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, ArcBorrow,
    },
};

/// What a socket tells its owner. Called in any context, also in softirq: must not sleep, but for
/// [`Self::sent_here()`].
pub(crate) trait Events: Send + Sync + 'static {
    /// As [`Self::readable()`], where what came in can be read at once.
    fn arrived(this: ArcBorrow<'_, Self>, arrival: Arrival<'_>);

    /// As [`Self::readable()`], for what another task of this machine has sent. Returns whether that
    /// task is to receive it here, which [`Self::sent_here()`] does then.
    fn takes_from_sender(&self) -> bool;

    /// Called by a task that has sent something, on its way out of `sendmsg()`. It holds no lock of the
    /// socket's, and no other that a task may not hold in `recvmsg()`: may sleep, shortly. The socket may have
    /// been given up meanwhile.
    fn sent_here(this: Arc<Self>);

    /// There may be something to receive: data, the end of the stream, an error.
    fn readable(this: ArcBorrow<'_, Self>);

    /// There may be room to send. Returns whether it was waited for.
    fn writable(this: ArcBorrow<'_, Self>) -> bool;
}

/// Whether the socket is a connection, or was one until it was ended. One that listens, or might, gives
/// its callbacks to all that connect to it, and those are not ours.
///
/// # Safety
///
/// `sk` must be a socket, valid and locked.
unsafe fn was_connected(sk: *mut bindings::sock) -> bool {
    // SAFETY: The caller promises so.
    let (state, shutdown) = unsafe { ((*sk).__sk_common.skc_state, (*sk).sk_shutdown) };
    match state {
        bindings::TCP_LISTEN => false,
        bindings::TCP_CLOSE => shutdown != 0,
        _ => true,
    }
}

/// What `sk_user_data` is for this hook: a pointer that connections to the socket do not inherit.
fn tagged<T: Events>(hook: &KBox<Hook<T>>) -> *mut core::ffi::c_void {
    let hook: *const Hook<T> = &raw const **hook;
    hook.wrapping_byte_add(bindings::SK_USER_DATA_NOCOPY)
        .cast_mut()
        .cast()
}

type Callback = Option<unsafe extern "C" fn(*mut bindings::sock)>;

/// What `sk_user_data` points to while a socket is hooked.
struct Hook<T: Events> {
    owner: Arc<T>,
    state_change: Callback,
    error_report: Callback,
    data_ready: Callback,
    write_space: Callback,
    /// Somebody has put theirs on top of our callbacks, and may call ours at any time from now on.
    covered: Atomic<bool>,
}

impl Socket {
    /// Has `owner` told of what happens on the socket, until the returned guard goes.
    ///
    /// # Errors
    ///
    /// `EBUSY` where another part of the kernel, such as another device of ours, has the socket.
    pub(crate) fn hook<T: Events>(&self, owner: Arc<T>) -> Result<Hooked<T>> {
        let sk = self.sk();
        let mut hook = KBox::new(
            Hook {
                owner,
                state_change: None,
                error_report: None,
                data_ready: None,
                write_space: None,
                covered: Atomic::new(false),
            },
            GFP_KERNEL,
        )?;
        // SAFETY: By the type invariant `sk` is valid; the lock protects what is changed here. The
        // socket is locked, so that it does not begin to listen meanwhile.
        let stopped = unsafe {
            bindings::lock_sock_nested(sk.cast(), 0);
            bindings::_raw_write_lock_bh(&raw mut (*sk).sk_callback_lock);
            let free = (*sk).sk_user_data.is_null();
            let connected = was_connected(sk);
            if free {
                hook.state_change = (*sk).sk_state_change;
                hook.error_report = (*sk).sk_error_report;
                hook.data_ready = (*sk).sk_data_ready;
                hook.write_space = (*sk).sk_write_space;
                (*sk).sk_user_data = tagged(&hook);
            }
            if free && connected {
                (*sk).sk_state_change = Some(state_change::<T>);
                (*sk).sk_error_report = Some(error_report::<T>);
                (*sk).sk_data_ready = Some(data_ready::<T>);
                (*sk).sk_write_space = Some(write_space::<T>);
            }
            bindings::_raw_write_unlock_bh(&raw mut (*sk).sk_callback_lock);
            bindings::release_sock(sk.cast());
            if !free {
                return Err(EBUSY);
            }
            !connected
        };
        let settings = {
            let _locked = self.lock();
            // SAFETY: By the type invariant `sk` is valid, and it is locked.
            unsafe { Settings::change(sk) }
        };
        // SAFETY: By the type invariant `sk` is valid.
        let lock_class = unsafe { LockClass::give(sk) };
        // INVARIANT: It was installed above, and so were the callbacks unless `stopped`.
        Ok(Hooked {
            socket: self.clone(),
            hook,
            stopped,
            settings,
            lock_class,
        })
    }
}

impl<T: Events> Hook<T> {
    /// Gives the socket its own callbacks back. Notes whether somebody knows of ours: whoever has the
    /// descriptor too can set TLS up, which keeps the `sk_data_ready` that it finds.
    ///
    /// # Safety
    ///
    /// `sk` must be the socket that this is the hook of, with `sk_callback_lock` held: for writing, or for
    /// reading by one of our callbacks, all of which store the same.
    unsafe fn put_back(&self, sk: *mut bindings::sock) {
        let address = |callback: Callback| callback.map(|callback| callback as usize);
        // SAFETY: The caller promises so. The pointers are read without the lock.
        unsafe {
            let found = address((&raw const (*sk).sk_data_ready).read_volatile());
            if found != address(Some(data_ready::<T>)) && found != address(self.data_ready) {
                self.covered.store(true, Relaxed);
            }
            (&raw mut (*sk).sk_state_change).write_volatile(self.state_change);
            (&raw mut (*sk).sk_error_report).write_volatile(self.error_report);
            (&raw mut (*sk).sk_data_ready).write_volatile(self.data_ready);
            (&raw mut (*sk).sk_write_space).write_volatile(self.write_space);
        }
    }
}

/// Keeps a socket for its owner: nobody else can hook it, and its callbacks tell the owner until
/// [`Self::stop()`].
///
/// # Invariants
///
/// `hook`, tagged, is the socket's `sk_user_data`. Unless `stopped`, the callbacks are ours for `T`, or
/// those that it had, where it was closed.
pub(crate) struct Hooked<T: Events> {
    socket: Socket,
    hook: KBox<Hook<T>>,
    stopped: bool,
    settings: Settings,
    lock_class: LockClass,
}

impl<T: Events> Hooked<T> {
    /// Ends the callbacks: when this returns none runs, and none will.
    pub(crate) fn stop(&mut self) {
        if self.stopped {
            return;
        }
        let sk = self.socket.sk();
        // SAFETY: By the type invariant the callbacks are ours. They run with the lock held for
        // reading, so when the lock for writing is released none runs and none will.
        unsafe {
            bindings::_raw_write_lock_bh(&raw mut (*sk).sk_callback_lock);
            self.hook.put_back(sk);
            bindings::_raw_write_unlock_bh(&raw mut (*sk).sk_callback_lock);
        }
        self.stopped = true;
        if self.hook.covered.load(Relaxed) {
            // They find nobody to tell, but have to find the code.
            pr_warn!(
                "a device's socket was set up for TLS behind its back, the module has to stay\n"
            );
            core::mem::forget(ModuleRef::get());
        }
    }
}

impl<T: Events> Drop for Hooked<T> {
    fn drop(&mut self) {
        self.stop();
        let sk = self.socket.sk();
        let locked = self.socket.lock();
        // SAFETY: `sk` is valid while `socket` is, and it is locked.
        unsafe { self.settings.restore(sk) };
        drop(locked);
        // SAFETY: `sk` is valid while `socket` is, and this is the class that it had. By the type
        // invariant `sk_user_data` is ours; nobody looks at what it points to any more.
        unsafe {
            self.lock_class.restore(sk);
            bindings::_raw_write_lock_bh(&raw mut (*sk).sk_callback_lock);
            (*sk).sk_user_data = core::ptr::null_mut();
            bindings::_raw_write_unlock_bh(&raw mut (*sk).sk_callback_lock);
        }
    }
}

/// Calls `f` with the socket's hook, if it is still there.
///
/// # Safety
///
/// To be called by a callback that was installed for `T`, with its `sk`.
unsafe fn with_hook<T: Events, R>(
    sk: *mut bindings::sock,
    f: impl FnOnce(&Hook<T>) -> R,
) -> Option<R> {
    // SAFETY: `sk` is valid during its callback. What `sk_user_data` points to stays while the lock is
    // held; it is null or a tagged `Hook<T>`, because the callback is replaced together with it.
    unsafe {
        bindings::_raw_read_lock_bh(&raw mut (*sk).sk_callback_lock);
        let hook = (*sk).sk_user_data.cast::<Hook<T>>();
        let result =
            (!hook.is_null()).then(|| f(&*hook.wrapping_byte_sub(bindings::SK_USER_DATA_NOCOPY)));
        bindings::_raw_read_unlock_bh(&raw mut (*sk).sk_callback_lock);
        result
    }
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
    // SAFETY: This is the callback for `T`, called as this callback is.
    let receiver = unsafe {
        with_hook::<T, _>(sk, |hook| {
            let owner = hook.owner.as_arc_borrow();
            if let Some(arrival) = Arrival::on(sk) {
                T::arrived(owner, arrival);
            } else if from_task && owner.takes_from_sender() {
                return Some(owner.into());
            } else {
                T::readable(owner);
            }
            None
        })
    };
    // What is taken to receive is what `recvmsg()` takes. `unix_stream_sendmsg()` holds none of it.
    if let Some(owner) = receiver.flatten() {
        T::sent_here(owner);
    }
}

/// Whether [`Callbacks`] can wait for a task that sleeps, or loses its processor, in a callback.
const CAN_WAIT_FOR_TASKS: bool = cfg!(any(CONFIG_TASKS_RCU, not(CONFIG_PREEMPTION)));

/// Goes after the last socket, and before what callbacks queue their work on.
pub(crate) struct Callbacks;

impl Drop for Callbacks {
    /// Waits until no task is in a callback any more. By now it cannot sleep there, nor hold a lock, but
    /// it may have lost its processor on its way out. Sleeps, for some tenths of a second.
    #[cfg(CONFIG_TASKS_RCU)]
    fn drop(&mut self) {
        // SAFETY: It has no conditions, but that one may sleep.
        unsafe { bindings::synchronize_rcu_tasks() };
    }

    /// As above, where a task keeps its processor until it sleeps. In a preemptible kernel that cannot wait
    /// for tasks ([`CAN_WAIT_FOR_TASKS`]), one that lost it on its last steps is overlooked.
    #[cfg(not(CONFIG_TASKS_RCU))]
    fn drop(&mut self) {
        // SAFETY: It has no conditions, but that one may sleep.
        unsafe { bindings::synchronize_rcu() };
    }
}

/// `sk_write_space`
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn write_space<T: Events>(sk: *mut bindings::sock) {
    // SAFETY: This is the callback for `T`; the saved callback gets the `sk` that it expects. `sk` has its
    // socket while it is hooked, since the hook holds the file. The next send that finds no room sets the
    // bit again.
    unsafe {
        with_hook::<T, _>(sk, |hook| {
            // TLS may have taken more than there was room for, and now sends the rest.
            let below_tls = !is_unix(sk) && has_upper_layer(sk);
            if let Some(saved) = hook.write_space.filter(|_| below_tls) {
                saved(sk);
            }
            if T::writable(hook.owner.as_arc_borrow()) {
                let socket = (*sk).sk_socket;
                bindings::clear_bit(bindings::SOCK_NOSPACE as usize, &raw mut (*socket).flags);
            }
        })
    };
}

/// `sk_state_change`
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn state_change<T: Events>(sk: *mut bindings::sock) {
    // SAFETY: This is the callback for `T`; the saved callback gets the `sk` that it expects.
    unsafe {
        with_hook::<T, _>(sk, |hook| {
            T::readable(hook.owner.as_arc_borrow());
            if let Some(saved) = hook.state_change {
                saved(sk);
            }
        })
    };
}

/// `sk_error_report`
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn error_report<T: Events>(sk: *mut bindings::sock) {
    // SAFETY: As above. `with_hook()` holds the lock for reading.
    unsafe {
        with_hook::<T, _>(sk, |hook| {
            T::readable(hook.owner.as_arc_borrow());
            // Whoever has the descriptor too can have it listen now: see `was_connected()`.
            if (*sk).__sk_common.skc_state == bindings::TCP_CLOSE {
                hook.put_back(sk);
            }
            if let Some(saved) = hook.error_report {
                saved(sk);
            }
        })
    };
}
