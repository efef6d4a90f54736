// SPDX-License-Identifier: GPL-2.0

//! Finds a device by its configuration, and what it lacks.

use std::collections::BTreeSet;

use super::config::Config;
use crate::device::{Connection, ConnectionState, Device, Session, State};
use crate::failure::{Exit, Failure};
use crate::handover::in_use;
use crate::kernel::Kernel;
use crate::text::plain;

/// What there is of a device that is to be kept.
#[derive(Debug)]
pub enum Found {
    Device(Device),
    Nothing,
}

/// What is to be dialled for.
#[derive(Debug, PartialEq, Eq)]
pub enum Goal {
    Connect,
    /// Whether a device that is connected already is connected to one of the servers.
    Adopt {
        index: u32,
        session: Session,
        /// The addresses that it is connected to.
        peers: Vec<String>,
    },
    Replace {
        /// How many are; `None`: nobody knows, and as many are offered as the device may have.
        dead: Option<u32>,
        /// Whether none is alive, and none drains.
        all: bool,
        /// The addresses of those that are or do: no others may be dialled.
        peers: Vec<String>,
    },
    HandOver {
        connections: u32,
    },
}

/// Finds the device by its identifier, or without one by its index.
///
/// # Errors
///
/// `Busy`: the device that the configuration names is something else, or it is another one.
pub fn find(devices: &[Device], config: &Config) -> Result<Found, Failure> {
    let has_session = |device: &&Device| matches!(device.state, State::Connected | State::Lost);
    let is_named = |device: &&Device| config.device.is_none_or(|index| index == device.index);
    let in_session = || devices.iter().filter(has_session);
    let mut ours = in_session().filter(|device| device.backend.as_deref() == config.backend());
    let taken = |device: &Device, what: String| {
        Failure::new(Exit::Busy, &device.device, what)
            .advise("\"rnbdctl list\" shows what is connected.")
    };
    if let Some(device) = ours.clone().find(is_named) {
        return Ok(Found::Device(device.clone()));
    }
    if let Some(index) = config.device {
        if let Some(other) = in_session().find(|device| device.index == index) {
            let what = match &other.backend {
                Some(backend) => {
                    format!("it is connected with the identifier \"{}\"", plain(backend))
                }
                None => "it is connected without an identifier".into(),
            };
            return Err(taken(other, what));
        }
        if let Some(other) = ours.next().filter(|_| config.backend().is_some()) {
            return Err(taken(
                other,
                format!("it has the identifier, and not /dev/nbd{index}"),
            ));
        }
    }
    Ok(Found::Nothing)
}

/// Connections that were told to be dead, and are not replaced yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deaths {
    pub number: u32,
    /// Others may have died and not been told.
    pub more: bool,
}

impl Deaths {
    /// What was dialled for a goal could not be had.
    pub fn put_back(&mut self, goal: &Goal) {
        match goal {
            Goal::Replace { dead: None, .. } => self.more = true,
            goal => self.put_back_some(goal, u32::MAX),
        }
    }

    /// So many of what was dialled for a goal could not be had, and the others could. If it is not known how many are
    /// dead, these may have been enough.
    pub fn put_back_some(&mut self, goal: &Goal, missing: u32) {
        if let Goal::Replace {
            dead: Some(dead), ..
        } = goal
        {
            self.number = self.number.saturating_add(missing.min(*dead));
        }
    }
}

/// How a device is that has a session.
#[derive(Debug)]
pub struct Condition {
    /// What it lacks.
    pub goal: Option<Goal>,
    /// Whether a connection is known to be alive.
    pub is_alive: bool,
    /// The addresses of those that are, or if none is, of those that drain.
    pub peers: Vec<String>,
    /// In one line.
    pub status: String,
}

impl Condition {
    /// Looks how a device is. `deaths` counts if the driver does not list
    /// connections.
    ///
    /// # Errors
    ///
    /// The kernel's reason. `Permission`: connections are told to root only.
    pub fn of(kernel: &Kernel, device: &Device, deaths: &Deaths) -> Result<Self, Failure> {
        if kernel.not_known().is_some() {
            return Ok(Self::of_deaths(device, deaths));
        }
        let found = kernel.connections(Some(device.index))?;
        let found = found.ok_or_else(|| {
            Failure::new(
                Exit::Permission,
                "listing the connections",
                "they are told to root only",
            )
        })?;
        Ok(Self::of_connections(device, &found))
    }

    fn of_connections(device: &Device, found: &[(u32, Connection)]) -> Self {
        let (alive, dead): (Vec<&Connection>, Vec<&Connection>) =
            in_use(found).partition(|connection| connection.is_alive());
        let status = format!(
            "{} is {}, {} of {} connections are alive",
            device.device,
            device.state.name(),
            alive.len(),
            alive.len() + dead.len()
        );
        // Another server must not execute what the old one still may.
        let drains =
            |c: &Connection| c.state == ConnectionState::Draining && c.in_flight != Some(0);
        let bound: Vec<&Connection> = match alive.is_empty() {
            true => dead.iter().copied().filter(|c| drains(c)).collect(),
            false => alive.clone(),
        };
        let peers: BTreeSet<String> = bound.iter().filter_map(|c| c.peer.clone()).collect();
        let peers: Vec<String> = peers.into_iter().collect();
        let goal = (!dead.is_empty()).then(|| Goal::Replace {
            dead: Some(dead.len() as u32),
            all: bound.is_empty(),
            peers: peers.clone(),
        });
        Self {
            goal,
            is_alive: !alive.is_empty(),
            peers,
            status,
        }
    }

    /// Nobody tells whether others are alive.
    fn of_deaths(device: &Device, deaths: &Deaths) -> Self {
        let is_alive = *deaths == Deaths::default();
        let goal = (!is_alive).then(|| Goal::Replace {
            dead: (!deaths.more).then_some(deaths.number),
            all: false,
            peers: Vec::new(),
        });
        Self {
            goal,
            is_alive,
            peers: Vec::new(),
            status: format!("{} is connected", device.device),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ConnectionState::{Alive, Dead, Draining};

    fn device(index: u32, state: State, backend: Option<&str>) -> Device {
        let mut device = Device::unused(index);
        device.state = state;
        device.backend = backend.map(str::to_owned);
        device
    }

    fn config(more: &str) -> Config {
        toml::from_str(&format!("uris = ['nbd://h']\n{more}")).unwrap()
    }

    #[test]
    fn by_its_identifier() {
        let devices = [
            device(0, State::Connected, Some("a")),
            device(1, State::Lost, Some("b")),
            device(2, State::Ended, Some("c")),
            device(3, State::Connected, None),
        ];
        let found = |more: &str| match find(&devices, &config(more)) {
            Ok(Found::Device(device)) => Ok(Some(device.index)),
            Ok(Found::Nothing) => Ok(None),
            Err(failure) => Err(failure.exit),
        };
        assert_eq!(found("backend = 'a'"), Ok(Some(0)));
        assert_eq!(found("backend = 'b'"), Ok(Some(1)));
        assert_eq!(found("backend = 'c'"), Ok(None), "it has ended");
        assert_eq!(found("backend = 'x'"), Ok(None));
        assert_eq!(found("backend = 'a'\ndevice = 'nbd0'"), Ok(Some(0)));
        assert_eq!(found("backend = 'a'\ndevice = 'nbd2'"), Err(Exit::Busy));
        assert_eq!(found("backend = 'x'\ndevice = 'nbd0'"), Err(Exit::Busy));
        assert_eq!(found("backend = 'x'\ndevice = 'nbd3'"), Err(Exit::Busy));
        assert_eq!(found("backend = ''\ndevice = 'nbd3'"), Ok(Some(3)));
        assert_eq!(found("backend = ''\ndevice = 'nbd2'"), Ok(None));
        assert_eq!(found("backend = ''\ndevice = 'nbd0'"), Err(Exit::Busy));
    }

    /// It is printed, and told to the service manager.
    #[test]
    fn an_identifier_is_printed_plainly() {
        let devices = [device(0, State::Connected, Some("a\x1b[2J"))];
        let failure = find(&devices, &config("backend = 'b'\ndevice = 'nbd0'")).unwrap_err();
        assert!(!failure.to_string().contains('\x1b'), "{failure}");
    }

    #[test]
    fn what_it_lacks() {
        let device = device(0, State::Connected, None);
        let goal = |states: &[ConnectionState]| {
            let found: Vec<(u32, Connection)> = (0..)
                .zip(states)
                .map(|(index, state)| {
                    let mut connection = Connection::new(index, *state);
                    connection.peer = Some(format!("peer {index}"));
                    (0, connection)
                })
                .collect();
            Condition::of_connections(&device, &found).goal
        };
        let replace = |dead, all, peers: &[&str]| {
            Some(Goal::Replace {
                dead: Some(dead),
                all,
                peers: peers.iter().map(ToString::to_string).collect(),
            })
        };
        assert_eq!(goal(&[Alive, Alive]), None);
        assert_eq!(goal(&[Alive, Dead]), replace(1, false, &["peer 0"]));
        assert_eq!(goal(&[Draining, Alive]), replace(1, false, &["peer 1"]));
        assert_eq!(goal(&[Dead, Dead]), replace(2, true, &[]));
        // They are named once, however many lead there.
        let twin = || {
            let mut connection = Connection::new(0, Alive);
            connection.peer = Some("peer".into());
            connection
        };
        let mut other = twin();
        other.index = 1;
        let condition = Condition::of_connections(&device, &[(0, twin()), (0, other)]);
        assert_eq!(condition.peers, ["peer"]);
        // Its server may still execute something.
        assert_eq!(goal(&[Dead, Draining]), replace(2, false, &["peer 1"]));
        let mut idle = Connection::new(0, Draining);
        idle.peer = Some("peer".into());
        idle.in_flight = Some(0);
        let condition = Condition::of_connections(&device, &[(0, idle)]);
        assert_eq!(condition.goal, replace(1, true, &[]));
        assert!(!condition.is_alive && condition.peers.is_empty());
    }

    /// What dies while another one is dialled is not forgotten.
    #[test]
    fn deaths_are_counted() {
        let device = device(0, State::Connected, None);
        let goal = |deaths: &Deaths| Condition::of_deaths(&device, deaths).goal;
        let mut deaths = Deaths::default();
        assert_eq!(goal(&deaths), None);
        deaths.number = 2;
        let first = goal(&deaths).unwrap();
        deaths = Deaths {
            number: 1,
            more: false,
        };
        deaths.put_back(&first);
        assert_eq!(deaths.number, 3);
        deaths.more = true;
        let unknown = goal(&deaths).unwrap();
        assert!(matches!(unknown, Goal::Replace { dead: None, .. }));
        deaths = Deaths::default();
        deaths.put_back(&unknown);
        assert!(deaths.more);
        // A server has taken one of three.
        let three = Goal::Replace {
            dead: Some(3),
            all: false,
            peers: Vec::new(),
        };
        deaths = Deaths::default();
        deaths.put_back_some(&three, 0);
        assert_eq!(deaths, Deaths::default());
        deaths.put_back_some(&three, 2);
        assert_eq!((deaths.number, deaths.more), (2, false));
        // Those that it has taken may be all that were dead.
        deaths.put_back_some(&unknown, 1);
        assert_eq!((deaths.number, deaths.more), (2, false));
    }
}
