// SPDX-License-Identifier: GPL-2.0

//! Faults that are made on purpose: allocations that fail, requests that fail or are forgotten,
//! processes that are killed, memory that is short, processors that go away.

mod allocations;
mod kills;
mod machine;
mod requests;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fastrand::Rng;
use rustix::io::Errno;

use crate::device::{self, assert_pattern, errno, pattern};
use crate::harness::{Test, Until};
use crate::sys::Buffer;

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

pub fn tests() -> Vec<Test> {
    [
        allocations::tests(),
        requests::tests(),
        kills::tests(),
        machine::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What a block must hold.
#[derive(Clone, Copy)]
enum Known {
    /// The generation that was acknowledged last; 0: never written.
    One(u64),
    /// A write failed, and may have been done all the same, or in part: a server that is killed stops
    /// between two pages. It is not written again.
    Either(u64, u64),
}

/// A writer's part of a device, and what each block of it must hold.
struct Ledger {
    number: u64,
    blocks: Vec<Known>,
    generation: u64,
    random: Rng,
}

impl Ledger {
    const BLOCK: usize = 16 << 10;
    const BLOCKS: u64 = 64;
    /// Of the device.
    const BYTES: u64 = Self::BLOCKS * Self::BLOCK as u64;

    fn new(number: u64, seed: u64) -> Self {
        Self {
            number,
            blocks: vec![Known::One(0); Self::BLOCKS as usize],
            generation: 0,
            random: Rng::with_seed(seed ^ number),
        }
    }

    fn offset(&self, block: usize) -> u64 {
        (self.number * Self::BLOCKS + block as u64) * Self::BLOCK as u64
    }

    /// Writes a block, or reads one and verifies it; EIO is the only error.
    fn step(&mut self, direct: &File) -> Result<(), Errno> {
        let block = self.random.usize(..self.blocks.len());
        let offset = self.offset(block);
        let Known::One(old) = self.blocks[block] else {
            return Ok(());
        };
        let answer = if self.random.u32(..3) == 0 {
            let mut data = Buffer::new(Self::BLOCK);
            let answer = errno(direct.read_exact_at(&mut data, offset));
            if answer.is_ok() {
                let right = data[..] == version(old, offset);
                assert!(right, "block {block} of {}", self.number);
            }
            answer
        } else {
            self.generation += 1;
            let new = self.generation;
            let data = Buffer::filled(Self::BLOCK, |data| pattern(new, offset, data));
            let answer = errno(direct.write_all_at(&data, offset));
            self.blocks[block] = match answer {
                Ok(()) => Known::One(new),
                Err(_) => Known::Either(old, new),
            };
            answer
        };
        assert!(matches!(answer, Ok(()) | Err(Errno::IO)), "{answer:?}");
        answer
    }

    /// Asserts that what was acknowledged is there.
    fn verify(&self, file: &File) {
        for (block, known) in self.blocks.iter().enumerate() {
            let offset = self.offset(block);
            let mut data = Buffer::new(Self::BLOCK);
            file.read_exact_at(&mut data, offset).expect("to verify");
            let allowed = match *known {
                Known::One(generation) => [generation; 2],
                Known::Either(old, new) => [old, new],
            };
            let versions = allowed.map(|generation| version(generation, offset));
            let mut pages = (0..Self::BLOCK).step_by(PAGE).map(|at| at..at + PAGE);
            let good = pages.all(|page| {
                versions
                    .iter()
                    .any(|v| v[page.clone()] == data[page.clone()])
            });
            assert!(good, "block {block} of writer {}", self.number);
        }
    }
}

/// A block of this generation.
fn version(generation: u64, offset: u64) -> Vec<u8> {
    let mut data = vec![0; Ledger::BLOCK];
    if generation > 0 {
        pattern(generation, offset, &mut data);
    }
    data
}

/// What the writers of a load have done.
#[derive(Debug, Default)]
struct Tally {
    done: AtomicU64,
    failed: AtomicU64,
}

impl Tally {
    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }
}

/// Several writers, each with its own part of device `index`.
struct Load {
    index: u32,
    ledgers: Vec<Ledger>,
}

impl Load {
    const WRITERS: u64 = 3;
    const BYTES: u64 = Self::WRITERS * Ledger::BYTES;

    fn new(index: u32, seed: u64) -> Self {
        let ledgers = (0..Self::WRITERS).map(|number| Ledger::new(number, seed));
        Self {
            index,
            ledgers: ledgers.collect(),
        }
    }

    /// Lets them write and read until `f` returns. After an error a writer goes on with other blocks,
    /// or stops where it is told so.
    fn run<T>(&mut self, stop_at_errors: bool, f: impl FnOnce(&Tally) -> T) -> (T, Tally) {
        let (tally, done) = (Tally::default(), AtomicBool::new(false));
        let index = self.index;
        let answer = std::thread::scope(|scope| {
            for ledger in &mut self.ledgers {
                let (tally, done) = (&tally, &done);
                let direct = device::open(index, libc::O_DIRECT).expect("the device");
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        if ledger.step(&direct).is_ok() {
                            tally.done.fetch_add(1, Ordering::Relaxed);
                        } else {
                            tally.failed.fetch_add(1, Ordering::Relaxed);
                            if stop_at_errors {
                                return;
                            }
                        }
                    }
                });
            }
            let _until_done = Until(&done);
            f(&tally)
        });
        (answer, tally)
    }

    fn verify(&self) {
        let direct = device::open(self.index, libc::O_DIRECT).expect("the device");
        self.verify_in(&direct);
    }

    fn verify_in(&self, file: &File) {
        for ledger in &self.ledgers {
            ledger.verify(file);
        }
    }
}

/// Writes a little, and reads it again.
fn move_data(index: u32, seed: u64) {
    try_move_data(index, seed).expect("to move data");
}

/// As [`move_data`], where there may be no connection.
fn try_move_data(index: u32, seed: u64) -> std::io::Result<()> {
    let direct = device::open(index, libc::O_DIRECT)?;
    let offset = seed % 8 * (64 << 10);
    let data = Buffer::filled(48 << 10, |data| pattern(seed, offset, data));
    direct.write_all_at(&data, offset)?;
    let mut back = Buffer::new(data.len());
    direct.read_exact_at(&mut back, offset)?;
    assert_pattern(seed, offset, &back);
    Ok(())
}
