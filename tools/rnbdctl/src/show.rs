// SPDX-License-Identifier: GPL-2.0

//! Lists the devices, and shows one with its connections.

use serde::Serialize;

use crate::cli::{ListArgs, ShowArgs};
use crate::device::{Connection, Device, State};
use crate::failure::Failure;
use crate::kernel::Kernel;
use crate::text::{duration, or_dash, plain, say, say_json, size, table};

/// What programs read.
#[derive(Serialize)]
struct Report<'a> {
    driver: &'a str,
    /// What the driver does not tell, if anything.
    not_known: Option<&'a str>,
    devices: Vec<Detailed>,
}

#[derive(Serialize)]
struct Detailed {
    #[serde(flatten)]
    device: Device,
    /// null if they are not known.
    connection_list: Option<Vec<Connection>>,
}

/// # Errors
///
/// `NoDevice`: no driver is loaded. Or the kernel's reason.
pub fn list(args: &ListArgs) -> Result<(), Failure> {
    let kernel = Kernel::look()?;
    let all = kernel.devices()?;
    let total = all.len();
    let used = |device: &Device| args.all || device.state != State::Unused;
    let devices: Vec<Device> = all.into_iter().filter(used).collect();
    if args.json {
        return report(&kernel, devices, None);
    }
    if devices.is_empty() {
        eprintln!("rnbdctl: no device is connected; {total} are unused");
        return Ok(());
    }
    say(&render_list(&devices));
    tell_what_is_not_known(&kernel);
    Ok(())
}

/// # Errors
///
/// `NoDevice`: there is no such device, or no driver is loaded. Or the kernel's reason.
pub fn show(args: &ShowArgs) -> Result<(), Failure> {
    let kernel = Kernel::look()?;
    let device = kernel.device(args.device)?;
    if args.json {
        return report(&kernel, vec![device], Some(args.device));
    }
    let told = kernel.connections_with_tls(Some(args.device))?;
    let are_hidden = told.is_none() && kernel.not_known().is_none();
    let told = told.unwrap_or_default().into_iter();
    let connections: Vec<Connection> = told.map(|(_, found)| found).collect();
    say(&render_device(&device));
    if !connections.is_empty() {
        say(&format!("\n{}", render_connections(&connections)));
    }
    if are_hidden {
        eprintln!("rnbdctl: connections are told to root only");
    }
    tell_what_is_not_known(&kernel);
    Ok(())
}

fn tell_what_is_not_known(kernel: &Kernel) {
    if let Some(what) = kernel.not_known() {
        eprintln!("rnbdctl: {what}");
    }
}

/// Prints devices as JSON, with the connections of `index` or of all.
fn report(kernel: &Kernel, devices: Vec<Device>, index: Option<u32>) -> Result<(), Failure> {
    let connections = kernel.connections_with_tls(index)?;
    let detailed = |device: Device| {
        let of_it = |list: &Vec<(u32, Connection)>| {
            let of_it = list.iter().filter(|(owner, _)| *owner == device.index);
            of_it.map(|(_, connection)| connection.clone()).collect()
        };
        Detailed {
            connection_list: connections.as_ref().map(of_it),
            device,
        }
    };
    say_json(&Report {
        driver: kernel.driver.name(),
        not_known: kernel.not_known(),
        devices: devices.into_iter().map(detailed).collect(),
    })
}

pub fn render_list(devices: &[Device]) -> String {
    let row = |device: &Device| {
        let alive = match (device.alive, device.connections) {
            (Some(alive), Some(all)) => format!("{alive}/{all}"),
            _ => "-".into(),
        };
        [
            device.device.clone(),
            device.state.name().into(),
            size(device.size),
            or_dash(device.block_size),
            or_dash(device.read_only.map(|is| if is { "ro" } else { "rw" })),
            alive,
            or_dash(device.pid),
            or_dash(device.backend.as_deref().map(plain)),
        ]
    };
    let head = [
        "DEVICE", "STATE", "SIZE", "BLOCK", "MODE", "ALIVE", "PID", "BACKEND",
    ];
    table(head, &devices.iter().map(row).collect::<Vec<_>>())
}

fn render_device(device: &Device) -> String {
    let time = |time: Option<u64>| match time {
        Some(0) => "none".into(),
        time => or_dash(time.map(duration)),
    };
    let connections = match (device.connections, device.alive) {
        (Some(all), Some(alive)) => format!("{all}, {alive} alive"),
        _ => "-".into(),
    };
    let lines = [
        ("state", device.state.name().to_owned()),
        (
            "size",
            format!("{} bytes ({})", device.size, size(device.size)),
        ),
        ("block size", or_dash(device.block_size)),
        ("read-only", or_dash(device.read_only.map(yes_or_no))),
        (
            "server flags",
            or_dash(device.flags.as_ref().map(|flags| flags.join(","))),
        ),
        (
            "structured replies",
            or_dash(device.structured_replies.map(yes_or_no)),
        ),
        ("backend", or_dash(device.backend.as_deref().map(plain))),
        (
            "connected by",
            or_dash(device.interface.map(|interface| interface.name())),
        ),
        ("pid", or_dash(device.pid)),
        ("timeout", time(device.timeout_ms)),
        ("dead connection timeout", time(device.dead_conn_timeout_ms)),
        ("connections", connections),
    ];
    let mut text = format!("{}\n", device.device);
    for (name, value) in lines {
        text += &format!("  {name:24}{value}\n");
    }
    text
}

fn yes_or_no(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

fn render_connections(connections: &[Connection]) -> String {
    let row = |connection: &Connection| {
        let is_long = |time: &u64| *time > 0;
        let silent = connection.silent_ms.filter(is_long);
        let oldest = connection.oldest_ms.filter(is_long);
        [
            connection.index.to_string(),
            connection.state.name().into(),
            or_dash(connection.peer.as_deref()),
            protocol(connection),
            or_dash(connection.in_flight),
            or_dash(connection.requests),
            or_dash(connection.errors),
            or_dash(connection.bytes_sent.map(size)),
            or_dash(connection.bytes_received.map(size)),
            or_dash(connection.reconnects),
            or_dash(connection.idle_ms.map(duration)),
            or_dash(silent.map(duration)),
            or_dash(oldest.map(duration)),
        ]
    };
    let head = [
        "CONNECTION",
        "STATE",
        "PEER",
        "PROTOCOL",
        "IN FLIGHT",
        "REQUESTS",
        "ERRORS",
        "SENT",
        "RECEIVED",
        "RECONNECTS",
        "IDLE",
        "SILENT",
        "OLDEST",
    ];
    table(head, &connections.iter().map(row).collect::<Vec<_>>())
}

/// The protocol of a connection, and what is on top of it.
fn protocol(connection: &Connection) -> String {
    let protocol = connection.protocol.unwrap_or("-");
    match &connection.tls {
        Some(tls) => format!("{protocol}+tls-{}/{}", tls.version, tls.cipher),
        None if connection.ulp => format!("{protocol}+ulp"),
        None => protocol.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ConnectionState;
    use crate::netlink::tls::Tls;

    #[test]
    fn what_is_not_known_is_a_dash() {
        let mut device = Device::unused(3);
        device.state = State::Connected;
        device.size = 1 << 30;
        device.backend = Some("a\x1bb".into());
        let text = render_list(&[device.clone()]);
        let line = text.lines().nth(1).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let expected = [
            "/dev/nbd3",
            "connected",
            "1",
            "GiB",
            "-",
            "-",
            "-",
            "-",
            "a\\u{1b}b",
        ];
        assert_eq!(words, expected);
        let text = render_device(&device);
        assert!(
            text.contains("  size                    1073741824 bytes (1 GiB)\n"),
            "{text}"
        );
        assert!(text.contains("  timeout                 -\n"), "{text}");
    }

    #[test]
    fn what_is_on_top_of_a_connection() {
        let mut connection = Connection::new(0, ConnectionState::Alive);
        assert_eq!(protocol(&connection), "-");
        connection.protocol = Some("tcp");
        assert_eq!(protocol(&connection), "tcp");
        connection.ulp = true;
        assert_eq!(protocol(&connection), "tcp+ulp");
        connection.tls = Some(Tls {
            version: "1.3",
            cipher: "aes-gcm-256",
        });
        assert_eq!(protocol(&connection), "tcp+tls-1.3/aes-gcm-256");
    }

    #[test]
    fn json_has_a_null_for_what_is_not_known() {
        let detailed = Detailed {
            device: Device::unused(3),
            connection_list: None,
        };
        let json = serde_json::to_value(&detailed).unwrap();
        assert_eq!(json["device"], "/dev/nbd3");
        assert_eq!(json["state"], "unused");
        assert!(json["timeout_ms"].is_null());
        assert!(json["connection_list"].is_null());
    }
}
