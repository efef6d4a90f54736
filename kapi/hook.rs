// SPDX-License-Identifier: GPL-2.0
//! What a socket tells its owner of: its callbacks.
//!
//! Source: `include/net/sock.h`; the use of the callbacks follows `drivers/nvme/host/tcp.c` and
//! `net/sunrpc/xprtsock.c`.

use super::{
    arrival::Arrival,
    bindings,
    callbacks::{self, call, Callback, Callbacks, Record, SocketId},
    lock_class::LockClass,
    memalloc::{MemallocSockets, Settings},
    sock::{has_upper_layer, is_unix, was_connected, Socket},
    task::{self, ModuleRef},
};
use core::{any::TypeId, mem::MaybeUninit, ptr::NonNull};
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

/// What can be in the low bits of `sk_user_data`.
const ALL_TAGS: usize =
    bindings::SK_USER_DATA_NOCOPY | bindings::SK_USER_DATA_BPF | bindings::SK_USER_DATA_PSOCK;

/// What every [`Hook`] begins with, and nothing else in the kernel.
static MARK: u8 = 0;

/// What `sk_user_data` points to while a socket is hooked.
///
/// # Invariants
///
/// It was installed on `sk`, or is not shared yet. Once it was, only `stopped` changes, and it goes only
/// after [`callbacks::forget()`] and when it is not in `sk_user_data` any more, with `sk_callback_lock` held
/// for writing in between.
#[repr(C)]
struct Hook<T: Events> {
    /// Points to [`MARK`].
    mark: *const u8,
    /// Whose hook it is.
    sk: *mut bindings::sock,
    /// `T`
    kind: TypeId,
    /// The callbacks that the socket had.
    had: Callbacks,
    /// Nobody is to be told any more.
    stopped: Atomic<bool>,
    owner: Arc<T>,
}

// SAFETY: Its pointers are only compared.
unsafe impl<T: Events> Send for Hook<T> {}
// SAFETY: What is shared is the owner, which can be, and what does not change.
unsafe impl<T: Events> Sync for Hook<T> {}

impl<T: Events> Hook<T> {
    /// Those that a socket has while it is hooked.
    fn callbacks() -> Callbacks {
        Callbacks {
            state_change: Some(state_change::<T>),
            data_ready: Some(data_ready::<T>),
            write_space: Some(write_space::<T>),
            error_report: Some(error_report::<T>),
        }
    }

    /// What `sk_user_data` is for this hook: a pointer that connections to the socket do not inherit.
    fn tagged(&self) -> *mut core::ffi::c_void {
        let hook = (&raw const *self).wrapping_byte_add(bindings::SK_USER_DATA_NOCOPY);
        hook.cast_mut().cast()
    }

    fn as_ptr(&self) -> NonNull<()> {
        NonNull::from(self).cast()
    }

    /// The hook that is `sk`'s `sk_user_data`, if that is one that tells of `sk` to a `T`.
    ///
    /// # Safety
    ///
    /// `sk` must be a socket with `sk_callback_lock` held for `'a`.
    unsafe fn in_user_data<'a>(sk: *mut bindings::sock) -> Option<&'a Self> {
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
    unsafe fn for_socket<'a>(hook: *const Self, sk: *mut bindings::sock) -> Option<&'a Self> {
        // SAFETY: The caller promises that it is one, and these are in the same place in all of them.
        let (whose, kind) = unsafe { ((*hook).sk, (*hook).kind) };
        if whose != sk || kind != TypeId::of::<T>() {
            return None;
        }
        // SAFETY: It is one for `T`, and the caller promises that it stays.
        let hook = unsafe { &*hook };
        (!hook.stopped.load(Relaxed)).then_some(hook)
    }

    /// Takes a socket over.
    ///
    /// # Errors
    ///
    /// `EBUSY`, `ENOTCONN`; see [`Socket::hook()`].
    ///
    /// # Safety
    ///
    /// `self.sk` must be a socket, valid, whose lock and `sk_callback_lock` the caller holds. Afterwards the
    /// hook must stay where it is, and go as its type invariant says.
    unsafe fn install(&mut self, record: KBox<Record>) -> Result {
        let sk = self.sk;
        // SAFETY: The caller promises that `sk` is valid; the pointer is only compared.
        if !unsafe { (*sk).sk_user_data }.is_null() {
            return Err(EBUSY);
        }
        // SAFETY: The caller promises that `sk` is valid. It is locked, so that it does not begin to listen.
        if !unsafe { was_connected(sk) } {
            return Err(ENOTCONN);
        }
        // SAFETY: The caller promises that `sk` is valid and `sk_callback_lock` held.
        self.had = unsafe { Callbacks::of(sk) };
        if self.had.has_one_of(&Self::callbacks()) {
            return Err(EBUSY);
        }
        // SAFETY: The caller promises that `sk` is valid.
        let (id, above) = unsafe { (SocketId::of(sk), has_upper_layer(sk)) };
        callbacks::note(record, id, self.had, above, self.as_ptr())?;
        // SAFETY: `sk` is valid, and whoever changes this holds `sk_callback_lock`.
        unsafe { (&raw mut (*sk).sk_user_data).write_volatile(self.tagged()) };
        // SAFETY: `sk` is valid, and ours find the hook there.
        unsafe { self.had.replace(sk, &Self::callbacks()) };
        Ok(())
    }
}

/// The memory that [`Socket::hook()`] needs, so that it can be allocated before it is too late to fail.
pub(crate) struct HookMemory<T: Events> {
    record: KBox<Record>,
    hook: KBox<MaybeUninit<Hook<T>>>,
}

impl<T: Events> HookMemory<T> {
    /// Allocates it. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Ok(HookMemory {
            record: Record::new()?,
            hook: KBox::new_uninit(GFP_KERNEL)?,
        })
    }
}

impl Socket {
    /// Tells `owner` what happens on the socket, until the returned guard is dropped. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where another part of the kernel, such as another device of ours, has the socket, or may have
    /// kept callbacks of ours from before; `ENOTCONN` where it is no connection, and was none; `ENODEV` where
    /// the module is about to go.
    pub(crate) fn hook<T: Events>(
        &self,
        memory: HookMemory<T>,
        owner: Arc<T>,
    ) -> Result<Hooked<T>> {
        let module = ModuleRef::get().ok_or(ENODEV)?;
        let HookMemory { record, hook } = memory;
        let mut hook = hook.write(Hook {
            mark: &raw const MARK,
            sk: self.sk(),
            kind: TypeId::of::<T>(),
            had: Callbacks::NONE,
            stopped: Atomic::new(false),
            owner,
        });
        let settings = {
            let _locked = self.lock();
            let callbacks = self.lock_callbacks();
            // SAFETY: `self` keeps `sk` valid, and both locks are held. `Hooked` lets the hook go as it must.
            unsafe { hook.install(record)? };
            drop(callbacks);
            // SAFETY: `self` keeps `sk` valid, and it is still locked.
            unsafe { Settings::change(self.sk()) }
        };
        // SAFETY: `self` keeps `sk` valid.
        let lock_class = unsafe { LockClass::give(self.sk()) };
        // INVARIANT: It was installed above.
        Ok(Hooked {
            socket: self.clone(),
            hook,
            settings,
            lock_class,
            module: Some(module),
        })
    }
}

/// Keeps a socket for its owner: nobody else can hook it, and its callbacks tell the owner until
/// [`Self::stop()`].
///
/// # Invariants
///
/// `hook` was installed on `socket`, with which it stays.
pub(crate) struct Hooked<T: Events> {
    socket: Socket,
    hook: KBox<Hook<T>>,
    settings: Settings,
    lock_class: LockClass,
    /// None where the module has to stay.
    module: Option<ModuleRef>,
}

impl<T: Events> Hooked<T> {
    /// Ends the callbacks: when this returns the owner is told of nothing, and will not be. Restores
    /// each of the socket's own callbacks whose place ours still has. May sleep.
    pub(crate) fn stop(&mut self) {
        if self.hook.stopped.load(Relaxed) {
            return;
        }
        let locked = self.socket.lock();
        let callbacks = self.socket.lock_callbacks();
        // Who is told is told with the callbacks' lock held for reading.
        self.hook.stopped.store(true, Relaxed);
        // SAFETY: `socket` keeps its `sk` valid, which had these.
        let covered = unsafe { Hook::<T>::callbacks().replace(self.socket.sk(), &self.hook.had) };
        // Whoever has put callbacks on top of ours, or has taken the socket over, may call ours or restore
        // them at any time from now on.
        let kept = covered || !self.has_user_data();
        // SAFETY: `socket` keeps its `sk` valid.
        let id = unsafe { SocketId::of(self.socket.sk()) };
        callbacks::forget(id, self.hook.as_ptr(), kept);
        drop((callbacks, locked));
        if kept {
            pr_warn!("a device's socket was taken over behind its back, the module has to stay\n");
            core::mem::forget(self.module.take());
        }
    }

    /// Whether the socket's `sk_user_data` is still ours. Certain only with the callbacks locked.
    fn has_user_data(&self) -> bool {
        // SAFETY: `socket` keeps its `sk` valid; the pointer is only compared.
        unsafe {
            (&raw const (*self.socket.sk()).sk_user_data).read_volatile() == self.hook.tagged()
        }
    }
}

impl<T: Events> Drop for Hooked<T> {
    fn drop(&mut self) {
        self.stop();
        let sk = self.socket.sk();
        // SAFETY: `socket` keeps its `sk` valid, and this is the class that it had.
        unsafe { self.lock_class.restore(sk) };
        let _locked = self.socket.lock();
        // What somebody else has taken over is set up as he likes.
        if self.has_user_data() {
            // Not with `sk_callback_lock` held: the socket's spin lock, which this takes, comes before that.
            // SAFETY: `socket` keeps its `sk` valid, and it is locked.
            unsafe { self.settings.restore(sk) };
        }
        let _callbacks = self.socket.lock_callbacks();
        if self.has_user_data() {
            // SAFETY: `sk` is valid, and whoever changes this holds `sk_callback_lock`.
            unsafe { (&raw mut (*sk).sk_user_data).write_volatile(core::ptr::null_mut()) };
        }
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
        let (id, above) = unsafe { (SocketId::of(sk), has_upper_layer(sk)) };
        let (had, hook) = callbacks::find(id, above).unwrap_or((Callbacks::NONE, None));
        // SAFETY: A socket with a hook is not freed, so a hook that was noted of this address is this one's. It
        // is forgotten before it goes, with the lock held for writing, and therefore stays for `'a`.
        let hook = hook.and_then(|hook| unsafe { Hook::for_socket(hook.cast().as_ptr(), sk) });
        Found {
            hook,
            is_ours: false,
            had,
        }
    }

    fn tell_readable(&self) {
        if let Some(hook) = self.hook {
            T::readable(hook.owner.as_arc_borrow());
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
                found.tell_readable();
                return (None, found.had.data_ready);
            }
        };
        let owner = hook.owner.as_arc_borrow();
        // SAFETY: The socket is ours alone, so the protocol has called this. The hook holds the file.
        if let Some(arrival) = unsafe { Arrival::on(sk) } {
            T::arrived(owner, arrival);
        } else if from_task && owner.takes_from_sender() {
            return (Some(owner.into()), None);
        } else {
            T::readable(owner);
        }
        (None, None)
    };
    // SAFETY: This is the callback for `T`, called as this callback is.
    let (receiver, forward) = unsafe { with_hook(sk, in_hook) };
    // SAFETY: It is a callback that this socket had.
    unsafe { call(forward, sk) };
    // What is taken to receive is what `recvmsg()` takes. `unix_stream_sendmsg()` holds none of it.
    if let Some(owner) = receiver {
        T::sent_here(owner);
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
        if T::writable(hook.owner.as_arc_borrow()) {
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
        found.tell_readable();
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
        found.tell_readable();
        // SAFETY: `sk` is valid during its callback.
        let closed = unsafe { (*sk).__sk_common.skc_state } == bindings::TCP_CLOSE;
        // Whoever has the descriptor too can have it listen now, and its children inherit what it has then:
        // see `was_connected()`. The locks cannot be taken here. But nothing but ours is replaced, and
        // `stop()`, which takes them, finds out who has kept ours, or does so just now.
        if closed && found.hook.is_some() {
            // SAFETY: `sk` is valid, and it had these.
            unsafe { Hook::<T>::callbacks().replace(sk, &found.had) };
        }
        found.had.error_report
    };
    // SAFETY: This is the callback for `T`, called as this callback is.
    let forward = unsafe { with_hook::<T, _>(sk, in_hook) };
    // SAFETY: It is a callback that this socket had.
    unsafe { call(forward, sk) };
}

/// Whether [`Hooks`] can wait for a task that sleeps, or loses its processor, in a callback.
const CAN_WAIT_FOR_TASKS: bool = cfg!(any(CONFIG_TASKS_RCU, not(CONFIG_PREEMPTION)));

/// What hooks need of the module. Goes after the last socket, and before what callbacks queue their work on.
pub(crate) struct Hooks {
    _memalloc: MemallocSockets,
}

impl Hooks {
    /// To be called when the module loads. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` the second time.
    pub(crate) fn begin() -> Result<Self> {
        callbacks::start()?;
        Ok(Hooks {
            _memalloc: MemallocSockets::begin(),
        })
    }
}

impl Drop for Hooks {
    /// Waits until nobody is in a callback any more. By now a task cannot sleep there, nor hold a lock, but
    /// it may have lost its processor on its way out. Sleeps, for some tenths of a second.
    #[cfg(CONFIG_TASKS_RCU)]
    fn drop(&mut self) {
        // SAFETY: It has no conditions, but that one may sleep.
        unsafe { bindings::synchronize_rcu_tasks() };
    }

    /// Waits until nobody is in a callback any more, where a task keeps its processor until it sleeps. In a
    /// preemptible kernel that cannot wait for tasks ([`CAN_WAIT_FOR_TASKS`]), one that lost it on its last
    /// steps is overlooked.
    #[cfg(not(CONFIG_TASKS_RCU))]
    fn drop(&mut self) {
        // SAFETY: It has no conditions, but that one may sleep.
        unsafe { bindings::synchronize_rcu() };
    }
}
