// SPDX-License-Identifier: GPL-2.0
//! The records of hooked sockets: which callbacks each had before ours replaced them.
//!
//! This is the last of the four parts that `hook.rs` describes. [`Callbacks`] reads and replaces the
//! callbacks of a socket. A record is needed because a callback cannot always find the hook through
//! `sk_user_data`: `drivers/scsi/iscsi_tcp.c` overwrites that pointer, and both iSCSI and TLS keep
//! pointers to our callbacks, which they may call or restore long after the hook has been removed. Our
//! callback must then still know which callback of the socket it stands for.
//!
//! [`note()`] makes a record when a socket is hooked, and [`find()`] looks it up. When the hook is
//! removed, one of two things happens:
//!
//! - [`forget()`] removes the record, if no other part of the kernel can have kept our callbacks;
//! - [`forget_hook()`] keeps it as a tombstone. The module then stays loaded until reboot, and so does the
//!   tombstone. [`note()`] refuses a socket that has one.
//!
//! A record is for one socket, but a tombstone outlives it, and the address of a socket is reused. So
//! [`SocketId`] also holds the number of the socket's inode.
//!
//! C header: [`include/net/sock.h`](srctree/include/net/sock.h)

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

/// A callback of a socket. `None` is a null pointer.
pub(super) type Callback = Option<unsafe extern "C" fn(*mut bindings::sock)>;

/// Those callbacks of a socket that a hook replaces.
#[derive(Clone, Copy)]
pub(super) struct Callbacks {
    pub(super) state_change: Callback,
    pub(super) data_ready: Callback,
    pub(super) write_space: Callback,
    pub(super) error_report: Callback,
}

/// Returns the address of a callback, for comparison, or 0 for none.
fn address(callback: Callback) -> usize {
    callback.map_or(0, |callback| callback as usize)
}

impl Callbacks {
    /// No callbacks.
    pub(super) const NONE: Self = Callbacks {
        state_change: None,
        data_ready: None,
        write_space: None,
        error_report: None,
    };

    /// Reads the callbacks that a socket has now.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket, whose `sk_callback_lock` is held.
    pub(super) unsafe fn of(sk: *mut bindings::sock) -> Self {
        // SAFETY: By this function's safety requirements, `sk` is valid and `sk_callback_lock` is held.
        // TLS writes `sk_write_space` without that lock, but the access here is volatile and as wide as a
        // pointer, so it reads either the old or the new one.
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

    /// Replaces each of the socket's callbacks by that of `new`, if it is still that of `self`. Returns
    /// whether a callback was found that is neither, which means that another part of the kernel has
    /// installed it.
    ///
    /// # Safety
    ///
    /// - `sk` must be a valid socket.
    /// - The callbacks in `new` must be sound to call for `sk`.
    pub(super) unsafe fn replace(&self, sk: *mut bindings::sock, new: &Callbacks) -> bool {
        // SAFETY: By this function's safety requirements, `sk` is valid. Only addresses of fields are taken.
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
            // SAFETY: `sk` is valid, so its fields are, and these are pointers, which are as wide as
            // `usize`. C reads and writes each with a single access.
            let place = unsafe { Atomic::from_ptr(place) };
            // By compare and exchange, because `sk_error_report` does this without the locks: TLS may install
            // its own callback at the same time.
            let found = place.cmpxchg(old, new, Full);
            found_others |= found.is_err_and(|found| found != new);
        }
        found_others
    }
}

/// Calls `callback` for `sk`, if it is not `None`.
///
/// # Safety
///
/// `callback` must be one that `sk` had, and the caller must be a callback of `sk` of the same kind.
pub(super) unsafe fn call(callback: Callback, sk: *mut bindings::sock) {
    if let Some(callback) = callback {
        // SAFETY: By this function's safety requirements, the socket could have called this one itself.
        unsafe { callback(sk) };
    }
}

/// Identifies a socket. The address alone is not enough, because it is reused after a socket was freed.
#[derive(Clone, Copy)]
pub(super) struct SocketId {
    address: usize,
    /// The number of the inode (`sk_ino`). It is 0 once the file is closed.
    inode: u64,
}

impl SocketId {
    /// Returns the identity of `sk`.
    ///
    /// # Safety
    ///
    /// `sk` must be a valid socket.
    pub(super) unsafe fn of(sk: *mut bindings::sock) -> Self {
        SocketId {
            address: sk.addr(),
            // SAFETY: By this function's safety requirements, `sk` is valid. C reads this without a lock,
            // too.
            inode: unsafe { (&raw const (*sk).sk_ino).read_volatile() },
        }
    }

    /// Whether `now`, which was read just now, can be the socket of `self`, which is from a record. A socket
    /// whose file is closed has no inode number to compare.
    fn can_be(&self, now: SocketId) -> bool {
        self.address == now.address && (now.inode == 0 || self.inode == now.inode)
    }
}

/// The record of a socket that is hooked, or the tombstone of one that was.
pub(super) struct Record {
    socket: SocketId,
    had: Callbacks,
    /// The socket had an upper layer protocol, such as TLS, when it was hooked. Some callbacks in `had` then
    /// belong to that protocol, and must not be called when it has been removed.
    had_upper_layer: bool,
    /// The hook. `None` in a tombstone.
    hook: Option<NonNull<()>>,
    next: Option<KBox<Record>>,
}

// SAFETY: The pointer to the hook is never dereferenced here. A caller of `find()` that dereferences it
// has to justify that.
unsafe impl Send for Record {}

impl Record {
    /// Allocates an empty record, for [`note()`]. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory.
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

/// The number of lists over which the records are spread. With thousands of sockets each list is still short.
const LISTS: usize = 1024;

/// A hash table of records, by the addresses of their sockets.
struct Records([Option<KBox<Record>>; LISTS]);

impl Records {
    /// Returns the list that holds the record of `socket`.
    fn list(&mut self, socket: SocketId) -> Option<&mut Option<KBox<Record>>> {
        // The low bits are the same for all: sockets are aligned to cache lines.
        self.0.get_mut((socket.address >> 6) % LISTS)
    }

    /// Returns the link to the record of `socket` that refers to `hook`.
    fn place(&mut self, socket: SocketId, hook: NonNull<()>) -> Option<&mut Option<KBox<Record>>> {
        let mut place = self.list(socket)?;
        while place.as_ref()?.hook != Some(hook) {
            place = &mut place.as_mut()?.next;
        }
        Some(place)
    }

    /// Returns the record or tombstone of `socket`.
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
    // SAFETY: `start()` initializes it. `note()` and `find()` do not touch it before, and `forget()` and
    // `forget_hook()` are only called after `note()`.
    unsafe(uninit) static RECORDS: SpinLock<Records> = Records([const { None }; LISTS]);
}

/// [`start()`] has not been called.
const NOT_STARTED: i32 = 0;
/// [`start()`] is running.
const STARTING: i32 = 1;
/// [`start()`] has initialized the lock.
const STARTED: i32 = 2;

static STATE: Atomic<i32> = Atomic::new(NOT_STARTED);

/// Initializes the records. To be called once, when the module is loaded.
///
/// # Errors
///
/// `EBUSY` if it was called before.
pub(super) fn start() -> Result {
    if STATE.cmpxchg(NOT_STARTED, STARTING, Full).is_err() {
        return Err(EBUSY);
    }
    // SAFETY: Only one caller ever changes `STATE` from `NOT_STARTED`, so this is reached only once.
    unsafe { RECORDS.init() };
    STATE.store(STARTED, Release);
    Ok(())
}

/// Records that `socket` gets `hook`, and `had` these callbacks before. `had_upper_layer` is whether it
/// has an upper layer protocol, such as TLS.
///
/// # Errors
///
/// - `EBUSY`: there is a tombstone. Another part of the kernel may have kept our callbacks, so a new hook
///   would have them both above and below that part's own.
/// - `ENODEV`: [`start()`] has not been called.
///
/// # Context
///
/// With `sk_callback_lock` held, which also keeps softirqs off this processor: callbacks take the lock of the
/// records in softirq context.
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

/// Returns the callbacks that a socket had before it was hooked, and its hook, if it still has one.
/// `has_upper_layer` is whether it has an upper layer protocol, such as TLS, now. Returns nothing if it
/// had one when it was hooked, but has none any more.
///
/// # Context
///
/// With `sk_callback_lock` held, as for [`note()`].
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

/// Removes the record of a socket whose hook is about to be freed.
///
/// # Context
///
/// With `sk_callback_lock` held for writing.
pub(super) fn forget(socket: SocketId, hook: NonNull<()>) {
    let mut records = RECORDS.lock();
    if let Some(place) = records.place(socket, hook) {
        if let Some(record) = place.take() {
            *place = KBox::into_inner(record).next;
        }
    }
}

/// Makes the record of a socket a tombstone: removes the reference to the hook, which is about to be
/// freed, and keeps the rest.
///
/// # Context
///
/// With `sk_callback_lock` held for writing.
pub(super) fn forget_hook(socket: SocketId, hook: NonNull<()>) {
    let mut records = RECORDS.lock();
    if let Some(Some(record)) = records.place(socket, hook) {
        record.hook = None;
    }
}
