// SPDX-License-Identifier: GPL-2.0

//! A socket that hears what a family tells of its own accord.
//!
//! The kernel ends the membership in a group when its family goes, without an error: whoever waits for events of a
//! module that was reloaded would wait for ever. So the socket hears of families, too, and follows them.

use std::io;

use neli::nl::NlPayload;
use neli::utils::Groups;
use rustix::io::Errno;

use super::{Answer, Attrs, CTRL, CTRL_FAMILY_ID, CTRL_FAMILY_NAME, CTRL_GETFAMILY, Family};
use super::{NetlinkError, malformed};

const CTRL_FAMILY_MCAST_GROUPS: u16 = 7;
const CTRL_GROUP_NAME: u16 = 1;
const CTRL_GROUP_ID: u16 = 2;

/// The group of the family of families that tells which come and go.
const FAMILIES: Group = Group {
    family: "nlctrl",
    name: "notify",
};

/// A multicast group of a family.
#[derive(Debug)]
pub struct Group {
    pub family: &'static str,
    pub name: &'static str,
}

/// What a listener has heard.
#[derive(Debug)]
pub enum Heard {
    /// A command's number, and its attributes.
    Message(u8, Answer),
    /// The kernel had something to tell, and no room or no memory to do so.
    Missed,
    /// The family that was heard is gone, or was registered anew, or another one is heard from now on.
    Changed,
}

/// A group as it is registered now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Joined {
    /// Its place among those that are wanted.
    place: usize,
    family: u16,
    group: u32,
}

/// A member of one of some groups: of the first one that the kernel has.
pub struct Listener {
    ctrl: Family,
    wanted: &'static [Group],
    joined: Option<Joined>,
}

impl Listener {
    /// Hears from now on. A family that the kernel does not have is heard as soon as it is registered.
    ///
    /// # Errors
    ///
    /// There is no generic netlink, or the kernel's answer cannot be understood.
    pub fn open(wanted: &'static [Group]) -> Result<Self, NetlinkError> {
        let ctrl = Family::of_families()?;
        let (_, notify) = ctrl
            .describe(FAMILIES.family)?
            .and_then(|described| registered(&FAMILIES, &[described]))
            .ok_or_else(|| malformed("nobody tells of families"))?;
        ctrl.socket
            .add_mcast_membership(Groups::new_groups(&[notify]))?;
        let mut listener = Self {
            ctrl,
            wanted,
            joined: None,
        };
        listener.follow()?;
        Ok(listener)
    }

    /// The place of the group that is heard.
    pub fn heard(&self) -> Option<usize> {
        self.joined.map(|joined| joined.place)
    }

    /// Waits for the next messages, of the group that is heard when it is called.
    ///
    /// # Errors
    ///
    /// `Io`: the socket has failed. `Malformed`: what it has received cannot be understood.
    pub fn wait(&mut self) -> Result<Vec<Heard>, NetlinkError> {
        let mut heard = Vec::new();
        let messages = match self.ctrl.receive() {
            Err(NetlinkError::Io(error)) if is_overrun(&error) => {
                heard.push(Heard::Missed);
                Vec::new()
            }
            Err(NetlinkError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(heard);
            }
            messages => messages?,
        };
        // What was missed may have told of a family.
        let mut may_have_changed = !heard.is_empty();
        for message in &messages {
            let NlPayload::Payload(payload) = message.nl_payload() else {
                continue;
            };
            let answer = Answer(payload.attrs().as_ref().to_vec());
            if *message.nl_type() == CTRL {
                may_have_changed |= is_about(self.wanted, &answer);
            } else if self.joined.is_some_and(|j| j.family == *message.nl_type()) {
                heard.push(Heard::Message(*payload.cmd(), answer));
            }
        }
        if may_have_changed && self.follow()? {
            heard.push(Heard::Changed);
        }
        Ok(heard)
    }

    /// Joins the group that is to be heard now. Returns whether that is another one than before.
    ///
    /// All families are listed, since the kernel runs modprobe when it is asked for one that it lacks: whoever
    /// unloads a module does not want it back.
    fn follow(&mut self) -> Result<bool, NetlinkError> {
        let found = choose(self.wanted, &families()?);
        if found == self.joined {
            return Ok(false);
        }
        // If its family is gone, the kernel has ended it.
        if let Some(old) = self.joined.take() {
            let _ = self.leave(old.group);
        }
        if let Some(new) = found {
            match self.join(new.group) {
                Ok(()) => self.joined = found,
                // It is gone again, which will be told.
                Err(error) if is_gone(&error) => (),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    fn join(&self, group: u32) -> io::Result<()> {
        let groups = Groups::new_groups(&[group]);
        self.ctrl.socket.add_mcast_membership(groups)
    }

    fn leave(&self, group: u32) -> io::Result<()> {
        let groups = Groups::new_groups(&[group]);
        self.ctrl.socket.drop_mcast_membership(groups)
    }
}

/// All families. A signal does not end the list.
fn families() -> Result<Vec<Answer>, NetlinkError> {
    loop {
        match Family::of_families()?.dump(CTRL_GETFAMILY, Attrs::default()) {
            Err(NetlinkError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => (),
            found => return found,
        }
    }
}

/// The first of some groups whose family is among those that are registered.
fn choose(wanted: &[Group], families: &[Answer]) -> Option<Joined> {
    wanted.iter().enumerate().find_map(|(place, group)| {
        let (family, group) = registered(group, families)?;
        Some(Joined {
            place,
            family,
            group,
        })
    })
}

/// The numbers of a family and of its group.
fn registered(group: &Group, families: &[Answer]) -> Option<(u16, u32)> {
    let name = |answer: &Answer| answer.text(CTRL_FAMILY_NAME);
    let family = families
        .iter()
        .find(|family| name(family).as_deref() == Some(group.family))?;
    let groups = family.lists(CTRL_FAMILY_MCAST_GROUPS);
    let found = groups
        .iter()
        .find(|found| found.text(CTRL_GROUP_NAME).as_deref() == Some(group.name))?;
    Some((family.number(CTRL_FAMILY_ID)?, found.number(CTRL_GROUP_ID)?))
}

/// Whether what the family of families tells is about one of those that are wanted.
fn is_about(wanted: &[Group], told: &Answer) -> bool {
    let name = told.text(CTRL_FAMILY_NAME);
    wanted
        .iter()
        .any(|group| name.as_deref() == Some(group.family))
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error())
}

/// Whether there is no such group.
fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::INVAL].map(|errno| Some(errno.raw_os_error()));
    gone.contains(&error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: [Group; 2] = [
        Group {
            family: "rnbd",
            name: "events",
        },
        Group {
            family: "nbd",
            name: "links",
        },
    ];

    /// A family as the kernel lists it.
    fn family(name: &str, id: u16, group: &str, number: u32) -> Answer {
        let attrs = || -> Result<Attrs, NetlinkError> {
            let group = Attrs::default()
                .with(CTRL_GROUP_ID, number)?
                .with(CTRL_GROUP_NAME, group)?;
            Attrs::default()
                .with(CTRL_FAMILY_NAME, name)?
                .with(CTRL_FAMILY_ID, id)?
                .nest(CTRL_FAMILY_MCAST_GROUPS, Attrs::default().nest(1, group)?)
        };
        attrs().unwrap().into()
    }

    /// A module that is loaded again has other numbers, and another driver another family.
    #[test]
    fn a_family_that_was_registered_anew_is_another_one() {
        let other = || family("other", 20, "events", 2);
        let rnbd = |id, number| family("rnbd", id, "events", number);
        let nbd = |id, number| family("nbd", id, "links", number);
        let chosen = |families: &[Answer]| {
            choose(&WANTED, families).map(|joined| (joined.place, joined.family, joined.group))
        };
        assert_eq!(chosen(&[other()]), None);
        assert_eq!(chosen(&[other(), nbd(31, 5)]), Some((1, 31, 5)));
        let both = [nbd(31, 5), other(), rnbd(32, 6)];
        assert_eq!(chosen(&both), Some((0, 32, 6)));
        let reloaded = [nbd(33, 5), other(), rnbd(34, 6)];
        assert_ne!(choose(&WANTED, &both), choose(&WANTED, &reloaded));
        assert_eq!(chosen(&[family("rnbd", 32, "others", 6)]), None);
    }

    #[test]
    fn only_what_is_about_these_families_is_looked_into() {
        let about = |name: &str| {
            let attrs = Attrs::default().with(CTRL_FAMILY_NAME, name).unwrap();
            is_about(&WANTED, &attrs.into())
        };
        assert!(about("rnbd") && about("nbd"));
        assert!(!about("nbdx") && !is_about(&WANTED, &Answer::default()));
    }
}
