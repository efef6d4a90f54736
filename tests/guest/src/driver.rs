// SPDX-License-Identifier: GPL-2.0

//! The two drivers that the suite can test, and the module that holds one of them.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::io::Errno;
use rustix::system::{delete_module, finit_module};

use crate::harness::wait_until;
use crate::sys::SysResult;

/// NBD's major number.
pub const MAJOR: u32 = 43;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The driver under test.
    Rnbd,
    /// The kernel's own, which says what is right.
    Nbd,
}

impl Driver {
    /// The one that `DRIVER` in the environment names.
    pub fn chosen() -> Self {
        match std::env::var("DRIVER").as_deref() {
            Ok("nbd") => Self::Nbd,
            Ok("rnbd" | "") | Err(_) => Self::Rnbd,
            Ok(other) => panic!("DRIVER is rnbd or nbd, not {other}"),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Rnbd => "rnbd",
            Self::Nbd => "nbd",
        }
    }

    pub fn other(self) -> Self {
        match self {
            Self::Rnbd => Self::Nbd,
            Self::Nbd => Self::Rnbd,
        }
    }

    /// Where its module file is.
    pub fn file(self) -> PathBuf {
        static STOCK: OnceLock<PathBuf> = OnceLock::new();
        match self {
            Self::Rnbd => std::env::var_os("RNBD_KO").map_or("/rnbd/rnbd.ko".into(), PathBuf::from),
            Self::Nbd => STOCK
                .get_or_init(|| {
                    let output = Command::new("modinfo")
                        .args(["-n", "nbd"])
                        .output()
                        .expect("modinfo");
                    String::from_utf8_lossy(&output.stdout).trim().into()
                })
                .clone(),
        }
    }

    /// Loads it as `insmod` does, but lets the caller see the errno.
    pub fn load(self, parameters: &str) -> SysResult<()> {
        const COMPRESSED_FILE: i32 = 4; // MODULE_INIT_COMPRESSED_FILE
        let path = self.file();
        let file = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let compressed = path.extension().is_some_and(|extension| extension != "ko");
        let flags = if compressed { COMPRESSED_FILE } else { 0 };
        finit_module(&file, &CString::new(parameters).unwrap(), flags)
    }

    /// Unloads it, without waiting for anything.
    pub fn try_unload(self) -> SysResult<()> {
        const NONBLOCK: i32 = 0o4000; // O_NONBLOCK, the only way that the kernel still knows
        delete_module(&CString::new(self.name()).unwrap(), NONBLOCK)
    }

    /// Unloads it; what was just closed may hold it a moment longer.
    pub fn unload(self) -> SysResult<()> {
        let mut answer = Err(Errno::WOULDBLOCK);
        let _ = wait_until(Duration::from_secs(3), || {
            answer = self.try_unload();
            answer != Err(Errno::WOULDBLOCK)
        });
        answer
    }

    pub fn loaded(self) -> bool {
        self.sysfs().exists()
    }

    /// Who holds the module, besides what is built on it.
    pub fn references(self) -> u32 {
        self.attribute("refcnt")
            .expect("refcnt")
            .parse()
            .expect("a number")
    }

    /// A parameter, if sysfs shows it.
    pub fn parameter(self, name: &str) -> Option<String> {
        self.attribute(&format!("parameters/{name}"))
    }

    fn attribute(self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.sysfs().join(name)).ok()?;
        Some(text.trim().to_owned())
    }

    fn sysfs(self) -> PathBuf {
        Path::new("/sys/module").join(self.name())
    }
}

/// The indices of all the /dev/nbdN there are.
pub fn devices() -> Vec<u32> {
    let entries = fs::read_dir("/sys/block").expect("/sys/block");
    let mut devices: Vec<u32> = entries
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .to_str()?
                .strip_prefix("nbd")?
                .parse()
                .ok()
        })
        .collect();
    devices.sort_unstable();
    devices
}
