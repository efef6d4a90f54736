// SPDX-License-Identifier: GPL-2.0

//! What can be seen of a device, in words that are the same for every run of a sequence.

use std::fs;
use std::time::Duration;

use rustix::io::Errno;

use super::{Stage, Step};
use crate::device::{self, errno};
use crate::differential::operations::Dev;
use crate::harness::wait_until;
use crate::proto::{self, Command};

impl Stage {
    pub fn sysfs(&self, device: Dev, name: &str) -> String {
        self.read(&format!("/sys/block/nbd{}/{name}", self.index(device)))
    }

    fn debugfs(&self, device: Dev, name: &str) -> String {
        let index = self.index(device);
        self.read(&format!("/sys/kernel/debug/nbd/nbd{index}/{name}"))
    }

    /// The text of a small file; tasks have their names in it instead of their numbers.
    fn read(&self, path: &str) -> String {
        let text = match errno(fs::read_to_string(path)) {
            Ok(text) => text.trim().to_owned(),
            Err(Errno::NOENT) => return "-".into(),
            Err(other) => return format!("{other:?}"),
        };
        if !path.ends_with("/pid") && !path.ends_with("/tasks") {
            return text.replace('\n', "|");
        }
        let number = text.rsplit(' ').next().unwrap_or_default().to_owned();
        let task = self
            .tids
            .iter()
            .find(|(tid, _)| tid.as_raw_nonzero().to_string() == number);
        match task {
            Some((_, name)) => text.replace(&number, name),
            None => text,
        }
    }

    pub fn look(&self, device: Dev) -> Step {
        let sysfs = [
            "ro",
            "backend",
            "capability",
            "queue/logical_block_size",
            "queue/physical_block_size",
            "queue/discard_max_bytes",
            "queue/write_zeroes_max_bytes",
            "queue/write_cache",
            "queue/fua",
            "queue/rotational",
            "queue/io_timeout",
            "queue/nr_requests",
        ];
        let debugfs = ["tasks", "size_bytes", "timeout", "blocksize_bits", "flags"];
        // rnbd makes the files soon after the start.
        let _ = wait_until(Duration::from_secs(1), || {
            let started = device::pid(self.index(device)).is_some();
            !started || self.debugfs(device, "flags") != "-"
        });
        let mut seen = Step::new();
        for name in sysfs {
            seen.push((format!("{device:?} {name}"), self.sysfs(device, name)));
        }
        let queues = format!("/sys/block/nbd{}/mq", self.index(device));
        let queues = fs::read_dir(queues).map_or(0, Iterator::count);
        seen.push((format!("{device:?} queues"), queues.to_string()));
        for name in debugfs {
            seen.push((
                format!("{device:?} debugfs {name}"),
                self.debugfs(device, name),
            ));
        }
        seen
    }

    pub fn look_at_all(&self) -> Step {
        let look = |device: &Dev| self.look(*device);
        self.devices.iter().flat_map(look).collect()
    }
}

/// What a device of this sequence is called.
pub fn name(base: u32, new: u32, index: u32) -> String {
    match index {
        _ if index == base => "A".into(),
        _ if index == base + 1 => "B".into(),
        _ if index == new => "New".into(),
        _ => "another".into(),
    }
}

/// What a uevent says, if it is about this disk or its partitions.
pub fn describe(event: &str, disk: &str) -> Option<String> {
    const ALWAYS: [&str; 9] = [
        "ACTION",
        "DEVPATH",
        "SUBSYSTEM",
        "MAJOR",
        "MINOR",
        "DEVNAME",
        "DEVTYPE",
        "SEQNUM",
        "DISKSEQ",
    ];
    let mut action = "";
    let mut ours = false;
    let mut rest = String::new();
    for (key, value) in event.lines().filter_map(|line| line.split_once('=')) {
        match key {
            "ACTION" => action = value,
            "DEVNAME" => ours = value == disk || value.starts_with(&format!("{disk}p")),
            _ if ALWAYS.contains(&key) => {}
            _ => rest += &format!(" {key}={value}"),
        }
    }
    ours.then(|| format!("{action}{rest}"))
}

/// What a server was asked for. How the block layer cuts and joins requests is a matter of timing.
pub fn joined(requests: &[proto::Request]) -> String {
    let mut all: Vec<(Command, u16, u64, u32)> = Vec::new();
    for (command, flags, offset, len) in requests.iter().map(proto::Request::essence) {
        match all.last_mut() {
            Some(last)
                if (last.0, last.1) == (command, flags)
                    && last.2 + u64::from(last.3) == offset
                    && len > 0 =>
            {
                last.3 += len;
            }
            _ => all.push((command, flags, offset, len)),
        }
    }
    format!("{all:?}")
}

pub fn checksum(data: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    data.iter().fold(0x811c_9dc5, step)
}
