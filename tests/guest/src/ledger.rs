// SPDX-License-Identifier: GPL-2.0

//! What may be on a medium of which some writes were acknowledged, some flushed, and some lost.
//!
//! Each sector that is written says which write it is of. The ledger has, for each sector, every
//! version that could be there: the last that is promised to be, and what was written since.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use crate::device::pattern;
use crate::sys::Buffer;
use crate::volatile::Disk;

pub const SECTOR: usize = 512;

/// Sectors of one read when all are looked at.
const CHUNK: usize = 256;

/// How many findings are worth telling.
const ENOUGH: usize = 10;

/// A version that may be in a sector.
#[derive(Clone, Copy, Debug)]
struct Version {
    number: u64,
    /// Of the disk, when the write was begun.
    incarnation: u64,
    /// Its place in the order of acknowledgements.
    acknowledged: Option<u64>,
}

/// Never written: zeroes.
const NOTHING: Version = Version {
    number: 0,
    incarnation: 0,
    acknowledged: None,
};

struct Entries {
    /// For each sector, the oldest first.
    versions: Vec<Vec<Version>>,
    /// Those with several.
    open: BTreeSet<usize>,
    writes: u64,
    acknowledgements: u64,
}

/// Everybody's writes to one medium.
pub struct Ledger {
    seed: u64,
    disk: Arc<Disk>,
    entries: Mutex<Entries>,
}

/// A write that was begun.
pub struct Write {
    pub number: u64,
    sectors: Range<usize>,
}

/// A flush that was begun.
pub struct Flush {
    incarnation: u64,
    acknowledgements: u64,
}

impl Ledger {
    /// Of a medium of `sectors` that has nothing but zeroes and is, in the end, on `disk`.
    pub fn new(seed: u64, disk: &Arc<Disk>, sectors: usize) -> Self {
        Self {
            seed,
            disk: Arc::clone(disk),
            entries: Mutex::new(Entries {
                versions: vec![vec![NOTHING]; sectors],
                open: BTreeSet::new(),
                writes: 0,
                acknowledgements: 0,
            }),
        }
    }

    /// How many the medium has.
    pub fn sectors(&self) -> usize {
        self.entries.lock().unwrap().versions.len()
    }

    /// Counts the disk's crashes.
    pub fn incarnation(&self) -> u64 {
        self.disk.incarnation()
    }

    /// To be called before the write; nobody else writes there before it is over.
    pub fn begin_write(&self, sectors: Range<usize>) -> Write {
        let mut entries = self.entries.lock().unwrap();
        entries.writes += 1;
        let version = Version {
            number: entries.writes,
            incarnation: self.disk.incarnation(),
            acknowledged: None,
        };
        for sector in sectors.clone() {
            entries.versions[sector].push(version);
            entries.open.insert(sector);
        }
        Write {
            number: version.number,
            sectors,
        }
    }

    /// What is to be written.
    pub fn data(&self, write: &Write) -> Buffer {
        Buffer::filled(write.sectors.len() * SECTOR, |data| {
            for (sector, data) in write.sectors.clone().zip(data.chunks_mut(SECTOR)) {
                self.fill(sector, write.number, data);
            }
        })
    }

    fn fill(&self, sector: usize, number: u64, data: &mut [u8]) {
        pattern(self.seed ^ (number << 20), (sector * SECTOR) as u64, data);
        data[..8].copy_from_slice(&number.to_le_bytes());
        data[8..16].copy_from_slice(&(sector as u64).to_le_bytes());
    }

    /// The write was acknowledged; `durable`: with the promise that it stays.
    pub fn acknowledge(&self, write: &Write, durable: bool) {
        let mut entries = self.entries.lock().unwrap();
        entries.acknowledgements += 1;
        let acknowledgements = entries.acknowledgements;
        for sector in write.sectors.clone() {
            let versions = &mut entries.versions[sector];
            let last = versions.len() - 1;
            assert_eq!(versions[last].number, write.number, "two writers");
            versions[last].acknowledged = Some(acknowledgements);
            if durable {
                versions.drain(..last);
                entries.open.remove(&sector);
            }
        }
    }

    /// To be called before the flush.
    pub fn begin_flush(&self) -> Flush {
        let entries = self.entries.lock().unwrap();
        Flush {
            incarnation: self.disk.incarnation(),
            acknowledgements: entries.acknowledgements,
        }
    }

    /// The flush was acknowledged. It promises nothing of what a server had that was gone by then:
    /// the new one knows nothing of that. Answers whether it promises anything.
    pub fn flushed(&self, flush: &Flush) -> bool {
        let mut entries = self.entries.lock().unwrap();
        if self.disk.incarnation() != flush.incarnation {
            return false;
        }
        let Entries { versions, open, .. } = &mut *entries;
        open.retain(|sector| {
            let versions = &mut versions[*sector];
            let covered = versions.iter().rposition(|version| {
                version.incarnation == flush.incarnation
                    && version
                        .acknowledged
                        .is_some_and(|acknowledged| acknowledged <= flush.acknowledgements)
            });
            if let Some(covered) = covered {
                versions.drain(..covered);
            }
            versions.len() > 1
        });
        true
    }

    /// What is wrong with `data`, which was read from `first` on while nobody wrote there and the
    /// disk was in `incarnation` all the time, or None if it crashed meanwhile.
    pub fn check(&self, first: usize, data: &[u8], incarnation: Option<u64>) -> Vec<String> {
        let entries = self.entries.lock().unwrap();
        let sectors = (first..).zip(data.chunks(SECTOR));
        sectors
            .filter_map(|(sector, data)| {
                let versions = &entries.versions[sector];
                let number = match self.number(sector, data) {
                    Ok(number) => number,
                    Err(finding) => return Some(finding),
                };
                if !versions.iter().any(|version| version.number == number) {
                    return Some(format!(
                        "sector {sector} has version {number}, may have {versions:?}"
                    ));
                }
                let last = versions.last().unwrap();
                // It was acknowledged by who answered the read.
                let known = last.acknowledged.is_some() && incarnation == Some(last.incarnation);
                (known && number != last.number)
                    .then(|| format!("sector {sector} reads as version {number}, though {last:?}"))
            })
            .take(ENOUGH)
            .collect()
    }

    /// Which version this is, if it is one.
    fn number(&self, sector: usize, data: &[u8]) -> Result<u64, String> {
        if data.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        let number = u64::from_le_bytes(data[..8].try_into().unwrap());
        let mut expected = [0; SECTOR];
        self.fill(sector, number, &mut expected);
        if data == expected {
            return Ok(number);
        }
        let differ = data.iter().zip(&expected).filter(|(a, b)| a != b).count();
        Err(format!(
            "sector {sector} has what nobody wrote: {differ} bytes differ from version {number}; \
             it begins {:02x?}",
            &data[..24]
        ))
    }

    /// Looks at all of `file` while nobody writes. Answers what is wrong.
    pub fn check_all(&self, file: &File) -> io::Result<Vec<String>> {
        self.look(file, true, |_, _| {})
    }

    /// As [`Self::check_all`], after a crash that nobody has written since: what is there stays,
    /// and what is not there never comes again.
    pub fn check_after_crash(&self, file: &File) -> io::Result<Vec<String>> {
        // A file's writes may have been acknowledged after the crash, by the cache.
        self.look(file, false, |first, data| {
            let mut entries = self.entries.lock().unwrap();
            for (sector, data) in (first..).zip(data.chunks(SECTOR)) {
                let Ok(number) = self.number(sector, data) else {
                    continue;
                };
                entries.versions[sector].retain(|version| version.number == number);
                entries.open.remove(&sector);
                if entries.versions[sector].is_empty() {
                    // Told already; the rest is to be compared with what is there.
                    entries.versions[sector].push(Version { number, ..NOTHING });
                }
            }
        })
    }

    /// `current`: what was acknowledged is to be there even if it was not flushed.
    fn look(
        &self,
        file: &File,
        current: bool,
        mut seen: impl FnMut(usize, &[u8]),
    ) -> io::Result<Vec<String>> {
        let sectors = self.sectors();
        let mut findings = Vec::new();
        for first in (0..sectors).step_by(CHUNK) {
            let mut data = Buffer::new(CHUNK.min(sectors - first) * SECTOR);
            let before = self.disk.incarnation();
            file.read_exact_at(&mut data, (first * SECTOR) as u64)?;
            let steady = current && self.disk.incarnation() == before;
            findings.extend(self.check(first, &data, steady.then_some(before)));
            seen(first, &data);
        }
        findings.truncate(ENOUGH);
        Ok(findings)
    }
}
