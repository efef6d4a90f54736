// SPDX-License-Identifier: GPL-2.0

//! Structured replies: whether they are wanted, and whether the driver has them.

use clap::ValueEnum;
use serde::Deserialize;

use crate::device::Device;
use crate::failure::{Exit, Failure};
use crate::family_rnbd::Rnbd;

const STEP: &str = "structured replies";

/// What a user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// The server and the driver must have them.
    On,
    Off,
    /// Where both have them.
    #[default]
    Auto,
}

/// What a server is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    No,
    IfOffered,
    Yes,
}

impl Choice {
    /// What to ask a server for, with the driver that is loaded.
    ///
    /// # Errors
    ///
    /// `Failed`: they must be on, and the driver does not have them. Or the kernel's reason.
    pub fn wanted(self) -> Result<Wanted, Failure> {
        match self {
            Self::Off => Ok(Wanted::No),
            Self::Auto if driver_has_them()? => Ok(Wanted::IfOffered),
            Self::Auto => Ok(Wanted::No),
            Self::On if driver_has_them()? => Ok(Wanted::Yes),
            Self::On => Err(Failure::new(
                Exit::Failed,
                STEP,
                "the driver does not have them",
            )),
        }
    }
}

impl Wanted {
    /// What the session of a device has been started with: a new connection must be the same.
    pub fn by(device: &Device) -> Self {
        match device.structured_replies {
            Some(true) => Self::Yes,
            _ => Self::No,
        }
    }
}

fn driver_has_them() -> Result<bool, Failure> {
    let asked = Rnbd::open().and_then(|rnbd| match rnbd {
        Some(rnbd) => rnbd.has_structured_replies(),
        None => Ok(false),
    });
    asked.map_err(|error| error.during(STEP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_connection_is_as_the_others() {
        let mut device = Device::unused(0);
        for (structured, wanted) in [
            (None, Wanted::No),
            (Some(false), Wanted::No),
            (Some(true), Wanted::Yes),
        ] {
            device.structured_replies = structured;
            assert_eq!(Wanted::by(&device), wanted);
        }
    }
}
