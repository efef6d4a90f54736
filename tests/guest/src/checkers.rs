// SPDX-License-Identifier: GPL-2.0

//! Whether the debug kernel finds what it is there for: `rnbd-guest checkers` loads the module of
//! `tests/faults`, which does wrong in one way after another. It is run in a guest of its own,
//! since lockdep stops at the first fault.

use std::ffi::CString;
use std::fs::{self, File};
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::debug_kernel::{Leak, leaks, lockdep_is_off};
use crate::harness::wait_until;
use crate::klog::{self, Klog};

const MODULE: &str = "/rnbd/faults.ko";

/// What the kernel has to say of each fault. Those that lockdep sees come first, as it stops at the
/// first deadlock and at the first corruption of memory; those that end a thread come last.
const FAULTS: &[(&str, &str)] = &[
    ("rcu_dereference_unlocked", "suspicious RCU usage"),
    ("rcu_list_unlocked", "suspicious RCU usage"),
    (
        "sleep_under_spinlock",
        "sleeping function called from invalid context",
    ),
    (LOCK_INVERSION, "possible circular locking dependency"),
    (LEAK, "new suspected memory leaks"),
    ("use_after_free", "KASAN: slab-use-after-free"),
    ("double_free", "KASAN: double-free"),
    ("out_of_bounds", "KASAN: slab-out-of-bounds"),
    ("out_of_vmalloc_bounds", "KASAN: vmalloc-out-of-bounds"),
    ("free_running_timer", "ODEBUG: free active"),
    ("unannotated_work_on_stack", "ODEBUG: object"),
    ("delete_list_entry_twice", "list_del corruption"),
    ("shift_too_far", "UBSAN: shift-out-of-bounds"),
    ("index_too_large", "UBSAN: array-index-out-of-bounds"),
    ("hang", "blocked for more than"),
    ("hog_processor", "BUG: soft lockup"),
    ("hog_work_queue", "BUG: workqueue lockup"),
    ("overflow", "attempt to add with overflow"),
    ("debug_assertion", "assertion failed"),
];
const LOCK_INVERSION: &str = "lock_inversion";
const LEAK: &str = "leak";

/// The watchdogs' files, the faults that they are for, and seconds: nobody wants to wait for the usual
/// ones. What one reports calms the others, so the others are off.
const WATCHDOGS: &[(&str, &str, &str)] = &[
    ("/proc/sys/kernel/hung_task_timeout_secs", "hang", "4"),
    ("/proc/sys/kernel/watchdog_thresh", "hog_processor", "2"),
    (
        "/sys/module/workqueue/parameters/watchdog_thresh",
        "hog_work_queue",
        "4",
    ),
];

/// A work queue is stuck only where it takes no other worker in place of one that computes for long.
const OTHER_WORKERS: &str = "/sys/module/workqueue/parameters/cpu_intensive_thresh_us";

/// As the tests do it, so that `tools/check` can count.
pub fn main() -> i32 {
    write(OTHER_WORKERS, "0");
    let trials = FAULTS.iter().map(|&(fault, report)| {
        Trial::test(format!("checkers::{fault}"), move || find(fault, report))
    });
    let arguments = Arguments {
        test_threads: Some(1),
        ..Arguments::default()
    };
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if conclusion.has_failed() { 101 } else { 0 }
}

fn write(file: &str, value: &str) {
    fs::write(file, value).unwrap_or_else(|error| panic!("{file}: {error}"));
}

/// Plants a fault, and waits until the kernel reports it in words that would fail a test.
fn find(fault: &str, report: &str) -> Result<(), Failed> {
    for (file, of, seconds) in WATCHDOGS {
        write(file, if *of == fault { seconds } else { "0" });
    }
    let mut log = Klog::from_now();
    plant(fault)?;
    if fault == LEAK && !leaks()?.iter().any(is_planted) {
        return Err("kmemleak does not show it".into());
    }
    let mut lines = Vec::new();
    let found = wait_until(Duration::from_secs(5), || {
        lines.extend(log.read());
        let alarms = klog::alarms(&lines);
        alarms.iter().any(|line| line.contains(report))
    });
    found.map_err(|()| format!("no alarm with {report:?} in:\n{}", lines.join("\n")))?;
    if fault == LOCK_INVERSION && !lockdep_is_off() {
        return Err("lockdep goes on after a report, or it is not seen to be off".into());
    }
    Ok(())
}

/// By the thread of that name.
fn is_planted(leak: &Leak) -> bool {
    leak.report.contains(r#"comm "leak""#) && leak.at > Duration::ZERO
}

fn plant(fault: &str) -> Result<(), Failed> {
    let file = File::open(MODULE).map_err(|error| format!("{MODULE}: {error}"))?;
    let parameters = CString::new(format!("fault={fault}")).expect("no NUL");
    match finit_module(file, &parameters, 0) {
        Err(Errno::CANCELED) => Ok(()),
        other => Err(format!("loading {MODULE}: {other:?}").into()),
    }
}
