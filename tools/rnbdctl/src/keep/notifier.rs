// SPDX-License-Identifier: GPL-2.0

//! Tells the service manager how it goes (sd_notify(3)). Without one, nothing happens.
//!
//! A thread does it: a service manager that does not read, perhaps because it waits for a device itself, must not
//! hold up what reconnects the device.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use sd_notify::{NotifyState, notify};

use crate::failure::{Exit, Failure};
use crate::log::tell;

/// How long the end of the program waits for a service manager that does not read.
const PATIENCE: Duration = Duration::from_secs(1);

enum Note {
    Status(String),
    Ready,
    Reloading,
    Stopping,
}

/// What was told last, and who tells it.
pub struct Notifier {
    is_ready: bool,
    status: String,
    notes: Sender<Note>,
    /// The thread sends nothing here, but ends it.
    end: Receiver<()>,
}

impl Notifier {
    /// # Errors
    ///
    /// There can be no thread.
    pub fn start() -> Result<Self, Failure> {
        let (notes, told) = channel();
        let (end_of_thread, end) = channel::<()>();
        let spawned = thread::Builder::new().spawn(move || {
            send_all(&told);
            drop(end_of_thread);
        });
        spawned.map_err(|error| Failure::new(Exit::Failed, "starting a thread", error))?;
        Ok(Self {
            is_ready: false,
            status: String::new(),
            notes,
            end,
        })
    }

    /// Tells the status if it has changed, and once that all devices are there.
    pub fn tell(&mut self, is_ready: bool, status: String) {
        if status != self.status {
            self.status.clone_from(&status);
            self.note(Note::Status(status));
        }
        if is_ready && !self.is_ready {
            self.is_ready = true;
            self.note(Note::Ready);
        }
    }

    /// Until it is ready again, the configuration is being read, and devices are handed over.
    pub fn reloading(&mut self) {
        self.is_ready = false;
        self.note(Note::Reloading);
    }

    /// The last that is told.
    pub fn stop(self) {
        self.note(Note::Stopping);
        drop(self.notes);
        if self.end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tell("the service manager does not listen");
        }
    }

    fn note(&self, note: Note) {
        // The thread ends after this.
        let _ = self.notes.send(note);
    }
}

fn send_all(told: &Receiver<Note>) {
    while let Ok(note) = told.recv() {
        match note {
            Note::Status(status) => send(&[NotifyState::Status(&status)]),
            Note::Ready => send(&[NotifyState::Ready]),
            Note::Reloading => match NotifyState::monotonic_usec_now() {
                Ok(now) => send(&[NotifyState::Reloading, now]),
                Err(error) => tell(&format!("reading the clock: {error}")),
            },
            Note::Stopping => send(&[NotifyState::Stopping]),
        }
    }
}

/// A service manager that cannot be told is no reason to let a device down.
fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = notify(state) {
        tell(&format!("telling the service manager: {error}"));
    }
}
