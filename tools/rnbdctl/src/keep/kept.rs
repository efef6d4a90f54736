// SPDX-License-Identifier: GPL-2.0

//! What is kept: the configuration of a device, and what is known of the device.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::slice;

use super::config::{Config, name};
use super::files::path_of_served;
use super::find::{Deaths, Found, find};
use super::served::Served;
use crate::device::{Device, Session};
use crate::failure::Failure;
use crate::log::tell;
use crate::negotiate::Export;

/// What connections are made to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub export: Export,
    pub served: Served,
}

pub struct Kept {
    pub name: String,
    /// Where the configuration is.
    pub path: PathBuf,
    pub config: Config,
    /// The device, once it was connected.
    pub index: Option<u32>,
    /// Its session. The next one may lead to something else.
    pub session: Session,
    /// What was last accepted as its export.
    pub known: Option<Export>,
    /// Where its connections lead, if that is known.
    pub served: Option<Served>,
    /// What is to be replaced, where the driver does not list it.
    pub deaths: Deaths,
    /// Devices that configurations name.
    pub reserved: BTreeSet<u32>,
}

impl Kept {
    /// # Errors
    ///
    /// Those of [`Config::read`].
    pub fn new(path: PathBuf) -> Result<Self, Failure> {
        Ok(Self {
            name: name(&path),
            config: Config::read(&path)?,
            path,
            index: None,
            session: Session::default(),
            known: None,
            served: None,
            deaths: Deaths::default(),
            reserved: BTreeSet::new(),
        })
    }

    /// Whether a device, and its session, is that which is kept.
    pub fn is(&self, device: &Device) -> bool {
        (self.index, self.session) == (Some(device.index), device.session())
    }

    /// As [`find`], but a second device with the same identifier does not take the place of the one that is kept.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn find(&self, devices: &[Device]) -> Result<Found, Failure> {
        let ours = devices.iter().find(|device| self.is(device));
        match ours.map(|device| find(slice::from_ref(device), &self.config)) {
            Some(Ok(Found::Device(device))) => Ok(Found::Device(device)),
            _ => find(devices, &self.config),
        }
    }

    /// There is no device any more, or it is another one. Nothing holds that was known of it.
    pub fn forget(&mut self) {
        self.index = None;
        self.session = Session::default();
        self.known = None;
        self.served = None;
        self.deaths = Deaths::default();
    }

    /// Connections lead there now, and that was accepted as the device's export.
    pub fn lead_to(&mut self, target: Target) {
        self.known = Some(target.export);
        self.serve(target.served);
    }

    /// Connections lead there now.
    pub fn serve(&mut self, served: Served) {
        let Some(index) = self.index else {
            return;
        };
        let path = path_of_served(&self.config);
        if self.served.as_ref() == Some(&served) && path.exists() {
            return;
        }
        if let Err(error) = served.remember(&path, index, self.session) {
            self.say(&format!(
                "where the connections lead is not known after a restart: {}: {error}",
                path.display()
            ));
        }
        self.served = Some(served);
    }

    /// Prints what has happened.
    pub fn say(&self, what: &str) {
        tell(&format!("{}: {what}", self.name));
    }
}
