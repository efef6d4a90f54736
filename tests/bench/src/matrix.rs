// SPDX-License-Identifier: GPL-2.0

//! What is measured.

use crate::sample::Mode;

/// Bytes of the export that are used.
pub const REGION_MIB: u64 = 64;

/// A workload.
pub struct Cell {
    pub name: &'static str,
    pub work: Work,
    /// I/Os of a run in cost mode.
    pub ios: u64,
    /// fio's own client can do it.
    pub without_device: bool,
}

pub enum Work {
    /// A job of fio: arguments beyond those that all have, block size in bytes, queue depth.
    Fio {
        arguments: &'static str,
        block: u64,
        depth: usize,
    },
    /// mkfs with these options, untar, sync, umount.
    FileSystem { options: &'static str },
}

const fn fio(
    name: &'static str,
    arguments: &'static str,
    block: u64,
    depth: usize,
    ios: u64,
) -> Cell {
    Cell {
        name,
        work: Work::Fio {
            arguments,
            block,
            depth,
        },
        ios,
        without_device: true,
    }
}

const fn file_system(name: &'static str, options: &'static str) -> Cell {
    Cell {
        name,
        work: Work::FileSystem { options },
        ios: 1,
        without_device: false,
    }
}

const KIB: u64 = 1 << 10;

/// Whether a cell is asked for: by a part of its name, or because nothing is. Empty parts do not count.
pub fn is_wanted<'a>(setting: Setting, cell: &Cell, parts: impl Iterator<Item = &'a str>) -> bool {
    let name = format!("{} {}", setting.name(), cell.name);
    let mut parts = parts.filter(|part| !part.is_empty()).peekable();
    parts.peek().is_none() || parts.any(|part| name.contains(part))
}

/// The cells that are measured in a setting, in the order of running.
pub fn cells(setting: Setting) -> Vec<Cell> {
    let mut cells = vec![
        fio("randread 4k QD32", "--rw=randread", 4 * KIB, 32, 6000),
        fio("randwrite 4k QD32", "--rw=randwrite", 4 * KIB, 32, 6000),
        fio("read 1m QD8", "--rw=read", KIB * KIB, 8, 200),
        fio("write 1m QD8", "--rw=write", KIB * KIB, 8, 200),
    ];
    if setting.connections > 1 {
        return cells;
    }
    cells.extend([
        fio("randread 4k QD1", "--rw=randread", 4 * KIB, 1, 3000),
        fio("randwrite 4k QD1", "--rw=randwrite", 4 * KIB, 1, 3000),
        fio("read 128k QD8", "--rw=read", 128 * KIB, 8, 1200),
        fio("write 128k QD8", "--rw=write", 128 * KIB, 8, 1200),
    ]);
    if setting.instant {
        return cells;
    }
    let mixed = "--rw=randrw --rwmixread=70 --bsrange=4k-64k";
    let buffered = "--rw=read --direct=0 --ioengine=psync";
    cells.extend([
        fio("mixed 4k-64k QD16", mixed, 0, 16, 3000),
        fio(
            "write+flush 4k",
            "--rw=randwrite --fsync=1",
            4 * KIB,
            1,
            1500,
        ),
        Cell {
            without_device: false,
            ..fio("buffered read 128k", buffered, 128 * KIB, 1, 512)
        },
        file_system("mkfs+untar+sync", ""),
        // The server keeps its memory, where it gives all of it back and takes it anew above.
        file_system("mkfs+untar w/o trim", "-E nodiscard"),
    ]);
    cells
}

/// What a cell is measured against.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// The server whose answers cost next to nothing, instead of nbdkit.
    pub instant: bool,
    pub unix: bool,
    pub connections: u32,
    /// Its name, where the server is on the other side of a network card.
    pub remote: Option<&'static str>,
}

impl Setting {
    /// The server is on another machine.
    pub const fn remote(name: &'static str) -> Self {
        Self {
            instant: true,
            unix: false,
            connections: 1,
            remote: Some(name),
        }
    }

    pub fn name(&self) -> String {
        if let Some(name) = self.remote {
            return name.to_owned();
        }
        format!(
            "{} {}{}",
            if self.unix { "unix" } else { "tcp" },
            if self.instant { "instant" } else { "nbdkit" },
            if self.connections > 1 {
                format!(" x{}", self.connections)
            } else {
                String::new()
            }
        )
    }
}

/// With one processor the block layer has one queue, and further connections only stand by.
pub fn settings(mode: Mode) -> Vec<Setting> {
    let mut settings = Vec::new();
    for unix in [false, true] {
        let one = Setting {
            instant: false,
            unix,
            connections: 1,
            remote: None,
        };
        settings.push(one);
        settings.push(Setting {
            instant: true,
            ..one
        });
        if mode == Mode::Wall {
            settings.push(Setting {
                connections: 4,
                ..one
            });
        }
    }
    settings
}
