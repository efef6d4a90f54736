// SPDX-License-Identifier: GPL-2.0

//! What is done for one device: it looks what the device lacks, has that dialled, and passes it on.
//!
//! Nothing is concluded from an event but that it is time to look. So neither an event that was missed nor a
//! connection that dies while another one is dialled is lost: after each attempt comes another look. (nbd.ko has
//! nothing to look at. There, dead connections are counted as they are told.)

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::backoff::Backoff;
use super::config::Config;
use super::dial::{Dialled, Dialler, Order, Reached};
use super::find::{Deaths, Goal};
use super::kept::Kept;
use super::lock::Lock;
use super::pass;
use crate::failure::{Exit, Failure};
use crate::listen::{Event, Kind};
use crate::structured::Wanted;
use crate::sysfs::{Driver, Sysfs};

/// How often it looks without an event: not all that happens is told, as what happens in another network namespace.
const SLOW_LOOK: Duration = Duration::from_secs(60);

/// How long connections may be dialled for a handover, at the least. Whoever has asked for it waits, as "systemctl reload"
/// does for 90 seconds.
const HANDOVER_LIMIT: Duration = Duration::from_secs(60);

/// What it is doing.
#[derive(Debug)]
enum Task {
    /// It waits for events, and looks then in any case.
    Idle(Instant),
    /// It is about to look.
    Look,
    /// It looks and dials then.
    Wait(Instant),
    Dial(Goal),
    /// It does nothing any more.
    Ended(Option<Exit>),
}

/// Why it does not go on.
enum Trouble {
    /// Another attempt may help.
    Retry(Failure),
    /// The device is not, or not any more, for this program to keep.
    End(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        match failure.exit {
            Exit::NoDevice | Exit::Permission => Self::End(failure),
            _ => Self::Retry(failure),
        }
    }
}

pub struct Keeper {
    /// Its place among all.
    number: usize,
    pub(super) kept: Kept,
    /// What new connections of the device have to be like.
    structured: Wanted,
    task: Task,
    backoff: Backoff,
    /// The number of the last order. What comes of earlier ones is not wanted any more.
    orders: u64,
    /// A handover is to be done, until this time.
    wants_handover: Option<Instant>,
    /// Nobody else may keep the device.
    lock: Option<Lock>,
    /// Whether the last look has found a connection that is alive.
    is_alive: bool,
    /// What was said last, so that it is not said again and again.
    complaint: Option<String>,
    status: String,
}

impl Keeper {
    /// # Errors
    ///
    /// Those of [`Config::read`].
    pub fn new(number: usize, path: PathBuf) -> Result<Self, Failure> {
        Ok(Self {
            number,
            kept: Kept::new(path)?,
            structured: Wanted::No,
            task: Task::Look,
            backoff: Backoff::default(),
            orders: 0,
            wants_handover: None,
            lock: None,
            is_alive: false,
            complaint: None,
            status: "looking for the device".into(),
        })
    }

    /// Keeps other runs of the program away.
    ///
    /// # Errors
    ///
    /// Those of [`Lock::take`].
    pub fn lock(&mut self) -> Result<(), Failure> {
        self.lock = Some(Lock::take(&self.kept)?);
        Ok(())
    }

    /// Whether the driver can reach the servers.
    ///
    /// # Errors
    ///
    /// Those of [`Config::check_transports`].
    pub fn check_transports(&self, driver: Option<Driver>) -> Result<(), Failure> {
        self.kept.config.check_transports(&self.kept.path, driver)
    }

    /// In one line.
    pub fn status(&self) -> String {
        format!("{}: {}", self.kept.name, self.status)
    }

    /// Whether it has a device that works, and does what it was last told to. One that it has refused is not its
    /// own: nobody may mount that.
    pub fn is_settled(&self) -> bool {
        match self.task {
            Task::Ended(exit) => exit.is_none(),
            _ => self.kept.index.is_some() && self.is_alive && self.wants_handover.is_none(),
        }
    }

    /// `Some(None)`: nothing is wrong, but somebody else has disconnected the device.
    pub fn ended(&self) -> Option<Option<Exit>> {
        match self.task {
            Task::Ended(exit) => Some(exit),
            _ => None,
        }
    }

    /// When it has something to do if nothing happens; `None`: never.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        let task = match self.task {
            Task::Look => Some(now),
            Task::Wait(until) | Task::Idle(until) => Some(until),
            _ => None,
        };
        task.into_iter().chain(self.wants_handover).min()
    }

    /// Something has happened to a device.
    pub fn heard(&mut self, event: &Event) {
        if Some(event.index) != self.kept.index {
            return;
        }
        if event.kind == Kind::ConnectionDead {
            self.kept.deaths.number = self.kept.deaths.number.saturating_add(1);
            let place = event
                .connection
                .map_or("a connection".into(), |place| format!("connection {place}"));
            self.kept.say(&match event.reason {
                Some("replaced") => format!("{place} has ended, which was replaced"),
                reason => format!("{place} is dead ({})", reason.unwrap_or("why is not told")),
            });
        }
        self.look_soon();
    }

    /// Nobody knows what has happened.
    pub fn missed(&mut self) {
        self.kept.deaths.more = true;
        self.look_soon();
    }

    /// Another driver is loaded, or the same one anew. It may lack what the servers take.
    pub fn driver_changed(&mut self, driver: Option<Driver>, now: Instant) {
        self.missed();
        if self.ended().is_some() {
            return;
        }
        if let Err(failure) = self.check_transports(driver) {
            self.abandon();
            self.give_way(Trouble::End(failure), now);
        }
    }

    /// Whoever waits or dials looks after that.
    fn look_soon(&mut self) {
        if matches!(self.task, Task::Idle(_)) {
            self.task = Task::Look;
        }
    }

    /// Reads the configuration again, and has all connections handed over to the server that it names.
    pub fn reload(&mut self, now: Instant) {
        // What another one was refused for may have changed.
        if self.ended() == Some(None) {
            return self
                .kept
                .say("somebody else has disconnected it: that takes a restart of the program");
        }
        let driver = Sysfs::new().driver();
        let config = Config::read(&self.kept.path);
        let config =
            config.and_then(|new| new.check_transports(&self.kept.path, driver).map(|()| new));
        let config = match config {
            Ok(config) => config,
            Err(failure) => {
                return self
                    .kept
                    .say(&format!("the old configuration stays: {failure}"));
            }
        };
        let is_same =
            |new: &Config, old: &Config| (new.device, new.backend()) == (old.device, old.backend());
        if !is_same(&config, &self.kept.config) {
            return self.kept.say(
                "the old configuration stays: another device or identifier takes a restart of the program",
            );
        }
        self.kept.say("the configuration was read again");
        self.kept.config = config;
        self.complaint = None;
        // Also of a device that it has yet to find.
        let limit = self.kept.config.connect_timeout.saturating_mul(3);
        self.wants_handover = now.checked_add(limit.max(HANDOVER_LIMIT));
        self.abandon();
        if self.ended().is_some() {
            self.kept.forget();
        }
        self.task = Task::Look;
        self.backoff = Backoff::default();
        if let Err(failure) = self.set_timeouts() {
            self.complain(&failure);
        }
    }

    /// What was ordered is not wanted any more. What it was ordered for is.
    pub fn abandon(&mut self) {
        self.orders += 1;
        if let Task::Dial(goal) = &self.task {
            self.kept.deaths.put_back(goal);
            self.task = Task::Look;
        }
    }

    fn set_timeouts(&self) -> Result<(), Failure> {
        match self.kept.index {
            Some(index) => pass::timeouts(index, &self.kept.config),
            None => Ok(()),
        }
    }

    /// Does what is to be done now.
    pub fn run(&mut self, now: Instant, dialler: &Dialler) {
        if self.wants_handover.is_some_and(|until| until <= now) {
            self.give_up_handover();
        }
        let after_wait = match self.task {
            Task::Look => false,
            Task::Idle(until) if until <= now => false,
            Task::Wait(until) if until <= now => true,
            _ => return,
        };
        match self.look() {
            Ok(None) => self.task = Task::Idle(now + SLOW_LOOK),
            Ok(Some(goal)) => self.pursue(goal, after_wait, now, dialler),
            Err(trouble) => self.give_way(trouble, now),
        }
    }

    /// It takes too long. What is dialled is of no use any more.
    fn give_up_handover(&mut self) {
        self.wants_handover = None;
        if matches!(self.task, Task::Dial(Goal::HandOver { .. })) {
            self.abandon();
        }
        if self.ended().is_none() {
            let what = "it has taken too long, the connections stay as they are";
            self.complain(&Failure::new(Exit::Unreachable, "handing over", what));
        }
    }

    /// Dials, or waits first.
    fn pursue(&mut self, goal: Goal, after_wait: bool, now: Instant, dialler: &Dialler) {
        if !after_wait && !matches!(goal, Goal::HandOver { .. }) {
            self.backoff.lost(now);
            let delay = self.backoff.delay(self.kept.config.max_retry_delay);
            if !delay.is_zero() {
                self.task = Task::Wait(now + delay);
                return;
            }
        }
        self.orders += 1;
        let order = Order::new(&self.kept, &goal, self.structured);
        match order.and_then(|order| dialler.dial(self.number, self.orders, order)) {
            Ok(()) => {
                // What dies from now on comes on top.
                self.kept.deaths = Deaths::default();
                self.task = Task::Dial(goal);
            }
            Err(failure) => self.retry(&failure, now),
        }
    }

    /// What was ordered is there, or cannot be had.
    pub fn dialled(&mut self, dialled: Dialled, now: Instant) {
        if dialled.number != self.orders {
            return;
        }
        let Task::Dial(goal) = std::mem::replace(&mut self.task, Task::Look) else {
            return;
        };
        let is_handover = matches!(goal, Goal::HandOver { .. });
        let is_adoption = matches!(goal, Goal::Adopt { .. });
        let is_elsewhere = matches!(&dialled.outcome, Err(failure) if failure.exit == Exit::Busy);
        let outcome = match dialled.outcome {
            Ok(Reached::Opened(uri, opened)) => {
                let missing = opened.missing;
                let passed = pass::on(&mut self.kept, &goal, uri, opened);
                // The rest is as dead as before, and nbd.ko does not tell that once more.
                passed.inspect(|()| self.kept.deaths.put_back_some(&goal, missing))
            }
            Ok(Reached::Same(served)) => match &goal {
                Goal::Adopt { index, session, .. } => self
                    .adopt(*index, *session)
                    .map(|()| self.kept.serve(served)),
                _ => Ok(()),
            },
            Err(failure) => Err(failure),
        };
        match outcome {
            Ok(()) if is_adoption => self.complaint = None,
            Ok(()) => {
                self.complaint = None;
                self.backoff.succeeded(now);
            }
            // It is connected to another server.
            Err(failure) if is_adoption && is_elsewhere => {
                self.give_way(Trouble::End(failure), now);
            }
            // An earlier one is not over yet.
            Err(failure) if is_handover && failure.exit == Exit::Busy => {
                return self.retry(&failure, now);
            }
            // Nothing is lost: whoever wants a handover asks again.
            Err(failure) if is_handover => {
                self.complain(&failure);
                self.kept.say("the connections stay as they are");
            }
            Err(failure) => {
                self.kept.deaths.put_back(&goal);
                self.give_way(failure.into(), now);
            }
        }
        if is_handover {
            self.wants_handover = None;
        }
    }

    fn give_way(&mut self, trouble: Trouble, now: Instant) {
        match trouble {
            Trouble::Retry(failure) => self.retry(&failure, now),
            Trouble::End(failure) => {
                self.complain(&failure);
                self.status = failure.to_string();
                // That somebody has disconnected it is as good an end as another.
                let was_kept = self.kept.index.is_some() && failure.exit == Exit::NoDevice;
                self.task = Task::Ended((!was_kept).then_some(failure.exit));
                if was_kept {
                    // That is for good, so another run may keep it.
                    self.lock = None;
                }
            }
        }
    }

    fn retry(&mut self, failure: &Failure, now: Instant) {
        self.backoff.failed();
        let delay = self.backoff.delay(self.kept.config.max_retry_delay);
        self.task = Task::Wait(now + delay);
        self.complain(failure);
        self.status = format!("trying again: {failure}");
    }

    fn complain(&mut self, failure: &Failure) {
        let words = failure.to_string();
        if self.complaint.as_ref() != Some(&words) {
            self.kept.say(&words);
            self.complaint = Some(words);
        }
    }
}

mod look;

#[cfg(test)]
mod tests;
