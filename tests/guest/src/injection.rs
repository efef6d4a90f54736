// SPDX-License-Identifier: GPL-2.0

//! Faults on demand: the kernel's own fault injection (Documentation/fault-injection), which only
//! the debug kernel has.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::io::Errno;

use crate::driver::Driver;
use crate::harness::{say, skip};
use crate::sys::SysResult;

const DEBUGFS: &str = "/sys/kernel/debug";

/// What makes allocations fail: of the slab allocator, and of pages.
const ALLOCATORS: [&str; 2] = ["failslab", "fail_page_alloc"];

/// More fault points than any call here has: then something goes round in circles.
const MANY: u32 = 5000;

/// One kind of fault, such as `failslab`; there is none of it before and afterwards.
pub struct Knobs(&'static str);

impl Knobs {
    /// Ends the test where this kernel cannot do it.
    pub fn of(kind: &'static str) -> Self {
        if !Path::new(DEBUGFS).join(kind).exists() {
            skip(&format!("this kernel cannot inject faults ({kind})"));
        }
        let knobs = Self(kind);
        knobs.reset();
        knobs
    }

    pub fn set(&self, knob: &str, value: impl Display) -> &Self {
        let path = Path::new(DEBUGFS).join(self.0).join(knob);
        let written = fs::write(&path, value.to_string());
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        self
    }

    /// How many faults it has left, of those that it was told to make.
    pub fn times_left(&self) -> i32 {
        let path = Path::new(DEBUGFS).join(self.0).join("times");
        let text = fs::read_to_string(path).expect("times");
        text.trim().parse().expect("a number")
    }

    /// Only what `code` calls, itself or through others, and at most 32 calls deep.
    fn below(&self, code: &Range<u64>) -> &Self {
        self.set("stacktrace-depth", 32)
            .set("require-start", format_args!("{:#x}", code.start))
            .set("require-end", format_args!("{:#x}", code.end))
    }

    fn reset(&self) {
        self.set("probability", 0)
            .set("interval", 1)
            .set("times", 1)
            .set("space", 0)
            .set("verbose", 0)
            .set("task-filter", "N")
            .below(&(0..u64::MAX))
            // kmemleak allocates for each allocation, and makes do without: that tests nothing.
            .set("reject-start", format_args!("{:#x}", KMEMLEAK.start))
            .set("reject-end", format_args!("{:#x}", KMEMLEAK.end));
    }
}

impl Drop for Knobs {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Allocations of some code fail.
pub struct Allocations([Knobs; 2]);

impl Allocations {
    /// Those that `code` asks for, itself or through what it calls.
    pub fn of(code: &Range<u64>) -> Self {
        let knobs = ALLOCATORS.map(Knobs::of);
        for one in &knobs {
            one.below(code).set("ignore-gfp-wait", "N");
        }
        knobs[1].set("min-order", 0).set("ignore-gfp-highmem", "Y");
        Self(knobs)
    }

    /// So many percent of them, until `stop`.
    pub fn fail(&self, percent: u32) {
        const PLENTY: i32 = 1_000_000;
        for knobs in &self.0 {
            knobs.set("times", PLENTY).set("probability", percent);
        }
    }

    /// Returns how many have failed.
    pub fn stop(&self) -> i32 {
        self.0
            .iter()
            .map(|knobs| {
                knobs.set("probability", 0);
                1_000_000 - knobs.times_left()
            })
            .sum()
    }
}

static KMEMLEAK: std::sync::LazyLock<Range<u64>> =
    std::sync::LazyLock::new(|| code_of("__alloc_object").unwrap_or(0..0));

/// Where a function of the kernel lies.
fn code_of(function: &str) -> Option<Range<u64>> {
    let mut symbols = symbols();
    let at = symbols.find(|symbol| symbol.name == function)?.address;
    let next = symbols.map(|symbol| symbol.address).find(|next| *next > at);
    Some(at..next?)
}

/// The code of the module that is loaded: all that it has done for it.
pub fn code_of_module(driver: Driver) -> Range<u64> {
    let own = symbols().filter(|symbol| symbol.module == driver.name());
    let addresses: Vec<u64> = own.map(|symbol| symbol.address).collect();
    let (Some(first), Some(last)) = (addresses.iter().min(), addresses.iter().max()) else {
        panic!("{} is not loaded", driver.name());
    };
    // The last function ends before the next page, or soon after.
    *first..(last + 0x2000) & !0xfff
}

/// What a module does when it is loaded: its own initialisation, not the kernel's.
pub fn code_of_initialisation() -> Range<u64> {
    code_of("do_one_initcall").expect("do_one_initcall")
}

struct Symbol {
    address: u64,
    name: String,
    module: String,
}

/// All functions, as /proc/kallsyms has them: in order, those of modules at the end.
fn symbols() -> impl Iterator<Item = Symbol> {
    let text = fs::read_to_string("/proc/kallsyms").expect("/proc/kallsyms");
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.into_iter().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let code = words.next()?.eq_ignore_ascii_case("t");
        let name = words.next()?.to_owned();
        let module = words.next().unwrap_or_default();
        let module = module.trim_matches(['[', ']']).to_owned();
        code.then_some(Symbol {
            address,
            name,
            module,
        })
    })
}

/// One try of a sweep: in which the nth allocation fails.
pub struct Nth {
    file: File,
    n: u32,
    /// It has failed, or there are not so many.
    injected: Option<bool>,
    answers: BTreeMap<String, u32>,
}

impl Nth {
    /// Makes a call in which the nth allocation fails. It may well succeed, since the kernel has
    /// other ways for many.
    pub fn fail<T>(&mut self, call: impl FnOnce() -> SysResult<T>) -> SysResult<T> {
        assert_eq!(self.injected, None, "one call in each try");
        self.write(self.n);
        let answer = call();
        let injected = self.left() == 0;
        self.write(0);
        self.injected = Some(injected);
        if injected {
            let said = match &answer {
                Ok(_) => "success".to_owned(),
                Err(errno) => format!("{errno:?}"),
            };
            *self.answers.entry(said).or_default() += 1;
        } else if let Err(errno) = &answer {
            panic!("{errno:?}, though nothing failed");
        }
        answer
    }

    fn write(&self, n: u32) {
        let written = self.file.write_at(n.to_string().as_bytes(), 0);
        written.expect("fail-nth");
    }

    fn left(&self) -> u32 {
        let mut text = [0; 16];
        let len = self.file.read_at(&mut text, 0).expect("fail-nth");
        let text = String::from_utf8_lossy(&text[..len]);
        text.trim().parse().expect("a number")
    }
}

/// What a sweep has found.
pub struct Swept {
    /// How many allocations have failed, one after the other.
    pub failed: u32,
    answers: BTreeMap<String, u32>,
}

impl Swept {
    /// How many calls ended with this errno.
    pub fn ended_with(&self, errno: Errno) -> u32 {
        // As an `Errno` and as an `io::Error` say it.
        let forms = [
            format!("{errno:?}"),
            format!("Os {{ code: {},", errno.raw_os_error()),
        ];
        let counted = self.answers.iter();
        let same = counted.filter(|(said, _)| forms.iter().any(|form| said.starts_with(form)));
        same.map(|(_, count)| count).sum()
    }

    /// What the calls answered is to be ENOMEM or success.
    pub fn assert_only_enomem(&self) {
        self.assert_only(&[Errno::NOMEM]);
    }

    /// What the calls answered is to be one of these, or success.
    pub fn assert_only(&self, errnos: &[Errno]) {
        let succeeded = self.answers.get("success").copied().unwrap_or(0);
        let expected: u32 = errnos.iter().map(|errno| self.ended_with(*errno)).sum();
        let all: u32 = self.answers.values().sum();
        assert_eq!(succeeded + expected, all, "{:?}", self.answers);
    }
}

/// Has each allocation of a call fail in turn: `attempt` makes the call, with [`Nth::fail`], and sees
/// that it did no harm. Which allocations is for [`Allocations`] to say, which must be there.
pub fn sweep(what: &str, attempt: impl FnMut(&mut Nth)) -> Swept {
    sweep_some(what, (1..MANY).step_by(1), attempt)
}

/// As [`sweep`], for a call with many: has some of its allocations fail, so many apart.
pub fn sample(what: &str, apart: usize, attempt: impl FnMut(&mut Nth)) -> Swept {
    sweep_some(what, (1..MANY).step_by(apart), attempt)
}

fn sweep_some(
    what: &str,
    places: impl Iterator<Item = u32>,
    mut attempt: impl FnMut(&mut Nth),
) -> Swept {
    let mut answers = BTreeMap::new();
    for (failed, n) in (0..).zip(places) {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth");
        let mut nth = Nth {
            file: file.expect("fail-nth"),
            n,
            injected: None,
            answers,
        };
        attempt(&mut nth);
        answers = nth.answers;
        if !nth.injected.expect("a call") {
            say(&format!("{what}: {failed} allocations failed: {answers:?}"));
            return Swept { failed, answers };
        }
    }
    panic!("{what} does not end");
}
