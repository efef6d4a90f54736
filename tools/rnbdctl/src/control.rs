// SPDX-License-Identifier: GPL-2.0

//! Disconnects and resizes a device.

use crate::cli::{DisconnectArgs, ResizeArgs};
use crate::connect::{no_driver, open_family};
use crate::exports::size_of;
use crate::failure::{Exit, Failure};
use crate::sysfs::Sysfs;
use crate::text::{plain, say};

/// # Errors
///
/// `NoDevice`, or the kernel's reason.
pub fn disconnect(args: &DisconnectArgs) -> Result<(), Failure> {
    let sysfs = Sysfs::new();
    check_connected(&sysfs, args.device)?;
    let nbd = open_family()?;
    if let Some(wanted) = &args.backend {
        // nbd.ko ignores the identifier. rnbd checks it, and this cannot be too late there.
        check_backend(&sysfs, args.device, wanted)?;
    }
    nbd.disconnect(args.device, args.backend.as_deref())
        .map_err(|error| error.during("disconnecting the device"))
}

/// # Errors
///
/// `NoDevice`, or the kernel's reason, or what failed on the way to the server.
pub fn resize(args: &ResizeArgs) -> Result<(), Failure> {
    let sysfs = Sysfs::new();
    check_connected(&sysfs, args.device)?;
    let nbd = open_family()?;
    let bytes = match (&args.from_server, args.bytes) {
        (Some(uri), _) => size_of(uri, &args.server)?,
        (None, Some(bytes)) => bytes,
        (None, None) => return Err(Failure::new(Exit::Usage, "resize", "a size is missing")),
    };
    let backend = sysfs.backend(args.device);
    nbd.resize(args.device, backend.as_deref(), bytes)
        .map_err(|error| error.during("resizing the device"))?;
    say(&format!("/dev/nbd{}: {bytes} bytes\n", args.device));
    Ok(())
}

/// Asking for the family would load a driver.
fn check_connected(sysfs: &Sysfs, index: u32) -> Result<(), Failure> {
    sysfs.driver().ok_or_else(no_driver)?;
    let what = if !sysfs.exists(index) {
        "there is no such device"
    } else if sysfs.pid(index).is_none() {
        "it is not connected"
    } else {
        return Ok(());
    };
    Err(
        Failure::new(Exit::NoDevice, format!("/dev/nbd{index}"), what)
            .advise("\"rnbdctl list\" shows what is connected."),
    )
}

fn check_backend(sysfs: &Sysfs, index: u32, wanted: &str) -> Result<(), Failure> {
    let what = match sysfs.backend(index) {
        Some(found) if found == wanted => return Ok(()),
        Some(found) => format!("it has the identifier \"{}\"", plain(&found)),
        None => "it has no identifier".into(),
    };
    Err(
        Failure::new(Exit::NoDevice, format!("/dev/nbd{index}"), what)
            .advise("Somebody else may have connected it meanwhile."),
    )
}
