// SPDX-License-Identifier: GPL-2.0

//! Gives connections that were dialled to the kernel.

use super::config::Config;
use super::find::{Condition, Found, Goal, find};
use super::kept::Kept;
use super::peers::leads_to;
use super::served::Served;
use crate::connect::{open_family, prepare, start};
use crate::device::{Device, Session};
use crate::dial::Address;
use crate::failure::{Exit, Failure};
use crate::family_nbd::Change;
use crate::handover::{check_export, count_dead, hand_over};
use crate::kernel::Kernel;
use crate::negotiate::Export;
use crate::opening::Opened;
use crate::sysfs::Sysfs;
use crate::uri::NbdUri;
use crate::wire;

const PASSING: &str = "passing the connections to the device";

/// Passes on what was opened with `uri`, if it is the device's export.
///
/// # Errors
///
/// `Refused`: it is another export. Or the kernel's reason.
pub fn on(kept: &mut Kept, goal: &Goal, uri: NbdUri, opened: Opened) -> Result<(), Failure> {
    if let Some(known) = &kept.known {
        check_known(known, &opened.export)?;
    }
    let (address, export) = (opened.address.to_string(), opened.export.clone());
    match goal {
        Goal::Connect => connect(kept, opened)?,
        Goal::HandOver { .. } => all(kept, &opened)?,
        // Nothing is dead any more, so nothing was passed on.
        Goal::Replace { .. } if replace(kept, &opened)? == 0 => return Ok(()),
        Goal::Replace { .. } => (),
        // Nothing is opened for this.
        Goal::Adopt { .. } => return Ok(()),
    }
    kept.known = Some(export);
    kept.serve(Served { uri, address });
    Ok(())
}

/// What a device does not tell is compared with what was told when it was connected.
fn check_known(known: &Export, export: &Export) -> Result<(), Failure> {
    // What it prefers, a server may tell differently each time: it is a hint.
    let told = |export: &Export| {
        let sizes = export.block_sizes;
        let limits = sizes.map(|sizes| (sizes.minimum, sizes.max_payload));
        (wire::effective(export.flags), limits)
    };
    if told(known) == told(export) {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Refused,
        "comparing the export",
        format!(
            "its flags are {:#x} and its block sizes {:?}; they were {:#x} and {:?}",
            export.flags, export.block_sizes, known.flags, known.block_sizes
        ),
    ))
}

fn connect(kept: &mut Kept, opened: Opened) -> Result<(), Failure> {
    let (config, number) = (&kept.config, opened.sockets.len());
    let (address, export) = (opened.address.clone(), opened.export.clone());
    let mut setup = prepare(opened, config.block_size, config.read_only)?;
    setup.index = config.device;
    setup.timeout = config.timeout;
    setup.dead_conn_timeout = config.dead_conn_timeout;
    setup.backend = config.backend().map(str::to_owned);
    // Dialling takes time, and the kernel does not compare identifiers.
    check_absent(&Kernel::look()?.devices()?, config)?;
    let index = start(&open_family()?, &setup, &export)?;
    kept.forget();
    kept.index = Some(index);
    // If it is gone again, the next look finds that out.
    kept.session = Sysfs::new()
        .device(index)
        .map_or_else(|_| Session::default(), |device| device.session());
    kept.say(&format!(
        "connected /dev/nbd{index} to {address}, {number} {}",
        connections(number)
    ));
    Ok(())
}

/// Somebody else may have connected the device meanwhile.
fn check_absent(devices: &[Device], config: &Config) -> Result<(), Failure> {
    match find(devices, config)? {
        Found::Nothing => Ok(()),
        Found::Device(device) => Err(Failure::new(
            Exit::Failed,
            PASSING,
            format!("{} was connected meanwhile", device.device),
        )),
    }
}

/// Returns how many connections were passed on.
fn replace(kept: &Kept, opened: &Opened) -> Result<usize, Failure> {
    let (kernel, device) = look_again(kept)?;
    let peers = Condition::of(&kernel, &device, &kept.deaths)?.peers;
    check_peers(&peers, &opened.address)?;
    check_export(&kernel, &device, &opened.export)?;
    let dead = count_dead(&kernel, device.index)?;
    // With more sockets than are dead, rnbd may replace stuck ones, if it was told so.
    let number = opened
        .sockets
        .len()
        .min(dead.map_or(usize::MAX, |dead| dead as usize));
    if number == 0 {
        return Ok(0);
    }
    let sockets = opened.sockets.get(..number).unwrap_or_default();
    let change = Change {
        sockets,
        timeout: kept.config.timeout,
        dead_conn_timeout: kept.config.dead_conn_timeout,
    };
    reconfigure(device.index, kept.config.backend(), &change)?;
    let what = if dead.is_some() {
        "replaced"
    } else {
        "offered"
    };
    let (named, address) = (connections(number), &opened.address);
    kept.say(&format!("{what} {number} {named}, to {address}"));
    Ok(number)
}

fn all(kept: &Kept, opened: &Opened) -> Result<(), Failure> {
    let (kernel, device) = look_again(kept)?;
    check_export(&kernel, &device, &opened.export)?;
    let (sockets, drain) = (&opened.sockets, kept.config.drain);
    hand_over(&kernel, &device, None, sockets, drain)?;
    kept.say(&format!(
        "handed {} {} over to {}",
        sockets.len(),
        connections(sockets.len()),
        opened.address
    ));
    Ok(())
}

/// Sets the timeouts of a device.
///
/// # Errors
///
/// The kernel's reason.
pub fn timeouts(index: u32, config: &Config) -> Result<(), Failure> {
    let change = Change {
        sockets: &[],
        timeout: config.timeout,
        dead_conn_timeout: config.dead_conn_timeout,
    };
    reconfigure(index, config.backend(), &change)
}

fn reconfigure(index: u32, backend: Option<&str>, change: &Change<'_>) -> Result<(), Failure> {
    open_family()?
        .reconfigure(index, backend, change)
        .map_err(|error| error.during(PASSING))
}

/// Dialling takes time.
fn look_again(kept: &Kept) -> Result<(Kernel, Device), Failure> {
    let kernel = Kernel::look()?;
    match find(&kernel.devices()?, &kept.config)? {
        Found::Device(device) if kept.is(&device) => Ok((kernel, device)),
        _ => Err(Failure::new(
            Exit::Failed,
            PASSING,
            "the device is gone, or was connected anew meanwhile",
        )),
    }
}

/// Somebody else may have connected the device to another server meanwhile.
fn check_peers(peers: &[String], address: &Address) -> Result<(), Failure> {
    if leads_to(address, peers) {
        return Ok(());
    }
    let what = format!(
        "it is connected to {} meanwhile, and not to {address}",
        peers.join(", ")
    );
    Err(Failure::new(Exit::Failed, PASSING, what))
}

fn connections(number: usize) -> &'static str {
    match number {
        1 => "connection",
        _ => "connections",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::State;
    use crate::negotiate::BlockSizes;

    /// A second one with this identifier would be another device for the same data.
    #[test]
    fn what_was_connected_meanwhile_is_not_connected_twice() {
        let config: Config = toml::from_str("uris = ['nbd://h']\nbackend = 'a'").unwrap();
        let mut device = Device::unused(3);
        device.backend = Some("a".into());
        assert!(check_absent(std::slice::from_ref(&device), &config).is_ok());
        device.state = State::Connected;
        let failure = check_absent(&[device], &config).unwrap_err();
        assert_eq!(failure.exit, Exit::Failed, "it is tried again: {failure}");
    }

    #[test]
    fn what_was_told_before_counts() {
        let known = Export {
            size: 1,
            flags: wire::HAS_FLAGS | 4,
            block_sizes: Some(BlockSizes {
                minimum: 1,
                preferred: 4096,
                max_payload: 1 << 25,
            }),
            ..Export::default()
        };
        let mut other = known.clone();
        // The device tells its size, which may have been changed since.
        other.size = 2;
        other.block_sizes.as_mut().unwrap().preferred = 65536;
        assert!(check_known(&known, &other).is_ok());
        other.block_sizes.as_mut().unwrap().max_payload = 65536;
        assert!(check_known(&known, &other).is_err());
        other = known.clone();
        other.flags = wire::HAS_FLAGS;
        assert!(check_known(&known, &other).is_err());
        other = known.clone();
        other.block_sizes = None;
        assert!(check_known(&known, &other).is_err());
    }

    #[test]
    fn what_came_to_life_meanwhile_counts() {
        let address = Address::Tcp("127.0.0.1:7".parse().unwrap());
        assert!(check_peers(&[], &address).is_ok());
        assert!(check_peers(&["127.0.0.1:7".into()], &address).is_ok());
        assert!(check_peers(&["127.0.0.2:7".into()], &address).is_err());
        let address = Address::Unix("/dev/null".into());
        assert!(check_peers(&["/dev/../dev/null".into()], &address).is_ok());
    }
}
