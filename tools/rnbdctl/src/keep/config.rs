// SPDX-License-Identifier: GPL-2.0

//! The configuration of a device: `/etc/rnbd/NAME.toml`.
//!
//! Its keys are described in packaging/rnbd.toml.5.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::Error;
use serde::{Deserialize, Deserializer};

use crate::cli;
use crate::connect::check_transport;
use crate::failure::{Exit, Failure};
use crate::structured::Choice;
use crate::sysfs::Driver;
use crate::uri::NbdUri;

/// Where the configurations are.
const DIRECTORY: &str = "/etc/rnbd";

const DAY: u64 = 86_400;
const YEAR: u64 = 31_536_000;

/// What is to be kept connected, and how.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Exports of the same data, in the order in which they are tried.
    #[serde(deserialize_with = "uris")]
    pub uris: Vec<NbdUri>,
    /// `None`: the kernel chooses an unused device.
    #[serde(default, deserialize_with = "device")]
    pub device: Option<u32>,
    /// The identifier of the backend, by which the device is found again. Without one in the file it is the
    /// name of the file; empty: the device has none, and is found by its index.
    #[serde(default, deserialize_with = "backend")]
    backend: Option<String>,
    #[serde(default, deserialize_with = "number::<_, 1, 64>")]
    connections: Option<u64>,
    /// In seconds.
    #[serde(default, deserialize_with = "number::<_, 1, DAY>")]
    pub timeout: Option<u64>,
    /// In seconds; 0: requests fail at once when all connections are lost.
    #[serde(
        default = "dead_conn_timeout",
        deserialize_with = "number::<_, 0, YEAR>"
    )]
    pub dead_conn_timeout: Option<u64>,
    #[serde(default, deserialize_with = "block_size")]
    pub block_size: Option<u32>,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default)]
    pub structured_replies: Choice,
    #[serde(default = "connect_timeout", deserialize_with = "time")]
    pub connect_timeout: Duration,
    #[serde(default = "max_retry_delay", deserialize_with = "time")]
    pub max_retry_delay: Duration,
    /// How long connections that are handed over may drain.
    #[serde(default = "drain", deserialize_with = "time_or_none")]
    pub drain: Duration,
}

fn dead_conn_timeout() -> Option<u64> {
    Some(300)
}

fn connect_timeout() -> Duration {
    Duration::from_secs(10)
}

fn max_retry_delay() -> Duration {
    Duration::from_secs(10)
}

fn drain() -> Duration {
    Duration::from_secs(30)
}

impl Config {
    /// Reads a configuration.
    ///
    /// # Errors
    ///
    /// `Usage`: it cannot be read, or makes no sense; with the line, where it has one.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |what: &dyn std::fmt::Display| {
            Failure::new(Exit::Usage, path.display().to_string(), what)
                .advise("rnbd.toml(5) describes the file.")
        };
        let text = fs::read_to_string(path).map_err(|error| wrong(&error))?;
        let config = Self::parse(&text).map_err(|words| wrong(&words.trim_end()))?;
        if config.backend.as_deref() == Some("") && config.device.is_none() {
            return Err(wrong(&"without an identifier, it must name the device"));
        }
        config.check_transports(path, None)?;
        Ok(Self {
            backend: config.backend.or_else(|| Some(name(path))),
            ..config
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    /// Whether the driver, if it is known, can reach all servers.
    ///
    /// # Errors
    ///
    /// `Usage`: it cannot reach one, and never will.
    pub fn check_transports(&self, path: &Path, driver: Option<Driver>) -> Result<(), Failure> {
        self.uris.iter().try_for_each(|uri| {
            check_transport(uri, driver)
                .map_err(|failure| Failure::new(Exit::Usage, path.display().to_string(), failure))
        })
    }

    /// The identifier, if the device has one.
    pub fn backend(&self) -> Option<&str> {
        self.backend.as_deref().filter(|name| !name.is_empty())
    }

    /// How many connections to make.
    pub fn connections(&self) -> Option<u32> {
        self.connections.map(|number| number as u32)
    }
}

/// Whether each is about another device.
///
/// # Errors
///
/// `Usage`: two would fight for one.
pub fn check_distinct<'a>(configs: impl Iterator<Item = &'a Config>) -> Result<(), Failure> {
    let (mut backends, mut devices) = (BTreeSet::new(), BTreeSet::new());
    for config in configs {
        let twice = match (config.backend(), config.device) {
            (Some(backend), _) if !backends.insert(backend) => {
                format!("several have the identifier \"{backend}\"")
            }
            (_, Some(device)) if !devices.insert(device) => {
                format!("several have the device /dev/nbd{device}")
            }
            _ => continue,
        };
        return Err(Failure::new(Exit::Usage, "configurations", twice));
    }
    Ok(())
}

/// The name of a device's configuration.
pub fn name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or(path.as_os_str());
    stem.to_string_lossy().into_owned()
}

/// The files that the command line names, or all that there are.
///
/// # Errors
///
/// `Usage`: there is none, or the directory cannot be read.
pub fn find(named: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    if !named.is_empty() {
        return Ok(named.iter().map(|path| locate(path)).collect());
    }
    let wrong = |what: &dyn std::fmt::Display| Failure::new(Exit::Usage, DIRECTORY, what);
    let entries = fs::read_dir(DIRECTORY).map_err(|error| wrong(&error))?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .collect();
    found.sort();
    if found.is_empty() {
        return Err(wrong(&"there is no configuration of a device (NAME.toml)"));
    }
    Ok(found)
}

/// A name alone is that of a file in the directory.
fn locate(path: &Path) -> PathBuf {
    let is_name = path.components().count() == 1 && path.extension().is_none();
    match path.to_str().filter(|_| is_name) {
        Some(name) => Path::new(DIRECTORY).join(format!("{name}.toml")),
        None => path.to_owned(),
    }
}

fn uris<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<NbdUri>, D::Error> {
    let texts = Vec::<String>::deserialize(source)?;
    if texts.is_empty() {
        return Err(D::Error::custom("at least one URI is needed"));
    }
    let parse = |text: &String| {
        NbdUri::parse(text).map_err(|error| D::Error::custom(format!("\"{text}\": {error}")))
    };
    texts.iter().map(parse).collect()
}

fn device<'de, D: Deserializer<'de>>(source: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(source)?;
    cli::device(&text).map(Some).map_err(D::Error::custom)
}

fn backend<'de, D: Deserializer<'de>>(source: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(source)?;
    if text.is_empty() {
        return Ok(Some(text));
    }
    cli::backend(&text).map(Some).map_err(D::Error::custom)
}

fn block_size<'de, D: Deserializer<'de>>(source: D) -> Result<Option<u32>, D::Error> {
    let size = u32::deserialize(source)?;
    cli::check_block_size(size)
        .map(Some)
        .map_err(D::Error::custom)
}

fn number<'de, D: Deserializer<'de>, const LOW: u64, const HIGH: u64>(
    source: D,
) -> Result<Option<u64>, D::Error> {
    let number = u64::deserialize(source)?;
    if !(LOW..=HIGH).contains(&number) {
        return Err(D::Error::custom(format!("it must be from {LOW} to {HIGH}")));
    }
    Ok(Some(number))
}

fn time<'de, D: Deserializer<'de>>(source: D) -> Result<Duration, D::Error> {
    cli::check_seconds(f64::deserialize(source)?).map_err(D::Error::custom)
}

fn time_or_none<'de, D: Deserializer<'de>>(source: D) -> Result<Duration, D::Error> {
    match f64::deserialize(source)? {
        0.0 => Ok(Duration::ZERO),
        seconds => cli::check_seconds(seconds).map_err(D::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str, words: &[&str]) {
        let said = Config::parse(text).unwrap_err();
        for words in words {
            assert!(said.contains(words), "{words:?} is not in {said}");
        }
    }

    #[test]
    fn the_least_that_there_can_be() {
        let config = Config::parse("uris = [\"nbd://h/x\"]").unwrap();
        assert_eq!(config.uris, [NbdUri::parse("nbd://h/x").unwrap()]);
        assert_eq!((config.device, config.backend()), (None, None));
        assert_eq!((config.connections(), config.timeout), (None, None));
        assert_eq!(config.dead_conn_timeout, Some(300));
        assert_eq!(config.drain, Duration::from_secs(30));
        assert!(!config.read_only);
    }

    #[test]
    fn all_that_there_can_be() {
        let text = "
            uris = ['nbd://a/x', 'nbd+unix:///?socket=/s']
            device = '/dev/nbd3'
            backend = 'image'
            connections = 2
            timeout = 30
            dead-conn-timeout = 0
            block-size = 4096
            read-only = true
            connect-timeout = 2.5
            max-retry-delay = 1
            drain = 0
        ";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.uris.len(), 2);
        assert_eq!((config.device, config.backend()), (Some(3), Some("image")));
        assert_eq!((config.connections(), config.timeout), (Some(2), Some(30)));
        assert_eq!(config.dead_conn_timeout, Some(0));
        assert_eq!((config.block_size, config.read_only), (Some(4096), true));
        assert_eq!(config.connect_timeout, Duration::from_millis(2500));
        assert_eq!(config.max_retry_delay, Duration::from_secs(1));
        assert_eq!(config.drain, Duration::ZERO);
    }

    #[test]
    fn errors_name_the_line() {
        let uris = "uris = [\"nbd://h/x\"]\n";
        let wrong = |line: &str, words: &str| refused(&format!("{uris}{line}"), &["line 2", words]);
        wrong("conections = 2", "conections");
        wrong("connections = 65", "from 1 to 64");
        wrong("connections = 'x'", "invalid type");
        wrong("timeout = 0", "from 1 to 86400");
        wrong("block-size = 1000", "power of two");
        wrong("device = 'sda'", "/dev/nbdN");
        wrong("backend = \"a\\nb\"", "control characters");
        wrong("connect-timeout = 0", "from 0.01");
        wrong("drain = -1", "from 0.01");
        wrong("read-only = 1", "invalid type");
        refused("uris = []", &["line 1", "at least one"]);
        refused("uris = ['http://h']", &["line 1", "http://h", "scheme"]);
        refused("", &["uris"]);
    }

    #[test]
    fn the_file_names_the_backend() {
        let path = std::env::temp_dir().join(format!("rnbdctl-{}.toml", std::process::id()));
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            Config::read(&path)
        };
        let config = read("uris = [\"nbd://h/x\"]").unwrap();
        assert_eq!(config.backend(), Some(name(&path).as_str()));
        let config = read("uris = [\"nbd://h/x\"]\nbackend = \"\"\ndevice = \"nbd0\"").unwrap();
        assert_eq!(config.backend(), None);
        let failure = read("uris = [\"nbds+unix:///?socket=/s\"]").unwrap_err();
        assert_eq!(failure.exit, Exit::Usage, "{failure}");
        let failure = read("uris = [\"nbd://h/x\"]\nbackend = \"\"").unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        fs::remove_file(&path).unwrap();
        assert!(Config::read(&path).is_err());
    }

    #[test]
    fn what_no_driver_can_do() {
        let check = |uri: &str, driver| {
            let config = Config::parse(&format!("uris = ['{uri}']")).unwrap();
            config.check_transports(Path::new("x.toml"), driver)
        };
        assert!(check("nbd+vsock://2/", None).is_ok());
        assert!(check("nbd+vsock://2/", Some(Driver::Rnbd)).is_ok());
        let failure = check("nbd+vsock://2/", Some(Driver::Nbd)).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("x.toml"), "{failure}");
        assert!(check("nbds+vsock://2/", Some(Driver::Rnbd)).is_err());
    }

    #[test]
    fn no_two_for_one_device() {
        let distinct = |lines: [&str; 2]| {
            let configs = lines.map(|line| Config::parse(&format!("uris = ['nbd://h']\n{line}")));
            check_distinct(configs.map(Result::unwrap).iter()).is_ok()
        };
        assert!(distinct(["backend = 'a'", "backend = 'b'"]));
        assert!(!distinct(["backend = 'a'", "backend = 'a'"]));
        assert!(!distinct([
            "backend = 'a'\ndevice = 'nbd1'",
            "backend = ''\ndevice = 'nbd1'"
        ]));
        assert!(distinct([
            "backend = ''\ndevice = 'nbd0'",
            "backend = ''\ndevice = 'nbd1'"
        ]));
    }

    #[test]
    fn names_and_paths() {
        let located = |path: &str| locate(Path::new(path)).display().to_string();
        assert_eq!(located("data"), "/etc/rnbd/data.toml");
        assert_eq!(located("./data"), "./data");
        assert_eq!(located("data.toml"), "data.toml");
        assert_eq!(located("/x/data.conf"), "/x/data.conf");
    }
}
