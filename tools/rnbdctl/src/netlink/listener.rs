// SPDX-License-Identifier: GPL-2.0

//! A socket that hears what a family tells of its own accord.

use std::io;

use neli::consts::socket::NlFamily;
use neli::nl::NlPayload;
use neli::socket::NlSocket;
use neli::utils::Groups;
use rustix::io::Errno;

use super::{Answer, CTRL, CTRL_VERSION, Family, NetlinkError, malformed};

const CTRL_FAMILY_MCAST_GROUPS: u16 = 7;
const CTRL_GROUP_NAME: u16 = 1;
const CTRL_GROUP_ID: u16 = 2;

/// What a listener has heard.
#[derive(Debug)]
pub enum Heard {
    /// A command's number, and its attributes.
    Message(u8, Answer),
    /// The kernel had something to tell, and no room or no memory to do so.
    Missed,
}

/// A member of a multicast group of a family.
pub struct Listener(Family);

impl Listener {
    /// Hears from now on. `None`: the kernel has no such family.
    ///
    /// # Errors
    ///
    /// Those of [`Family::open`]. `Malformed`: the family has no such group.
    pub fn open(name: &str, group: &str) -> Result<Option<Self>, NetlinkError> {
        let ctrl = Family {
            socket: NlSocket::connect(NlFamily::Generic, None, Groups::empty())?,
            id: CTRL,
            version: CTRL_VERSION,
            sequence: 0.into(),
        };
        let Some(described) = ctrl.describe(name)? else {
            return Ok(None);
        };
        let groups = described.lists(CTRL_FAMILY_MCAST_GROUPS);
        let found = groups
            .iter()
            .find(|described| described.text(CTRL_GROUP_NAME).as_deref() == Some(group))
            .and_then(|described| described.number(CTRL_GROUP_ID))
            .ok_or_else(|| malformed(format!("the family {name} has no group {group}")))?;
        ctrl.socket
            .add_mcast_membership(Groups::new_groups(&[found]))?;
        let family = ctrl.described_by(&described)?;
        Ok(Some(Self(family)))
    }

    /// Waits for the next messages.
    ///
    /// # Errors
    ///
    /// `Io`: the socket has failed. `Malformed`: what it has received cannot be understood.
    pub fn wait(&self) -> Result<Vec<Heard>, NetlinkError> {
        let messages = match self.0.receive() {
            Err(NetlinkError::Io(error)) if is_overrun(&error) => return Ok(vec![Heard::Missed]),
            Err(NetlinkError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Vec::new());
            }
            messages => messages?,
        };
        let ours = messages
            .iter()
            .filter(|message| *message.nl_type() == self.0.id);
        let heard = ours.filter_map(|message| match message.nl_payload() {
            NlPayload::Payload(payload) => {
                let answer = Answer(payload.attrs().as_ref().to_vec());
                Some(Heard::Message(*payload.cmd(), answer))
            }
            _ => None,
        });
        Ok(heard.collect())
    }
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error())
}
