// SPDX-License-Identifier: GPL-2.0
//! The context in which the socket calls of `sock.rs` run.
//!
//! C header: [`include/linux/sched.h`](srctree/include/linux/sched.h)
//!
//! The context in which data is sent and received (`PF_MEMALLOC`, the credentials of the kernel) follows
//! `__sock_xmit()` in `drivers/block/nbd.c`. nvme-tcp and sunrpc set `PF_MEMALLOC` for their sockets, too.

use crate::kapi::{
    bindings,
    task, //
};

/// Runs `f` as if the current task did not run a BPF program (`has_current_bpf_ctx()`), which it may if the
/// program has faulted in a page of user memory. `tcp_abort()` and others assume that such a task has
/// locked the socket already.
pub(super) fn outside_bpf<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(CONFIG_BPF_SYSCALL)]
    {
        // SAFETY: The current task is valid.
        let context = unsafe { &raw mut (*bindings::get_current()).bpf_ctx };
        // SAFETY: Only the current task uses this field, and it is restored below.
        let had = unsafe { context.replace(core::ptr::null_mut()) };
        let result = f();
        // SAFETY: The current task is valid, and only it uses this field.
        unsafe { context.write(had) };
        result
    }
    #[cfg(not(CONFIG_BPF_SYSCALL))]
    f()
}

/// Runs `f` in the context that I/O needs, as nbd.c's `__sock_xmit()` does: allocations may use the
/// memory reserves and do not start reclaim (`PF_MEMALLOC`), and security modules see the credentials of
/// the kernel instead of those of the task that happens to write.
pub(super) fn in_io_context<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: Only the current task changes its own `cred`, which is restored before this returns.
    task::memalloc_noreclaim(|| unsafe {
        let task = bindings::get_current();
        let creds = (*task).cred;
        (*task).cred = bindings::init_task.cred;
        let result = f();
        (*task).cred = creds;
        result
    })
}
