// SPDX-License-Identifier: GPL-2.0
//! Which callbacks a socket had before ours replaced them.
//!
//! Ours are replaced together with `sk_user_data`, but not everybody in the kernel asks whether that is
//! free. TLS puts its own callbacks on top of those that it finds, at any time; `drivers/scsi/iscsi_tcp.c`
//! and `net/sunrpc/svcsock.c` take `sk_user_data`, too. They keep the callbacks that they have found, call
//! them, and put them back, when we have long let go of the socket. So it is written down here which
//! callbacks a socket had, while it is hooked and, where somebody may have kept ours, for ever.

use crate::kapi::bindings;
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Release, //
        },
        global_lock, //
    },
};

/// One callback of a socket, or nothing.
pub(super) type Callback = Option<unsafe extern "C" fn(*mut bindings::sock)>;

/// The callbacks of a socket that a hook replaces.
#[derive(Clone, Copy)]
pub(super) struct Callbacks {
    pub(super) state_change: Callback,
    pub(super) data_ready: Callback,
    pub(super) write_space: Callback,
    pub(super) error_report: Callback,
}

/// As a number, to be compared: 0 for none.
fn address(callback: Callback) -> usize {
    callback.map_or(0, |callback| callback as usize)
}

impl Callbacks {
    /// None.
    pub(super) const NONE: Self = Callbacks {
        state_change: None,
        data_ready: None,
        write_space: None,
        error_report: None,
    };

    /// Those that a socket has.
    ///
    /// # Safety
    ///
    /// `sk` must be a socket, valid during the call, with `sk_callback_lock` held.
    pub(super) unsafe fn of(sk: *mut bindings::sock) -> Self {
        // SAFETY: The caller promises that `sk` is valid. TLS writes `sk_write_space` without that lock; what
        // is read is what was there before or after.
        unsafe {
            Callbacks {
                state_change: (&raw const (*sk).sk_state_change).read_volatile(),
                data_ready: (&raw const (*sk).sk_data_ready).read_volatile(),
                write_space: (&raw const (*sk).sk_write_space).read_volatile(),
                error_report: (&raw const (*sk).sk_error_report).read_volatile(),
            }
        }
    }

    fn addresses(&self) -> [usize; 4] {
        [
            address(self.state_change),
            address(self.data_ready),
            address(self.write_space),
            address(self.error_report),
        ]
    }

    /// Whether any of them is the same as in `other`.
    pub(super) fn has_one_of(&self, other: &Callbacks) -> bool {
        let mut pairs = self.addresses().into_iter().zip(other.addresses());
        pairs.any(|(mine, theirs)| mine == theirs)
    }

    /// Puts `new` in the place of these, each where it is still there. Returns whether one was found that
    /// is neither.
    ///
    /// # Safety
    ///
    /// `sk` must be a socket, valid during the call. `new` must be fit for it.
    pub(super) unsafe fn replace(&self, sk: *mut bindings::sock, new: &Callbacks) -> bool {
        // SAFETY: The caller promises that `sk` is valid; only addresses are taken.
        let places: [*mut usize; 4] = unsafe {
            [
                (&raw mut (*sk).sk_state_change).cast(),
                (&raw mut (*sk).sk_data_ready).cast(),
                (&raw mut (*sk).sk_write_space).cast(),
                (&raw mut (*sk).sk_error_report).cast(),
            ]
        };
        let mut found_others = false;
        let replacements = self.addresses().into_iter().zip(new.addresses());
        for (place, (old, new)) in places.into_iter().zip(replacements) {
            // SAFETY: It is valid as `sk` is, and as large as a pointer; C reads and writes it in one access.
            let place = unsafe { Atomic::from_ptr(place) };
            // By exchange: TLS may write its own just now.
            let found = place.cmpxchg(old, new, Full);
            found_others |= found.is_err_and(|found| found != new);
        }
        found_others
    }
}

/// Calls a callback that a socket had.
///
/// # Safety
///
/// It must be a callback of `sk`, which must be as it expects it.
pub(super) unsafe fn call(callback: Callback, sk: *mut bindings::sock) {
    if let Some(callback) = callback {
        // SAFETY: The caller promises that it may be called for `sk`.
        unsafe { callback(sk) };
    }
}

/// Which socket it is. The address alone would not do: it is used again when a socket has gone.
#[derive(Clone, Copy)]
pub(super) struct SocketId {
    address: usize,
    /// The inode's number, which is 0 when its file has gone.
    inode: u64,
}

impl SocketId {
    /// # Safety
    ///
    /// `sk` must be a socket, valid during the call.
    pub(super) unsafe fn of(sk: *mut bindings::sock) -> Self {
        SocketId {
            address: sk.addr(),
            // SAFETY: The caller promises that `sk` is valid; it is read without a lock in C, too.
            inode: unsafe { (&raw const (*sk).sk_ino).read_volatile() },
        }
    }

    /// Whether it can be the socket that `self` was noted of.
    fn can_be(&self, now: SocketId) -> bool {
        self.address == now.address && (now.inode == 0 || self.inode == now.inode)
    }
}

/// What is known of a socket that has, or had, our callbacks.
pub(super) struct Record {
    socket: SocketId,
    had: Callbacks,
    /// It had TLS or the like, whose callbacks are of no use without it.
    had_upper_layer: bool,
    /// The hook, while there is one.
    hook: Option<NonNull<()>>,
    next: Option<KBox<Record>>,
}

// SAFETY: Nothing here follows the pointer to the hook. Who does so knows that it is still there.
unsafe impl Send for Record {}

impl Record {
    /// Memory for one.
    pub(super) fn new() -> Result<KBox<Self>> {
        let record = Record {
            socket: SocketId {
                address: 0,
                inode: 0,
            },
            had: Callbacks::NONE,
            had_upper_layer: false,
            hook: None,
            next: None,
        };
        Ok(KBox::new(record, GFP_KERNEL)?)
    }
}

/// Over how many lists the records are spread: with thousands of sockets each is still short.
const LISTS: usize = 1024;

/// The records, by the addresses of their sockets.
struct Records([Option<KBox<Record>>; LISTS]);

impl Records {
    /// The list that a socket's record is in.
    fn list(&mut self, socket: SocketId) -> Option<&mut Option<KBox<Record>>> {
        // Sockets are aligned to cache lines, at least.
        self.0.get_mut((socket.address >> 6) % LISTS)
    }

    /// Where the record of a socket with that hook is.
    fn place(&mut self, socket: SocketId, hook: NonNull<()>) -> Option<&mut Option<KBox<Record>>> {
        let mut place = self.list(socket)?;
        while place.as_ref()?.hook != Some(hook) {
            place = &mut place.as_mut()?.next;
        }
        Some(place)
    }

    fn find(&mut self, socket: SocketId) -> Option<&Record> {
        let mut next = self.list(socket)?.as_ref();
        while let Some(record) = next {
            if record.socket.can_be(socket) {
                return Some(record);
            }
            next = record.next.as_ref();
        }
        None
    }
}

global_lock! {
    // SAFETY: `start()` initializes it; `note()` and `find()` do nothing before, and `forget()` comes after
    // `note()`.
    unsafe(uninit) static RECORDS: SpinLock<Records> = Records([const { None }; LISTS]);
}

/// [`start()`] was not called.
const NOT_STARTED: i32 = 0;
/// It runs.
const STARTING: i32 = 1;
/// It is over: the lock can be used.
const STARTED: i32 = 2;

static STATE: Atomic<i32> = Atomic::new(NOT_STARTED);

/// To be called when the module loads.
///
/// # Errors
///
/// `EBUSY` the second time.
pub(super) fn start() -> Result {
    if STATE.cmpxchg(NOT_STARTED, STARTING, Full).is_err() {
        return Err(EBUSY);
    }
    // SAFETY: This is reached once.
    unsafe { RECORDS.init() };
    STATE.store(STARTED, Release);
    Ok(())
}

/// Notes which callbacks a socket `had`, and its hook. To be called with `sk_callback_lock` held, which keeps
/// softirqs away.
///
/// # Errors
///
/// `EBUSY` where the socket was hooked before and somebody may have kept our callbacks: ours would be below
/// his, and above. `ENODEV` before [`start()`].
pub(super) fn note(
    mut record: KBox<Record>,
    socket: SocketId,
    had: Callbacks,
    had_upper_layer: bool,
    hook: NonNull<()>,
) -> Result {
    if STATE.load(Acquire) != STARTED {
        return Err(ENODEV);
    }
    let mut records = RECORDS.lock();
    if records.find(socket).is_some() {
        return Err(EBUSY);
    }
    record.socket = socket;
    record.had = had;
    record.had_upper_layer = had_upper_layer;
    record.hook = Some(hook);
    let list = records.list(socket).ok_or(EINVAL)?;
    record.next = list.take();
    *list = Some(record);
    Ok(())
}

/// The callbacks that a socket had before it got ours, and its hook, if it is still there. To be called with
/// `sk_callback_lock` held. `has_upper_layer` is whether it has TLS or the like.
pub(super) fn find(
    socket: SocketId,
    has_upper_layer: bool,
) -> Option<(Callbacks, Option<NonNull<()>>)> {
    if STATE.load(Acquire) != STARTED {
        return None;
    }
    let mut records = RECORDS.lock();
    let record = records.find(socket)?;
    if record.had_upper_layer && !has_upper_layer {
        return None;
    }
    Some((record.had, record.hook))
}

/// Forgets a socket, whose hook is about to be freed. To be called with `sk_callback_lock` held.
pub(super) fn forget(socket: SocketId, hook: NonNull<()>) {
    let mut records = RECORDS.lock();
    if let Some(place) = records.place(socket, hook) {
        if let Some(record) = place.take() {
            *place = KBox::into_inner(record).next;
        }
    }
}

/// Forgets the hook of a socket, which is about to be freed, and keeps the rest. To be called with
/// `sk_callback_lock` held.
pub(super) fn forget_hook(socket: SocketId, hook: NonNull<()>) {
    let mut records = RECORDS.lock();
    if let Some(Some(record)) = records.place(socket, hook) {
        record.hook = None;
    }
}
