// SPDX-License-Identifier: GPL-2.0

//! A table of what the devices do, drawn again and again.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stdout};
use std::thread;
use std::time::{Duration, Instant};

use crate::cli::WatchArgs;
use crate::device::{Connection, Device, State};
use crate::failure::Failure;
use crate::kernel::Kernel;
use crate::sysfs::{IoStat, Operations, SECTOR};
use crate::text::{or_dash, say, table};

/// Goes to the terminal's first line, and clears all.
const CLEAR: &str = "\x1b[H\x1b[J";

/// What was seen at one time.
struct Sample {
    at: Instant,
    devices: Vec<(Device, IoStat)>,
    /// The age of the oldest request of each device whose connections are told, in milliseconds.
    oldest: BTreeMap<u32, u64>,
}

impl Sample {
    fn take(kernel: &Kernel) -> Result<Self, Failure> {
        let mut devices = kernel.devices()?;
        devices.retain(|device| device.state != State::Unused);
        let with_stat = |device: Device| {
            let stat = kernel.sysfs.io_stat(device.index)?;
            Some((device, stat))
        };
        Ok(Self {
            at: Instant::now(),
            devices: devices.into_iter().filter_map(with_stat).collect(),
            oldest: oldest(&kernel.connections(None)?.unwrap_or_default()),
        })
    }

    fn stat(&self, index: u32) -> Option<IoStat> {
        let mut devices = self.devices.iter();
        let (_, stat) = devices.find(|(device, _)| device.index == index)?;
        Some(*stat)
    }
}

fn oldest(connections: &[(u32, Connection)]) -> BTreeMap<u32, u64> {
    let mut oldest = BTreeMap::new();
    for (index, connection) in connections {
        if let Some(age) = connection.oldest_ms {
            let of_device = oldest.entry(*index).or_default();
            *of_device = age.max(*of_device);
        }
    }
    oldest
}

/// # Errors
///
/// `NoDevice`: no driver is loaded. Or the kernel's reason.
pub fn run(args: &WatchArgs) -> Result<(), Failure> {
    let redraw = stdout().is_terminal() && !args.once;
    let mut before = Sample::take(&Kernel::look()?)?;
    loop {
        thread::sleep(args.interval);
        // The driver may have been replaced meanwhile.
        let now = Sample::take(&Kernel::look()?)?;
        let text = render(&before, &now);
        if redraw {
            say(&format!("{CLEAR}{text}"));
        } else {
            say(&text);
        }
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

/// What happened between two samples, for a second.
#[derive(Debug, PartialEq)]
struct Rates {
    reads: f64,
    writes: f64,
    /// Everything else: flushes and discards.
    others: f64,
    read_bytes: f64,
    written_bytes: f64,
    /// Milliseconds for a request, if there was one.
    latency: Option<f64>,
    /// Which part of the time there was something to do, in percent.
    busy: f64,
}

/// Counters that have gone back belong to a device that was added again: nothing is known then.
fn rates(before: &IoStat, now: &IoStat, passed: Duration) -> Rates {
    let seconds = passed.as_secs_f64().max(0.001);
    let since = |kind: fn(&IoStat) -> Operations| {
        let (before, now) = (kind(before), kind(now));
        Operations {
            requests: now.requests.saturating_sub(before.requests),
            sectors: now.sectors.saturating_sub(before.sectors),
            ticks: now.ticks.saturating_sub(before.ticks),
        }
    };
    let [reads, writes, discards, flushes] = [
        since(|stat| stat.reads),
        since(|stat| stat.writes),
        since(|stat| stat.discards),
        since(|stat| stat.flushes),
    ];
    let kinds = [reads, writes, discards, flushes];
    let requests: u64 = kinds.iter().map(|kind| kind.requests).sum();
    let ticks: u64 = kinds.iter().map(|kind| kind.ticks).sum();
    let per_second = |count: u64| count as f64 / seconds;
    Rates {
        reads: per_second(reads.requests),
        writes: per_second(writes.requests),
        others: per_second(discards.requests + flushes.requests),
        read_bytes: per_second(reads.sectors.saturating_mul(SECTOR)),
        written_bytes: per_second(writes.sectors.saturating_mul(SECTOR)),
        latency: (requests > 0).then(|| ticks as f64 / requests as f64),
        busy: (per_second(now.busy.saturating_sub(before.busy)) / 10.0).min(100.0),
    }
}

fn render(before: &Sample, now: &Sample) -> String {
    if now.devices.is_empty() {
        return "no device is connected\n".into();
    }
    let passed = now.at.saturating_duration_since(before.at);
    let row = |(device, stat): &(Device, IoStat)| {
        // A device that is new has done all that it has done meanwhile.
        let earlier = before.stat(device.index).unwrap_or_default();
        let rates = rates(&earlier, stat, passed);
        let alive = match (device.alive, device.connections) {
            (Some(alive), Some(all)) => format!("{alive}/{all}"),
            _ => "-".into(),
        };
        [
            device.name(),
            device.state.name().into(),
            alive,
            format!("{:.0}", rates.reads),
            format!("{:.0}", rates.writes),
            format!("{:.0}", rates.others),
            format!("{:.1}", rates.read_bytes / 1e6),
            format!("{:.1}", rates.written_bytes / 1e6),
            stat.in_flight.to_string(),
            or_dash(rates.latency.map(|time| format!("{time:.2}"))),
            or_dash(now.oldest.get(&device.index)),
            format!("{:.0}", rates.busy),
        ]
    };
    let head = [
        "DEVICE",
        "STATE",
        "ALIVE",
        "READ/S",
        "WRITE/S",
        "OTHER/S",
        "READ MB/S",
        "WRITE MB/S",
        "IN FLIGHT",
        "LATENCY MS",
        "OLDEST MS",
        "BUSY %",
    ];
    table(head, &now.devices.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(requests: u64, sectors: u64, ticks: u64) -> IoStat {
        IoStat {
            reads: Operations {
                requests,
                sectors,
                ticks,
            },
            busy: ticks,
            ..IoStat::default()
        }
    }

    #[test]
    fn rates_are_differences() {
        let found = rates(
            &stat(10, 80, 5),
            &stat(30, 240, 45),
            Duration::from_millis(500),
        );
        assert_eq!(found.reads, 40.0);
        assert_eq!(found.read_bytes, 163_840.0);
        assert_eq!(found.latency, Some(2.0));
        assert_eq!(found.busy, 8.0);
        assert_eq!((found.writes, found.others), (0.0, 0.0));
    }

    #[test]
    fn counters_that_go_back_are_nothing() {
        let found = rates(&stat(30, 240, 45), &stat(10, 80, 5), Duration::ZERO);
        assert_eq!((found.reads, found.latency, found.busy), (0.0, None, 0.0));
    }

    #[test]
    fn a_new_device_is_in_the_table() {
        let at = Instant::now();
        let before = Sample {
            at,
            devices: Vec::new(),
            oldest: BTreeMap::new(),
        };
        let mut device = Device::unused(1);
        device.state = State::Connected;
        let now = Sample {
            at: at + Duration::from_secs(1),
            devices: vec![(device, stat(10, 16, 10))],
            oldest: BTreeMap::from([(1, 7)]),
        };
        let text = render(&before, &now);
        let line = text.lines().nth(1).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        let expected = [
            "nbd1",
            "connected",
            "-",
            "10",
            "0",
            "0",
            "0.0",
            "0.0",
            "0",
            "1.00",
            "7",
            "1",
        ];
        assert_eq!(words, expected);
    }
}
