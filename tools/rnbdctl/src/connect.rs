// SPDX-License-Identifier: GPL-2.0

//! Connects a device to an export.

use std::os::fd::OwnedFd;
use std::thread;

use crate::cli::ConnectArgs;
use crate::failure::{Exit, Failure};
use crate::family_nbd::{Nbd, Setup};
use crate::negotiate::Export;
use crate::server::{explain_option, reach, reach_at};
use crate::sysfs::{Driver, Sysfs};
use crate::text::say;
use crate::uri::Place;
use crate::wire::{self, Opt};

const KERNEL: &str = "connecting the device";

/// More connections than this have not been seen to help.
const ENOUGH: usize = 4;

/// The largest request that a driver sends, in bytes.
const LARGEST_REQUEST: u32 = 32 << 20;

/// # Errors
///
/// The step that failed, and why.
pub fn run(args: &ConnectArgs) -> Result<(), Failure> {
    let nbd = open_family()?;
    check_transport(&args.uri.place, Sysfs::new().driver())?;
    let (sockets, export) = open_connections(args)?;
    let block_size = block_size(args.block_size, &export)?;
    warn_of_rest(&export, block_size);
    let setup = Setup {
        index: args.device,
        size: export.size,
        block_size,
        flags: flags(&export, args.read_only),
        timeout: args.timeout,
        dead_conn_timeout: args.dead_conn_timeout,
        backend: args.backend.clone(),
        sockets,
    };
    let index = nbd.connect(&setup).map_err(|error| error.during(KERNEL))?;
    limit_requests(index, &export);
    say(&format!("/dev/nbd{index}\n"));
    Ok(())
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
fn check_transport(place: &Place, driver: Option<Driver>) -> Result<(), Failure> {
    match (place, driver) {
        (Place::Vsock(..), Some(Driver::Nbd)) => {
            Err(
                Failure::new(Exit::Failed, KERNEL, "nbd.ko takes no vsock sockets")
                    .advise("rnbd does."),
            )
        }
        _ => Ok(()),
    }
}

/// Makes all connections to one address, since another one could be another store.
fn open_connections(args: &ConnectArgs) -> Result<(Vec<OwnedFd>, Export), Failure> {
    let (name, patience) = (&args.uri.export, args.server.connect_timeout);
    let go = |problem| explain_option(problem, Opt::Go);
    let (address, handshake) = reach(&args.uri.place, patience)?;
    let (socket, export) = handshake.go(name).map_err(go)?;
    let mut sockets = vec![socket];
    for number in 1..connections(args.connections, &export)? {
        let (socket, same) = reach_at(&address, patience)?.go(name).map_err(go)?;
        compare(number + 1, &export, &same)?;
        sockets.push(socket);
    }
    Ok((sockets, export))
}

/// How many connections to make.
fn connections(wanted: Option<u32>, export: &Export) -> Result<u32, Failure> {
    let allowed = export.flags & wire::CAN_MULTI_CONN != 0;
    match wanted {
        Some(number) if number > 1 && !allowed => Err(Failure::new(
            Exit::Refused,
            "number of connections",
            "the server does not say that several are safe (NBD_FLAG_CAN_MULTI_CONN)",
        )
        .advise("Leave --connections out, or configure the server.")),
        Some(number) => Ok(number),
        None if allowed => {
            let processors = thread::available_parallelism().map_or(1, usize::from);
            Ok(processors.min(ENOUGH) as u32)
        }
        None => Ok(1),
    }
}

/// All connections must lead to the same thing.
fn compare(number: u32, first: &Export, other: &Export) -> Result<(), Failure> {
    let same = (first.size, first.flags, first.block_sizes)
        == (other.size, other.flags, other.block_sizes);
    if same {
        return Ok(());
    }
    let what = format!(
        "the server describes another export than by the first one: {} bytes with flags {:#x}, not {} \
         bytes with flags {:#x}",
        other.size, other.flags, first.size, first.flags
    );
    Err(
        Failure::new(Exit::Refused, format!("connection {number}"), what).advise(
            "Is the address shared by servers with different contents? Use --connections 1.",
        ),
    )
}

/// Without the server's word, only the smallest requests are known to be right.
fn block_size(wanted: Option<u32>, export: &Export) -> Result<u32, Failure> {
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
        eprintln!(
            "rnbdctl: the last {rest} bytes of the export are no whole block, and out of reach"
        );
    }
}

/// Flags mean something only if the first one is set.
fn flags(export: &Export, read_only: bool) -> u16 {
    let told = match export.flags & wire::HAS_FLAGS {
        0 => 0,
        _ => export.flags,
    };
    let added = if read_only { wire::READ_ONLY } else { 0 };
    told | added | wire::HAS_FLAGS
}

/// The family has no attribute for the largest payload that a server takes.
fn limit_requests(index: u32, export: &Export) {
    let Some(sizes) = export.block_sizes else {
        return;
    };
    if sizes.max_payload >= LARGEST_REQUEST {
        return;
    }
    if let Err(error) = Sysfs::new().limit_requests(index, sizes.max_payload >> 10) {
        eprintln!(
            "rnbdctl: the server takes {} bytes at once, but the limit of nbd{index} cannot be lowered: {error}",
            sizes.max_payload
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::negotiate::BlockSizes;

    fn export(flags: u16, minimum: u32) -> Export {
        Export {
            size: 1 << 20,
            flags,
            block_sizes: Some(BlockSizes {
                minimum,
                preferred: 4096,
                max_payload: 1 << 20,
            }),
            description: None,
        }
    }

    #[test]
    fn several_connections_take_a_server_that_allows_them() {
        let (one, several) = (export(1, 1), export(1 | wire::CAN_MULTI_CONN, 1));
        assert_eq!(connections(None, &one).unwrap(), 1);
        assert_eq!(connections(Some(1), &one).unwrap(), 1);
        assert_eq!(connections(Some(2), &one).unwrap_err().exit, Exit::Refused);
        assert_eq!(connections(Some(9), &several).unwrap(), 9);
        let number = connections(None, &several).unwrap();
        assert!((1..=4).contains(&number));
    }

    #[test]
    fn block_sizes() {
        assert_eq!(block_size(None, &Export::default()).unwrap(), 512);
        assert_eq!(block_size(None, &export(1, 1)).unwrap(), 512);
        assert_eq!(block_size(None, &export(1, 4096)).unwrap(), 4096);
        assert_eq!(block_size(Some(4096), &export(1, 1)).unwrap(), 4096);
        let failure = block_size(Some(512), &export(1, 4096)).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
    }

    #[test]
    fn flags_are_those_of_the_server() {
        assert_eq!(flags(&export(0x105, 1), false), 0x105);
        assert_eq!(flags(&export(0x105, 1), true), 0x107);
        assert_eq!(
            flags(&export(0x104, 1), false),
            1,
            "no flags without HAS_FLAGS"
        );
    }

    #[test]
    fn another_export_is_noticed() {
        let first = export(1, 1);
        assert!(compare(2, &first, &first.clone()).is_ok());
        let sizes = [export(3, 1), export(1, 512)];
        for other in sizes {
            assert!(compare(2, &first, &other).is_err());
        }
    }
}
