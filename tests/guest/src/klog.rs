// SPDX-License-Identifier: GPL-2.0

//! The kernel's log: what it said since a test began, and what it must never say.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::LazyLock;

use regex_lite::Regex;

/// The list that `tools/vm` searches the whole console log for.
const BAD_KERNEL_LOG: &str = include_str!("../../../tools/bad-kernel-log.txt");

/// Matters of this driver, besides.
const ALSO_BAD: &str = r"
possibly leaking
(list_add|list_del|slab|page) corruption
double.free|slab-out-of-bounds|KFENCE|KCSAN|kmemleak
scheduling while atomic|sleeping function called
unable to handle|bad unlock balance|held lock freed
page allocation failure
(EXT4-fs|XFS|BTRFS).*([Cc]orrupt($|[^ ]| [^0])|bad )
";

static BAD: LazyLock<Regex> = LazyLock::new(|| {
    let lines = BAD_KERNEL_LOG.lines().chain(ALSO_BAD.lines());
    let patterns: Vec<&str> = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    Regex::new(&patterns.join("|")).expect("patterns")
});

/// The lines that fail a test.
pub fn alarms(lines: &[String]) -> Vec<&String> {
    lines.iter().filter(|line| BAD.is_match(line)).collect()
}

/// A place in the kernel's log from which lines are read.
pub struct Klog(File);

impl Klog {
    /// Starts behind the newest line.
    pub fn from_now() -> Self {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .expect("/dev/kmsg");
        file.seek(SeekFrom::End(0)).expect("seek in /dev/kmsg");
        Self(file)
    }

    /// The lines since the last call.
    pub fn read(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return lines,
                Ok(len) => lines.push(message(&String::from_utf8_lossy(&record[..len]))),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return lines,
                // Overwritten before it was read: the next read goes on behind the gap.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) => panic!("/dev/kmsg: {error}"),
            }
        }
    }
}

/// `6,1234,5678,-;text\n KEY=value\n` → `text`
fn message(record: &str) -> String {
    let text = record.split_once(';').map_or(record, |(_, text)| text);
    text.lines().next().unwrap_or_default().to_owned()
}

/// Leaves a line in the kernel's log, so that the console tells which test was running.
pub fn mark(line: &str) {
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // In one piece, which is one line of the log.
        let _ = kmsg.write_all(format!("rnbd-guest: {line}").as_bytes());
    }
}
