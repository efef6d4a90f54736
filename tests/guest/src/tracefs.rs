// SPDX-License-Identifier: GPL-2.0

//! The kernel's trace events, through tracefs.

use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::harness::skip;

const ROOT: &str = "/sys/kernel/tracing";

/// The trace events of the loaded driver. None is on any more when this is dropped.
pub struct Tracefs;

impl Tracefs {
    /// Skips the test if the kernel has no trace events.
    pub fn new() -> Self {
        if !Path::new(ROOT).exists() {
            skip("the kernel has no trace events");
        }
        if !Path::new(ROOT).join("events").exists() {
            mount("tracefs", ROOT, "tracefs", MountFlags::empty(), None).expect("to mount tracefs");
        }
        let tracefs = Self;
        tracefs.clear();
        tracefs
    }

    fn write(&self, path: &str, text: &str) {
        fs::write(format!("{ROOT}/{path}"), text)
            .unwrap_or_else(|error| panic!("{path} does not take {text:?}: {error}"));
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(format!("{ROOT}/{path}"))
            .unwrap_or_else(|error| panic!("{path} cannot be read: {error}"))
    }

    /// The names of the events, in order.
    pub fn events(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(format!("{ROOT}/events/nbd")) else {
            return Vec::new();
        };
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        let names = entries.map(|entry| name(entry.expect("an event")));
        let mut names: Vec<_> = names.filter(|name| name.starts_with("nbd_")).collect();
        names.sort();
        names
    }

    /// The description of an event, without its number.
    pub fn format(&self, event: &str) -> String {
        let text = self.read(&format!("events/nbd/{event}/format"));
        let lines = text.lines().filter(|line| !line.starts_with("ID: "));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Switches an event on or off; all, if there is no name.
    pub fn switch(&self, event: Option<&str>, on: bool) {
        let directory = event.map_or(String::new(), |name| format!("/{name}"));
        let number = if on { "1" } else { "0" };
        self.write(&format!("events/nbd{directory}/enable"), number);
    }

    /// Adds a trigger to an event, or removes it, as the guide does.
    pub fn trigger(&self, event: &str, trigger: &str) {
        let path = format!("{ROOT}/events/nbd/{event}/trigger");
        let mut file = fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .expect(&path);
        std::io::Write::write_all(&mut file, trigger.as_bytes())
            .unwrap_or_else(|error| panic!("{path} does not take {trigger:?}: {error}"));
    }

    /// The histograms of an event: the lines with entries.
    pub fn histogram(&self, event: &str) -> Vec<String> {
        let text = self.read(&format!("events/nbd/{event}/hist"));
        let lines = text.lines().filter(|line| line.starts_with('{'));
        lines.map(str::to_owned).collect()
    }

    /// Forgets what was traced.
    pub fn clear(&self) {
        self.write("trace", "");
    }

    /// What was traced: the names of events, and their text, in order.
    pub fn lines(&self) -> Vec<(String, String)> {
        let text = self.read("trace");
        let parsed = text.lines().filter_map(|line| {
            let (_, event) = line.split_once(": nbd_")?;
            let (name, text) = event.split_once(": ")?;
            Some((format!("nbd_{name}"), text.to_owned()))
        });
        parsed.collect()
    }

    /// The text of each event `name` that was traced, in order.
    pub fn lines_of(&self, name: &str) -> Vec<String> {
        let lines = self.lines().into_iter();
        let wanted = lines.filter(|(event, _)| event == name);
        wanted.map(|(_, text)| text).collect()
    }
}

impl Drop for Tracefs {
    fn drop(&mut self) {
        // The module may be gone.
        let _ = fs::write(format!("{ROOT}/events/nbd/enable"), "0");
        let _ = fs::write(format!("{ROOT}/trace"), "");
    }
}
