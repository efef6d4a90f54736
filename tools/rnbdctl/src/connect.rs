// SPDX-License-Identifier: GPL-2.0

//! Connects a device to an export.

use crate::cli::ConnectArgs;
use crate::failure::{Exit, Failure};
use crate::family_nbd::{Nbd, Setup};
use crate::family_rnbd::Rnbd;
use crate::log::tell;
use crate::negotiate::Export;
use crate::netlink::NetlinkError;
use crate::opening::{Opened, open};
use crate::sysfs::{Driver, Sysfs};
use crate::text::say;
use crate::uri::{NbdUri, Place};
use crate::wire;

const KERNEL: &str = "connecting the device";

/// The largest request that a driver sends, in bytes.
const LARGEST_REQUEST: u32 = 32 << 20;

/// A larger block size that a server prefers is not passed on: it would decide how much is read ahead, and keep
/// smaller discards from being sent.
const LARGEST_PREFERRED: u32 = 1 << 20;

/// # Errors
///
/// The step that failed, and why.
pub fn run(args: &ConnectArgs) -> Result<(), Failure> {
    let nbd = open_family()?;
    check_transport(&args.uri, Sysfs::new().driver())?;
    let structured = args.structured_replies.wanted()?;
    let opened = open(&args.uri, args.connections, &args.server, structured)?;
    let export = opened.export.clone();
    let mut setup = prepare(opened, args.block_size, args.read_only)?;
    setup.index = args.device;
    setup.timeout = args.timeout;
    setup.dead_conn_timeout = args.dead_conn_timeout;
    setup.backend.clone_from(&args.backend);
    let index = start(&nbd, &setup, &export)?;
    say(&format!("/dev/nbd{index}\n"));
    Ok(())
}

/// What a device is connected with, as far as its export decides on it.
///
/// # Errors
///
/// `Usage`: the server takes no blocks of this size.
pub fn prepare(opened: Opened, block_size: Option<u32>, read_only: bool) -> Result<Setup, Failure> {
    let Opened {
        sockets, export, ..
    } = opened;
    let block_size = choose_block_size(block_size, &export)?;
    warn_of_rest(&export, block_size);
    Ok(Setup {
        index: None,
        size: export.size,
        block_size,
        preferred_block_size: preferred_block_size(block_size, &export),
        max_payload: max_payload(block_size, &export),
        flags: flags(&export, read_only),
        timeout: None,
        dead_conn_timeout: None,
        backend: None,
        structured_replies: must_be_structured(&export),
        sockets,
    })
}

/// Connects a device, and returns its index. Tells rnbd all that the server has told. The family of both drivers
/// has less.
///
/// # Errors
///
/// The kernel's reason.
pub fn start(nbd: &Nbd, setup: &Setup, export: &Export) -> Result<u32, Failure> {
    let refused = |error: NetlinkError| error.during(KERNEL);
    if let Some(rnbd) = Rnbd::open().map_err(refused)? {
        if let Some(index) = rnbd.connect(setup).map_err(refused)? {
            if setup.max_payload.is_none() {
                limit_requests(index, export);
            }
            return Ok(index);
        }
    }
    let index = nbd.connect(setup).map_err(refused)?;
    limit_requests(index, export);
    Ok(index)
}

/// The driver's family, which is looked for before a server is bothered. If no driver is loaded, the kernel
/// runs modprobe for it.
///
/// # Errors
///
/// `NoDevice`: no driver is loaded.
pub fn open_family() -> Result<Nbd, Failure> {
    let family =
        Nbd::open().map_err(|error| error.during("asking the kernel for the family nbd"))?;
    family.ok_or_else(no_driver)
}

pub fn no_driver() -> Failure {
    Failure::new(
        Exit::NoDevice,
        "driver",
        "neither rnbd nor nbd.ko is loaded",
    )
    .advise("\"modprobe nbd\" loads the one that is installed.")
}

/// nbd.ko would refuse the sockets, and say why in its log only.
///
/// # Errors
///
/// `Failed`: it takes another driver, or none can do it.
pub fn check_transport(uri: &NbdUri, driver: Option<Driver>) -> Result<(), Failure> {
    match (&uri.place, driver) {
        (Place::Unix(_) | Place::Vsock(..), _) if uri.tls.is_some() => Err(Failure::new(
            Exit::Failed,
            KERNEL,
            "the kernel has TLS for TCP only",
        )
        .advise("A proxy can encrypt such a connection, as nbdkit's plugin \"nbd\" does.")),
        (Place::Vsock(..), Some(Driver::Nbd)) => {
            Err(
                Failure::new(Exit::Failed, KERNEL, "nbd.ko takes no vsock sockets")
                    .advise("rnbd does."),
            )
        }
        _ => Ok(()),
    }
}

/// Without the server's word, only the smallest requests are known to be right.
fn choose_block_size(wanted: Option<u32>, export: &Export) -> Result<u32, Failure> {
    let minimum = export.block_sizes.map_or(1, |sizes| sizes.minimum).max(512);
    match wanted {
        Some(size) if size < minimum => Err(Failure::new(
            Exit::Usage,
            "block size",
            format!("the server takes no blocks below {minimum} bytes"),
        )),
        Some(size) => Ok(size),
        None => Ok(minimum),
    }
}

fn warn_of_rest(export: &Export, block_size: u32) {
    let rest = export.size % u64::from(block_size);
    if rest != 0 {
        tell(&format!(
            "the last {rest} bytes of the export are no whole block, and out of reach"
        ));
    }
}

fn flags(export: &Export, read_only: bool) -> u16 {
    let added = if read_only { wire::READ_ONLY } else { 0 };
    wire::effective(export.flags) | added
}

/// Whether the driver has to be told that replies are structured. The flag does so as well, and allows simple replies to
/// reads: nbd-server (3.26) uses them, against the protocol.
fn must_be_structured(export: &Export) -> bool {
    export.structured_replies && export.flags & wire::SEND_DF == 0
}

/// What the server prefers, if that makes sense.
fn preferred_block_size(block_size: u32, export: &Export) -> Option<u32> {
    let preferred = export.block_sizes?.preferred;
    let largest = max_payload(block_size, export)
        .map_or(LARGEST_PREFERRED, |payload| payload.min(LARGEST_PREFERRED));
    let valid = preferred.is_power_of_two() && (block_size..=largest).contains(&preferred);
    valid.then_some(preferred)
}

/// The most data that the server takes, if the driver can keep to that: the block layer cannot do with less than a
/// page at once.
fn max_payload(block_size: u32, export: &Export) -> Option<u32> {
    let payload = export.block_sizes?.max_payload;
    let page = rustix::param::page_size().try_into().unwrap_or(u32::MAX);
    (payload >= block_size.max(page)).then_some(payload.min(LARGEST_REQUEST))
}

/// The family of both drivers has no attribute for the largest payload that a server takes.
fn limit_requests(index: u32, export: &Export) {
    let Some(sizes) = export.block_sizes else {
        return;
    };
    if sizes.max_payload >= LARGEST_REQUEST {
        return;
    }
    if let Err(error) = Sysfs::new().limit_requests(index, sizes.max_payload >> 10) {
        tell(&format!(
            "the server takes {} bytes at once, but the limit of nbd{index} cannot be lowered: {error}",
            sizes.max_payload
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::negotiate::BlockSizes;

    #[test]
    fn block_sizes() {
        assert_eq!(choose_block_size(None, &Export::default()).unwrap(), 512);
        assert_eq!(choose_block_size(None, &Export::of(1, 1)).unwrap(), 512);
        assert_eq!(choose_block_size(None, &Export::of(1, 4096)).unwrap(), 4096);
        assert_eq!(
            choose_block_size(Some(4096), &Export::of(1, 1)).unwrap(),
            4096
        );
        let failure = choose_block_size(Some(512), &Export::of(1, 4096)).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
    }

    #[test]
    fn sizes_are_those_that_make_sense() {
        let with = |minimum, preferred, max_payload| Export {
            block_sizes: Some(BlockSizes {
                minimum,
                preferred,
                max_payload,
            }),
            ..Export::default()
        };
        let both = |export: &Export| (preferred_block_size(512, export), max_payload(512, export));
        assert_eq!(both(&Export::default()), (None, None));
        assert_eq!(both(&with(1, 4096, 65536)), (Some(4096), Some(65536)));
        assert_eq!(both(&with(1, 1, u32::MAX)), (None, Some(LARGEST_REQUEST)));
        assert_eq!(both(&with(1, 3000, 4096)), (None, Some(4096)));
        assert_eq!(both(&with(1, 65536, 4096)), (None, Some(4096)));
        assert_eq!(both(&with(1, 4096, 1024)), (Some(4096), None));
        assert_eq!(max_payload(65536, &with(1, 4096, 32768)), None);
    }

    #[test]
    fn the_flag_tells_of_structured_replies() {
        let mut export = Export::of(wire::HAS_FLAGS, 1);
        assert!(!must_be_structured(&export));
        export.structured_replies = true;
        assert!(must_be_structured(&export), "nothing else does");
        export.flags |= wire::SEND_DF;
        assert!(!must_be_structured(&export));
    }

    #[test]
    fn flags_are_those_of_the_server() {
        assert_eq!(flags(&Export::of(0x105, 1), false), 0x105);
        assert_eq!(flags(&Export::of(0x105, 1), true), 0x107);
        assert_eq!(
            flags(&Export::of(0x104, 1), false),
            1,
            "no flags without HAS_FLAGS"
        );
    }
}
