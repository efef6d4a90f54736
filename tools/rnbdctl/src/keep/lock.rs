// SPDX-License-Identifier: GPL-2.0

//! Keeps other runs of the program away from a device: two that have one identifier would connect two devices, or
//! replace each other's connections.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::config::Config;
use super::files::path_of_lock;
use super::kept::Kept;
use crate::failure::{Exit, Failure};

/// The kernel gives it up when the program ends. `None`: nothing could be locked.
pub struct Lock(#[expect(dead_code, reason = "it is held")] Option<File>);

impl Lock {
    /// Nothing is locked.
    #[cfg(test)]
    pub fn none() -> Self {
        Self(None)
    }

    /// Where no file can be made, it says so, and nothing is locked.
    ///
    /// # Errors
    ///
    /// `Busy`: another run of the program has the lock.
    pub fn take(kept: &Kept) -> Result<Self, Failure> {
        let path = path_of_lock(&kept.config);
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
