// SPDX-License-Identifier: GPL-2.0

//! Keeps other runs of the program away from a device: two that have one identifier would connect two devices, or
//! replace each other's connections.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::config::Config;
use super::kept::Kept;
use crate::failure::{Exit, Failure};

/// Where the files are, two for each identifier. They stay when the program ends: only the lock counts.
const DIRECTORY: &str = "/run/rnbd";

/// How much of an identifier is in the name of its file, in bytes: three letters stand for one byte, and there may be
/// no more than 255. For a longer one, a hash of all of it follows.
const IDENTIFIER: usize = 64;

/// The kernel gives it up when the program ends. `None`: nothing could be locked.
pub struct Lock(#[expect(dead_code, reason = "it is held")] Option<File>);

impl Lock {
    /// Where no file can be made, it says so, and nothing is locked.
    ///
    /// # Errors
    ///
    /// `Busy`: another run of the program has the lock.
    pub fn take(kept: &Kept) -> Result<Self, Failure> {
        let path = path(&kept.config);
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

/// The file of what is kept. The names of identifiers and those of devices are told apart by their endings.
fn path(config: &Config) -> PathBuf {
    let name = match (config.backend(), config.device) {
        (Some(backend), _) => {
            let bytes = backend.as_bytes().iter().take(IDENTIFIER);
            let mut name: String = bytes.map(|byte| letters(*byte)).collect();
            if backend.len() > IDENTIFIER {
                let mut hasher = DefaultHasher::new();
                hasher.write(backend.as_bytes());
                name += &format!("-{:016x}", hasher.finish());
            }
            format!("{name}.backend")
        }
        (None, device) => format!("nbd{}.device", device.unwrap_or_default()),
    };
    Path::new(DIRECTORY).join(name)
}

/// The file beside it, which tells what a device is connected to.
pub fn path_of_served(config: &Config) -> PathBuf {
    let mut name = path(config).into_os_string();
    name.push(".served");
    name.into()
}

fn letters(byte: u8) -> String {
    match byte {
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' => char::from(byte).into(),
        other => format!("%{other:02x}"),
    }
}

fn lock(path: &Path) -> io::Result<File> {
    // Whoever can open the file can lock it, even if only to read it.
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        Errno::WOULDBLOCK => io::ErrorKind::WouldBlock.into(),
        errno => io::Error::from(errno),
    })?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn name(more: &str) -> String {
        let config: Config = toml::from_str(&format!("uris = ['nbd://h']\n{more}")).unwrap();
        let path = path_of_served(&config);
        let name = path.file_name().unwrap().to_str().unwrap();
        name.strip_suffix(".served").unwrap().to_owned()
    }

    #[test]
    fn files_have_safe_names() {
        assert_eq!(name("backend = 'a-1_B'"), "a-1_B.backend");
        assert_eq!(name("backend = '../ü'"), "%2e%2e%2f%c3%bc.backend");
        assert_eq!(name("backend = ''\ndevice = 'nbd3'"), "nbd3.device");
        let long = name(&format!("backend = '{}'", "/".repeat(300)));
        assert!(long.len() + ".served".len() <= 255, "{long}");
        let other = name(&format!("backend = '{}x'", "/".repeat(299)));
        assert_ne!(long, other);
    }

    #[test]
    fn only_one_has_it() {
        let path = std::env::temp_dir().join(format!("rnbdctl-lock-{}", std::process::id()));
        let first = lock(&path).unwrap();
        let mode = first.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "others could lock it");
        let second = lock(&path).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        assert!(lock(&path).is_ok());
        fs::remove_file(path).unwrap();
    }
}
