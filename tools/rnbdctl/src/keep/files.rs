// SPDX-License-Identifier: GPL-2.0

//! The names of the files of what is kept.

use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

use super::config::Config;

/// Where the files are, two for each identifier. They stay when the program ends: only the lock counts.
const DIRECTORY: &str = "/run/rnbd";

/// How much of an identifier is in the name of its file, in bytes: three letters stand for one byte, and there may be
/// no more than 255. For a longer one, a hash of all of it follows.
const IDENTIFIER: usize = 64;

/// The file that is locked. The names of identifiers and those of devices are told apart by their endings.
pub fn path_of_lock(config: &Config) -> PathBuf {
    let name = match (config.backend(), config.device) {
        (Some(backend), _) => {
            let bytes = backend.as_bytes().iter().take(IDENTIFIER);
            let mut name: String = bytes.map(|byte| letters(*byte)).collect();
            if backend.len() > IDENTIFIER {
                let mut hasher = DefaultHasher::new();
                hasher.write(backend.as_bytes());
                name += &format!("-{:016x}", hasher.finish());
            }
            format!("{name}.backend")
        }
        (None, device) => format!("nbd{}.device", device.unwrap_or_default()),
    };
    Path::new(DIRECTORY).join(name)
}

/// The file beside it, which tells what a device is connected to.
pub fn path_of_served(config: &Config) -> PathBuf {
    let mut name = path_of_lock(config).into_os_string();
    name.push(".served");
    name.into()
}

fn letters(byte: u8) -> String {
    match byte {
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' => char::from(byte).into(),
        other => format!("%{other:02x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(more: &str) -> String {
        let config: Config = toml::from_str(&format!("uris = ['nbd://h']\n{more}")).unwrap();
        let path = path_of_served(&config);
        let name = path.file_name().unwrap().to_str().unwrap();
        name.strip_suffix(".served").unwrap().to_owned()
    }

    #[test]
    fn files_have_safe_names() {
        assert_eq!(name("backend = 'a-1_B'"), "a-1_B.backend");
        assert_eq!(name("backend = '../ü'"), "%2e%2e%2f%c3%bc.backend");
        assert_eq!(name("backend = ''\ndevice = 'nbd3'"), "nbd3.device");
        let long = name(&format!("backend = '{}'", "/".repeat(300)));
        assert!(long.len() + ".served".len() <= 255, "{long}");
        let other = name(&format!("backend = '{}x'", "/".repeat(299)));
        assert_ne!(long, other);
    }
}
