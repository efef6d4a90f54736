// SPDX-License-Identifier: GPL-2.0

//! Looks what a device lacks.

use super::super::files::path_of_served;
use super::super::find::{Condition, Found, Goal};
use super::super::pass;
use super::super::served::Served;
use super::{Keeper, Trouble};
use crate::device::{Device, Session};
use crate::failure::{Exit, Failure};
use crate::handover::{check_allowed, check_driver, check_reconfigurable};
use crate::kernel::Kernel;
use crate::structured::Wanted;

impl Keeper {
    /// What is to be dialled for; `None`: nothing.
    pub(super) fn look(&mut self) -> Result<Option<Goal>, Trouble> {
        let kernel = Kernel::look().map_err(|failure| self.without_driver(failure))?;
        let found = self.kept.find(&kernel.devices()?).map_err(Trouble::End)?;
        let device = match found {
            Found::Device(device) => device,
            Found::Nothing if self.kept.index.is_none() => {
                self.status = "not connected yet".into();
                // All connections are new.
                self.wants_handover = None;
                self.kept.forget();
                return Ok(Some(Goal::Connect));
            }
            Found::Nothing => {
                return Err(Trouble::End(Failure::new(
                    Exit::NoDevice,
                    "device",
                    "somebody else has disconnected it",
                )));
            }
        };
        self.structured = Wanted::by(&device);
        self.recognise(&device);
        if self.kept.index.is_none() {
            check_reconfigurable(&device).map_err(Trouble::End)?;
            let Condition { goal, peers, .. } = Condition::of(&kernel, &device, &self.kept.deaths)?;
            let path = path_of_served(&self.kept.config);
            self.kept.served = Served::recall(&path, &device);
            // Where all are dead, any of the servers may have the device.
            let is_lost = matches!(goal, Some(Goal::Replace { all: true, .. }));
            if let Some(served) = self.kept.served.as_ref().filter(|_| !is_lost) {
                let checked = served.check(&self.kept.config.uris, &peers, &path);
                checked.map_err(Trouble::End)?;
            }
            if !peers.is_empty() {
                self.status = format!("{} is connected already", device.device);
                return Ok(Some(Goal::Adopt {
                    index: device.index,
                    session: device.session(),
                    peers,
                }));
            }
            // Nobody tells what it is connected to.
            self.adopt(device.index, device.session())?;
        }
        let condition = Condition::of(&kernel, &device, &self.kept.deaths)?;
        self.status = condition.status;
        self.is_alive = condition.is_alive;
        let goal = condition.goal;
        if self.wants_handover.is_none() {
            return Ok(goal);
        }
        if matches!(goal, Some(Goal::Replace { all: true, .. })) {
            // All connections are made anew.
            self.wants_handover = None;
            return Ok(goal);
        }
        match check_driver(&kernel).and_then(|()| check_allowed(&device)) {
            Ok(()) => Ok(Some(Goal::HandOver {
                connections: device.connections.unwrap_or(1),
            })),
            Err(failure) => {
                self.wants_handover = None;
                self.complain(&failure);
                Ok(goal)
            }
        }
    }

    /// A device that somebody else has disconnected and connected again, between two looks, is another one: it may lead
    /// to something else.
    pub(super) fn recognise(&mut self, device: &Device) {
        if self.kept.is(device) {
            return;
        }
        if self.kept.index.is_some() {
            let what = format!("somebody else has connected {} anew", device.device);
            self.kept.say(&what);
        }
        self.is_alive = false;
        self.kept.forget();
    }

    /// Somebody may be about to load another driver. Where there was a device, that is gone with the old one.
    pub(super) fn without_driver(&self, failure: Failure) -> Trouble {
        match self.kept.index {
            None if failure.exit == Exit::NoDevice => Trouble::Retry(failure),
            _ => failure.into(),
        }
    }

    /// Keeps a device from now on that somebody else has connected, or an earlier run of the program.
    pub(super) fn adopt(&mut self, index: u32, session: Session) -> Result<(), Failure> {
        pass::timeouts(index, &self.kept.config)?;
        self.kept
            .say(&format!("/dev/nbd{index} is connected already"));
        self.kept.index = Some(index);
        self.kept.session = session;
        self.kept.known = None;
        self.missed();
        Ok(())
    }
}
