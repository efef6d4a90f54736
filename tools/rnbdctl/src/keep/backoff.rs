// SPDX-License-Identifier: GPL-2.0

//! How long to wait until the next attempt.

use std::time::{Duration, Instant};

/// The first delay, which each failure doubles.
const FIRST: Duration = Duration::from_millis(100);

/// A connection that lives less long was no success.
const SHORT: Duration = Duration::from_secs(1);

/// The delays of one device.
#[derive(Debug, Default)]
pub struct Backoff {
    /// How many attempts have failed since the last success.
    failures: u32,
    /// How many successes in a row did not last.
    short_lives: u32,
    succeeded: Option<Instant>,
}

impl Backoff {
    pub fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
    }

    pub fn succeeded(&mut self, now: Instant) {
        self.failures = 0;
        self.succeeded = Some(now);
    }

    /// Something is lost: did it last?
    pub fn lost(&mut self, now: Instant) {
        let Some(since) = self.succeeded.take() else {
            return;
        };
        if now.saturating_duration_since(since) < SHORT {
            self.short_lives = self.short_lives.saturating_add(1);
        } else {
            self.short_lives = 0;
        }
    }

    /// How long to wait. The first attempt comes at once. Then it is a random part of a time that doubles up to
    /// `max`, but at least half of it: so the clients of a server that returns do not come all at once.
    pub fn delay(&self, max: Duration) -> Duration {
        let attempts = self.failures.max(self.short_lives);
        let Some(doublings) = attempts.checked_sub(1) else {
            return Duration::ZERO;
        };
        let factor = 2_u32.saturating_pow(doublings);
        let longest = FIRST.saturating_mul(factor).min(max);
        longest.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(10);

    /// Whether the delay is a part of this.
    fn is(backoff: &Backoff, longest: Duration) -> bool {
        (0..100).all(|_| {
            let delay = backoff.delay(MAX);
            longest / 2 <= delay && delay <= longest
        })
    }

    #[test]
    fn failures_double_it() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.delay(MAX), Duration::ZERO);
        for longest in [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000] {
            backoff.failed();
            assert!(is(&backoff, Duration::from_millis(longest)), "{backoff:?}");
        }
        for _ in 0..100 {
            backoff.failed();
        }
        assert!(is(&backoff, MAX), "{backoff:?}");
    }

    #[test]
    fn it_is_not_the_same_twice() {
        let mut backoff = Backoff::default();
        backoff.failed();
        let first = backoff.delay(MAX);
        assert!((0..100).any(|_| backoff.delay(MAX) != first));
    }

    #[test]
    fn what_lasts_resets_it() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        backoff.failed();
        backoff.failed();
        backoff.succeeded(now);
        assert_eq!(backoff.delay(MAX), Duration::ZERO);
        backoff.lost(now + SHORT);
        assert_eq!(backoff.delay(MAX), Duration::ZERO);
    }

    /// A server that accepts connections and ends them is not dialled in a loop.
    #[test]
    fn what_does_not_last_is_no_success() {
        let (mut backoff, mut now) = (Backoff::default(), Instant::now());
        for longest in [100, 200, 400] {
            backoff.succeeded(now);
            now += SHORT / 2;
            backoff.lost(now);
            // Two that are lost at once count once.
            backoff.lost(now);
            assert!(is(&backoff, Duration::from_millis(longest)), "{backoff:?}");
        }
    }
}
