// SPDX-License-Identifier: GPL-2.0

//! The differential test: sequences of operations, drawn at random, are carried out on `nbd.ko` and
//! on `rnbd.ko`, and everything that can be seen is compared.
//!
//! - `operations` has what a sequence is made of, and draws it
//! - `stage` carries one out and writes down what is seen
//! - `allowed` has the differences that are meant
//!
//! Two things that differ are carried out again before they count, since some timing is nobody's
//! fault; what is left is shrunk to a sequence from which nothing can be taken away.

mod allowed;
mod operations;
mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::time::{Duration, Instant};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::differences;
use crate::driver::Driver;
use crate::harness::wait_until;
use crate::klog::{self, Klog};
pub use operations::{Op, Request};
pub use stage::Step;

use allowed::Difference;
use operations::Sequence;
use stage::{Transcript, devices_of};

/// How many sequences are carried out before the module is loaded anew.
const BATCH: usize = 50;

/// Devices to make at a time where both sides use the same driver, which then stays loaded.
const SPARE: u32 = 40;

/// How often what differs is carried out again with each driver.
const REPEATS: usize = 2;

/// How long a sequence that differs may be made shorter.
const SHRINKING: Duration = Duration::from_secs(150);

/// Changes what was seen, to show that it would be noticed.
pub type Plant = fn(&Op, &mut Step);

/// A driver, and what is to be wrong with it.
#[derive(Clone, Copy)]
pub struct Side {
    pub driver: Driver,
    pub plant: Option<Plant>,
}

impl From<Driver> for Side {
    fn from(driver: Driver) -> Self {
        let plant = None;
        Self { driver, plant }
    }
}

/// What is to be compared.
#[derive(Clone, Copy)]
pub struct Plan {
    /// What is right, and what is looked at.
    pub sides: [Side; 2],
    pub seed: u64,
    /// The first sequence of the seed, and how many.
    pub first: u64,
    pub count: u64,
    pub shrink: bool,
}

/// What came of it.
#[derive(Default)]
pub struct Report {
    pub sequences: usize,
    pub operations: usize,
    /// Sequences that were compared up to a difference that is meant, by its name.
    pub meant: BTreeMap<&'static str, usize>,
    /// Sequences that differed in some runs and not in others.
    pub unsteady: Vec<String>,
    pub differences: Vec<Found>,
    took: Duration,
}

/// A difference that is not meant.
pub struct Found {
    pub sequence: Sequence,
    pub text: String,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for found in &self.differences {
            writeln!(f, "{}", found.text)?;
        }
        for text in &self.unsteady {
            writeln!(f, "not steady: {text}")?;
        }
        for (name, count) in &self.meant {
            let reason = differences::reason(name);
            writeln!(f, "{count} compared up to {name}, which is meant: {reason}")?;
        }
        write!(
            f,
            "{} sequences of {} operations in {:.0} s: {} differences, {} not steady",
            self.sequences,
            self.operations,
            self.took.as_secs_f32(),
            self.differences.len(),
            self.unsteady.len()
        )
    }
}

/// A seed that nobody has used.
pub fn fresh_seed() -> u64 {
    let mut bytes = [0; 4];
    let random = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    random.expect("/dev/urandom");
    u32::from_le_bytes(bytes).into()
}

/// `rnbd-guest differential [--seed S] [--count N] [--first I] [--nbd]`; the last compares nbd.ko
/// with itself. The answer is the exit status.
pub fn main(arguments: &[String]) -> i32 {
    let number = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        Some(arguments.get(at + 1)?.parse().expect("a number"))
    };
    let other = if arguments.iter().any(|argument| argument == "--nbd") {
        Driver::Nbd
    } else {
        Driver::Rnbd
    };
    let plan = Plan {
        sides: [Driver::Nbd.into(), other.into()],
        seed: number("--seed").unwrap_or_else(fresh_seed),
        first: number("--first").unwrap_or(0),
        count: number("--count").unwrap_or(100),
        shrink: !arguments.iter().any(|argument| argument == "--no-shrink"),
    };
    println!("seed {}, {} sequences", plan.seed, plan.count);
    match compare(&plan) {
        Ok(report) => {
            println!("{report}");
            i32::from(!report.differences.is_empty())
        }
        Err(failure) => {
            println!("{failure}");
            2
        }
    }
}

/// Carries out the sequences of `plan` on both sides. It fails where it cannot go on: something
/// hangs, or a module cannot be loaded or unloaded.
pub fn compare(plan: &Plan) -> Result<Report, String> {
    let began = Instant::now();
    let _hurry = Hurry::begin();
    let mut bench = Bench::default();
    if plan.sides[0].driver == plan.sides[1].driver {
        bench.spare = SPARE;
    }
    let mut report = Report::default();
    let cases: Vec<u64> = (plan.first..plan.first + plan.count).collect();
    for batch in cases.chunks(BATCH) {
        compare_batch(plan, batch, &mut bench, &mut report)?;
        println!(
            "{} of {} after {:.0} s, {} differ",
            report.sequences,
            plan.count,
            began.elapsed().as_secs_f32(),
            report.differences.len()
        );
    }
    bench.unload()?;
    report.took = began.elapsed();
    Ok(report)
}

/// Makes the kernel wait less where it waits for all processors, which is most of what loading and
/// connecting take.
struct Hurry;

impl Hurry {
    const FILE: &str = "/sys/kernel/rcu_expedited";

    fn begin() -> Self {
        let _ = fs::write(Self::FILE, "1");
        Self
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, "0");
    }
}

fn compare_batch(
    plan: &Plan,
    cases: &[u64],
    bench: &mut Bench,
    report: &mut Report,
) -> Result<(), String> {
    let drawn = |case: &u64| tree(plan.seed, *case).current();
    let sequences: Vec<Sequence> = cases.iter().map(drawn).collect();
    report.sequences += sequences.len();
    report.operations += sequences.iter().map(Vec::len).sum::<usize>();
    let [nbd, other] = bench.play_both(plan, &sequences)?;
    let mut suspects = Vec::new();
    for (at, sequence) in sequences.into_iter().enumerate() {
        match judge(&sequence, &nbd[at], &other[at]) {
            Verdict::Same => {}
            Verdict::Meant(name) => *report.meant.entry(name).or_default() += 1,
            Verdict::Differs(text) => suspects.push(Suspect {
                case: cases[at],
                sequence,
                text,
                runs: [vec![nbd[at].clone()], vec![other[at].clone()]],
            }),
        }
    }
    look_again(plan, &mut suspects, bench)?;
    for suspect in suspects {
        convict(plan, suspect, bench, report)?;
    }
    Ok(())
}

/// A sequence that differed, and what was seen in each of its runs with either side.
struct Suspect {
    case: u64,
    sequence: Sequence,
    text: String,
    runs: [Vec<Transcript>; 2],
}

impl Suspect {
    /// Whether all runs of one side differ from all of the other.
    fn always_differs(&self) -> bool {
        let [nbd, other] = &self.runs;
        let differs = |nbd, other| matches!(judge(&self.sequence, nbd, other), Verdict::Differs(_));
        nbd.iter()
            .all(|nbd| other.iter().all(|other| differs(nbd, other)))
    }
}

fn look_again(plan: &Plan, suspects: &mut [Suspect], bench: &mut Bench) -> Result<(), String> {
    let sequences: Vec<Sequence> = suspects.iter().map(|s| s.sequence.clone()).collect();
    for (number, side) in plan.sides.iter().enumerate() {
        for _ in 0..REPEATS {
            let runs = bench.play_all(side, &sequences)?;
            for (suspect, run) in suspects.iter_mut().zip(runs) {
                suspect.runs[number].push(run);
            }
        }
    }
    Ok(())
}

/// Puts a sequence that differs into the report, the first one in its shortest form.
fn convict(
    plan: &Plan,
    suspect: Suspect,
    bench: &mut Bench,
    report: &mut Report,
) -> Result<(), String> {
    let name = format!("--seed {} --first {} --count 1", plan.seed, suspect.case);
    if !suspect.always_differs() {
        report.unsteady.push(format!("{name}: {}", suspect.text));
        return Ok(());
    }
    println!("{name} differs: {}", suspect.text);
    let shortest = if plan.shrink && report.differences.is_empty() {
        shrink(plan, suspect.case, bench)?
    } else {
        None
    };
    let (sequence, text) = shortest.unwrap_or((suspect.sequence, suspect.text));
    let text = format!("{name} differs:\n{}{text}\n", listed(&sequence));
    report.differences.push(Found { sequence, text });
    Ok(())
}

fn listed(sequence: &Sequence) -> String {
    let line = |(number, op)| format!("  {number}: {op:?}\n");
    sequence.iter().enumerate().map(line).collect()
}

/// The drawn sequence with this number, and how it can be made simpler.
fn tree(seed: u64, case: u64) -> impl ValueTree<Value = Sequence> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&case.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), random);
    let drawn = operations::sequences().new_tree(&mut runner);
    drawn.expect("a sequence")
}

/// Makes a sequence that differs shorter, and its values simpler; the answer is what still differs,
/// and how.
fn shrink(plan: &Plan, case: u64, bench: &mut Bench) -> Result<Option<(Sequence, String)>, String> {
    let deadline = Instant::now() + SHRINKING;
    let mut tree = tree(plan.seed, case);
    let mut shortest = None;
    let mut more = tree.simplify();
    while more && Instant::now() < deadline {
        let sequence = tree.current();
        more = match differs(plan, &sequence, bench)? {
            Some(text) => {
                shortest = Some((sequence, text));
                tree.simplify()
            }
            None => tree.complicate(),
        };
    }
    let Some((mut sequence, mut text)) = shortest else {
        return Ok(None);
    };
    // What proptest takes away together may have to go one by one.
    for at in (0..sequence.len()).rev() {
        let mut shorter = sequence.clone();
        shorter.remove(at);
        if let Some(still) = differs(plan, &shorter, bench)? {
            (sequence, text) = (shorter, still);
        }
    }
    Ok(Some((sequence, text)))
}

fn differs(plan: &Plan, sequence: &Sequence, bench: &mut Bench) -> Result<Option<String>, String> {
    let [nbd, other] = bench.play_both(plan, std::slice::from_ref(sequence))?;
    Ok(match judge(sequence, &nbd[0], &other[0]) {
        Verdict::Differs(text) => Some(text),
        _ => None,
    })
}

#[derive(Debug)]
enum Verdict {
    Same,
    /// They differ, as they may, for the reason of this name. What comes after that is not
    /// compared.
    Meant(&'static str),
    Differs(String),
}

fn judge(sequence: &Sequence, nbd: &Transcript, other: &Transcript) -> Verdict {
    for (at, steps) in nbd.iter().zip(other).enumerate() {
        let mut differs = different(steps);
        differs.retain(|one| {
            let name = allowed::ignored(sequence, at, one, nbd);
            name.map(differences::reason).is_none()
        });
        if differs.is_empty() {
            continue;
        }
        if let Some(name) = allowed::meant(sequence, at, &differs, nbd) {
            return Verdict::Meant(name);
        }
        let what = match sequence.get(at) {
            Some(op) => format!("operation {at}, {op:?}"),
            None if at == sequence.len() => "what is to be seen at the end".into(),
            None => "what is to be seen after the end".into(),
        };
        let lines: Vec<String> = differs
            .iter()
            .map(|(key, nbd, other)| format!("  {key}:\n    nbd   {nbd}\n    other {other}"))
            .collect();
        return Verdict::Differs(format!("{what}:\n{}", lines.join("\n")));
    }
    Verdict::Same
}

/// What is not the same in two steps; what was not seen is empty.
fn different<'a>((nbd, other): (&'a Step, &'a Step)) -> Vec<Difference<'a>> {
    let by_key = |step: &'a Step| -> BTreeMap<&'a str, &'a str> {
        let pairs = step.iter();
        pairs
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect()
    };
    let (nbd, other) = (by_key(nbd), by_key(other));
    let keys: BTreeSet<&str> = nbd.keys().chain(other.keys()).copied().collect();
    let value = |step: &BTreeMap<&'a str, &'a str>, key| step.get(key).copied().unwrap_or("");
    keys.into_iter()
        .map(|key| (key, value(&nbd, key), value(&other, key)))
        .filter(|(_, nbd, other)| nbd != other)
        .collect()
}

/// A machine in which one driver at a time is loaded.
#[derive(Default)]
struct Bench {
    loaded: Option<Driver>,
    /// How many devices the loaded module has, and the first that has not been used.
    devices: u32,
    unused: u32,
    /// How many devices to have at least.
    spare: u32,
    /// Keeps used devices in use.
    held: Vec<File>,
    log: Option<Klog>,
}

impl Bench {
    fn play_both(
        &mut self,
        plan: &Plan,
        sequences: &[Sequence],
    ) -> Result<[Vec<Transcript>; 2], String> {
        let [right, other] = &plan.sides;
        Ok([
            self.play_all(right, sequences)?,
            self.play_all(other, sequences)?,
        ])
    }

    fn play_all(&mut self, side: &Side, sequences: &[Sequence]) -> Result<Vec<Transcript>, String> {
        sequences
            .iter()
            .enumerate()
            .map(|(at, sequence)| {
                let enough = self.unused + devices_of(sequence) <= self.devices;
                if self.loaded != Some(side.driver) || !enough {
                    let devices = sequences[at..].iter().map(devices_of).sum();
                    self.load(side.driver, devices)?;
                }
                self.play(side, sequence).map_err(|failure| {
                    let sequence = listed(sequence);
                    format!("{:?}: {failure}\nin\n{sequence}", side.driver)
                })
            })
            .collect()
    }

    fn play(&mut self, side: &Side, sequence: &Sequence) -> Result<Transcript, String> {
        let base = self.unused;
        // Below the largest index that a device can have.
        let new = 20_000 + base;
        self.unused += devices_of(sequence);
        let (mut transcript, devices) = stage::play(sequence, base, new)?;
        self.held.extend(devices);
        let log = self.log.as_mut().map(Klog::read).unwrap_or_default();
        let alarms = klog::alarms(&log);
        if side.driver == Driver::Rnbd && !alarms.is_empty() {
            return Err(format!("the kernel complains: {alarms:#?}"));
        }
        if let Some(plant) = side.plant {
            for (op, step) in sequence.iter().zip(&mut transcript) {
                plant(op, step);
            }
        }
        Ok(transcript)
    }

    fn load(&mut self, driver: Driver, devices: u32) -> Result<(), String> {
        self.unload()?;
        let devices = devices.max(self.spare);
        self.devices = devices;
        self.unused = 0;
        // Which open reads a partition table, and when, differs; the tests of `partitions` show how.
        let parameters = format!("nbds_max={devices} max_part=0");
        let loaded = driver.load(&parameters);
        loaded.map_err(|errno| format!("{driver:?} does not load: {errno}"))?;
        self.loaded = Some(driver);
        self.log = Some(Klog::from_now());
        Ok(())
    }

    fn unload(&mut self) -> Result<(), String> {
        self.held.clear();
        let Some(driver) = self.loaded.take() else {
            return Ok(());
        };
        let free = wait_until(Duration::from_secs(5), || driver.references() == 0);
        if free.is_err() {
            return Err(format!("{driver:?} stays in use"));
        }
        let unloaded = driver.unload();
        unloaded.map_err(|errno| format!("{driver:?} does not unload: {errno}"))
    }
}
