// SPDX-License-Identifier: GPL-2.0

//! Statistics in the text format of Prometheus, for its node exporter's text files or a small server.

mod format;

use crate::device::{Connection, ConnectionState, Device, State};
use crate::failure::Failure;
use crate::kernel::Kernel;
use crate::sysfs::{IoStat, SECTOR};
use crate::text::say;

use format::{Kind, Metric};

/// # Errors
///
/// `NoDevice`: no driver is loaded. Or the kernel's reason.
pub fn run() -> Result<(), Failure> {
    let kernel = Kernel::look()?;
    let mut devices = kernel.devices()?;
    devices.retain(|device| device.state != State::Unused);
    let connections = kernel.connections(None)?.unwrap_or_default();
    let stats: Vec<(String, IoStat)> = devices
        .iter()
        .filter_map(|device| Some((device.name(), kernel.sysfs.io_stat(device.index)?)))
        .collect();
    let mut driver = Metric::new(
        "rnbd_driver_info",
        "The driver that is loaded.",
        Kind::Gauge,
    );
    driver.add(&[("driver", kernel.driver.name())], 1);
    let mut metrics = vec![driver];
    metrics.extend(of_devices(&devices));
    metrics.extend(of_operations(&stats));
    metrics.extend(of_connections(&connections));
    say(&metrics.iter().map(ToString::to_string).collect::<String>());
    Ok(())
}

/// A gauge of each device that has a value.
fn gauge<T: Into<f64>>(
    name: &'static str,
    help: &'static str,
    devices: &[Device],
    value: impl Fn(&Device) -> Option<T>,
) -> Metric {
    let mut metric = Metric::new(name, help, Kind::Gauge);
    for device in devices {
        if let Some(value) = value(device) {
            metric.add(&[("device", &device.name())], value.into());
        }
    }
    metric
}

fn of_devices(devices: &[Device]) -> Vec<Metric> {
    let mut info = Metric::new(
        "rnbd_device_info",
        "What does not change while a device is connected.",
        Kind::Gauge,
    );
    let mut states = Metric::new(
        "rnbd_device_state",
        "1 for the device's state, else 0.",
        Kind::Gauge,
    );
    for device in devices {
        let name = device.name();
        let interface = device.interface.map_or("", |interface| interface.name());
        let backend = device.backend.as_deref().unwrap_or("");
        let labels = [
            ("device", name.as_str()),
            ("backend", backend),
            ("interface", interface),
        ];
        info.add(&labels, 1);
        for state in State::IN_SESSION {
            let labels = [("device", name.as_str()), ("state", state.name())];
            states.add(&labels, u8::from(state == device.state));
        }
    }
    vec![
        info,
        states,
        gauge(
            "rnbd_device_size_bytes",
            "The device's size.",
            devices,
            |d| Some(d.size as f64),
        ),
        gauge(
            "rnbd_device_connections",
            "How many connections the device has, dead ones among them.",
            devices,
            |d| d.connections,
        ),
        gauge(
            "rnbd_device_connections_alive",
            "How many of the device's connections are alive.",
            devices,
            |d| d.alive,
        ),
    ]
}

/// What the block layer has counted.
fn of_operations(stats: &[(String, IoStat)]) -> Vec<Metric> {
    let counter = |name, help| Metric::new(name, help, Kind::Counter);
    let mut requests = counter(
        "rnbd_device_requests_total",
        "How many requests the device has completed, by kind.",
    );
    let mut bytes = counter(
        "rnbd_device_bytes_total",
        "How many bytes these requests were about, by kind.",
    );
    let mut seconds = counter(
        "rnbd_device_request_seconds_total",
        "How long these requests took, all together, by kind.",
    );
    let mut busy = counter(
        "rnbd_device_busy_seconds_total",
        "For how long the device had something to do.",
    );
    let mut in_flight = Metric::new(
        "rnbd_device_in_flight",
        "How many requests the device works on.",
        Kind::Gauge,
    );
    for (device, stat) in stats {
        for (kind, operations) in [
            ("read", stat.reads),
            ("write", stat.writes),
            ("discard", stat.discards),
            ("flush", stat.flushes),
        ] {
            let labels = [("device", device.as_str()), ("kind", kind)];
            requests.add(&labels, operations.requests as f64);
            seconds.add(&labels, operations.ticks as f64 / 1000.0);
            if kind != "flush" {
                bytes.add(&labels, operations.sectors.saturating_mul(SECTOR) as f64);
            }
        }
        let labels = [("device", device.as_str())];
        busy.add(&labels, stat.busy as f64 / 1000.0);
        in_flight.add(&labels, stat.in_flight as f64);
    }
    vec![requests, bytes, seconds, busy, in_flight]
}

/// What the driver has counted, where it tells.
fn of_connections(connections: &[(u32, Connection)]) -> Vec<Metric> {
    type Value = fn(&Connection) -> Option<f64>;
    let metrics: [(&str, &str, Kind, Value); 11] = [
        (
            "rnbd_connection_alive",
            "Whether requests are sent on the connection.",
            Kind::Gauge,
            |c| Some(f64::from(c.state == ConnectionState::Alive)),
        ),
        (
            "rnbd_connection_in_flight",
            "How many requests were sent and not answered.",
            Kind::Gauge,
            |c| Some(c.in_flight? as f64),
        ),
        (
            "rnbd_connection_requests_total",
            "How many requests were sent.",
            Kind::Counter,
            |c| Some(c.requests? as f64),
        ),
        (
            "rnbd_connection_replies_total",
            "How many replies were received.",
            Kind::Counter,
            |c| Some(c.replies? as f64),
        ),
        (
            "rnbd_connection_errors_total",
            "How many replies had an error.",
            Kind::Counter,
            |c| Some(c.errors? as f64),
        ),
        (
            "rnbd_connection_sent_bytes_total",
            "How many bytes were sent.",
            Kind::Counter,
            |c| Some(c.bytes_sent? as f64),
        ),
        (
            "rnbd_connection_received_bytes_total",
            "How many bytes were received.",
            Kind::Counter,
            |c| Some(c.bytes_received? as f64),
        ),
        (
            "rnbd_connection_reconnects_total",
            "How often the connection was replaced.",
            Kind::Counter,
            |c| c.reconnects.map(f64::from),
        ),
        (
            "rnbd_connection_idle_seconds",
            "The time since anything was received.",
            Kind::Gauge,
            |c| Some(c.idle_ms? as f64 / 1000.0),
        ),
        (
            "rnbd_connection_silent_seconds",
            "For how long the server has owed replies and been silent.",
            Kind::Gauge,
            |c| Some(c.silent_ms? as f64 / 1000.0),
        ),
        (
            "rnbd_connection_oldest_request_seconds",
            "The age of the oldest request in flight, 0 if there is none.",
            Kind::Gauge,
            |c| Some(c.oldest_ms? as f64 / 1000.0),
        ),
    ];
    let metric = |(name, help, kind, value): (_, _, _, Value)| {
        let mut metric = Metric::new(name, help, kind);
        for (device, connection) in connections {
            let (device, index) = (format!("nbd{device}"), connection.index.to_string());
            if let Some(value) = value(connection) {
                metric.add(&[("device", &device), ("connection", &index)], value);
            }
        }
        metric
    };
    metrics.into_iter().map(metric).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_units() {
        let stat = IoStat {
            in_flight: 3,
            busy: 1500,
            reads: crate::sysfs::Operations {
                requests: 7,
                sectors: 8,
                ticks: 250,
            },
            ..IoStat::default()
        };
        let text: String = of_operations(&[("nbd0".into(), stat)])
            .iter()
            .map(ToString::to_string)
            .collect();
        for line in [
            "rnbd_device_requests_total{device=\"nbd0\",kind=\"read\"} 7",
            "rnbd_device_bytes_total{device=\"nbd0\",kind=\"read\"} 4096",
            "rnbd_device_request_seconds_total{device=\"nbd0\",kind=\"read\"} 0.25",
            "rnbd_device_busy_seconds_total{device=\"nbd0\"} 1.5",
            "rnbd_device_in_flight{device=\"nbd0\"} 3",
            "rnbd_device_requests_total{device=\"nbd0\",kind=\"flush\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("bytes_total{device=\"nbd0\",kind=\"flush\"}"));
    }

    #[test]
    fn what_is_not_known_has_no_sample() {
        let mut device = Device::unused(0);
        device.state = State::Connected;
        let text: String = of_devices(&[device])
            .iter()
            .map(ToString::to_string)
            .collect();
        assert!(!text.contains("rnbd_device_connections"), "{text}");
        assert!(text.contains("rnbd_device_state{device=\"nbd0\",state=\"connected\"} 1\n"));
        assert!(text.contains("rnbd_device_state{device=\"nbd0\",state=\"lost\"} 0\n"));
    }
}
