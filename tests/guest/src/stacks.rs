// SPDX-License-Identifier: GPL-2.0

//! What to show of a machine on which something hangs.

use std::fs;
use std::path::Path;

use rustix::thread::{Pid, gettid};

/// The kernel stacks of this process's threads, and of all others that sleep uninterruptibly;
/// asks the kernel to log the same.
pub fn all() -> String {
    let _ = fs::write("/proc/sysrq-trigger", "w");
    let own = std::process::id().to_string();
    let mut text = String::new();
    for process in numbered("/proc") {
        for thread in numbered(&format!("/proc/{process}/task")) {
            let path = format!("/proc/{process}/task/{thread}");
            let Some((name, state)) = name_and_state(Path::new(&path)) else {
                continue;
            };
            if process != own && state != 'D' {
                continue;
            }
            let stack = fs::read_to_string(format!("{path}/stack")).unwrap_or_default();
            text += &format!("{name} ({process}/{thread}, {state})\n");
            text.extend(stack.lines().map(|line| format!("    {line}\n")));
        }
    }
    text
}

/// Whether a task sleeps, and a signal would wake it.
pub fn sleeps(task: Pid) -> bool {
    let path = format!("/proc/{}", task.as_raw_nonzero());
    name_and_state(Path::new(&path)).is_some_and(|(_, state)| state == 'S')
}

/// Whether a task waits for anything, or is gone.
pub fn waits(task: Pid) -> bool {
    let path = format!("/proc/{}", task.as_raw_nonzero());
    name_and_state(Path::new(&path)).is_none_or(|(_, state)| state != 'R')
}

/// Whether all other threads of this process wait for something.
pub fn others_wait() -> bool {
    let own = gettid().as_raw_nonzero().to_string();
    numbered("/proc/self/task")
        .iter()
        .filter(|thread| **thread != own)
        .filter_map(|thread| name_and_state(Path::new(&format!("/proc/self/task/{thread}"))))
        .all(|(_, state)| state != 'R')
}

fn numbered(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .collect()
}

/// `123 (name) D ...`
fn name_and_state(thread: &Path) -> Option<(String, char)> {
    let stat = fs::read_to_string(thread.join("stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    Some((name.to_owned(), rest.trim_start().chars().next()?))
}
