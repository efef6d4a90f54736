// SPDX-License-Identifier: GPL-2.0

//! The devices as the kernel tells of them: by rnbd's own family where there is one, else by sysfs.

use std::io;

use rustix::io::Errno;

use crate::connect::no_driver;
use crate::device::{Connection, Device};
use crate::failure::{Exit, Failure};
use crate::family_rnbd::{Handover, Rnbd};
use crate::netlink::NetlinkError;
use crate::netlink::tls::{SockDiag, Tls};
use crate::sysfs::{Driver, Sysfs};

const ASKING: &str = "asking the kernel for the family rnbd";
const HANDING_OVER: &str = "handing connections over";

pub struct Kernel {
    pub sysfs: Sysfs,
    pub driver: Driver,
    family: Option<Rnbd>,
}

impl Kernel {
    /// # Errors
    ///
    /// `NoDevice`: no driver is loaded. Or the kernel's answer cannot be understood.
    pub fn look() -> Result<Self, Failure> {
        let sysfs = Sysfs::new();
        let driver = sysfs.driver().ok_or_else(no_driver)?;
        // Asked for a family that it lacks, the kernel runs modprobe.
        let family = match driver {
            Driver::Rnbd => Rnbd::open().map_err(|error| error.during(ASKING))?,
            Driver::Nbd => None,
        };
        Ok(Self {
            sysfs,
            driver,
            family,
        })
    }

    /// What the driver does not tell, in one line.
    pub fn not_known(&self) -> Option<&'static str> {
        match (&self.family, self.driver) {
            (Some(_), _) => None,
            (None, Driver::Nbd) => Some(
                "nbd.ko does not tell flags, timeouts and connections, and whether these are alive",
            ),
            (None, Driver::Rnbd) => Some(
                "this rnbd has no family \"rnbd\", and so does not tell flags, timeouts and connections",
            ),
        }
    }

    /// All devices, unused ones among them.
    ///
    /// # Errors
    ///
    /// The kernel's reason.
    pub fn devices(&self) -> Result<Vec<Device>, Failure> {
        let Some(family) = &self.family else {
            let wrong = |error| Failure::new(Exit::Failed, "reading sysfs", error);
            let indices = self.sysfs.indices().map_err(wrong)?.into_iter();
            let devices = indices.map(|index| self.sysfs.device(index));
            return devices.collect::<io::Result<_>>().map_err(wrong);
        };
        let mut devices = family.devices().map_err(|error| error.during(ASKING))?;
        devices.sort_unstable_by_key(|device| device.index);
        for device in &mut devices {
            device.read_only = self.sysfs.read_only(device.index);
            device.session_file = self.sysfs.session_file(device.index);
        }
        Ok(devices)
    }

    /// # Errors
    ///
    /// `NoDevice`, or the kernel's reason.
    pub fn device(&self, index: u32) -> Result<Device, Failure> {
        let found = self.devices()?.into_iter().find(|d| d.index == index);
        found.ok_or_else(|| {
            let name = format!("/dev/nbd{index}");
            Failure::new(Exit::NoDevice, name, "there is no such device")
                .advise("\"rnbdctl list --all\" shows which there are.")
        })
    }

    /// Replaces connections, alive or dead, by new ones.
    ///
    /// # Errors
    ///
    /// The kernel's reason, or that the driver cannot do it.
    pub fn hand_over(&self, handover: &Handover<'_>) -> Result<(), Failure> {
        let Some(family) = &self.family else {
            return Err(Failure::new(
                Exit::Failed,
                HANDING_OVER,
                "the driver has no family \"rnbd\"",
            ));
        };
        family.hand_over(handover).map_err(|error| match error {
            NetlinkError::Refused {
                errno: Errno::BUSY,
                words: Some(words),
            } => {
                let what = format!("the kernel says \"{words}\"");
                Failure::new(Exit::Busy, HANDING_OVER, what)
            }
            error => error.during(HANDING_OVER),
        })
    }

    /// As [`Self::connections`], with what is known of their encryption.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn connections_with_tls(
        &self,
        index: Option<u32>,
    ) -> Result<Option<Vec<(u32, Connection)>>, Failure> {
        let mut found = self.connections(index)?;
        for (_, connection) in found.iter_mut().flatten() {
            connection.tls = tls(connection);
        }
        Ok(found)
    }

    /// The connections of one device, or of all, each with its device's index; `None` if they are not
    /// known, or are not told to this user.
    ///
    /// # Errors
    ///
    /// The kernel's reason.
    pub fn connections(
        &self,
        index: Option<u32>,
    ) -> Result<Option<Vec<(u32, Connection)>>, Failure> {
        let Some(family) = &self.family else {
            return Ok(None);
        };
        match family.connections(index) {
            Ok(found) => Ok(Some(found)),
            // Connections are told to root only.
            Err(NetlinkError::Refused { errno, .. }) if errno == Errno::PERM => Ok(None),
            Err(error) => Err(error.during(ASKING)),
        }
    }
}

/// How the kernel encrypts a connection. Where it does not tell, nothing else is wrong.
fn tls(connection: &Connection) -> Option<Tls> {
    if !connection.ulp {
        return None;
    }
    let local = connection.local.as_ref()?.parse().ok()?;
    let peer = connection.peer.as_ref()?.parse().ok()?;
    SockDiag::open().ok()?.tls(local, peer).ok()?
}
