// SPDX-License-Identifier: GPL-2.0

//! The text format of Prometheus, version 0.0.4.

use std::fmt;

#[derive(Clone, Copy)]
pub enum Kind {
    Counter,
    Gauge,
}

/// A metric and its samples. Without samples it is not printed at all.
pub struct Metric {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    /// Labels, as they are printed, and a value.
    samples: Vec<(String, f64)>,
}

impl Metric {
    pub fn new(name: &'static str, help: &'static str, kind: Kind) -> Self {
        Self {
            name,
            help,
            kind,
            samples: Vec::new(),
        }
    }

    pub fn add(&mut self, labels: &[(&str, &str)], value: impl Into<f64>) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
            .collect();
        self.samples.push((labels.join(","), value.into()));
    }
}

/// In a label's value three characters have another meaning.
fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.samples.is_empty() {
            return Ok(());
        }
        let kind = match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        writeln!(f, "# HELP {} {}", self.name, self.help)?;
        writeln!(f, "# TYPE {} {kind}", self.name)?;
        for (labels, value) in &self.samples {
            writeln!(f, "{}{{{labels}}} {value}", self.name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric() {
        let mut metric = Metric::new("m_total", "What it is.", Kind::Counter);
        assert_eq!(metric.to_string(), "");
        metric.add(&[("a", "x\\y\"z\n"), ("b", "ü")], 1);
        metric.add(&[("a", "")], 0.5);
        assert_eq!(
            metric.to_string(),
            "# HELP m_total What it is.\n# TYPE m_total counter\n\
             m_total{a=\"x\\\\y\\\"z\\n\",b=\"ü\"} 1\nm_total{a=\"\"} 0.5\n"
        );
    }

    #[test]
    fn large_numbers_keep_their_digits() {
        let mut metric = Metric::new("m", "Bytes.", Kind::Gauge);
        metric.add(&[("a", "b")], (1_u64 << 53) as f64);
        assert!(metric.to_string().ends_with(" 9007199254740992\n"));
    }
}
