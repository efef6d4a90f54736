// SPDX-License-Identifier: GPL-2.0

//! Gives connections that were dialled to the kernel.

use std::collections::BTreeSet;

use super::config::Config;
use super::find::{Condition, Found, Goal, find};
use super::kept::{Kept, Target};
use super::peers::leads_to;
use super::served::Served;
use crate::connect::{open_family, prepare, start};
use crate::device::{Device, Session, State};
use crate::dial::Address;
use crate::failure::{Exit, Failure};
use crate::family_nbd::Change;
use crate::handover::{check_export, count_dead, hand_over, in_use};
use crate::kernel::Kernel;
use crate::negotiate::{BlockSizes, Export};
use crate::opening::Opened;
use crate::same::differences;
use crate::sysfs::Sysfs;
use crate::uri::NbdUri;
use crate::wire;

const PASSING: &str = "passing the connections to the device";

/// How many unused devices are tried. What is in use may also be a socket.
const ENOUGH: usize = 4;

/// Passes on what was opened with `uri`, if it is the device's export.
///
/// # Errors
///
/// `Refused`: it is another export. Or the kernel's reason.
pub fn on(kept: &mut Kept, goal: &Goal, uri: NbdUri, opened: Opened) -> Result<(), Failure> {
    if let Some(known) = &kept.known {
        check_known(known, &opened.export)?;
    }
    let connections = match goal {
        Goal::Connect | Goal::HandOver { .. } => Some(opened.sockets.len() as u32),
        _ => kept.served.as_ref().and_then(|served| served.connections),
    };
    let target = Target {
        export: opened.export.clone(),
        served: Served {
            uri,
            address: opened.address.to_string(),
            connections,
        },
    };
    match goal {
        Goal::Connect => {
            connect(kept, opened)?;
            kept.lead_to(target);
            Ok(())
        }
        Goal::HandOver { .. } => all(kept, &opened, target),
        Goal::Replace { .. } => replace(kept, &opened, target),
        // Nothing is opened for this.
        Goal::Adopt { .. } => Ok(()),
    }
}

/// Which connection has each place of a device: its index, and how many were there before. `None`: nobody tells.
type Places = Option<Vec<(u32, Option<u32>)>>;

fn places(kernel: &Kernel, index: u32) -> Places {
    let found = kernel.connections(Some(index)).ok()??;
    let places = in_use(&found).map(|connection| (connection.index, connection.reconnects));
    Some(places.collect())
}

/// Has connections replaced, and records where they lead. The kernel takes one after the other, and what it has taken
/// stays if it fails then.
///
/// `all`: none of the others is in use.
///
/// # Errors
///
/// Those of `pass`, and whether it may have replaced any.
fn record(
    kept: &mut Kept,
    target: Target,
    all: bool,
    look: impl Fn() -> Places,
    pass: impl FnOnce(&Kept) -> Result<(), Failure>,
) -> Result<(), (Failure, bool)> {
    if all {
        // This program may be killed before it can say so.
        kept.lead_to(target.clone());
    }
    let before = look();
    let Err(failure) = pass(kept) else {
        kept.lead_to(target);
        return Ok(());
    };
    let has_changed = before.is_none() || look() != before;
    if has_changed {
        kept.lead_to(target);
        // Nobody knows how many of those that were counted are replaced.
        kept.deaths.more = true;
    }
    Err((failure, has_changed))
}

/// What a device does not tell is compared with what was told when it was connected.
fn check_known(known: &Export, export: &Export) -> Result<(), Failure> {
    let told = |export: &Export| Export {
        flags: wire::effective(export.flags),
        // What it prefers, a server may tell differently each time: it is a hint.
        block_sizes: export.block_sizes.map(|sizes| BlockSizes {
            preferred: 0,
            ..sizes
        }),
        ..Export::default()
    };
    let Some(differences) = differences(&told(known), &told(export)) else {
        return Ok(());
    };
    let what = format!("it is not as it was: {differences}");
    Err(Failure::new(Exit::Refused, "comparing the export", what))
}

fn connect(kept: &mut Kept, opened: Opened) -> Result<(), Failure> {
    let (config, number) = (&kept.config, opened.sockets.len());
    let (address, export) = (opened.address.clone(), opened.export.clone());
    let mut setup = prepare(opened, config.block_size, config.read_only)?;
    setup.timeout = config.timeout;
    setup.dead_conn_timeout = config.dead_conn_timeout;
    setup.backend = config.backend().map(str::to_owned);
    // Dialling takes time, and the kernel does not compare identifiers.
    let devices = Kernel::look()?.devices()?;
    check_absent(&devices, config)?;
    let family = open_family()?;
    let index = first_free(candidates(&devices, config, &kept.reserved), |index| {
        setup.index = index;
        start(&family, &setup, &export)
    })?;
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

/// The devices to be tried, one after the other; `None`: the kernel chooses one. It does not know which ones other
/// configurations name.
fn candidates(devices: &[Device], config: &Config, reserved: &BTreeSet<u32>) -> Vec<Option<u32>> {
    if config.device.is_some() || reserved.is_empty() {
        return vec![config.device];
    }
    let is_named = |index: &u32| reserved.contains(index);
    let unused = devices
        .iter()
        .filter(|device| device.state == State::Unused)
        .map(|device| device.index)
        .filter(|index| !is_named(index));
    let exists = |index: &u32| devices.iter().any(|device| device.index == *index);
    // It is added.
    let new = (0..).find(|index| !exists(index) && !is_named(index));
    unused.take(ENOUGH).chain(new).map(Some).collect()
}

/// Connects the first one that is not in use: a program may have one open that has no session.
fn first_free(
    candidates: Vec<Option<u32>>,
    mut connect: impl FnMut(Option<u32>) -> Result<u32, Failure>,
) -> Result<u32, Failure> {
    let mut busy = None;
    for index in candidates {
        match connect(index) {
            Err(failure) if failure.exit == Exit::Busy => busy = Some(failure),
            outcome => return outcome,
        }
    }
    Err(busy.unwrap_or_else(|| Failure::new(Exit::Busy, PASSING, "no device is free")))
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

fn replace(kept: &mut Kept, opened: &Opened, target: Target) -> Result<(), Failure> {
    let (kernel, device) = look_again(kept)?;
    let condition = Condition::of(&kernel, &device, &kept.deaths)?;
    check_peers(&condition.peers, &opened.address)?;
    check_export(&kernel, &device, &opened.export)?;
    let dead = count_dead(&kernel, device.index)?;
    // With more sockets than are dead, rnbd may replace stuck ones, if it was told so.
    let number = opened
        .sockets
        .len()
        .min(dead.map_or(usize::MAX, |dead| dead as usize));
    if number == 0 {
        // Nothing is dead any more.
        return Ok(());
    }
    let sockets = opened.sockets.get(..number).unwrap_or_default();
    let pass = |kept: &Kept| {
        let change = Change {
            sockets,
            timeout: kept.config.timeout,
            dead_conn_timeout: kept.config.dead_conn_timeout,
        };
        reconfigure(device.index, kept.config.backend(), &change)
    };
    let all = matches!(condition.goal, Some(Goal::Replace { all: true, .. }));
    let look = || places(&kernel, device.index);
    record(kept, target, all, look, pass).map_err(|(failure, _)| failure)?;
    let what = if dead.is_some() {
        "replaced"
    } else {
        "offered"
    };
    let (named, address) = (connections(number), &opened.address);
    kept.say(&format!("{what} {number} {named}, to {address}"));
    Ok(())
}

fn all(kept: &mut Kept, opened: &Opened, target: Target) -> Result<(), Failure> {
    let (kernel, device) = look_again(kept)?;
    check_export(&kernel, &device, &opened.export)?;
    let sockets = &opened.sockets;
    let pass = |kept: &Kept| hand_over(&kernel, &device, None, sockets, kept.config.drain);
    let look = || places(&kernel, device.index);
    record(kept, target, false, look, pass).map_err(
        |(failure, has_changed)| match has_changed {
            // It is to be tried again: a part of the connections leads to the old server.
            true => Failure::new(Exit::Busy, "handing over some of the connections", failure),
            false => failure,
        },
    )?;
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
    match kept.find(&kernel.devices()?)? {
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

    /// The kernel would choose the first one.
    #[test]
    fn what_another_configuration_names_is_left_to_that() {
        let config = |more: &str| -> Config {
            toml::from_str(&format!("uris = ['nbd://h']\n{more}")).unwrap()
        };
        let mut devices = [0, 1, 2, 3].map(Device::unused);
        devices[2].state = State::Connected;
        let reserved = BTreeSet::from([0, 4]);
        let chosen = |more: &str| candidates(&devices, &config(more), &reserved);
        assert_eq!(chosen(""), [Some(1), Some(3), Some(5)]);
        assert_eq!(chosen("device = 'nbd2'"), [Some(2)]);
        let free = BTreeSet::new();
        assert_eq!(candidates(&devices, &config(""), &free), [None]);
        // Somebody has opened the first one.
        let busy = || Failure::new(Exit::Busy, PASSING, "in use");
        let connect = |index: Option<u32>| match index {
            Some(1) => Err(busy()),
            other => Ok(other.unwrap()),
        };
        assert_eq!(first_free(chosen(""), connect).unwrap(), 3);
        let failure = first_free(chosen(""), |_| Err(busy())).unwrap_err();
        assert_eq!(failure.exit, Exit::Busy);
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
        let told = check_known(&known, &other).unwrap_err().to_string();
        assert!(
            told.ends_with("it is not as it was: largest request 65536 bytes, not 33554432 bytes"),
            "{told}"
        );
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

    fn kept(name: &str) -> Kept {
        let path = std::env::temp_dir().join(format!("rnbdctl-{name}-{}.toml", std::process::id()));
        std::fs::write(&path, "uris = ['nbd://127.0.0.1:1/old']").unwrap();
        let mut kept = Kept::new(path.clone()).unwrap();
        std::fs::remove_file(path).unwrap();
        kept.index = Some(u32::MAX);
        kept.served = Some(target("old").served);
        kept
    }

    fn target(export: &str) -> Target {
        let uri = NbdUri::parse(&format!("nbd://127.0.0.1:1/{export}")).unwrap();
        Target {
            export: Export::of(1, 1),
            served: Served {
                uri,
                address: "127.0.0.1:1".into(),
                connections: None,
            },
        }
    }

    /// The next lost connection must lead to where the first one that was taken leads.
    #[test]
    fn what_was_taken_before_an_error_counts() {
        let failed = |_: &Kept| Err(Failure::new(Exit::Failed, PASSING, "no memory"));
        let served = |kept: &Kept| kept.served.clone().unwrap().uri.export;
        let places = |reconnects: u32| Some(vec![(0, Some(reconnects)), (1, Some(0))]);
        let mut kept = kept("taken");
        let (_, has_changed) =
            record(&mut kept, target("new"), false, || places(0), failed).unwrap_err();
        assert_eq!((served(&kept).as_str(), has_changed), ("old", false));
        // The first one was replaced.
        let calls = std::cell::Cell::new(0);
        let look = || places(calls.replace(1));
        let (_, has_changed) = record(&mut kept, target("new"), false, look, failed).unwrap_err();
        assert_eq!((served(&kept).as_str(), has_changed), ("new", true));
        assert!(kept.known.is_some() && kept.deaths.more);
        // nbd.ko does not tell.
        let (_, has_changed) = record(&mut kept, target("x"), false, || None, failed).unwrap_err();
        assert_eq!((served(&kept).as_str(), has_changed), ("x", true));
    }

    /// The program may be killed while the kernel replaces them.
    #[test]
    fn where_all_are_dead_it_is_recorded_before() {
        let mut kept = kept("before");
        let pass = |kept: &Kept| {
            assert_eq!(kept.served.as_ref().unwrap().uri.export, "new");
            Ok(())
        };
        let look = || Some(Vec::new());
        record(&mut kept, target("new"), true, look, pass).unwrap();
        let pass = |kept: &Kept| {
            assert_eq!(kept.served.as_ref().unwrap().uri.export, "new");
            Ok(())
        };
        record(&mut kept, target("next"), false, look, pass).unwrap();
        assert_eq!(kept.served.unwrap().uri.export, "next");
    }
}
