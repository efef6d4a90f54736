// SPDX-License-Identifier: GPL-2.0

//! Whether an export is what a device has been connected to, as far as a device tells of that.
//!
//! Nobody can see whether it has the same data. That it has another size, or promises other things, shows
//! that it has not, or that the device would break its promises.

use crate::device::Device;
use crate::failure::{Exit, Failure};
use crate::negotiate::{BlockSizes, Export};
use crate::sysfs::SECTOR;
use crate::wire::{self, flag_names};

/// Checks an export before it is given to a device. `limit` is how long a request of the device may be, in KiB.
///
/// # Errors
///
/// `Refused`: it is another export.
pub fn check(device: &Device, limit: Option<u32>, export: &Export) -> Result<(), Failure> {
    compare(device, limit, export).map_err(|what| {
        Failure::new(Exit::Refused, "comparing the export", what).advise(format!(
            "{} was connected to another export. Is it the right server, and the right image?",
            device.device
        ))
    })
}

/// In what an export differs from what was told before, in words; `None`: in nothing.
pub fn differences(before: &Export, now: &Export) -> Option<String> {
    let both = [now, before];
    let flags = |flags: u16| format!("{} ({flags:#x})", names(flags));
    let told =
        |bytes: Option<u32>| bytes.map_or("not told".into(), |bytes| format!("{bytes} bytes"));
    let sizes = |of: fn(BlockSizes) -> u32| both.map(|export| told(export.block_sizes.map(of)));
    let replies = |structured: bool| if structured { "structured" } else { "simple" }.to_owned();
    let all = [
        ("size", both.map(|export| format!("{} bytes", export.size))),
        ("flags", both.map(|export| flags(export.flags))),
        ("smallest block", sizes(|sizes| sizes.minimum)),
        ("preferred block", sizes(|sizes| sizes.preferred)),
        ("largest request", sizes(|sizes| sizes.max_payload)),
        (
            "replies",
            both.map(|export| replies(export.structured_replies)),
        ),
    ];
    let differ = all.into_iter().filter(|(_, [now, before])| now != before);
    let words: Vec<String> = differ
        .map(|(what, [now, before])| format!("{what} {now}, not {before}"))
        .collect();
    (!words.is_empty()).then(|| words.join("; "))
}

fn compare(device: &Device, limit: Option<u32>, export: &Export) -> Result<(), String> {
    // nbd.ko tells the size in sectors only.
    if device.size / SECTOR != export.size / SECTOR {
        return Err(format!(
            "it has {} bytes, and the device {}",
            export.size, device.size
        ));
    }
    if let Some(flags) = device.flag_bits {
        same_flags(flags, wire::effective(export.flags))?;
    } else if device.read_only == Some(false) && export.flags & wire::READ_ONLY != 0 {
        return Err("it is read-only, and the device is not".into());
    }
    let Some(sizes) = export.block_sizes else {
        return Ok(());
    };
    if let Some(block_size) = device.block_size.filter(|size| *size < sizes.minimum) {
        return Err(format!(
            "the server takes no blocks below {} bytes, and the device has blocks of {block_size}",
            sizes.minimum
        ));
    }
    let largest = limit.map(|limit| u64::from(limit) << 10);
    if let Some(largest) = largest.filter(|largest| *largest > u64::from(sizes.max_payload)) {
        return Err(format!(
            "the server takes {} bytes at once, and the device sends up to {largest}",
            sizes.max_payload
        ));
    }
    Ok(())
}

/// A device may have been made read-only, whatever the server allows.
fn same_flags(device: u16, export: u16) -> Result<(), String> {
    let differ = device ^ export;
    let allowed = match device & wire::READ_ONLY {
        0 => wire::HAS_FLAGS,
        _ => wire::HAS_FLAGS | wire::READ_ONLY,
    };
    if differ & !allowed == 0 {
        return Ok(());
    }
    Err(format!(
        "its flags are {}, and those of the device {}",
        names(export),
        names(device)
    ))
}

fn names(flags: u16) -> String {
    match flag_names(flags).join(",").as_str() {
        "" => "none".into(),
        names => names.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: u16 = 1 << 2;
    const USUAL: u16 = wire::HAS_FLAGS | FLUSH | wire::CAN_MULTI_CONN;

    fn device(flags: Option<u16>) -> Device {
        let mut device = Device::unused(0);
        device.size = 1 << 20;
        device.block_size = Some(512);
        device.read_only = Some(flags.is_some_and(|flags| flags & wire::READ_ONLY != 0));
        device.flag_bits = flags;
        device
    }

    fn export(size: u64, flags: u16) -> Export {
        Export {
            size,
            flags,
            ..Export::default()
        }
    }

    #[track_caller]
    fn refused(device: &Device, limit: Option<u32>, export: &Export, words: &str) {
        let failure = check(device, limit, export).unwrap_err();
        assert_eq!(failure.exit, Exit::Refused);
        assert!(failure.to_string().contains(words), "{failure}");
    }

    #[test]
    fn sizes() {
        let device = device(Some(USUAL));
        assert!(check(&device, None, &export(1 << 20, USUAL)).is_ok());
        // The rest of a sector is out of reach.
        assert!(check(&device, None, &export((1 << 20) + 511, USUAL)).is_ok());
        refused(&device, None, &export(1 << 19, USUAL), "524288 bytes");
        refused(&device, None, &export(1 << 21, USUAL), "2097152 bytes");
    }

    #[test]
    fn flags() {
        let writable = device(Some(USUAL));
        let size = 1 << 20;
        refused(&writable, None, &export(size, USUAL & !FLUSH), "flags are");
        let more = USUAL | (1 << 3);
        refused(&writable, None, &export(size, more), "flush,fua,multi-conn");
        let read_only = USUAL | wire::READ_ONLY;
        refused(&writable, None, &export(size, read_only), "read-only");
        let device_only = device(Some(read_only));
        assert!(check(&device_only, None, &export(size, USUAL)).is_ok());
        assert!(check(&device_only, None, &export(size, read_only)).is_ok());
        // Flags without HAS_FLAGS mean nothing.
        assert!(check(&device(Some(1)), None, &export(size, FLUSH)).is_ok());
    }

    #[test]
    fn where_flags_are_not_told() {
        let device = device(None);
        assert!(check(&device, None, &export(1 << 20, USUAL)).is_ok());
        let read_only = export(1 << 20, USUAL | wire::READ_ONLY);
        refused(&device, None, &read_only, "read-only");
    }

    #[test]
    fn block_sizes() {
        let device = device(Some(USUAL));
        let with = |minimum, max_payload| Export {
            block_sizes: Some(BlockSizes {
                minimum,
                preferred: 4096,
                max_payload,
            }),
            ..export(1 << 20, USUAL)
        };
        assert!(check(&device, Some(128), &with(1, 128 << 10)).is_ok());
        refused(&device, None, &with(4096, 1 << 20), "no blocks below 4096");
        refused(
            &device,
            Some(129),
            &with(1, 128 << 10),
            "131072 bytes at once",
        );
    }
}
