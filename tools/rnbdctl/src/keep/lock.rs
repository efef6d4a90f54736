// SPDX-License-Identifier: GPL-2.0

//! Keeps other runs of the program away from a device: two that have one identifier would connect two devices, or
//! replace each other's connections.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::config::Config;
use super::kept::Kept;
use crate::failure::{Exit, Failure};

/// Where the files are, one for each identifier. They stay when the program ends: only the lock counts.
const DIRECTORY: &str = "/run/rnbd";

/// How much of an identifier is in the name of its file, in bytes: three letters stand for one byte, and there may be
/// no more than 255. Two identifiers of which so much is the same exclude each other.
const IDENTIFIER: usize = 80;

/// The kernel gives it up when the program ends. `None`: nothing could be locked.
pub struct Lock(#[expect(dead_code, reason = "it is held")] Option<File>);

impl Lock {
    /// Where no file can be made, it says so, and nothing is locked.
    ///
    /// # Errors
    ///
    /// `Busy`: another run of the program has the lock.
    pub fn take(kept: &Kept) -> Result<Self, Failure> {
        let path = path(Path::new(DIRECTORY), &kept.config);
        match lock(&path) {
            Ok(file) => Ok(Self(Some(file))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Failure::new(
                Exit::Busy,
                &kept.name,
                format!("another \"rnbdctl keep\" keeps {}", owned(&kept.config)),
            )
            .advise(format!("It has locked {}.", path.display()))),
            Err(error) => {
                kept.say(&format!(
                    "whether another \"rnbdctl keep\" keeps the same is not known: {}: {error}",
                    path.display()
                ));
                Ok(Self(None))
            }
        }
    }
}

/// What only one may have.
fn owned(config: &Config) -> String {
    match (config.backend(), config.device) {
        (Some(backend), _) => format!("the device with the identifier \"{backend}\""),
        (None, device) => format!("/dev/nbd{}", device.unwrap_or_default()),
    }
}

/// The names of identifiers and those of devices are told apart by their endings.
fn path(directory: &Path, config: &Config) -> PathBuf {
    let name = match (config.backend(), config.device) {
        (Some(backend), _) => {
            let bytes = backend.as_bytes().iter().take(IDENTIFIER);
            let name: String = bytes.map(|byte| letters(*byte)).collect();
            format!("{name}.backend")
        }
        (None, device) => format!("nbd{}.device", device.unwrap_or_default()),
    };
    directory.join(name)
}

fn letters(byte: u8) -> String {
    match byte {
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' => char::from(byte).into(),
        other => format!("%{other:02x}"),
    }
}

fn lock(path: &Path) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        Errno::WOULDBLOCK => io::ErrorKind::WouldBlock.into(),
        errno => io::Error::from(errno),
    })?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(more: &str) -> String {
        let config: Config = toml::from_str(&format!("uris = ['nbd://h']\n{more}")).unwrap();
        let path = path(Path::new(""), &config);
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn files_have_safe_names() {
        assert_eq!(name("backend = 'a-1_B'"), "a-1_B.backend");
        assert_eq!(name("backend = '../ü'"), "%2e%2e%2f%c3%bc.backend");
        assert_eq!(name("backend = ''\ndevice = 'nbd3'"), "nbd3.device");
        let long = name(&format!("backend = '{}'", "/".repeat(300)));
        assert!(long.len() < 255, "{long}");
    }

    #[test]
    fn only_one_has_it() {
        let path = std::env::temp_dir().join(format!("rnbdctl-lock-{}", std::process::id()));
        let first = lock(&path).unwrap();
        let second = lock(&path).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        assert!(lock(&path).is_ok());
        fs::remove_file(path).unwrap();
    }
}
