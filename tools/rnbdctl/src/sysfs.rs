// SPDX-License-Identifier: GPL-2.0

//! What sysfs tells of the devices, with either driver and without privilege.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::device::{Device, State};

/// A unit of sysfs, whatever the block size is.
pub const SECTOR: u64 = 512;

/// Where sysfs is mounted.
pub struct Sysfs(PathBuf);

/// Which driver is loaded, or built in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    Rnbd,
    Nbd,
}

impl Driver {
    pub fn name(self) -> &'static str {
        match self {
            Self::Rnbd => "rnbd",
            Self::Nbd => "nbd",
        }
    }
}

/// What a device has done since it was added, in requests, sectors and milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operations {
    pub requests: u64,
    pub sectors: u64,
    pub ticks: u64,
}

/// The block layer's statistics of a device (Documentation/block/stat.rst of the kernel).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStat {
    pub reads: Operations,
    pub writes: Operations,
    pub discards: Operations,
    /// Without sectors.
    pub flushes: Operations,
    pub in_flight: u64,
    /// For how many milliseconds there was something to do.
    pub busy: u64,
}

impl Sysfs {
    pub fn new() -> Self {
        Self("/sys".into())
    }

    pub fn driver(&self) -> Option<Driver> {
        let loaded = |driver: &Driver| self.0.join("module").join(driver.name()).exists();
        [Driver::Rnbd, Driver::Nbd].into_iter().find(loaded)
    }

    /// The indices of the devices that there are, in their order.
    ///
    /// # Errors
    ///
    /// Those of reading the directory.
    pub fn indices(&self) -> io::Result<Vec<u32>> {
        let mut indices: Vec<u32> = Vec::new();
        for entry in fs::read_dir(self.0.join("block"))? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("nbd"));
            indices.extend(number.and_then(|number| number.parse::<u32>().ok()));
        }
        indices.sort_unstable();
        Ok(indices)
    }

    fn disk(&self, index: u32) -> PathBuf {
        self.0.join("block").join(format!("nbd{index}"))
    }

    pub fn exists(&self, index: u32) -> bool {
        self.disk(index).exists()
    }

    /// `None`: there is no such file.
    fn text(&self, index: u32, name: &str) -> io::Result<Option<String>> {
        read(&self.disk(index).join(name))
    }

    fn number<T: std::str::FromStr>(&self, index: u32, name: &str) -> io::Result<Option<T>> {
        let text = self.text(index, name)?;
        Ok(text.and_then(|text| text.parse().ok()))
    }

    /// The process that has connected the device; only a device with a session has one.
    pub fn pid(&self, index: u32) -> Option<u32> {
        self.number(index, "pid").ok()?
    }

    /// The inode of the file that names this process; see [`Session::file`](crate::device::Session::file).
    pub fn session_file(&self, index: u32) -> Option<u64> {
        let found = fs::metadata(self.disk(index).join("pid"));
        found.ok().map(|found| found.ino())
    }

    /// The backend identifier, if the device has one.
    pub fn backend(&self, index: u32) -> Option<String> {
        self.identifier(index).ok()?
    }

    fn identifier(&self, index: u32) -> io::Result<Option<String>> {
        let name = self.text(index, "backend")?;
        Ok(name.filter(|name| !name.is_empty()))
    }

    pub fn read_only(&self, index: u32) -> Option<bool> {
        let number: Option<u8> = self.number(index, "ro").ok()?;
        number.map(|number| number != 0)
    }

    /// All that sysfs tells of a device.
    ///
    /// # Errors
    ///
    /// Something is there and cannot be read, so nobody knows whether the device is connected.
    pub fn device(&self, index: u32) -> io::Result<Device> {
        let pid = self.number(index, "pid")?;
        let sectors: u64 = self.number(index, "size")?.unwrap_or(0);
        let mut device = Device::unused(index);
        if pid.is_none() {
            return Ok(device);
        }
        device.state = State::Connected;
        device.pid = pid;
        device.session_file = self.session_file(index);
        device.backend = self.identifier(index)?;
        device.size = sectors.saturating_mul(SECTOR);
        device.block_size = self.number(index, "queue/logical_block_size")?;
        device.read_only = self.read_only(index);
        Ok(device)
    }

    pub fn io_stat(&self, index: u32) -> Option<IoStat> {
        parse_stat(&self.text(index, "stat").ok()??)
    }

    /// How long a request may be, in KiB.
    pub fn request_limit(&self, index: u32) -> Option<u32> {
        self.number(index, "queue/max_sectors_kb").ok()?
    }

    /// Lowers the limit of a request's size, in KiB, if it is higher.
    ///
    /// # Errors
    ///
    /// Those of writing to sysfs.
    pub fn limit_requests(&self, index: u32, limit: u32) -> std::io::Result<()> {
        let now = self.request_limit(index);
        if now.is_some_and(|now| now <= limit) {
            return Ok(());
        }
        let path = self.disk(index).join("queue/max_sectors_kb");
        fs::write(path, limit.to_string())
    }
}

/// `None`: it is not there, or not any more.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end_matches('\n').to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse_stat(line: &str) -> Option<IoStat> {
    let fields: Option<Vec<u64>> = line.split_whitespace().map(|f| f.parse().ok()).collect();
    let fields = fields?;
    let at = |place: usize| fields.get(place).copied();
    // Each kind has: requests, merged ones, sectors, milliseconds.
    let operations = |first: usize| {
        Some(Operations {
            requests: at(first)?,
            sectors: at(first + 2)?,
            ticks: at(first + 3)?,
        })
    };
    Some(IoStat {
        reads: operations(0)?,
        writes: operations(4)?,
        discards: operations(11).unwrap_or_default(),
        flushes: Operations {
            requests: at(15).unwrap_or(0),
            sectors: 0,
            ticks: at(16).unwrap_or(0),
        },
        in_flight: at(8)?,
        busy: at(9)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics() {
        let line = "  1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17";
        let stat = parse_stat(line).unwrap();
        let of = |requests, sectors, ticks| Operations {
            requests,
            sectors,
            ticks,
        };
        assert_eq!(stat.reads, of(1, 3, 4));
        assert_eq!(stat.writes, of(5, 7, 8));
        assert_eq!((stat.in_flight, stat.busy), (9, 10));
        assert_eq!(stat.discards, of(12, 14, 15));
        assert_eq!(stat.flushes, of(16, 0, 17));
        assert_eq!(parse_stat("1 2 3"), None);
        assert_eq!(parse_stat("x"), None);
    }

    #[test]
    fn devices() {
        let root = std::env::temp_dir().join(format!("rnbdctl-sysfs-{}", std::process::id()));
        let file = |name: &str, text: &str| {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        file("module/nbd/x", "");
        file("block/sda/size", "7\n");
        file("block/nbd10/size", "0\n");
        file("block/nbd2/size", "2048\n");
        file("block/nbd2/pid", "77\n");
        file("block/nbd2/backend", "disk a\n");
        file("block/nbd2/ro", "1\n");
        file("block/nbd2/queue/logical_block_size", "4096\n");
        let sysfs = Sysfs(root.clone());
        assert_eq!(sysfs.driver(), Some(Driver::Nbd));
        assert_eq!(sysfs.indices().unwrap(), [2, 10]);
        let device = sysfs.device(2).unwrap();
        assert_eq!((device.state, device.pid), (State::Connected, Some(77)));
        assert_eq!((device.size, device.block_size), (1 << 20, Some(4096)));
        assert_eq!(device.backend.as_deref(), Some("disk a"));
        // One process has connected it twice.
        let first = device.session();
        assert_eq!(sysfs.device(2).unwrap().session(), first);
        fs::rename(root.join("block/nbd2/pid"), root.join("old")).unwrap();
        file("block/nbd2/pid", "77\n");
        assert_ne!(sysfs.device(2).unwrap().session(), first);
        assert_eq!(device.read_only, Some(true));
        assert_eq!(sysfs.device(10).unwrap().state, State::Unused);
        assert_eq!(sysfs.device(11).unwrap().state, State::Unused);
        // What cannot be read is not absent. Here it is a directory.
        fs::create_dir(root.join("block/nbd10/pid")).unwrap();
        assert!(sysfs.device(10).is_err());
        fs::remove_file(root.join("block/nbd2/backend")).unwrap();
        assert_eq!(sysfs.device(2).unwrap().backend, None);
        fs::create_dir(root.join("block/nbd2/backend")).unwrap();
        assert!(sysfs.device(2).is_err());
        fs::remove_dir_all(root).unwrap();
    }
}
