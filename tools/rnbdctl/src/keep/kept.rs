// SPDX-License-Identifier: GPL-2.0

//! What is kept: the configuration of a device, and what is known of the device.

use std::path::PathBuf;

use super::config::{Config, name};
use super::find::Deaths;
use crate::failure::Failure;
use crate::log::tell;
use crate::negotiate::Export;

pub struct Kept {
    pub name: String,
    /// Where the configuration is.
    pub path: PathBuf,
    pub config: Config,
    /// The device, once it was connected.
    pub index: Option<u32>,
    /// What was last accepted as its export.
    pub known: Option<Export>,
    /// Which URI was used last.
    pub in_use: Option<usize>,
    /// What is to be replaced, where the driver does not list it.
    pub deaths: Deaths,
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
            known: None,
            in_use: None,
            deaths: Deaths::default(),
        })
    }

    /// Prints what has happened.
    pub fn say(&self, what: &str) {
        tell(&format!("{}: {what}", self.name));
    }
}
