// SPDX-License-Identifier: GPL-2.0

//! What is different on the debug kernel (`make check-debug`): it is slow, and it knows of leaks.

use std::fs;
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

/// Where the module lies: once it is unloaded, kmemleak has only addresses for its functions.
pub fn text_of(module: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/module/{module}/sections/.text")).ok()?;
    runs().then(|| format!("{module}'s code lies at {}", text.trim()))
}

/// Allocations that nothing points to any more, except young ones. Each is told once.
pub fn leaks() -> Vec<String> {
    if !runs() {
        return Vec::new();
    }
    match scan() {
        Ok(report) => report.lines().map(str::to_owned).collect(),
        Err(error) => vec![format!("{KMEMLEAK}: {error}")],
    }
}

/// As [`leaks()`], but nothing is too young.
pub fn old_and_young_leaks() -> Vec<String> {
    if runs() {
        thread::sleep(YOUNG);
    }
    leaks()
}

/// What changed its contents since the last scan is left for the next: hence two.
fn scan() -> std::io::Result<String> {
    fs::write(KMEMLEAK, "scan")?;
    fs::write(KMEMLEAK, "scan")?;
    let report = fs::read_to_string(KMEMLEAK)?;
    if !report.is_empty() {
        fs::write(KMEMLEAK, "clear")?;
    }
    Ok(report)
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
