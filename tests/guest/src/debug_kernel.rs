// SPDX-License-Identifier: GPL-2.0

//! What is different on the debug kernel (`make check-debug`): it is slow, and it knows of leaks.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// What kmemleak takes for too young to be reported.
const YOUNG: Duration = Duration::from_secs(5);

/// How many times as long as on the stock kernel things may take; `SLOW` in the environment
/// overrides what is known of the kernel.
static SLOWNESS: LazyLock<u32> = LazyLock::new(|| {
    let asked = std::env::var("SLOW")
        .ok()
        .and_then(|text| text.parse().ok());
    asked.unwrap_or(if runs() { 4 } else { 1 })
});

/// Whether this is one.
pub fn runs() -> bool {
    Path::new(KMEMLEAK).exists()
}

/// What to wait on this kernel for something that takes at most `limit` on the stock kernel.
pub fn patient(limit: Duration) -> Duration {
    limit * *SLOWNESS
}

/// How much of something there is to do: less on a slow kernel, where each of it does for many.
pub fn enough<T>(stock: T, debug: T) -> T {
    if runs() { debug } else { stock }
}

/// Where the module lies: once it is unloaded, kmemleak has only addresses for its functions.
pub fn text_of(module: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/module/{module}/sections/.text")).ok()?;
    runs().then(|| format!("{module}'s code lies at {}", text.trim()))
}

/// An allocation that nothing points to any more.
pub struct Leak {
    /// When it was allocated, since the machine was started.
    pub at: Duration,
    /// What kmemleak says of it.
    pub report: String,
}

/// All leaks so far. Each is told once. A scan takes many seconds.
pub fn leaks() -> io::Result<Vec<Leak>> {
    if !runs() {
        return Ok(Vec::new());
    }
    thread::sleep(YOUNG);
    // What changed its contents since the last scan is left for the next: hence two.
    fs::write(KMEMLEAK, "scan")?;
    fs::write(KMEMLEAK, "scan")?;
    let report = fs::read_to_string(KMEMLEAK)?;
    fs::write(KMEMLEAK, "clear")?;
    let objects = report.split(OBJECT).skip(1);
    let leak = |object| Leak {
        at: allocated(object),
        report: format!("{OBJECT}{object}"),
    };
    Ok(objects.map(leak).collect())
}

/// How a report begins.
const OBJECT: &str = "unreferenced object";

/// `..., jiffies 4294937294` → 180 s. The kernel's count begins five minutes before it overflows 32 bits.
fn allocated(report: &str) -> Duration {
    const HZ: u64 = 250; // tools/debug.config
    let first = (1 << 32) - 300 * HZ;
    let digits = report.split("jiffies ").nth(1).unwrap_or_default();
    let digits = digits.split_whitespace().next().unwrap_or_default();
    let jiffies = digits.parse::<u64>().unwrap_or(first);
    Duration::from_millis(jiffies.saturating_sub(first) * 1000 / HZ)
}

/// Whether lockdep has given up: it does so after its first report, and where its tables are full.
pub fn lockdep_is_off() -> bool {
    let stats = fs::read_to_string("/proc/lockdep_stats").unwrap_or_default();
    let mut lines = stats.lines().map(str::trim);
    lines.any(|line| {
        line.strip_prefix("debug_locks:")
            .is_some_and(|on| on.trim() == "0")
    })
}
