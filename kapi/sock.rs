// SPDX-License-Identifier: GPL-2.0
//! Connected stream sockets that user space hands over: sending, receiving, callbacks, death.
//!
//! The `kernel` crate (7.3) has no sockets. Source: `include/linux/net.h`, `include/net/sock.h`; the
//! use of the callbacks follows `drivers/nvme/host/tcp.c` and `net/sunrpc/xprtsock.c`.

use super::{bindings, payload::Payload};
use core::{marker::PhantomData, mem::MaybeUninit, ptr::NonNull};
use kernel::{
    alloc::AllocError,
    error::to_result,
    page::Page,
    prelude::*,
    sync::{Arc, ArcBorrow},
};

/// Why a file descriptor cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BadSocket {
    /// It is no open file, or no socket: the errno of `sockfd_lookup()`.
    Fd(Error),
    /// Neither TCP nor a UNIX stream.
    Kind,
}

/// What becomes of bytes that the peer has not read yet when a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// They are still delivered.
    Polite,
    /// They are thrown away where that is possible (TCP: a reset; a UNIX socket has no such thing).
    Reset,
}

/// A socket, and a reference to its file.
///
/// # Invariants
///
/// `socket` is valid, and so is its `sk`, which does not change, because we hold a reference to its
/// file. It is TCP or a UNIX stream.
pub(crate) struct Socket {
    socket: NonNull<bindings::socket>,
}

// SAFETY: Sockets may be used by any task, and lock themselves.
unsafe impl Send for Socket {}
// SAFETY: As above.
unsafe impl Sync for Socket {}

impl Socket {
    /// The socket behind a file descriptor of the current process (`nbd_get_socket()`). May sleep.
    pub(crate) fn from_fd(fd: i32) -> core::result::Result<Self, BadSocket> {
        let mut err = 0;
        // SAFETY: `err` is valid for the write.
        let socket = unsafe { bindings::sockfd_lookup(fd, &mut err) };
        let Some(socket) = NonNull::new(socket) else {
            return Err(BadSocket::Fd(to_result(err).err().unwrap_or(EBADF)));
        };
        // INVARIANT: `sockfd_lookup()` took a reference to the file; dropping this puts it.
        let socket = Socket { socket };
        if socket.is_tcp() || socket.is_unix_stream() {
            Ok(socket)
        } else {
            Err(BadSocket::Kind)
        }
    }

    fn sk(&self) -> *mut bindings::sock {
        // SAFETY: By the type invariant the socket is valid. kernel::bindings does not know the fields
        // of `struct sock`, our bindings do; it is the same type in C.
        unsafe { (*self.socket.as_ptr()).sk.cast() }
    }

    fn family(&self) -> u32 {
        // SAFETY: By the type invariant `sk` is valid. The family of a connected socket does not change
        // but from IPv6 to IPv4 (`IPV6_ADDRFORM`), which makes no difference here.
        u32::from(unsafe { (*self.sk()).__sk_common.skc_family })
    }

    /// `sk_is_tcp()`.
    fn is_tcp(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid; its kind does not change.
        let (kind, protocol) = unsafe { ((*sk).sk_type, (*sk).sk_protocol) };
        matches!(self.family(), bindings::AF_INET | bindings::AF_INET6)
            && u32::from(kind) == bindings::SOCK_STREAM
            && u32::from(protocol) == bindings::IPPROTO_TCP
    }

    /// `sk_is_stream_unix()`.
    fn is_unix_stream(&self) -> bool {
        // SAFETY: By the type invariant `sk` is valid; its type does not change.
        let kind = unsafe { (*self.sk()).sk_type };
        self.family() == bindings::AF_UNIX && u32::from(kind) == bindings::SOCK_STREAM
    }

    /// Makes the socket fit for writing out dirty memory: it may dip into the reserves, and its
    /// allocations never wait for I/O (as nbd.c's `__sock_xmit()` and `nbd_start_device()`).
    fn prepare_for_reclaim(&self) {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid. Only the kernel's own users of a socket set
        // these fields, and there is no other while it is hooked.
        unsafe {
            bindings::sk_set_memalloc(sk);
            (*sk).sk_allocation = bindings::GFP_NOIO | bindings::__GFP_MEMALLOC;
            (*sk).sk_use_task_frag = false;
        }
    }

    /// Sends as much of `data` as fits. `more`: further data follows at once. Does not wait for room,
    /// but may sleep for the socket's lock.
    ///
    /// # Errors
    ///
    /// `EAGAIN` where nothing fits; anything else means that the connection is gone.
    pub(crate) fn send(&self, data: Iov<'_>, more: bool) -> Result<usize> {
        let mut flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
        if more {
            flags |= bindings::MSG_MORE;
        }
        self.transfer(data, bindings::ITER_SOURCE, |socket, msg| {
            // SAFETY: The socket is valid; `msg` describes memory that lives during the call.
            unsafe {
                (*msg).msg_flags = flags;
                bindings::sock_sendmsg(socket, msg)
            }
        })
    }

    /// Receives at most as much as `data` has room for. Does not wait for data, but may sleep for the
    /// socket's lock.
    ///
    /// # Errors
    ///
    /// `EAGAIN` where nothing is there; `EPIPE` at the end of the stream; anything else means that the
    /// connection is gone.
    pub(crate) fn receive(&self, data: Iov<'_>) -> Result<usize> {
        let got = self.transfer(data, bindings::ITER_DEST, |socket, msg| {
            let flags = bindings::MSG_DONTWAIT | bindings::MSG_NOSIGNAL;
            // SAFETY: The socket is valid; `msg` describes memory that lives during the call.
            unsafe { bindings::sock_recvmsg(socket, msg, flags as i32) }
        })?;
        if got == 0 {
            return Err(EPIPE);
        }
        Ok(got)
    }

    fn transfer(
        &self,
        data: Iov<'_>,
        direction: u32,
        call: impl FnOnce(*mut bindings::socket, *mut bindings::msghdr) -> i32,
    ) -> Result<usize> {
        // SAFETY: It consists of numbers and pointers, for which zeroes are fine.
        let mut msg: bindings::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: The pieces describe memory that lives as long as `data`.
        unsafe {
            bindings::iov_iter_bvec(
                &mut msg.msg_iter,
                direction,
                data.pieces.as_ptr(),
                data.pieces.len(),
                data.bytes,
            )
        };
        let result = in_io_context(|| call(self.socket.as_ptr(), &mut msg));
        to_result(result)?;
        Ok(result as usize)
    }

    /// Whether there is something to receive: data, the end of the stream, or an error. May be wrong
    /// about what happens at the same time; that is announced by [`Events::readable`].
    pub(crate) fn has_input(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid; these are looked at as `tcp_poll()` does.
        unsafe {
            let queue = &raw const (*sk).sk_receive_queue;
            let first = (&raw const (*queue).__bindgen_anon_1.list.next).read_volatile();
            let shutdown = (&raw const (*sk).sk_shutdown).read_volatile();
            let err = (&raw const (*sk).sk_err).read_volatile();
            !core::ptr::eq(first.cast::<u8>(), queue.cast::<u8>())
                || u32::from(shutdown) & bindings::RCV_SHUTDOWN != 0
                || err != 0
        }
    }

    /// Whether enough room has become free that sending again is worth it
    /// (`sk_stream_is_writeable()`, `unix_writable()`).
    pub(crate) fn has_room(&self) -> bool {
        let sk = self.sk();
        // SAFETY: By the type invariant `sk` is valid; these are looked at without its lock in C too.
        unsafe {
            let limit = (&raw const (*sk).sk_sndbuf).read_volatile();
            if self.family() == bindings::AF_UNIX {
                let used = (&raw const (*sk).sk_wmem_alloc.refs.counter).read_volatile();
                used.saturating_mul(4) <= limit
            } else {
                let used = (&raw const (*sk).sk_wmem_queued).read_volatile();
                limit.saturating_sub(used) >= used >> 1
            }
        }
    }

    /// Ends the connection: nothing more is sent or received. May sleep.
    pub(crate) fn end(&self, ending: Ending) {
        // SAFETY: The socket is valid. Both calls may be repeated.
        unsafe {
            if ending == Ending::Reset && self.is_tcp() {
                // kernel::bindings' and our `struct sock` are the same type in C.
                bindings::tcp_abort(self.sk().cast(), bindings::ECONNABORTED as i32);
            }
            bindings::kernel_sock_shutdown(
                self.socket.as_ptr(),
                bindings::sock_shutdown_cmd_SHUT_RDWR,
            );
        }
    }

    /// Whether somebody has hooked it: then it is not the caller's to send on or to end.
    pub(crate) fn is_hooked(&self) -> bool {
        // SAFETY: By the type invariant `sk` is valid; the pointer is only compared.
        unsafe {
            !(&raw const (*self.sk()).sk_user_data)
                .read_volatile()
                .is_null()
        }
    }

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
            },
            GFP_KERNEL,
        )?;
        // SAFETY: By the type invariant `sk` is valid; the lock protects what is changed here.
        unsafe {
            bindings::_raw_write_lock_bh(&raw mut (*sk).sk_callback_lock);
            let free = (*sk).sk_user_data.is_null();
            if free {
                hook.state_change = (*sk).sk_state_change;
                hook.error_report = (*sk).sk_error_report;
                hook.data_ready = (*sk).sk_data_ready;
                hook.write_space = (*sk).sk_write_space;
                (*sk).sk_user_data = (&raw const *hook).cast_mut().cast();
                (*sk).sk_state_change = Some(state_change::<T>);
                (*sk).sk_error_report = Some(error_report::<T>);
                (*sk).sk_data_ready = Some(data_ready::<T>);
                (*sk).sk_write_space = Some(write_space::<T>);
            }
            bindings::_raw_write_unlock_bh(&raw mut (*sk).sk_callback_lock);
            if !free {
                return Err(EBUSY);
            }
        }
        self.prepare_for_reclaim();
        // SAFETY: By the type invariant `sk` is valid.
        let lock_class = unsafe { LockClass::give(sk) };
        // INVARIANT: It was installed above.
        Ok(Hooked {
            socket: self.clone(),
            hook,
            stopped: false,
            lock_class,
        })
    }
}

impl Clone for Socket {
    fn clone(&self) -> Self {
        // SAFETY: By the type invariant we hold a reference to the file.
        unsafe { bindings::get_file((*self.socket.as_ptr()).file) };
        // INVARIANT: A reference was taken above.
        Socket {
            socket: self.socket,
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // SAFETY: By the type invariant we hold a reference to the file (`sockfd_put()`).
        unsafe { bindings::fput((*self.socket.as_ptr()).file) };
    }
}

/// What a socket tells its owner. Called in any context, also in softirq: must not sleep.
pub(crate) trait Events: Send + Sync + 'static {
    /// As [`Self::readable()`], where what came in can be read at once.
    fn arrived(this: ArcBorrow<'_, Self>, arrival: Arrival<'_>);

    /// There may be something to receive: data, the end of the stream, an error.
    fn readable(this: ArcBorrow<'_, Self>);

    /// There may be room to send. Returns whether it was waited for.
    fn writable(this: ArcBorrow<'_, Self>) -> bool;
}

type Callback = Option<unsafe extern "C" fn(*mut bindings::sock)>;

/// What `sk_user_data` points to while a socket is hooked.
struct Hook<T: Events> {
    owner: Arc<T>,
    state_change: Callback,
    error_report: Callback,
    data_ready: Callback,
    write_space: Callback,
}

/// Keeps a socket for its owner: nobody else can hook it, and its callbacks tell the owner until
/// [`Self::stop()`].
///
/// # Invariants
///
/// `hook` is the socket's `sk_user_data`. Unless `stopped`, the callbacks are ours for `T`.
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
            (*sk).sk_state_change = self.hook.state_change;
            (*sk).sk_error_report = self.hook.error_report;
            (*sk).sk_data_ready = self.hook.data_ready;
            (*sk).sk_write_space = self.hook.write_space;
            bindings::_raw_write_unlock_bh(&raw mut (*sk).sk_callback_lock);
        }
        self.stopped = true;
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

/// What lockdep knew of a socket's lock before it was hooked. While it is hooked the lock has a class
/// of its own (nbd.c's `nbd_reclassify_socket()`): writing out dirty memory takes it, and programs
/// make room in memory while they hold the locks of their sockets, which is no deadlock only because
/// those are others.
struct LockClass {
    #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
    saved: bindings::lockdep_map,
}

// SAFETY: It is a copy that only `restore()` looks into.
unsafe impl Send for LockClass {}
// SAFETY: As above.
unsafe impl Sync for LockClass {}

#[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
impl LockClass {
    /// Gives the lock another class. May sleep.
    ///
    /// # Safety
    ///
    /// `sk` must be a socket, valid during the call.
    unsafe fn give(sk: *mut bindings::sock) -> Self {
        // One for each family, since one may hold the lock of another, as of the transport of TLS.
        // SAFETY: The caller promises that `sk` is valid.
        let (name, key) = match u32::from(unsafe { (*sk).__sk_common.skc_family }) {
            bindings::AF_INET => (c"sk_lock-AF_INET-RNBD", kernel::static_lock_class!()),
            bindings::AF_INET6 => (c"sk_lock-AF_INET6-RNBD", kernel::static_lock_class!()),
            _ => (c"sk_lock-AF_UNIX-RNBD", kernel::static_lock_class!()),
        };
        // SAFETY: The caller promises that `sk` is valid. The socket is locked, so that nobody else is
        // within that lock. Name and key live as long as the module, which restores the class.
        unsafe {
            let map = &raw mut (*sk).sk_lock.dep_map;
            bindings::lock_sock_nested(sk.cast(), 0);
            let saved = map.read();
            bindings::lockdep_init_map_type(
                map,
                name.as_char_ptr(),
                key.as_ptr(),
                0,
                saved.wait_type_inner,
                saved.wait_type_outer,
                saved.lock_type,
            );
            bindings::release_sock(sk.cast());
            LockClass { saved }
        }
    }

    /// Gives the lock back the class that it had: the socket may outlive the module. May sleep.
    ///
    /// # Safety
    ///
    /// As for [`Self::give()`], which must have been called with the same `sk`.
    unsafe fn restore(&self, sk: *mut bindings::sock) {
        // SAFETY: The caller promises that `sk` is valid; it is locked as above. The copy is written
        // back to where it was read.
        unsafe {
            bindings::lock_sock_nested(sk.cast(), 0);
            core::ptr::copy_nonoverlapping(&self.saved, &raw mut (*sk).sk_lock.dep_map, 1);
            bindings::release_sock(sk.cast());
        }
    }
}

#[cfg(not(CONFIG_DEBUG_LOCK_ALLOC))]
impl LockClass {
    /// Without lockdep there is nothing to do.
    ///
    /// # Safety
    ///
    /// None.
    unsafe fn give(_sk: *mut bindings::sock) -> Self {
        LockClass {}
    }

    /// As [`Self::give()`].
    ///
    /// # Safety
    ///
    /// None.
    unsafe fn restore(&self, _sk: *mut bindings::sock) {}
}

/// Calls `f` with the socket's hook, if it is still there.
///
/// # Safety
///
/// To be called by a callback that was installed for `T`, with its `sk`.
unsafe fn with_hook<T: Events>(sk: *mut bindings::sock, f: impl FnOnce(&Hook<T>)) {
    // SAFETY: `sk` is valid during its callback. What `sk_user_data` points to stays while the lock is
    // held; it is null or a `Hook<T>`, because the callback is replaced together with it.
    unsafe {
        bindings::_raw_read_lock_bh(&raw mut (*sk).sk_callback_lock);
        let hook = (*sk).sk_user_data.cast::<Hook<T>>();
        if let Some(hook) = hook.as_ref() {
            f(hook);
        }
        bindings::_raw_read_unlock_bh(&raw mut (*sk).sk_callback_lock);
    }
}

/// `sk_data_ready`
///
/// # Safety
///
/// To be called as the callback of a socket that was hooked for a `T`.
unsafe extern "C" fn data_ready<T: Events>(sk: *mut bindings::sock) {
    // SAFETY: This is the callback for `T`, called as this callback is.
    unsafe {
        with_hook::<T>(sk, |hook| match Arrival::on(sk) {
            Some(arrival) => T::arrived(hook.owner.as_arc_borrow(), arrival),
            None => T::readable(hook.owner.as_arc_borrow()),
        })
    };
}

/// `sk_write_space`
///
/// # Safety
///
/// As for [`data_ready()`].
unsafe extern "C" fn write_space<T: Events>(sk: *mut bindings::sock) {
    // SAFETY: This is the callback for `T`. `sk` has its socket while it is hooked, since the hook holds
    // the file. The next send that finds no room sets the bit again.
    unsafe {
        with_hook::<T>(sk, |hook| {
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
        with_hook::<T>(sk, |hook| {
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
    // SAFETY: As above.
    unsafe {
        with_hook::<T>(sk, |hook| {
            T::readable(hook.owner.as_arc_borrow());
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
        // SAFETY: `sk` has its socket while it is hooked, since the hook holds the file. An upper layer
        // protocol replaces the operations under the socket's lock.
        let read_sock = unsafe {
            let socket = (*sk).sk_socket.cast::<bindings::socket>();
            (*(&raw const (*socket).ops).read_volatile()).read_sock?
        };
        // INVARIANT: Only TCP sockets read so, and TCP calls this callback with the lock held.
        (read_sock as usize == bindings::tcp_read_sock as usize).then_some(Arrival {
            sk,
            _locked: PhantomData,
        })
    }

    /// Calls `each` with one piece of the stream after the other until it returns false or nothing is
    /// left. What it leaves of a piece stays in the socket.
    pub(crate) fn read<F: FnMut(&mut Segment<'_>) -> bool>(self, mut each: F) {
        // SAFETY: It consists of numbers, for which zeroes are fine.
        let mut desc: bindings::read_descriptor_t = unsafe { MaybeUninit::zeroed().assume_init() };
        desc.count = 1;
        desc.arg.data = (&raw mut each).cast();
        // SAFETY: By the type invariant the socket is TCP's and locked. The actor is the one for `F`.
        // kernel::bindings' and our `struct sock` are the same type in C.
        unsafe { bindings::tcp_read_sock(self.sk.cast(), &mut desc, Some(actor::<F>)) };
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
    pub(crate) fn move_to(&mut self, payload: &mut Payload) -> Result {
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

/// Runs `f` as I/O has to run: allocations may use the reserves and never wait for reclaim, and
/// security modules see the kernel, not whoever happens to write (as `__sock_xmit()`).
fn in_io_context<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: The current task changes its own flags and credentials, and puts them back.
    unsafe {
        let task = bindings::get_current();
        let had_memalloc = (*task).flags & bindings::PF_MEMALLOC;
        let creds = (*task).cred;
        (*task).flags |= bindings::PF_MEMALLOC;
        (*task).cred = bindings::init_task.cred;
        let result = f();
        (*task).cred = creds;
        (*task).flags = (*task).flags & !bindings::PF_MEMALLOC | had_memalloc;
        result
    }
}

/// A page of memory for headers. Its bytes are copied in and out, never referred to, so a socket may
/// read and write them too.
pub(crate) struct IoPage(Page);

impl IoPage {
    /// How much it holds.
    pub(crate) const BYTES: usize = bindings::PAGE_SIZE;

    /// A page. May sleep.
    pub(crate) fn new() -> core::result::Result<Self, AllocError> {
        Ok(IoPage(Page::alloc_page(GFP_KERNEL)?))
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Errors
    ///
    /// `EINVAL` where that is not within the page.
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) -> Result {
        // SAFETY: `bytes` is that long. The page is exclusively ours.
        unsafe { self.0.write_raw(bytes.as_ptr(), offset, bytes.len()) }
    }

    /// Copies from `offset` to `bytes`.
    ///
    /// # Errors
    ///
    /// `EINVAL` where that is not within the page.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result {
        // SAFETY: `bytes` is that long. No socket call writes to the page: it would have an `Iov` that
        // borrows the page mutably.
        unsafe { self.0.read_raw(bytes.as_mut_ptr(), offset, bytes.len()) }
    }

    /// Copies from `offset` to the current position of `payload` and moves that on, as far as both
    /// reach, at most `bytes`. Returns how much it was.
    ///
    /// # Errors
    ///
    /// `EINVAL` where that is not within the page.
    pub(crate) fn copy_to(
        &self,
        offset: usize,
        bytes: usize,
        payload: &mut Payload,
    ) -> Result<usize> {
        payload.fill(bytes, |to, done, step| {
            // SAFETY: `fill()` gives `step` bytes of room.
            unsafe { self.0.read_raw(to, offset + done, step) }
        })
    }
}

/// Room for the description of one transfer, kept so that none needs an allocation.
pub(crate) struct Pieces(KVec<bindings::bio_vec>);

// SAFETY: It is empty but while an `Iov` borrows it.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Room for `count` pieces. May sleep.
    pub(crate) fn new(count: usize) -> core::result::Result<Self, AllocError> {
        Ok(Pieces(KVec::with_capacity(count, GFP_KERNEL)?))
    }
}

/// Memory to send from or receive into.
///
/// # Invariants
///
/// `pieces` describe memory that lives for `'a`, `bytes` in all.
pub(crate) struct Iov<'a> {
    pieces: &'a mut KVec<bindings::bio_vec>,
    bytes: usize,
    _data: PhantomData<&'a mut IoPage>,
}

impl<'a> Iov<'a> {
    /// Nothing yet.
    pub(crate) fn new(room: &'a mut Pieces) -> Self {
        room.0.clear();
        Iov {
            pieces: &mut room.0,
            bytes: 0,
            _data: PhantomData,
        }
    }

    /// How much it describes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn push(&mut self, piece: bindings::bio_vec) -> bool {
        let len = piece.bv_len as usize;
        let pushed = self.pieces.push_within_capacity(piece).is_ok();
        if pushed {
            self.bytes += len;
        }
        pushed
    }

    /// Appends what is left of `payload`. Returns whether all of it found room.
    pub(crate) fn push_payload(&mut self, payload: &'a Payload) -> bool {
        payload.for_each_piece(|piece| self.push(piece))
    }

    /// Appends `len` bytes of a page from `offset`, to send.
    pub(crate) fn push_bytes(&mut self, page: &'a IoPage, offset: usize, len: usize) -> bool {
        offset + len <= IoPage::BYTES
            && self.push(bindings::bio_vec {
                bv_page: page.0.as_ptr(),
                bv_len: len as u32,
                bv_offset: offset as u32,
            })
    }

    /// Appends `len` bytes of a page from `offset`, to receive into.
    pub(crate) fn push_room(&mut self, page: &'a mut IoPage, offset: usize, len: usize) -> bool {
        self.push_bytes(page, offset, len)
    }
}
