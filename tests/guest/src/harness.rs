// SPDX-License-Identifier: GPL-2.0

//! Runs one test: from a freshly loaded module, under a watchdog, to an unloaded module and a
//! clean kernel log.

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use libtest_mimic::{Completion, Failed, Trial};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::debug_kernel::{self, Leak, patient};
use crate::driver::{Driver, devices};
use crate::klog::{self, Klog};
use crate::{differences, server, stacks};

/// How the module is loaded for most tests: few devices load and unload quickly.
const PARAMETERS: &str = "nbds_max=2";

/// One test, and what it needs.
pub struct Test {
    name: String,
    run: fn(&Guest),
    /// None: the test loads the module itself.
    parameters: Option<&'static str>,
    limit: Duration,
    request: Request,
    leaves_module: bool,
}

/// What has to be asked for to have a test run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Request {
    /// Nothing, or any part of its name.
    None,
    /// Its group, `group::`, at the beginning.
    Group,
    /// Its whole name.
    Name,
}

impl Test {
    pub fn new(path: &str, run: fn(&Guest)) -> Self {
        let name = path.trim_start_matches("rnbd_guest::tests::").to_owned();
        Self {
            name,
            run,
            parameters: Some(PARAMETERS),
            limit: Duration::from_secs(120),
            request: Request::None,
            leaves_module: false,
        }
    }

    /// Loads the module with these parameters.
    pub fn parameters(self, parameters: &'static str) -> Self {
        Self {
            parameters: Some(parameters),
            ..self
        }
    }

    /// Does not load the module.
    pub fn unloaded(self) -> Self {
        Self {
            parameters: None,
            ..self
        }
    }

    /// May take this long.
    pub fn limit_seconds(self, seconds: u64) -> Self {
        Self {
            limit: Duration::from_secs(seconds),
            ..self
        }
    }

    /// Takes so long, or leaves so much, that it runs only where its whole name is asked for.
    pub fn on_request(self) -> Self {
        Self {
            request: Request::Name,
            ..self
        }
    }

    /// Belongs to a group that takes so long that its tests run only where the group is asked for.
    pub fn on_request_of_its_group(self) -> Self {
        Self {
            request: Request::Group,
            ..self
        }
    }

    /// The module cannot be unloaded after it, and so nothing can be run.
    pub fn leaves_module(self) -> Self {
        Self {
            leaves_module: true,
            ..self
        }
    }

    /// Whether it is to run, by the comma-separated parts of `filter`.
    pub fn is_selected(&self, filter: Option<&str>) -> bool {
        let mut parts = filter.into_iter().flat_map(|filter| filter.split(','));
        match self.request {
            Request::None => filter.is_none() || parts.any(|part| self.name.contains(part)),
            Request::Group => parts.any(|part| part.contains("::") && self.name.starts_with(part)),
            Request::Name => parts.any(|part| part == self.name),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn into_trial(self, driver: Driver) -> Trial {
        let name = self.name.clone();
        Trial::ignorable_test(name, move || self.start(driver))
    }

    fn start(self, driver: Driver) -> Result<Completion, Failed> {
        if let Some(reason) = differences::skip(driver, &self.name) {
            return Ok(Completion::ignored_with(reason));
        }
        if let Some(why) = ABORTED.get() {
            return Err(format!("not run: {why}").into());
        }
        let (name, limit) = (self.name.clone(), patient(self.limit));
        klog::mark(&format!("{name} begins"));
        COMPLAINTS.lock().unwrap().clear();
        let began = Instant::now();
        let guest = Arc::new(Guest::new(driver, &name));
        BEGINNINGS.lock().unwrap().push((uptime(), name.clone()));
        let outcome = self.run_watched(&guest, limit);
        let took = began.elapsed();
        TIMES.lock().unwrap().push((took, name.clone()));
        let failure = match outcome {
            Ok(completion) => return Ok(completion),
            Err(failure) => failure,
        };
        // Said at once, too: the machine may not live to the end of the suite.
        let text = format!("{failure}\n  after {:.1} s", took.as_secs_f32());
        eprintln!("\n--- {name} failed:\n{text}\n---");
        klog::mark(&format!("{name} failed"));
        Err(text.into())
    }

    fn run_watched(self, guest: &Arc<Guest>, limit: Duration) -> Result<Completion, String> {
        let (tell, told) = mpsc::channel();
        let watched = Arc::clone(guest);
        let name = self.name.clone();
        thread::Builder::new()
            .name("test".into())
            .spawn(move || {
                let _ = tell.send(self.run_fully(&watched));
            })
            .expect("a thread");
        match told.recv_timeout(limit) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Disconnected) => Err("the test's thread died".into()),
            Err(RecvTimeoutError::Timeout) => {
                let mut text = format!("still not done after {limit:?}; who waits for what:\n");
                text += &stacks::all();
                server::kill_all();
                if let Ok(outcome) = told.recv_timeout(Duration::from_secs(20)) {
                    text += &format!("\nended when its servers were killed: {:?}", outcome.err());
                } else {
                    text += "\nkilling its servers did not end it";
                    let _ = ABORTED.set(format!("{name} hangs"));
                }
                for complaint in &*COMPLAINTS.lock().unwrap() {
                    text += &format!("\ncomplaint: {complaint}");
                }
                text += &guest.log_tail();
                Err(text)
            }
        }
    }

    /// In the test's own thread.
    fn run_fully(self, guest: &Guest) -> Result<Completion, String> {
        if guest.driver.loaded() {
            return Err(format!("{} is loaded already", guest.driver.name()));
        }
        let before = Leavings::count();
        if let Some(parameters) = self.parameters {
            let loaded = guest.driver.load(parameters);
            loaded.map_err(|errno| format!("loading the module failed: {errno}"))?;
            if let Some(place) = debug_kernel::text_of(guest.driver.name()) {
                klog::mark(&place);
            }
        }
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| (self.run)(guest)));
        let skipped = outcome
            .err()
            .and_then(|payload| payload.downcast::<Skip>().ok());
        if self.leaves_module {
            let _ = ABORTED.set(format!("{} leaves the module", guest.test));
        } else {
            complain_about(guest.check_devices());
            guest.unload();
            complain_about(before.compare());
        }
        let log = guest.log();
        complain_about(
            klog::alarms(&log)
                .into_iter()
                .map(|line| format!("kernel: {line}")),
        );
        let complaints = std::mem::take(&mut *COMPLAINTS.lock().unwrap());
        if complaints.is_empty() {
            Ok(skipped.map_or(Completion::Completed, |skip| {
                Completion::ignored_with(skip.0)
            }))
        } else {
            Err(complaints.join("\n") + &guest.log_tail())
        }
    }
}

/// Makes a [`Test`] of a function, named after it and its module.
#[macro_export]
macro_rules! test {
    ($function:ident) => {
        $crate::harness::Test::new(
            concat!(module_path!(), "::", stringify!($function)),
            $function,
        )
    };
}

/// Why the rest of the suite cannot be run.
static ABORTED: OnceLock<String> = OnceLock::new();

/// What is wrong with the running test, from whichever thread.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// How long each test took.
pub static TIMES: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// When each test began, since the machine was started.
static BEGINNINGS: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Fails the running test, at its end.
pub fn complain(what: String) {
    COMPLAINTS.lock().unwrap().push(what);
}

fn complain_about(what: impl IntoIterator<Item = String>) {
    COMPLAINTS.lock().unwrap().extend(what);
}

/// Makes every panic, in whatever thread, a complaint.
pub fn catch_panics() {
    panic::set_hook(Box::new(|info| {
        if info.payload().downcast_ref::<Skip>().is_none() {
            complain(info.to_string());
        }
    }));
}

struct Skip(String);

/// Ends the running test without a verdict.
pub fn skip(reason: &str) -> ! {
    panic::panic_any(Skip(reason.to_owned()))
}

/// Looks every 10 ms whether something has become true. On a slow kernel it waits longer.
pub fn wait_until(limit: Duration, is_true: impl FnMut() -> bool) -> Result<(), ()> {
    look_every(Duration::from_millis(10), patient(limit), is_true)
}

/// Looks every `pause` whether something has become true.
pub fn look_every(
    pause: Duration,
    limit: Duration,
    mut is_true: impl FnMut() -> bool,
) -> Result<(), ()> {
    let deadline = Instant::now() + limit;
    loop {
        if is_true() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(());
        }
        thread::sleep(pause);
    }
}

/// Says that something is done, even where it panics.
pub struct Until<'a>(pub &'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Where a test's random numbers begin: `SEED` in the environment, or the time.
pub fn seed() -> u64 {
    let seed = match std::env::var("SEED") {
        Ok(seed) if !seed.is_empty() => seed.parse().expect("SEED is a number"),
        _ => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            now.subsec_nanos().into()
        }
    };
    say(&format!("SEED={seed}"));
    seed
}

/// Has the calling thread run on one processor only.
pub fn run_on(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    sched_setaffinity(None, &set).expect("to run there");
}

/// For the reader of the output, and of the console.
pub fn say(text: &str) {
    println!("    {text}");
    klog::mark(text);
}

/// What a test is given.
pub struct Guest {
    pub driver: Driver,
    test: String,
    log: Mutex<(Klog, Vec<String>)>,
}

impl Guest {
    fn new(driver: Driver, test: &str) -> Self {
        Self {
            driver,
            test: test.to_owned(),
            log: Mutex::new((Klog::from_now(), Vec::new())),
        }
    }

    /// Unloads the module, if it is loaded.
    fn unload(&self) {
        if !self.driver.loaded() {
            return;
        }
        self.driver.unload().unwrap_or_else(|errno| {
            complain(format!("rmmod failed: {errno}"));
            let why = format!("the module could not be unloaded after {}", self.test);
            let _ = ABORTED.set(why);
        });
    }

    /// Whose behaviour this test is to expect, where `differences.toml` lists one.
    pub fn expected(&self, difference: &str) -> Driver {
        differences::expected(self.driver, &self.test, difference)
    }

    /// What the kernel has said since the test began.
    pub fn log(&self) -> Vec<String> {
        let mut log = self.log.lock().unwrap();
        let news = log.0.read();
        log.1.extend(news);
        log.1.clone()
    }

    /// Whether the kernel has logged a line with `text` since the test began.
    pub fn has_logged(&self, text: &str) -> bool {
        self.log().iter().any(|line| line.contains(text))
    }

    /// Waits for the kernel to say something, 2 s at most. The drivers word it differently.
    pub fn expect_logged(&self, nbd: &str, rnbd: &str) {
        let what = match self.expected("messages-are-worded-differently") {
            Driver::Nbd => nbd,
            Driver::Rnbd => rnbd,
        };
        let found = wait_until(Duration::from_secs(2), || self.has_logged(what));
        assert!(found.is_ok(), "the kernel did not say {what:?}");
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let tail = &log[log.len().saturating_sub(25)..];
        format!("\nkernel's last lines:\n  {}", tail.join("\n  "))
    }

    /// After a test no device may be configured or open.
    fn check_devices(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if !self.driver.loaded() {
            return wrong;
        }
        let free = wait_until(Duration::from_secs(3), || self.driver.references() == 0);
        if free.is_err() {
            wrong.push(format!(
                "the module still has {} references",
                self.driver.references()
            ));
        }
        for index in devices() {
            let disk = format!("/sys/block/nbd{index}");
            if fs::exists(format!("{disk}/pid")).unwrap_or(false) {
                wrong.push(format!("{disk}/pid is left"));
            }
            let size = fs::read_to_string(format!("{disk}/size"));
            // A device that was to be destroyed may go while this looks.
            if let Some(size) = size.ok().filter(|size| size.trim() != "0") {
                wrong.push(format!("{disk}/size is left at {}", size.trim()));
            }
        }
        wrong
    }
}

/// What a test could leave behind in this process and in the kernel.
struct Leavings {
    files: usize,
    threads: usize,
    sockets: Vec<(String, usize)>,
    kernel_threads: Vec<String>,
}

impl Leavings {
    fn count() -> Self {
        let entries = |path| fs::read_dir(path).map_or(0, Iterator::count);
        Self {
            files: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            sockets: sockets(),
            kernel_threads: kernel_threads(),
        }
    }

    /// Whether everything that the test made is gone by now, or soon.
    fn compare(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        // vsock waits 8 s for the other side before it gives a socket up.
        let _ = wait_until(Duration::from_secs(12), || {
            let now = Self::count();
            wrong.clear();
            if now.files > self.files {
                wrong.push(format!("{} open files, {} before", now.files, self.files));
            }
            if now.threads > self.threads {
                wrong.push(format!("{} threads, {} before", now.threads, self.threads));
            }
            for ((protocol, before), (_, after)) in self.sockets.iter().zip(&now.sockets) {
                if after > before {
                    wrong.push(format!("{after} {protocol} sockets, {before} before"));
                }
            }
            for thread in &now.kernel_threads {
                if !self.kernel_threads.contains(thread) {
                    wrong.push(format!("the kernel thread {thread} is left"));
                }
            }
            wrong.extend(devices_without_driver());
            wrong.is_empty()
        });
        wrong
    }
}

fn devices_without_driver() -> Option<String> {
    let driverless = !Driver::Nbd.loaded() && !Driver::Rnbd.loaded();
    let left = devices();
    (driverless && !left.is_empty()).then(|| format!("without a module, devices {left:?} are left"))
}

/// The drivers' own: rescuers of work queues, and what may come.
fn kernel_threads() -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = processes.filter_map(|entry| {
        let path = entry.path();
        // A process with an executable is none of the kernel's.
        let name = fs::read_to_string(path.join("comm")).ok()?;
        // Workers are everybody's and show whose work they did last; only rescuers are somebody's.
        let own = !name.starts_with("kworker/") || name.starts_with("kworker/R-");
        (own && name.contains("nbd") && fs::read_link(path.join("exe")).is_err())
            .then(|| format!("{} {}", path.display(), name.trim()))
    });
    names.collect()
}

/// How many TCP sockets there are, with those that nobody has open any more.
pub fn tcp_sockets() -> usize {
    let tcp = sockets()
        .into_iter()
        .filter(|(name, _)| name.starts_with("TCP"));
    tcp.map(|(_, count)| count).sum()
}

/// The kernel's own count of the sockets that can carry NBD.
fn sockets() -> Vec<(String, usize)> {
    let table = fs::read_to_string("/proc/net/protocols").unwrap_or_default();
    let rows = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let known = |row: &Vec<&str>| {
        matches!(
            row[0],
            "TCP" | "TCPv6" | "MPTCP" | "MPTCPv6" | "UNIX-STREAM"
        )
    };
    rows.filter(known)
        .map(|row| (row[0].to_owned(), row[2].parse().unwrap_or(0)))
        .chain([("vsock".to_owned(), vsock_sockets())])
        .collect()
}

/// The module is used by its sockets and by other modules.
fn vsock_sockets() -> usize {
    let module = "/sys/module/vsock";
    let users = fs::read_to_string(format!("{module}/refcnt")).unwrap_or_default();
    let modules = fs::read_dir(format!("{module}/holders")).map_or(0, Iterator::count);
    users
        .trim()
        .parse()
        .unwrap_or(0_usize)
        .saturating_sub(modules)
}

/// What only the debug kernel tells, and that only some time after it happened.
pub fn last_faults() -> Vec<String> {
    let mut faults = match debug_kernel::leaks() {
        Ok(leaks) => leaks.iter().map(whose).collect(),
        Err(error) => vec![format!("kmemleak: {error}")],
    };
    if debug_kernel::lockdep_is_off() {
        faults.push("lockdep has turned itself off".into());
    }
    faults
}

fn whose(leak: &Leak) -> String {
    let tests = BEGINNINGS.lock().unwrap();
    let test = tests.iter().rev().find(|(began, _)| *began <= leak.at);
    let test = test.map_or("no test", |(_, name)| name);
    format!("lost in {test}:\n{}", leak.report)
}

/// Prints what took longest.
pub fn print_times() {
    let mut times = std::mem::take(&mut *TIMES.lock().unwrap());
    let total: Duration = times.iter().map(|(time, _)| *time).sum();
    times.sort_unstable();
    println!(
        "{} tests took {:.0} s; the longest:",
        times.len(),
        total.as_secs_f32()
    );
    for (time, name) in times.iter().rev().take(12) {
        println!("{:7.1} s  {name}", time.as_secs_f32());
    }
}
