// SPDX-License-Identifier: GPL-2.0

//! Prints events as they come.

use std::time::SystemTime;

use humantime::format_rfc3339_millis;
use serde::Serialize;

use crate::cli::EventsArgs;
use crate::device::{Device, State};
use crate::failure::{Exit, Failure};
use crate::kernel::Kernel;
use crate::listen::{Event, Events, Heard};
use crate::show::render_list;
use crate::sysfs::Driver;
use crate::text::{plain, say};

/// A line for programs: an event, or what has become of the devices when some were missed.
#[derive(Serialize)]
struct Line<T: Serialize> {
    time: String,
    #[serde(flatten)]
    what: T,
}

#[derive(Serialize)]
struct Missed {
    event: &'static str,
    devices: Vec<Device>,
}

/// # Errors
///
/// `NoDevice`: no driver is loaded. Or the kernel's reason.
pub fn run(args: &EventsArgs) -> Result<(), Failure> {
    let mut events = Events::open()?;
    tell_what_is_heard(&events);
    loop {
        for heard in events.wait()? {
            match heard {
                Heard::Event(event) => print(&event, args.json)?,
                Heard::Missed => print_missed(args.json)?,
                Heard::Changed => {
                    tell_what_is_heard(&events);
                    if events.family().is_some() {
                        print_missed(args.json)?;
                    }
                }
            }
        }
    }
}

/// Tells who waits for it that nothing is missed from now on.
fn tell_what_is_heard(events: &Events) {
    match events.family() {
        None => return eprintln!("rnbdctl: no driver is loaded any more; waiting for one"),
        Some(Driver::Nbd) => eprintln!(
            "rnbdctl: nbd.ko tells only that a connection is dead, not which one, nor why, nor anything else"
        ),
        Some(Driver::Rnbd) => (),
    }
    eprintln!("rnbdctl: listening");
}

fn now() -> String {
    format_rfc3339_millis(SystemTime::now()).to_string()
}

fn print(event: &Event, json: bool) -> Result<(), Failure> {
    if json {
        return say_line(event);
    }
    say(&format!("{} {}\n", now(), describe(event)));
    Ok(())
}

/// One line, so that each can be parsed by itself.
fn say_line(what: impl Serialize) -> Result<(), Failure> {
    let line = Line { time: now(), what };
    let json = serde_json::to_string(&line)
        .map_err(|error| Failure::new(Exit::Failed, "making JSON", error))?;
    say(&format!("{json}\n"));
    Ok(())
}

fn describe(event: &Event) -> String {
    let number = |name: &str, value: Option<u64>| value.map(|value| format!(" {name}={value}"));
    let quoted = |name: &str, words: Option<&str>| {
        words.map(|words| format!(" {name}=\"{}\"", plain(words)))
    };
    let details = [
        number("connection", event.connection.map(u64::from)),
        event.reason.map(|reason| format!(" reason={reason}")),
        number("errno", event.errno.map(u64::from)),
        number("reconnects", event.reconnects.map(u64::from)),
        number("size", event.size),
        number("block-size", event.block_size.map(u64::from)),
        event
            .flags
            .as_ref()
            .map(|flags| format!(" flags={}", flags.join(","))),
        number("connections", event.connections.map(u64::from)),
        event
            .interface
            .map(|interface| format!(" interface={}", interface.name())),
        number("pid", event.pid.map(u64::from)),
        number("error", event.error.map(u64::from)),
        event.command.map(|command| format!(" command={command}")),
        number("offset", event.offset),
        number("length", event.length.map(u64::from)),
        number("error-offset", event.error_offset),
        quoted("text", event.text.as_deref()),
        quoted("backend", event.backend.as_deref()),
    ];
    let details: String = details.into_iter().flatten().collect();
    format!("nbd{} {}{details}", event.index, event.kind.name())
}

/// What was missed can be seen in the devices only.
fn print_missed(json: bool) -> Result<(), Failure> {
    let mut devices = match Kernel::look() {
        Ok(kernel) => kernel.devices()?,
        // The driver is gone again.
        Err(failure) if failure.exit == Exit::NoDevice => return Ok(()),
        Err(failure) => return Err(failure),
    };
    devices.retain(|device| device.state != State::Unused);
    if json {
        return say_line(Missed {
            event: "missed",
            devices,
        });
    }
    say(&format!(
        "{} events were missed; the devices are now:\n{}",
        now(),
        render_list(&devices)
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listen::Kind;

    fn event() -> Event {
        Event {
            connection: Some(0),
            reason: Some("timed-out"),
            reconnects: Some(2),
            backend: Some("a\nb".into()),
            ..Event::new(Kind::ConnectionDead, 1)
        }
    }

    #[test]
    fn for_people() {
        let line = describe(&event());
        let expected =
            "nbd1 connection-dead connection=0 reason=timed-out reconnects=2 backend=\"a\\nb\"";
        assert_eq!(line, expected);
    }

    #[test]
    fn for_programs() {
        let line = Line {
            time: "t".into(),
            what: event(),
        };
        let json = serde_json::to_string(&line).unwrap();
        assert!(json.starts_with("{\"time\":\"t\",\"event\":\"connection-dead\",\"index\":1,"));
        assert!(!json.contains('\n') && !json.contains("size"), "{json}");
    }
}
