// SPDX-License-Identifier: GPL-2.0
//! What a socket tells its owner of: its callbacks.
//!
//! Source: `include/net/sock.h`; the use of the callbacks follows `drivers/nvme/host/tcp.c` and
//! `net/sunrpc/xprtsock.c`.

use super::{
    callbacks::hook_callbacks,
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
    sock::{
        has_upper_layer,
        was_connected,
        Socket, //
    },
};
use crate::kapi::{
    bindings,
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
        if self.had.has_one_of(&hook_callbacks::<T>()) {
            return Err(EBUSY);
        }
        // SAFETY: The caller promises that `sk` is valid.
        let (id, has_upper) = unsafe { (SocketId::of(sk), has_upper_layer(sk)) };
        saved::note(record, id, self.had, has_upper, self.as_ptr())?;
        // SAFETY: `sk` is valid, and whoever changes this holds `sk_callback_lock`.
        unsafe { (&raw mut (*sk).sk_user_data).write_volatile(self.tagged()) };
        // SAFETY: `sk` is valid, and ours find the hook there.
        unsafe { self.had.replace(sk, &hook_callbacks::<T>()) };
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
        let covered = unsafe { hook_callbacks::<T>().replace(self.socket.sk(), &self.hook.had) };
        // Whoever has put callbacks on top of ours, or has taken the socket over, may call ours or restore
        // them at any time from now on.
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
        saved::start()?;
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
