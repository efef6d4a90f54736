// SPDX-License-Identifier: GPL-2.0

//! Gives a connected device new connections: in place of those that are alive, by the family "rnbd", or in
//! place of dead ones, by the family "nbd".

use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use crate::cli::{HandoverArgs, ReconnectArgs};
use crate::connect::open_family;
use crate::device::{Connection, Device, Interface, State};
use crate::failure::{Exit, Failure};
use crate::family_nbd::Change;
use crate::family_rnbd::Handover;
use crate::kernel::Kernel;
use crate::negotiate::Export;
use crate::opening::open;
use crate::same;
use crate::structured::Wanted;
use crate::sysfs::Driver;
use crate::text::say;
use crate::wire;

const PASSING: &str = "passing the connections to the device";

/// How often is looked whether old connections have ended.
const PAUSE: Duration = Duration::from_millis(100);

/// # Errors
///
/// The step that failed, and why.
pub fn run(args: &HandoverArgs) -> Result<(), Failure> {
    let kernel = Kernel::look()?;
    check_driver(&kernel)?;
    let device = connected(&kernel, args.device)?;
    check_allowed(&device)?;
    let all = device.connections.unwrap_or(1);
    if let Some(place) = args.connection.filter(|place| *place >= all) {
        let what = format!("it has no connection {place}, but {all} from 0 on");
        return Err(Failure::new(Exit::Usage, &device.device, what));
    }
    let number = if args.connection.is_some() { 1 } else { all };
    let structured = Wanted::by(&device);
    let opened = open(&args.uri, Some(number), &args.server, structured)?;
    check_export(&kernel, &device, &opened.export)?;
    hand_over(
        &kernel,
        &device,
        args.connection,
        &opened.sockets,
        args.drain,
    )?;
    say(&format!(
        "{}: {number} of {all} connections handed over\n",
        device.device
    ));
    if args.wait {
        wait_until_drained(&kernel, args.device)?;
    }
    Ok(())
}

/// # Errors
///
/// The step that failed, and why.
pub fn reconnect(args: &ReconnectArgs) -> Result<(), Failure> {
    let kernel = Kernel::look()?;
    let device = connected(&kernel, args.device)?;
    check_reconfigurable(&device)?;
    let dead = count_dead(&kernel, args.device)?;
    let number = match (args.connections, dead) {
        (Some(wanted), Some(dead)) => wanted.min(dead),
        (None, Some(dead)) => dead,
        // As many as are dead are taken, and nobody tells how many that was.
        (wanted, None) => wanted.unwrap_or(1),
    };
    if number == 0 {
        say(&format!("{}: no connection is dead\n", device.device));
        return Ok(());
    }
    let structured = Wanted::by(&device);
    let opened = open(&args.uri, Some(number), &args.server, structured)?;
    check_export(&kernel, &device, &opened.export)?;
    let change = Change {
        sockets: &opened.sockets,
        timeout: args.timeout,
        dead_conn_timeout: args.dead_conn_timeout,
    };
    open_family()?
        .reconfigure(args.device, device.backend.as_deref(), &change)
        .map_err(|error| error.during(PASSING))?;
    say(&match dead {
        Some(_) => format!("{}: {number} connections replaced\n", device.device),
        None => format!("{}: {number} connections offered\n", device.device),
    });
    Ok(())
}

/// Only rnbd hands over.
///
/// # Errors
///
/// `Failed`: the driver is nbd.ko.
pub fn check_driver(kernel: &Kernel) -> Result<(), Failure> {
    match kernel.driver {
        Driver::Rnbd => Ok(()),
        Driver::Nbd => Err(Failure::new(
            Exit::Failed,
            "driver",
            "nbd.ko replaces no connections that are alive: it has no family \"rnbd\"",
        )
        .advise("\"rnbdctl reconnect\" replaces those that are dead.")),
    }
}

/// A device that has a session which goes on.
fn connected(kernel: &Kernel, index: u32) -> Result<Device, Failure> {
    let device = kernel.device(index)?;
    match device.state {
        State::Connected | State::Lost => Ok(device),
        _ => Err(
            Failure::new(Exit::NoDevice, &device.device, "it is not connected")
                .advise("\"rnbdctl list\" shows what is connected."),
        ),
    }
}

/// The kernel says so, too, but only after a server was bothered.
///
/// # Errors
///
/// `Refused`: the device was connected to a server that does not allow several connections.
pub fn check_allowed(device: &Device) -> Result<(), Failure> {
    let allowed = |flags: u16| flags & wire::CAN_MULTI_CONN != 0;
    if device.flag_bits.is_none_or(allowed) {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Refused,
        &device.device,
        "its server does not allow several connections (NBD_FLAG_CAN_MULTI_CONN)",
    )
    .advise(
        "A flush on a new connection need not cover what was written on the old one. Stop the server, and \
         replace the dead connections (\"rnbdctl reconnect\").",
    ))
}

/// # Errors
///
/// `Failed`: the device was connected by ioctls.
pub fn check_reconfigurable(device: &Device) -> Result<(), Failure> {
    if device.interface != Some(Interface::Ioctl) {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Failed,
        &device.device,
        "it was connected by ioctls, and only the program that did so can reconnect it",
    )
    .advise("\"nbd-client -L -persist\" does."))
}

/// Whether an export is that of a device; see [`same::check`].
///
/// # Errors
///
/// `Refused`: it is another one.
pub fn check_export(kernel: &Kernel, device: &Device, export: &Export) -> Result<(), Failure> {
    same::check(device, kernel.sysfs.request_limit(device.index), export)
}

/// Replaces one connection or all.
///
/// # Errors
///
/// The kernel's reason.
pub fn hand_over(
    kernel: &Kernel,
    device: &Device,
    connection: Option<u32>,
    sockets: &[OwnedFd],
    drain: Duration,
) -> Result<(), Failure> {
    kernel.hand_over(&Handover {
        index: device.index,
        connection,
        sockets,
        drain,
        backend: device.backend.as_deref(),
    })
}

/// How many connections can be replaced; `None` if the driver does not tell.
///
/// # Errors
///
/// The kernel's reason.
pub fn count_dead(kernel: &Kernel, index: u32) -> Result<Option<u32>, Failure> {
    let connections = kernel.connections(Some(index))?;
    Ok(connections.map(|found| {
        let dead = in_use(&found).filter(|connection| !connection.is_alive());
        dead.count() as u32
    }))
}

/// The connections that have a place. What a handover has replaced is listed after its successor.
pub fn in_use(found: &[(u32, Connection)]) -> impl Iterator<Item = &Connection> {
    let mut last = None;
    found.iter().filter_map(move |(_, connection)| {
        let is_first = last != Some(connection.index);
        last = Some(connection.index);
        is_first.then_some(connection)
    })
}

/// Until then the old server is needed.
fn wait_until_drained(kernel: &Kernel, index: u32) -> Result<(), Failure> {
    loop {
        let found = kernel.connections(Some(index))?.unwrap_or_default();
        if in_use(&found).count() == found.len() {
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ConnectionState;

    fn connection(index: u32, state: ConnectionState) -> (u32, Connection) {
        (0, Connection::new(index, state))
    }

    #[test]
    fn what_was_replaced_is_not_in_use() {
        let found = [
            connection(0, ConnectionState::Alive),
            connection(0, ConnectionState::Draining),
            connection(1, ConnectionState::Draining),
            connection(2, ConnectionState::Dead),
        ];
        let used: Vec<_> = in_use(&found).map(|c| (c.index, c.is_alive())).collect();
        assert_eq!(used, [(0, true), (1, false), (2, false)]);
    }

    #[test]
    fn without_the_flag() {
        let mut device = Device::unused(0);
        assert!(check_allowed(&device).is_ok(), "the kernel will tell");
        device.flag_bits = Some(wire::HAS_FLAGS | wire::CAN_MULTI_CONN);
        assert!(check_allowed(&device).is_ok());
        device.flag_bits = Some(wire::HAS_FLAGS);
        assert_eq!(check_allowed(&device).unwrap_err().exit, Exit::Refused);
    }

    #[test]
    fn by_ioctls() {
        let mut device = Device::unused(0);
        assert!(check_reconfigurable(&device).is_ok());
        device.interface = Some(Interface::Netlink);
        assert!(check_reconfigurable(&device).is_ok());
        device.interface = Some(Interface::Ioctl);
        assert!(check_reconfigurable(&device).is_err());
    }
}
