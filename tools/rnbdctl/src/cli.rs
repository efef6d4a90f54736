// SPDX-License-Identifier: GPL-2.0

//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, value_parser};
use clap_complete::Shell;

use crate::structured::Choice;
use crate::tls::TlsArgs;
use crate::uri::NbdUri;

const STATUSES: &str = "\
Exit status:
  0  It worked.
  1  It failed, for a reason that has no number of its own.
  2  The command line is wrong.
  3  The device is in use.
  4  A privilege is missing.
  5  There is no such device, or it is not connected, or no driver is loaded.
  6  No NBD server was reached.
  7  The server has refused what it was asked for.";

/// Connects, lists and watches network block devices.
///
/// It works with rnbd and with nbd.ko. What only rnbd tells is missing with nbd.ko, and the commands say
/// so.
#[derive(Parser)]
#[command(name = "rnbdctl", version, after_help = STATUSES, after_long_help = STATUSES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Connect a device to an export, and print the device's path
    Connect(ConnectArgs),
    /// List the exports of a server
    Exports(ExportsArgs),
    /// List the devices that are connected
    List(ListArgs),
    /// Show a device and its connections
    Show(ShowArgs),
    /// Disconnect a device
    Disconnect(DisconnectArgs),
    /// Change the size of a connected device
    Resize(ResizeArgs),
    /// Replace the dead connections of a device
    Reconnect(ReconnectArgs),
    /// Replace connections that are alive, without an error
    ///
    /// The new ones are in use when the command ends. The old ones are sent no other request, and a disconnect when
    /// the server has answered what it has. It takes rnbd, and servers that allow several connections
    /// (NBD_FLAG_CAN_MULTI_CONN).
    Handover(HandoverArgs),
    /// Keep devices connected
    ///
    /// It connects the devices that are not connected, and replaces connections that have died. SIGHUP has it read
    /// the configuration again and hand all connections over to the server that it names. SIGTERM ends it and leaves
    /// the devices connected, unless --disconnect is given. It ends as well when somebody else has disconnected all
    /// its devices.
    Keep(KeepArgs),
    /// Print what happens to the devices, as it happens
    Events(EventsArgs),
    /// Print statistics in the text format of Prometheus
    Stats,
    /// Show what the devices do, again and again
    Watch(WatchArgs),
    /// Print a completion script for a shell
    Completion { shell: Shell },
    /// Print the manual page of the program, or of one of its commands
    Man { command: Option<String> },
}

/// How a server is reached.
#[derive(Args, Clone, Debug)]
pub struct ServerArgs {
    /// Give up a server that takes longer for a step: resolving, connecting, greeting, an option
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub connect_timeout: Duration,
    #[command(flatten)]
    pub tls: TlsArgs,
}

#[derive(Args)]
pub struct ConnectArgs {
    /// nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH or nbd+vsock://CID[:PORT]/EXPORT; with TLS,
    /// nbds:// in place of nbd://
    #[arg(value_parser = NbdUri::parse)]
    pub uri: NbdUri,
    /// Which device, such as /dev/nbd0 [default: an unused one]
    #[arg(value_parser = device)]
    pub device: Option<u32>,
    /// How many connections to make [default: 1; if the server allows several, one for each processor, at
    /// most 4]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=64))]
    pub connections: Option<u32>,
    /// Fail a request, or send it on another connection, if the server takes longer for it [default: wait
    /// without limit]
    #[arg(long, value_name = "SECONDS", value_parser = value_parser!(u64).range(1..=86400))]
    pub timeout: Option<u64>,
    /// Have requests wait for new connections when all are lost, for this long [default: fail at once]
    #[arg(long, value_name = "SECONDS", value_parser = value_parser!(u64).range(1..=31_536_000))]
    pub dead_conn_timeout: Option<u64>,
    /// The device's block size [default: the server's minimum, at least 512]
    #[arg(long, value_name = "BYTES", value_parser = block_size)]
    pub block_size: Option<u32>,
    /// An identifier that later commands for the device have to repeat
    #[arg(long, value_name = "ID", value_parser = backend)]
    pub backend: Option<String>,
    /// Make the device read-only, whatever the server allows
    #[arg(long)]
    pub read_only: bool,
    /// Have reads answered by structured replies: zeroes need not be sent, and the server can say in words what has
    /// failed. "auto": if the server and the driver have them
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    pub structured_replies: Choice,
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(Args)]
pub struct ExportsArgs {
    /// As for "connect"; nbds+unix and nbds+vsock, too. An export's name limits the list to that export
    #[arg(value_parser = NbdUri::parse)]
    pub uri: NbdUri,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// List unused devices, too
    #[arg(long)]
    pub all: bool,
}

#[derive(Args)]
pub struct ShowArgs {
    /// Such as /dev/nbd0, nbd0 or 0
    #[arg(value_parser = device)]
    pub device: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct DisconnectArgs {
    /// Such as /dev/nbd0, nbd0 or 0
    #[arg(value_parser = device)]
    pub device: u32,
    /// Disconnect the device only if it has this identifier
    #[arg(long, value_name = "ID", value_parser = backend)]
    pub backend: Option<String>,
}

#[derive(Args)]
pub struct ResizeArgs {
    /// Such as /dev/nbd0, nbd0 or 0
    #[arg(value_parser = device)]
    pub device: u32,
    /// The new size
    #[arg(
        required_unless_present = "from_server",
        conflicts_with = "from_server"
    )]
    #[arg(value_parser = value_parser!(u64).range(1..=i64::MAX as u64))]
    pub bytes: Option<u64>,
    /// Take the size that the server tells of this export now
    #[arg(long, value_name = "URI", value_parser = NbdUri::parse)]
    pub from_server: Option<NbdUri>,
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(Args)]
pub struct ReconnectArgs {
    /// Such as /dev/nbd0, nbd0 or 0
    #[arg(value_parser = device)]
    pub device: u32,
    /// The export, which must be the one that the device has
    #[arg(value_parser = NbdUri::parse)]
    pub uri: NbdUri,
    /// How many connections to make at most [default: as many as are dead; with nbd.ko, which does not tell, 1]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=64))]
    pub connections: Option<u32>,
    /// Change the timeout of requests, as of "connect"
    #[arg(long, value_name = "SECONDS", value_parser = value_parser!(u64).range(1..=86400))]
    pub timeout: Option<u64>,
    /// Change how long requests wait for new connections, as of "connect"
    #[arg(long, value_name = "SECONDS", value_parser = value_parser!(u64).range(1..=31_536_000))]
    pub dead_conn_timeout: Option<u64>,
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(Args)]
pub struct HandoverArgs {
    /// Such as /dev/nbd0, nbd0 or 0
    #[arg(value_parser = device)]
    pub device: u32,
    /// The export, which must be the one that the device has: on another server, or on the same
    #[arg(value_parser = NbdUri::parse)]
    pub uri: NbdUri,
    /// Replace only the connection at this place [default: all]
    #[arg(long, value_name = "N")]
    pub connection: Option<u32>,
    /// Give the old server so much time to answer what is in flight. The rest is sent again, and the old server may
    /// still execute it: with a time that is too short, stop it before you rely on the data
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = drain)]
    pub drain: Duration,
    /// Wait until the old connections have ended, so that the old server is not needed any more
    #[arg(long)]
    pub wait: bool,
    #[command(flatten)]
    pub server: ServerArgs,
}

#[derive(Args)]
pub struct KeepArgs {
    /// The devices' configurations: NAME for /etc/rnbd/NAME.toml, or a path [default: all in /etc/rnbd]
    #[arg(value_name = "CONFIG")]
    pub configs: Vec<PathBuf>,
    /// At SIGTERM and SIGINT, disconnect the devices, except those that are mounted or otherwise claimed
    #[arg(long)]
    pub disconnect: bool,
}

#[derive(Args)]
pub struct EventsArgs {
    /// Print JSON, one object in each line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct WatchArgs {
    /// How long to wait from one table to the next
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub interval: Duration,
    /// Print one table, after one interval, and end
    #[arg(long)]
    pub once: bool,
}

/// The index of a device, of its path, its name or its number.
///
/// # Errors
///
/// It is none of these.
pub fn device(text: &str) -> Result<u32, String> {
    let name = text.strip_prefix("/dev/").unwrap_or(text);
    let index = name.strip_prefix("nbd").unwrap_or(name).parse();
    index.map_err(|_| "a device is called /dev/nbdN".into())
}

/// A time that makes sense to wait for.
fn seconds(text: &str) -> Result<Duration, String> {
    check_seconds(text.parse().map_err(|_| "it is not a number")?)
}

/// A time that makes sense to wait for.
///
/// # Errors
///
/// It does not.
pub fn check_seconds(seconds: f64) -> Result<Duration, String> {
    if !(0.01..=86400.0).contains(&seconds) {
        return Err("it must be from 0.01 to 86400".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// How long a connection may drain: not at all, or up to a day.
fn drain(text: &str) -> Result<Duration, String> {
    match text {
        "0" => Ok(Duration::ZERO),
        text => seconds(text),
    }
}

fn block_size(text: &str) -> Result<u32, String> {
    check_block_size(text.parse().map_err(|_| "it is not a number")?)
}

/// A block size that a driver may take.
///
/// # Errors
///
/// None does.
pub fn check_block_size(size: u32) -> Result<u32, String> {
    if !size.is_power_of_two() || size < 512 {
        return Err("it must be a power of two, at least 512".into());
    }
    Ok(size)
}

/// An identifier that sysfs can show.
///
/// # Errors
///
/// It cannot.
pub fn backend(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 1024 || text.contains(char::is_control) {
        return Err("it must have 1 to 1024 bytes, and no control characters".into());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_makes_sense() {
        Cli::command().debug_assert();
    }

    #[test]
    fn devices_have_three_names() {
        for text in ["/dev/nbd7", "nbd7", "7"] {
            assert_eq!(device(text), Ok(7));
        }
        for text in ["/dev/nbd", "/dev/nbd7p1", "sda", "-1", "/dev/nbd/7"] {
            assert!(device(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_limited() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "nan", "inf", "1e9", "x"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn draining_can_be_left_out() {
        assert_eq!(drain("0"), Ok(Duration::ZERO));
        assert_eq!(drain("1.5"), Ok(Duration::from_millis(1500)));
        assert!(drain("-1").is_err());
    }

    #[test]
    fn a_size_or_a_server() {
        let parse =
            |args: &[&str]| Cli::try_parse_from([&["rnbdctl", "resize", "0"], args].concat());
        assert!(parse(&["4096"]).is_ok());
        assert!(parse(&["--from-server", "nbd://h/x"]).is_ok());
        assert!(parse(&[]).is_err());
        assert!(parse(&["4096", "--from-server", "nbd://h/x"]).is_err());
        assert!(parse(&["0"]).is_err());
    }

    #[test]
    fn a_certificate_takes_its_key() {
        let parse = |args: &[&str]| {
            Cli::try_parse_from([&["rnbdctl", "exports", "nbds://h/x"], args].concat())
        };
        assert!(parse(&["--tls-cert", "c", "--tls-key", "k"]).is_ok());
        assert!(parse(&["--tls-cert", "c"]).is_err());
        assert!(parse(&["--tls-key", "k"]).is_err());
    }
}
