// SPDX-License-Identifier: GPL-2.0

//! The faults of `plant.c` that Rust code can have.

use core::hint::black_box;
use core::ptr::NonNull;

use kernel::{
    new_mutex,
    new_spinlock,
    prelude::*, //
};

/// Nothing is worth reporting but the fault itself.
fn ignore(_: Result) {}

/// Many, since the allocator still points to those that it handed out last.
#[no_mangle]
extern "C" fn rust_leak() {
    for _ in 0..200 {
        if let Ok(lost) = KBox::new([0u8; 512], GFP_KERNEL) {
            core::mem::forget(lost);
        }
    }
}

#[no_mangle]
extern "C" fn rust_use_after_free() {
    let Ok(freed) = KBox::new(7u64, GFP_KERNEL) else {
        return;
    };
    let freed = KBox::into_raw(freed);
    // SAFETY: There is none; this is what is to be found.
    unsafe {
        drop(KBox::from_raw(freed));
        freed.read_volatile();
    }
}

#[no_mangle]
extern "C" fn rust_double_free() {
    let Ok(freed) = KBox::new(7u64, GFP_KERNEL) else {
        return;
    };
    let freed = KBox::into_raw(freed);
    // SAFETY: There is none; this is what is to be found.
    unsafe {
        drop(KBox::from_raw(freed));
        drop(KBox::from_raw(freed));
    }
}

/// # Safety
///
/// There is none; this is what is to be found.
unsafe fn read_behind(first: NonNull<u8>, len: usize) {
    // SAFETY: As the caller says.
    unsafe { first.as_ptr().add(black_box(len)).read_volatile() };
}

#[no_mangle]
extern "C" fn rust_out_of_bounds() {
    if let Ok(mut bytes) = KBox::new([0u8; 104], GFP_KERNEL) {
        // SAFETY: There is none.
        unsafe { read_behind(NonNull::from(&mut *bytes).cast(), 104) };
    }
}

#[no_mangle]
extern "C" fn rust_out_of_vmalloc_bounds() {
    if let Ok(mut bytes) = VBox::new([0u8; 104], GFP_KERNEL) {
        // SAFETY: There is none.
        unsafe { read_behind(NonNull::from(&mut *bytes).cast(), 104) };
    }
}

fn sleep_under_spinlock() -> Result {
    let lock = KBox::pin_init(new_spinlock!(1), GFP_KERNEL)?;
    let _guard = lock.lock();
    // May wait for memory.
    KBox::new(1, GFP_KERNEL)?;
    Ok(())
}

#[no_mangle]
extern "C" fn rust_sleep_under_spinlock() {
    ignore(sleep_under_spinlock());
}

fn lock_inversion() -> Result {
    let a = KBox::pin_init(new_mutex!(1), GFP_KERNEL)?;
    let b = KBox::pin_init(new_mutex!(2), GFP_KERNEL)?;
    {
        let _a = a.lock();
        let _b = b.lock();
    }
    let _b = b.lock();
    let _a = a.lock();
    Ok(())
}

#[no_mangle]
extern "C" fn rust_lock_inversion() {
    ignore(lock_inversion());
}

#[no_mangle]
extern "C" fn rust_overflow() {
    black_box(u32::MAX - black_box(0) + black_box(1));
}

#[no_mangle]
extern "C" fn rust_debug_assertion() {
    debug_assert!(black_box(false));
}
