// SPDX-License-Identifier: GPL-2.0

//! The few system calls that no crate wraps safely. The only file with `unsafe`.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::{io, ptr, slice};

use rustix::io::Errno;
use rustix::mm::{
    Advice, MapFlags, MsyncFlags, ProtFlags, madvise, mmap, mmap_anonymous, msync, munmap,
};
use rustix::thread::Pid;

pub const MIB: usize = 1 << 20;

/// What a system call says: a number, or an errno.
pub type SysResult<T = i32> = Result<T, Errno>;

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).expect("an errno")
}

/// `ioctl(fd, request, argument)` where the argument is a number.
pub fn ioctl_number(fd: impl AsFd, request: u32, argument: u64) -> SysResult {
    // SAFETY: the callers pass requests whose argument is a number (linux/nbd.h) or nothing,
    // so the kernel follows no pointer.
    let answer = unsafe {
        libc::ioctl(
            fd.as_fd().as_raw_fd(),
            request as libc::Ioctl,
            argument as libc::c_ulong,
        )
    };
    if answer < 0 {
        Err(last_errno())
    } else {
        Ok(answer)
    }
}

/// `ioctl(fd, request, &value)`, for requests that read or write a plain `T` behind the pointer.
pub fn ioctl_pointer<T: Plain>(fd: impl AsFd, request: u32, value: &mut T) -> SysResult {
    // SAFETY: the callers pair each request with the type that it is defined for; `Plain` types
    // have no invalid bit patterns, and the borrow lasts for the call.
    let answer = unsafe {
        libc::ioctl(
            fd.as_fd().as_raw_fd(),
            request as libc::Ioctl,
            ptr::from_mut(value),
        )
    };
    if answer < 0 {
        Err(last_errno())
    } else {
        Ok(answer)
    }
}

/// Types of which every bit pattern is a value.
pub trait Plain {}
impl Plain for i32 {}
impl Plain for u64 {}
impl Plain for [u64; 2] {}

/// A 64-bit process can make no 32-bit calls here: the same call, with the argument cut.
#[cfg(not(target_arch = "x86_64"))]
pub fn ioctl_compat(fd: impl AsFd, request: u32, argument: u32) -> SysResult {
    ioctl_number(fd, request, argument.into())
}

/// The same call as a 32-bit process makes it: through `int 0x80`, with 32-bit arguments.
#[cfg(target_arch = "x86_64")]
pub fn ioctl_compat(fd: impl AsFd, request: u32, argument: u32) -> SysResult {
    const NR_IOCTL: i64 = 54; // of the 32-bit table
    let answer: i64;
    // SAFETY: as in `ioctl_number`: no pointers. The 32-bit entry zeroes r8 to r15, and LLVM
    // keeps rbx for itself, hence the exchange.
    unsafe {
        core::arch::asm!(
            "xchg {fd}, rbx",
            "int 0x80",
            "xchg {fd}, rbx",
            fd = inout(reg) i64::from(fd.as_fd().as_raw_fd()) => _,
            inout("rax") NR_IOCTL => answer,
            in("rcx") u64::from(request),
            in("rdx") u64::from(argument),
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
    let answer = answer as i32;
    if answer < 0 {
        Err(Errno::from_raw_os_error(-answer))
    } else {
        Ok(answer)
    }
}

/// `setsockopt()` with a value of bytes, for options that no crate knows.
pub fn set_socket_option(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> SysResult {
    // SAFETY: the borrow lasts for the call, and the callers set no option whose value has pointers.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if answer < 0 {
        Err(last_errno())
    } else {
        Ok(answer)
    }
}

/// Sends bytes over a socket that the kernel encrypts, in records of this type (`TLS_SET_RECORD_TYPE`).
pub fn send_tls_record(fd: impl AsFd, kind: u8, bytes: &[u8]) -> SysResult<usize> {
    const SOL_TLS: i32 = 282;
    const TLS_SET_RECORD_TYPE: i32 = 1;
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        kind: u8,
    }
    let mut control = Control {
        header: libc::cmsghdr {
            cmsg_len: size_of::<libc::cmsghdr>() + 1,
            cmsg_level: SOL_TLS,
            cmsg_type: TLS_SET_RECORD_TYPE,
        },
        kind,
    };
    let mut piece = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let message = libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut piece,
        msg_iovlen: 1,
        msg_control: (&raw mut control).cast(),
        msg_controllen: size_of::<Control>(),
        msg_flags: 0,
    };
    // SAFETY: what the message points to lives during the call, which only reads it.
    let sent = unsafe { libc::sendmsg(fd.as_fd().as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| last_errno())
}

/// `getsockopt()` of an option whose value is a number.
pub fn socket_option(fd: impl AsFd, level: i32, name: i32) -> SysResult<u32> {
    let mut value = 0;
    let mut len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the borrows last for the call, and `len` is the size of `value`.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            ptr::from_mut(&mut value).cast(),
            ptr::from_mut(&mut len),
        )
    };
    if answer < 0 {
        Err(last_errno())
    } else {
        Ok(value)
    }
}

/// `bind()` to a port of vsock, of every address that this machine has.
pub fn bind_vsock(socket: impl AsFd, port: u32) -> SysResult {
    with_vsock_address(socket, libc::VMADDR_CID_ANY, port, libc::bind)
}

/// `connect()` to a port of vsock on this machine.
pub fn connect_vsock(socket: impl AsFd, port: u32) -> SysResult {
    with_vsock_address(socket, libc::VMADDR_CID_LOCAL, port, libc::connect)
}

type AddressCall =
    unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn with_vsock_address(socket: impl AsFd, cid: u32, port: u32, call: AddressCall) -> SysResult {
    // SAFETY: zeroes are a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the borrow lasts for the call, and `len` is the size of the address.
    let answer = unsafe {
        call(
            socket.as_fd().as_raw_fd(),
            ptr::from_ref(&address).cast(),
            len,
        )
    };
    if answer < 0 {
        Err(last_errno())
    } else {
        Ok(answer)
    }
}

/// Takes over a descriptor that this process was started with.
pub fn take_fd(number: RawFd) -> OwnedFd {
    // SAFETY: the parent left it open for this purpose, and nobody else here knows it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

extern "C" fn do_nothing(_signal: libc::c_int) {}

/// Installs a handler that does nothing, so that `signal` interrupts system calls and no more.
pub fn handle_and_ignore(signal: i32, restart: bool) {
    // SAFETY: a zeroed sigaction is a valid one, and the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = do_nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = if restart { libc::SA_RESTART } else { 0 };
        assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
    }
}

/// Sends `signal` to one thread of this process.
pub fn signal_thread(thread: Pid, signal: i32) {
    // SAFETY: takes numbers only.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            libc::getpid(),
            thread.as_raw_nonzero().get(),
            signal,
        );
    }
}

/// Page-aligned anonymous memory, as O_DIRECT wants it.
pub struct Buffer {
    base: *mut u8,
    start: *mut u8,
    mapped: usize,
    len: usize,
}

// SAFETY: owns its mapping alone, like a Vec.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn new(len: usize) -> Self {
        Self::map(len, 0, 4096, false)
    }

    /// A buffer that starts `skew` bytes into a page.
    pub fn skewed(len: usize, skew: usize) -> Self {
        Self::map(len, skew, 4096, false)
    }

    /// A buffer of huge pages where the kernel has them: few, long segments.
    pub fn huge(len: usize) -> Self {
        Self::map(len, 0, 2 * MIB, true)
    }

    /// A buffer whose pages do not lie behind one another in memory: as many segments as there can be.
    pub fn scattered(len: usize) -> Self {
        // Prime, and no divisor of any number of pages.
        const STRIDE: usize = 7919;
        let mut buffer = Self::new(len);
        // SAFETY: advice on our own mapping that does not change its contents.
        let _ = unsafe { madvise(buffer.base.cast(), buffer.mapped, Advice::LinuxNoHugepage) };
        let pages = len / 4096;
        for nth in 0..pages {
            // Memory is given to a page when it is first touched.
            buffer[nth * STRIDE % pages * 4096] = 0;
        }
        buffer
    }

    pub fn filled(len: usize, fill: impl Fn(&mut [u8])) -> Self {
        let mut buffer = Self::new(len);
        fill(&mut buffer);
        buffer
    }

    fn map(len: usize, skew: usize, align: usize, huge: bool) -> Self {
        let mapped = len + skew + align;
        // SAFETY: a new anonymous mapping, placed by the kernel, aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .expect("mmap")
        .cast::<u8>();
        let start = base.wrapping_add(base.align_offset(align) + skew);
        if huge {
            // SAFETY: advice on our own mapping that does not change its contents.
            let _ = unsafe { madvise(base.cast(), mapped, Advice::LinuxHugepage) };
        }
        Self {
            base,
            start,
            mapped,
            len,
        }
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start..start + len` lies in our mapping, which is readable and initialised.
        unsafe { slice::from_raw_parts(self.start, self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it any more.
        unsafe { munmap(self.base.cast(), self.mapped) }.expect("munmap");
    }
}

/// A part of a file or device that is mapped and shared. Nothing else in this process has it mapped.
pub struct Mapping {
    base: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps the first `len` bytes.
    pub fn new(file: impl AsFd, len: usize) -> Self {
        // SAFETY: a new mapping, placed by the kernel, aliases nothing in this process.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        };
        Self {
            base: base.expect("mmap").cast(),
            len,
        }
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len);
        // SAFETY: lies in our mapping. Whatever the bytes are, they are copied as bytes.
        (at..at + len)
            .map(|at| unsafe { self.base.add(at).read_volatile() })
            .collect()
    }

    pub fn write(&mut self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.len);
        for (at, byte) in (at..).zip(data) {
            // SAFETY: as in `read`, and `&mut self` makes the access exclusive in this process.
            unsafe { self.base.add(at).write_volatile(*byte) };
        }
    }

    /// Has each page read by itself, when it is first touched.
    pub fn read_ahead_nothing(&self) {
        // SAFETY: advice on our own mapping that does not change its contents.
        unsafe { madvise(self.base.cast(), self.len, Advice::Random) }.expect("madvise");
    }

    /// Sends a part of it over a socket that blocks.
    pub fn send(&self, socket: impl AsFd, at: usize, len: usize) -> SysResult<()> {
        assert!(at + len <= self.len);
        let mut sent = 0;
        while sent < len {
            // SAFETY: lies in our mapping. Whatever the bytes are, the kernel copies them as bytes.
            let answer = unsafe {
                libc::send(
                    socket.as_fd().as_raw_fd(),
                    self.base.add(at + sent).cast(),
                    len - sent,
                    libc::MSG_NOSIGNAL,
                )
            };
            sent += usize::try_from(answer).map_err(|_| last_errno())?;
        }
        Ok(())
    }

    pub fn sync(&self) -> SysResult<()> {
        // SAFETY: the range is our mapping.
        unsafe { msync(self.base.cast(), self.len, MsyncFlags::SYNC) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it.
        unsafe { munmap(self.base.cast(), self.len) }.expect("munmap");
    }
}

/// Gives the current thread a network namespace of its own.
pub fn enter_new_network() {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: The thread's descriptors stay those of the process.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace");
}
