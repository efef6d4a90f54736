// SPDX-License-Identifier: GPL-2.0
//! Hooks: taking over the callbacks of a socket, and giving them back.
//!
//! A hook replaces four callbacks of a connected socket and calls the methods of an owner instead
//! ([`Events`]). A socket has at most one hook. The hook has four parts, each with its own file:
//!
//! - this file installs and removes hooks;
//! - `owner.rs`: [`Hook`], to which `sk_user_data` points, and the owner's methods;
//! - `callbacks.rs`: the callbacks that replace those of the socket;
//! - `saved.rs`: a record of each hooked socket, with the callbacks that it had before.
//!
//! # Installing
//!
//! [`Socket::hook()`] refuses a socket whose `sk_user_data` is not null, that was never connected, or that
//! has a record already. It notes the callbacks of the socket in a new record, points `sk_user_data` to the
//! hook, and replaces the callbacks.
//!
//! # When a callback runs
//!
//! The callback takes `sk_callback_lock` for reading and looks into `sk_user_data`. It accepts the pointer
//! only if the object behind it begins with a mark that proves it to be a hook, and if the hook is for this
//! socket. Otherwise it looks for the record of the socket.
//!
//! # When another part of the kernel puts itself on top
//!
//! A process that has the descriptor can cause this while the socket is hooked:
//!
//! - TLS (`net/tls/`) replaces `sk_data_ready` and `sk_write_space`. It keeps pointers to our callbacks,
//!   calls them from its own, and restores them when the socket is closed. It leaves `sk_user_data` alone.
//! - iSCSI (`drivers/scsi/iscsi_tcp.c`) overwrites `sk_user_data`, without a look at what is there, and
//!   replaces three of the callbacks. It keeps pointers to ours, calls some of them, and restores them when
//!   it lets go of the socket. It then sets `sk_user_data` to null.
//!
//! In the second case our callbacks do not find the hook in `sk_user_data`, but in the record.
//!
//! # Removing
//!
//! [`Hooked::stop()`] restores each callback, but only where ours is still in place. If one was replaced, or
//! if `sk_user_data` does not point to the hook any more, then another part of the kernel has kept pointers
//! to our callbacks and can call or restore them at any later time. In that case the record stays as a
//! tombstone: it refers to no hook, but it tells our callbacks which ones to call instead. It is never
//! removed, the socket cannot be hooked again, and the module stays loaded until reboot.
//!
//! # Locks
//!
//! Hooks are installed and removed with both locks of the socket held, because each excludes something else:
//!
//! - `lock_sock()` excludes TLS where it replaces `sk_write_space`, and `listen()`, after which accepted
//!   connections would inherit our callbacks;
//! - `sk_callback_lock`, held for writing, excludes the callbacks, TLS where it replaces `sk_data_ready`, and
//!   iSCSI.
//!
//! `lock_sock()` is taken first, because it sleeps.
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)
//!
//! The use of `sk_callback_lock` follows `drivers/nvme/host/tcp.c`, that of `lock_sock()`
//! `net/sunrpc/xprtsock.c`. Both create the sockets that they hook, so they need neither the mark nor the
//! records. The sockets here come from user space, which can hand them to other parts of the kernel as well.

use super::{
    callbacks::hook_callbacks,
    kind::{
        has_upper_layer,
        was_connected, //
    },
    lock_class::LockClass,
    memalloc::{
        MemallocSockets,
        Settings, //
    },
    owner::{
        Hook,
        MARK, //
    },
    saved::{
        self,
        Callbacks,
        Record,
        SocketId, //
    },
    sock::Socket, //
};
use crate::kapi::{
    bindings,
    errno::ENOTCONN,
    task::ModuleRef, //
};
use core::{
    any::TypeId,
    mem::MaybeUninit, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
};

pub(crate) use super::owner::Events;

impl<T: Events> Hook<T> {
    /// Installs the hook on its socket.
    ///
    /// # Errors
    ///
    /// `EBUSY`, `ENOTCONN` and `ENODEV`, as [`Socket::hook()`].
    ///
    /// # Safety
    ///
    /// - `self.sk` must be a valid socket of one of the [`Kind`](super::kind::Kind)s, that a file refers to.
    /// - The caller must hold the socket's lock, and `sk_callback_lock` for writing.
    /// - If this succeeds, the hook must not be moved, and must be freed only as its type invariant requires.
    unsafe fn install(&mut self, record: KBox<Record>) -> Result {
        let sk = self.sk;
        // SAFETY: By this function's safety requirements, `sk` is valid. The pointer is only compared.
        if !unsafe { (*sk).sk_user_data }.is_null() {
            return Err(EBUSY);
        }
        // The socket is locked, so it cannot start to listen after this.
        // SAFETY: By this function's safety requirements, `sk` is valid and a file refers to it.
        if !unsafe { was_connected(sk) } {
            return Err(ENOTCONN.into());
        }
        // SAFETY: By this function's safety requirements, `sk` is valid and `sk_callback_lock` is held.
        self.had = unsafe { Callbacks::of(sk) };
        if self.had.has_one_of(&hook_callbacks::<T>()) {
            return Err(EBUSY);
        }
        // SAFETY: By this function's safety requirements, `sk` is valid.
        let (id, has_upper) = unsafe { (SocketId::of(sk), has_upper_layer(sk)) };
        saved::note(record, id, self.had, has_upper, self.as_ptr())?;
        // SAFETY: `sk` is valid, and `sk_callback_lock`, which protects this field, is held for writing.
        unsafe { (&raw mut (*sk).sk_user_data).write_volatile(self.tagged()) };
        // SAFETY: `sk` is valid. The new callbacks find the hook, which was published above.
        unsafe { self.had.replace(sk, &hook_callbacks::<T>()) };
        Ok(())
    }
}

/// The memory that [`Socket::hook()`] needs. It is allocated separately, so that a caller can do so while
/// it can still fail with `ENOMEM`.
pub(crate) struct HookMemory<T: Events> {
    record: KBox<Record>,
    hook: KBox<MaybeUninit<Hook<T>>>,
}

impl<T: Events> HookMemory<T> {
    /// Allocates the memory.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is none.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn new() -> Result<Self> {
        Ok(HookMemory {
            record: Record::new()?,
            hook: KBox::new_uninit(GFP_KERNEL)?,
        })
    }
}

impl Socket {
    /// Hooks the socket: until [`Hooked::stop()`], its callbacks call `owner`.
    ///
    /// The socket is also set up for writing out dirty memory, until the returned guard is dropped: see
    /// [`Settings::change()`] and [`LockClass::give()`].
    ///
    /// `TCP_NODELAY` is set, as in `drivers/nvme/host/tcp.c`, and stays set: a request must not wait
    /// for the acknowledgement of the one before, and a program can forget the option.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: another user in the kernel, which may be another owner, uses the socket, or may have kept
    ///   pointers to our callbacks from an earlier hook.
    /// - `ENOTCONN`: the socket is not connected and never was.
    /// - `ENODEV`: the module is being unloaded.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
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
            // SAFETY: `self` keeps `sk` valid and its file open, and both locks are held. `Hooked`, which
            // owns the hook below, frees it as the type invariant of `Hook` requires.
            unsafe { hook.install(record)? };
            drop(callbacks);
            // SAFETY: `self` keeps `sk` valid, and the socket is still locked.
            unsafe { Settings::change(self.sk()) }
        };
        self.set_nodelay();
        // SAFETY: `self` keeps `sk` valid.
        let lock_class = unsafe { LockClass::give(self.sk()) };
        // INVARIANT: The hook was installed on `self` above.
        Ok(Hooked {
            socket: self.clone(),
            hook,
            settings,
            lock_class,
            module: Some(module),
        })
    }
}

/// A hooked socket. The callbacks call the owner until [`Self::stop()`], and no other owner can hook the
/// socket until this is dropped.
///
/// # Invariants
///
/// `hook` was installed on `socket`.
pub(crate) struct Hooked<T: Events> {
    socket: Socket,
    hook: KBox<Hook<T>>,
    settings: Settings,
    lock_class: LockClass,
    /// `None` once the reference has been leaked, so that the module stays loaded.
    module: Option<ModuleRef>,
}

impl<T: Events> Hooked<T> {
    /// Stops the callbacks: when this returns, no callback calls the owner, and none will. Only
    /// [`Events::sender_receives()`] may still run.
    ///
    /// Restores each callback of the socket, unless another part of the kernel has replaced ours. In that
    /// case the record of the socket and a reference to the module are kept; see the module's documentation.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn stop(&mut self) {
        if self.hook.stopped.load(Relaxed) {
            return;
        }
        let locked = self.socket.lock();
        let callbacks = self.socket.lock_callbacks();
        // The callbacks call the owner with `sk_callback_lock` held for reading, so none of them does now.
        self.hook.stopped.store(true, Relaxed);
        // SAFETY: `socket` keeps its `sk` valid, which had these callbacks before.
        let covered = unsafe { hook_callbacks::<T>().replace(self.socket.sk(), &self.hook.had) };
        // Another part of the kernel has kept pointers to our callbacks, and can call or restore them at any
        // time from now on.
        let kept = covered || !self.has_user_data();
        // SAFETY: `socket` keeps its `sk` valid.
        let id = unsafe { SocketId::of(self.socket.sk()) };
        if kept {
            saved::forget_hook(id, self.hook.as_ptr());
        } else {
            saved::forget(id, self.hook.as_ptr());
        }
        drop((callbacks, locked));
        if kept {
            pr_warn!(
                "another part of the kernel, such as TLS, took over a device's socket; the module stays loaded until reboot\n"
            );
            core::mem::forget(self.module.take());
        }
    }

    /// Whether `sk_user_data` still points to this hook. The answer is stable only while
    /// `sk_callback_lock` is held.
    fn has_user_data(&self) -> bool {
        // SAFETY: `socket` keeps its `sk` valid. The pointer is only compared.
        unsafe {
            (&raw const (*self.socket.sk()).sk_user_data).read_volatile() == self.hook.tagged()
        }
    }
}

impl<T: Events> Drop for Hooked<T> {
    fn drop(&mut self) {
        self.stop();
        let sk = self.socket.sk();
        // SAFETY: `lock_class` was made from `socket`, which keeps its `sk` valid.
        unsafe { self.lock_class.restore() };
        let _locked = self.socket.lock();
        // If another part of the kernel has taken the socket over, the settings are now its own.
        if self.has_user_data() {
            // Not with `sk_callback_lock` held: `restore()` takes the socket's spin lock, which comes
            // before it in the lock order.
            // SAFETY: `socket` keeps its `sk` valid, which is locked, and `settings` is from the same socket.
            unsafe { self.settings.restore(sk) };
        }
        let _callbacks = self.socket.lock_callbacks();
        if self.has_user_data() {
            // SAFETY: `sk` is valid, and `sk_callback_lock`, which protects this field, is held for writing.
            unsafe { (&raw mut (*sk).sk_user_data).write_volatile(core::ptr::null_mut()) };
        }
    }
}

/// What all hooks of the module share. To be dropped after the last [`Hooked`], and before the workqueues
/// that the owners use in callbacks.
pub(crate) struct Hooks {
    _memalloc: MemallocSockets,
}

impl Hooks {
    /// Prepares the module for hooks. To be called once, when the module is loaded.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it was called before.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn begin() -> Result<Self> {
        saved::start()?;
        Ok(Hooks {
            _memalloc: MemallocSockets::begin(),
        })
    }
}

impl Drop for Hooks {
    /// Waits until no task executes a callback any more. No task can sleep in one by now, but a task may have
    /// been preempted in its last instructions. Sleeps for some tenths of a second.
    ///
    /// On PREEMPT_RT, a task may also wait for a spin lock in a callback, which Tasks RCU takes for the end of
    /// the callback. Such a task is an RCU reader. Therefore the first wait ends when each task that was in a
    /// callback either has left it or is such a reader, or was; the second, when none is any more; and the
    /// third, when those tasks have executed their last instructions, in which they do not sleep.
    #[cfg(CONFIG_TASKS_RCU)]
    fn drop(&mut self) {
        // SAFETY: This may sleep here, and has no other requirements.
        unsafe { bindings::synchronize_rcu_tasks() };
        #[cfg(CONFIG_PREEMPT_RT)]
        // SAFETY: These may sleep here, and have no other requirements.
        unsafe {
            bindings::synchronize_rcu();
            bindings::synchronize_rcu_tasks();
        };
    }

    /// Waits until no task executes a callback any more. This is exact where the kernel is not preemptible. A
    /// preemptible kernel without `CONFIG_TASKS_RCU` offers no way to wait for a task that was preempted in
    /// the last instructions of a callback; no callback sleeps there.
    #[cfg(not(CONFIG_TASKS_RCU))]
    fn drop(&mut self) {
        // SAFETY: This may sleep here, and has no other requirements.
        unsafe { bindings::synchronize_rcu() };
    }
}
