// SPDX-License-Identifier: GPL-2.0

//! Keeps devices connected.
//!
//! - `config` reads what is to be kept; `find` finds that among the devices, and what it lacks
//! - `dial` opens connections; `pass` gives them to the kernel; `backoff` is the time between attempts
//! - `keeper` does all this for one device; `disconnect` undoes it at the end
//! - `kept` is what is known of a device, `served` where its connections lead, and `peers` whether an address is there
//! - `lock` keeps another run of the program away from a device; `files` has the names of what is locked or remembered
//! - `notifier` tells the service manager
//!
//! The main thread waits for messages of others, which wait for events of the kernel, for signals, and for servers.
//! It alone asks the kernel for anything.

mod backoff;
mod config;
mod dial;
mod disconnect;
mod files;
mod find;
mod keeper;
mod kept;
mod lock;
mod notifier;
mod pass;
mod peers;
mod served;

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use rustix::process::configure_io_flusher_behavior;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::dial::{Dialled, Dialler};
use self::disconnect::disconnect;
use self::keeper::Keeper;
use self::notifier::Notifier;
use crate::cli::KeepArgs;
use crate::connect::open_family;
use crate::failure::{Exit, Failure};
use crate::listen::{Events, Heard};
use crate::log::{self, tell};
use crate::sysfs::Sysfs;

/// What the main thread waits for.
pub enum Message {
    Heard(Vec<Heard>),
    /// There will be no more events.
    Deaf(Failure),
    Signal(i32),
    Dialled(Dialled),
}

/// # Errors
///
/// `Usage`: a configuration makes no sense. Others: no driver is loaded, or none of the devices can be kept.
pub fn run(args: &KeepArgs) -> Result<(), Failure> {
    let paths = config::find(&args.configs)?;
    let keepers = paths.into_iter().enumerate();
    let keepers: Result<Vec<Keeper>, Failure> = keepers
        .map(|(number, path)| Keeper::new(number, path))
        .collect();
    let mut keepers = keepers?;
    config::check_distinct(keepers.iter().map(|keeper| &keeper.kept.config))?;
    let named = keepers
        .iter()
        .filter_map(|keeper| keeper.kept.config.device);
    let named: BTreeSet<u32> = named.collect();
    for keeper in &mut keepers {
        keeper.kept.reserved.clone_from(&named);
    }
    keepers.iter_mut().try_for_each(Keeper::lock)?;
    // The threads inherit it.
    avoid_own_writeback();
    let (sender, told) = channel();
    hear_signals(sender.clone())?;
    // This loads a driver if none is loaded.
    open_family()?;
    let driver = Sysfs::new().driver();
    keepers
        .iter()
        .try_for_each(|keeper| keeper.check_transports(driver))?;
    hear_events(sender.clone())?;
    // Messages of the start are written at once.
    log::start().map_err(|error| Failure::new(Exit::Failed, "starting a thread", error))?;
    let keep = Keep {
        keepers,
        dialler: Dialler(sender),
        notifier: Notifier::start()?,
        disconnect: args.disconnect,
    };
    keep.run(&told)
}

/// Memory must not be freed by writing to the devices: that may have to wait for this very program.
fn avoid_own_writeback() {
    if let Err(error) = configure_io_flusher_behavior(true) {
        tell(&format!(
            "when memory is short, the program may wait for a device: {error}"
        ));
    }
}

fn hear_signals(sender: Sender<Message>) -> Result<(), Failure> {
    let wrong = |error| Failure::new(Exit::Failed, "handling signals", error);
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(wrong)?;
    let hear = move || {
        for signal in signals.forever() {
            if sender.send(Message::Signal(signal)).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().spawn(hear).map(drop).map_err(wrong)
}

fn hear_events(sender: Sender<Message>) -> Result<(), Failure> {
    let mut events = Events::open()?;
    let hear = move || {
        loop {
            let message = match events.wait() {
                Ok(heard) => Message::Heard(heard),
                Err(failure) => Message::Deaf(failure),
            };
            let is_last = matches!(message, Message::Deaf(_));
            if sender.send(message).is_err() || is_last {
                return;
            }
        }
    };
    thread::Builder::new()
        .spawn(hear)
        .map(drop)
        .map_err(|error| Failure::new(Exit::Failed, "listening to the kernel", error))
}

struct Keep {
    keepers: Vec<Keeper>,
    dialler: Dialler,
    notifier: Notifier,
    /// Whether devices are disconnected at the end.
    disconnect: bool,
}

impl Keep {
    fn run(mut self, told: &Receiver<Message>) -> Result<(), Failure> {
        loop {
            let now = Instant::now();
            for keeper in &mut self.keepers {
                keeper.run(now, &self.dialler);
            }
            self.notify();
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            let Some(message) = self.wait(told) else {
                continue;
            };
            match message {
                Message::Heard(heard) => self.heard(&heard),
                Message::Deaf(failure) => return Err(failure),
                Message::Dialled(dialled) => self.dialled(dialled),
                Message::Signal(SIGHUP) => self.reload(),
                Message::Signal(_) => {
                    self.stop();
                    return Ok(());
                }
            }
        }
    }

    /// `None`: a device has something to do.
    fn wait(&self, told: &Receiver<Message>) -> Option<Message> {
        let now = Instant::now();
        let due = self.keepers.iter().filter_map(|keeper| keeper.due(now));
        match due.min() {
            Some(due) => told.recv_timeout(due.saturating_duration_since(now)).ok(),
            // There is always a sender: the dialler's.
            None => told.recv().ok(),
        }
    }

    fn notify(&mut self) {
        let status: Vec<String> = self.keepers.iter().map(Keeper::status).collect();
        self.notifier
            .tell(is_ready(&self.keepers), status.join("; "));
    }

    /// `None`: there is something left to keep.
    fn outcome(&self) -> Option<Result<(), Failure>> {
        let ends: Option<Vec<_>> = self.keepers.iter().map(Keeper::ended).collect();
        match ends?.into_iter().flatten().next() {
            None => Some(Ok(())),
            Some(exit) => Some(Err(Failure::new(
                exit,
                "keep",
                "there is no device left to keep",
            ))),
        }
    }

    fn heard(&mut self, heard: &[Heard]) {
        for heard in heard {
            match heard {
                Heard::Event(_) => (),
                Heard::Missed => tell("events were missed; looking at the devices"),
                Heard::Changed => tell("the driver has changed; looking at the devices"),
            }
            let driver = Sysfs::new().driver();
            for keeper in &mut self.keepers {
                match heard {
                    Heard::Event(event) => keeper.heard(event),
                    Heard::Missed => keeper.missed(),
                    Heard::Changed => keeper.driver_changed(driver, Instant::now()),
                }
            }
        }
    }

    fn dialled(&mut self, dialled: Dialled) {
        if let Some(keeper) = self.keepers.get_mut(dialled.keeper) {
            keeper.dialled(dialled, Instant::now());
        }
    }

    fn reload(&mut self) {
        self.notifier.reloading();
        for keeper in &mut self.keepers {
            keeper.reload(Instant::now());
        }
    }

    fn stop(mut self) {
        self.notifier.stop();
        self.keepers.iter_mut().for_each(Keeper::abandon);
        let ours = self
            .keepers
            .iter()
            .filter(|keeper| keeper.ended().is_none());
        for kept in ours.map(|keeper| &keeper.kept) {
            match (self.disconnect, kept.index) {
                (true, _) => {
                    if let Err(failure) = disconnect(kept) {
                        kept.say(&failure.to_string());
                    }
                }
                (false, Some(index)) => kept.say(&format!("/dev/nbd{index} stays connected")),
                (false, None) => (),
            }
        }
    }
}

/// Whether all that is kept works, and something is: nobody may mount a device that is gone.
fn is_ready(keepers: &[Keeper]) -> bool {
    let mut kept = keepers.iter().filter(|keeper| keeper.ended().is_none());
    keepers.iter().all(Keeper::is_settled) && kept.next().is_some()
}
