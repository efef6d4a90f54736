// SPDX-License-Identifier: GPL-2.0

//! Disconnects a device at the end, if it is still the one that was kept, and nobody has mounted or claimed it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

use super::find::{Condition, Found};
use super::kept::Kept;
use crate::connect::open_family;
use crate::device::Device;
use crate::failure::Failure;
use crate::kernel::Kernel;

/// Disconnects what was kept. What is left connected is said.
///
/// # Errors
///
/// The kernel's reason.
pub fn disconnect(kept: &Kept) -> Result<(), Failure> {
    let Some((kernel, device)) = still_there(kept)? else {
        return Ok(());
    };
    // Opening a device that does not answer may have to wait for it.
    if !Condition::of(&kernel, &device, &kept.deaths)?.is_alive {
        let has = match kernel.not_known() {
            None => "has",
            Some(_) => "may have",
        };
        kept.say(&format!(
            "{} {has} lost its connections, and stays connected",
            device.device
        ));
        return Ok(());
    }
    // It stays claimed until it is disconnected.
    let _claimed = match claim(Path::new(&device.device)) {
        Ok(claimed) => claimed,
        Err(why) => {
            kept.say(&format!("{} {why}, and stays connected", device.device));
            return Ok(());
        }
    };
    // While it is open, nobody can connect it to something else. nbd.ko does not compare the identifier.
    if still_there(kept)?.is_none_or(|(_, now)| now.index != device.index) {
        return Ok(());
    }
    open_family()?
        .disconnect(device.index, kept.config.backend())
        .map_err(|error| error.during("disconnecting the device"))
}

/// The device, if it is still that which was kept.
fn still_there(kept: &Kept) -> Result<Option<(Kernel, Device)>, Failure> {
    if kept.index.is_none() {
        return Ok(None);
    }
    let kernel = Kernel::look()?;
    let found = kept.find(&kernel.devices()?)?;
    Ok(match found {
        Found::Device(device) if kept.is(&device) => Some((kernel, device)),
        _ => None,
    })
}

/// Claims a device as a mount does. Without a claim, nobody knows whether somebody else has one.
fn claim(path: &Path) -> Result<File, String> {
    let claimed = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::EXCL.bits() as i32)
        .open(path);
    claimed.map_err(|error| match error.kind() {
        io::ErrorKind::ResourceBusy => "is mounted or claimed".into(),
        _ => format!("cannot be claimed ({error})"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_claim() {
        let why = claim(Path::new("/nonexistent/nbd0")).unwrap_err();
        assert!(why.contains("cannot be claimed (No such file"), "{why}");
        assert!(claim(Path::new("/dev/null")).is_ok());
    }
}
