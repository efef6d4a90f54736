// SPDX-License-Identifier: GPL-2.0
//! What a socket tells its owner of: its callbacks, and what has come in, read where it arrives.
//!
//! Source: `include/net/sock.h`, `include/net/tcp.h`; the use of the callbacks follows
//! `drivers/nvme/host/tcp.c` and `net/sunrpc/xprtsock.c`.

use super::{
    bindings,
    iov::IoPage,
    lock_class::LockClass,
    mq::Unanswered,
    payload::Payload,
    sock::{has_data, has_upper_layer, Socket},
    task::ModuleRef,
};
use core::{marker::PhantomData, mem::MaybeUninit};
use kernel::{
    error::to_result,
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
        self.prepare();
        // SAFETY: By the type invariant `sk` is valid.
        let lock_class = unsafe { LockClass::give(sk) };
        // INVARIANT: It was installed above, and so were the callbacks unless `stopped`.
        Ok(Hooked {
            socket: self.clone(),
            hook,
            stopped,
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
    // SAFETY: This is the callback for `T`, called as this callback is.
    let receiver = unsafe {
        with_hook::<T, _>(sk, |hook| {
            let owner = hook.owner.as_arc_borrow();
            if let Some(arrival) = Arrival::on(sk) {
                T::arrived(owner, arrival);
            } else if CAN_WAIT_FOR_TASKS && is_unix(sk) && owner.takes_from_sender() {
                return Some(owner.into());
            } else {
                T::readable(owner);
            }
            None
        })
    };
    // `unix_stream_sendmsg()` has slept for memory before it calls this, or might have, and holds no lock
    // any more. What is taken to receive is what `recvmsg()` takes.
    if let Some(owner) = receiver.flatten() {
        T::sent_here(owner);
    }
}

/// Whether [`Callbacks`] can wait for a task that sleeps, or loses its processor, in a callback.
const CAN_WAIT_FOR_TASKS: bool = cfg!(any(CONFIG_TASKS_RCU, not(CONFIG_PREEMPTION)));

/// Whether it is a UNIX socket.
///
/// # Safety
///
/// `sk` must be a socket, valid during the call.
pub(super) unsafe fn is_unix(sk: *mut bindings::sock) -> bool {
    // SAFETY: The caller promises so; the family of a UNIX socket never changes.
    u32::from(unsafe { (*sk).__sk_common.skc_family }) == bindings::AF_UNIX
}

/// Whether it is a TCP socket without an upper layer protocol, such as TLS, which replaces the operations
/// under the socket's lock.
///
/// # Safety
///
/// `sk` must be a socket that is hooked, valid during the call.
unsafe fn is_plain_tcp(sk: *mut bindings::sock) -> bool {
    // SAFETY: `sk` has its socket while it is hooked, since the hook holds the file.
    let read_sock = unsafe {
        let socket = (*sk).sk_socket.cast::<bindings::socket>();
        (*(&raw const (*socket).ops).read_volatile()).read_sock
    };
    read_sock.is_some_and(|read_sock| read_sock as usize == bindings::tcp_read_sock as usize)
}

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

/// What has come in on a TCP socket, to be read without leaving the callback that told of it
/// (as `drivers/scsi/iscsi_tcp.c` does).
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
    /// To be called by the `sk_data_ready` of `sk`, and used within it only.
    unsafe fn on(sk: *mut bindings::sock) -> Option<Self> {
        // INVARIANT: TCP calls this callback with the lock held.
        // SAFETY: The caller promises so.
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
        unsafe {
            bindings::tcp_read_sock(self.sk.cast(), &mut desc, Some(actor::<F>));
            has_data(self.sk)
        }
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
    // SAFETY: The caller promises so.
    let (desc, each) = unsafe { (&mut *desc, &mut *(*desc).arg.data.cast::<F>()) };
    if desc.count == 0 {
        return 0;
    }
    // INVARIANT: The caller promises so.
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
