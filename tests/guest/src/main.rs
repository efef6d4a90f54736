// SPDX-License-Identifier: GPL-2.0

//! The guest test suite of rnbd.
//!
//! One program that runs as root in a virtual machine, and loads, uses, torments and unloads an
//! NBD client driver there. `DRIVER=rnbd` (the default) tests `/rnbd/rnbd.ko`, or the file that
//! `RNBD_KO` names; `DRIVER=nbd` tests the kernel's own `nbd.ko`, the oracle: what a test expects
//! is what that driver does, and where rnbd differs on purpose, `differences.toml` says so.
//!
//! ```text
//! cargo build --release
//! tools/vm -f target/release/rnbd-guest -f rnbd.ko -- /rnbd/rnbd-guest [PATTERN,...]
//! tools/vm -f target/release/rnbd-guest -- env DRIVER=nbd /rnbd/rnbd-guest [PATTERN,...]
//! ```
//!
//! `--list` lists the tests, `--help` tells of more options. Each test starts from a freshly
//! loaded module and fails if the kernel complained, if anything is left over (a configured
//! device, a socket, a reference), or if the module cannot be unloaded afterwards. A test that
//! hangs fails with the stacks of everybody concerned.
//!
//! - `harness` runs a test, `klog` reads the kernel's log, `stacks` shows what hangs
//! - `server` is an NBD server that can be told to misbehave; `proto` has the numbers
//! - `volatile` is a server that loses what was not flushed; `ledger` knows what must be there
//! - `liar` is a server that does so at random
//! - `firewall` ends connections in the middle of their path
//! - `device` connects a device to it; `driver` loads modules; `programs` runs real programs
//! - `negotiate` dials real servers
//! - `injection` has the kernel inject faults
//! - `debug_kernel` knows what is different on the kernel of `make check-debug`
//! - `checkers` sees whether that kernel finds faults that are put in
//! - `tree` compares directory trees; `uevents` hears what udev hears
//! - `tests` has the tests

mod checkers;
mod debug_kernel;
mod device;
mod differences;
mod differential;
mod driver;
mod firewall;
mod front;
mod harness;
mod helper;
mod injection;
mod klog;
mod ledger;
mod liar;
mod negotiate;
mod netlink;
mod programs;
mod proto;
mod server;
mod stacks;
mod sys;
mod tests;
mod tracefs;
mod tree;
mod uevents;
mod volatile;

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, exit};

use libtest_mimic::Arguments;

use crate::driver::Driver;

const STATUS_FD: &str = "RNBD_GUEST_STATUS_FD";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "helper") {
        return helper::main(&arguments[1..]);
    }
    if arguments.first().is_some_and(|first| first == "checkers") {
        exit(checkers::main());
    }
    if arguments
        .first()
        .is_some_and(|first| first == "differential")
    {
        exit(differential::main(&arguments[1..]));
    }
    exit(match std::env::var(STATUS_FD) {
        Ok(fd) => run_tests(&fd),
        Err(_) => run_worker(&arguments),
    })
}

/// Runs the tests in a child, since a process of which one thread hangs in the kernel cannot end:
/// the child tells its exit status through a pipe, and is not waited for.
fn run_worker(arguments: &[String]) -> i32 {
    use std::os::fd::AsRawFd;
    let (read, write) = rustix::pipe::pipe().expect("a pipe");
    let worker = Command::new("/proc/self/exe")
        .args(arguments)
        .env(STATUS_FD, write.as_raw_fd().to_string())
        .spawn();
    drop(write);
    let mut worker = worker.expect("a child");
    let mut status = [0];
    match File::from(read).read_exact(&mut status) {
        Ok(()) => status[0].into(),
        // It crashed, or had nothing to run.
        Err(_) => worker
            .wait()
            .ok()
            .and_then(|status| status.code())
            .unwrap_or(101),
    }
}

fn run_tests(status_fd: &str) -> i32 {
    // run_worker made this descriptor for us alone.
    let status_pipe = sys::take_fd(status_fd.parse().expect("a descriptor"));
    rustix::io::fcntl_setfd(&status_pipe, rustix::io::FdFlags::CLOEXEC).expect("fcntl");

    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let driver = Driver::chosen();
    let tests = tests::all();
    let names: Vec<String> = tests.iter().map(|test| test.name().to_owned()).collect();
    let mistakes = differences::mistakes(&names);
    if !mistakes.is_empty() {
        eprintln!("differences.toml:\n{}", mistakes.join("\n"));
        return 2;
    }
    if !arguments.list {
        harness::catch_panics();
    }
    let filter = arguments.filter.clone();
    // The harness knows no commas.
    arguments.filter.take_if(|filter| filter.contains(','));
    let trials = tests
        .into_iter()
        .filter(|test| arguments.list || test.is_selected(filter.as_deref()))
        .map(|test| test.into_trial(driver))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let mut failed = conclusion.has_failed();
    if !arguments.list {
        let faults = harness::last_faults();
        if !faults.is_empty() {
            failed = true;
            eprintln!("after the last test:\n{}", faults.join("\n"));
        }
        harness::print_times();
        println!(
            "{} passed, {} failed, {} skipped",
            conclusion.num_passed, conclusion.num_failed, conclusion.num_ignored
        );
    }
    let status = if failed { 101 } else { 0 };
    let _ = std::io::stdout().flush();
    let _ = File::from(status_pipe).write_all(&[status]);
    status.into()
}
