// SPDX-License-Identifier: GPL-2.0

//! Directory trees, summed up so that two can be compared.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Every file of some directories: by path, its mode, length and checksum.
#[derive(Default)]
pub struct Manifest {
    files: BTreeMap<String, (u32, u64, u64)>,
    /// Checksums of what has been read; hard links share theirs.
    inodes: HashMap<u64, u64>,
    /// Bytes that were read.
    pub total: u64,
}

impl Manifest {
    /// Sums up `directories`, where `prefix` has been put in front of their names.
    pub fn of(prefix: &str, directories: &[&str]) -> Self {
        let mut manifest = Self::default();
        for directory in directories {
            manifest.add(Path::new(&format!("{prefix}{directory}")), prefix);
        }
        manifest
    }

    fn add(&mut self, path: &Path, prefix: &str) {
        let metadata = fs::symlink_metadata(path).unwrap();
        let (mut len, mut sum) = (0, 0);
        if metadata.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                self.add(&entry.unwrap().path(), prefix);
            }
        } else if metadata.is_symlink() {
            sum = checksum(fs::read_link(path).unwrap().as_os_str().as_encoded_bytes());
        } else {
            len = metadata.len();
            self.total += if self.inodes.contains_key(&metadata.ino()) {
                0
            } else {
                len
            };
            let read = || checksum(&fs::read(path).unwrap());
            sum = *self.inodes.entry(metadata.ino()).or_insert_with(read);
        }
        let name = path.to_string_lossy()[prefix.len()..].to_owned();
        self.files.insert(name, (metadata.mode(), len, sum));
    }

    /// Asserts that a copy has the same files with the same contents.
    pub fn assert_same(&self, copy: &Self) {
        let differs = self
            .files
            .iter()
            .find(|(path, file)| copy.files.get(*path) != Some(*file));
        assert_eq!(differs, None, "is not the same in the copy");
        assert_eq!(copy.files.len(), self.files.len());
    }
}

/// A checksum that is quick even where every instruction is emulated.
fn checksum(data: &[u8]) -> u64 {
    let mix = |sum: u64, word: u64| {
        (sum ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(31)
    };
    let words = data.chunks_exact(8);
    let rest = words
        .remainder()
        .iter()
        .fold(0, |word, byte| (word << 8) | u64::from(*byte));
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let sum = words.fold(data.len() as u64, |sum, bytes| mix(sum, word(bytes)));
    mix(sum, rest)
}
