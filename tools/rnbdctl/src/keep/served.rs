// SPDX-License-Identifier: GPL-2.0

//! The server and the export that a device's live connections lead to: only they may replace a dead one of them.
//!
//! It is remembered beside the lock. So neither an edited configuration nor a restart of the program mixes two
//! exports on one device.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::find::Goal;
use super::peers::may_be;
use crate::device::{Device, Session};
use crate::failure::{Exit, Failure};
use crate::uri::NbdUri;

/// What connections were last made to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    pub uri: NbdUri,
    /// The address that it led to.
    pub address: String,
    /// How many connections the device has, if that is known. nbd.ko does not tell.
    #[serde(default)]
    pub connections: Option<u32>,
}

/// What is in the file, and of which session.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    index: u32,
    #[serde(flatten)]
    session: Session,
    served: Served,
}

impl Served {
    /// What is remembered of this session of a device; `None`: nothing.
    pub fn recall(path: &Path, device: &Device) -> Option<Self> {
        let record: Record = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let session = Session {
            // Older versions have not written it.
            file: record.session.file.and(device.session_file),
            ..device.session()
        };
        let is_its = (record.index, record.session) == (device.index, session);
        is_its.then_some(record.served)
    }

    /// # Errors
    ///
    /// Those of writing the file.
    pub fn remember(&self, path: &Path, index: u32, session: Session) -> std::io::Result<()> {
        let record = Record {
            index,
            session,
            served: self.clone(),
        };
        fs::write(path, serde_json::to_vec(&record)?)
    }

    /// The addresses that a lost connection may be made to, where nobody tells those of the others. A host may have
    /// several, which need not be one store. A device that has lost its only connection is bound to none.
    pub fn peers(&self) -> Vec<String> {
        match self.connections {
            Some(1) => Vec::new(),
            _ => vec![self.address.clone()],
        }
    }

    /// Whether the live connections still lead there, whose addresses are known, or `peers` is empty. Otherwise
    /// somebody else has handed them over.
    fn holds(&self, peers: &[String]) -> bool {
        peers.is_empty() || peers.iter().any(|peer| may_be(&self.address, peer))
    }

    /// Whether a URI leads to the export. Where addresses are known, they are compared when it is dialled.
    fn is(&self, uri: &NbdUri, peers: &[String]) -> bool {
        uri.export == self.uri.export && (!peers.is_empty() || uri.place == self.uri.place)
    }

    /// Whether a device that was found may be kept with these URIs.
    ///
    /// # Errors
    ///
    /// `Busy`: it is connected to what none of them names.
    pub fn check(&self, uris: &[NbdUri], peers: &[String], path: &Path) -> Result<(), Failure> {
        if !self.holds(peers) || uris.iter().any(|uri| self.is(uri, peers)) {
            return Ok(());
        }
        let NbdUri { place, export, .. } = &self.uri;
        let what = format!(
            "with this identifier, it is connected to the export {export:?} of {place}, and none of the URIs is that"
        );
        Err(Failure::new(Exit::Busy, "device", what).advise(format!(
            "Disconnect it, or if none of its connections is alive, remove {}.",
            path.display()
        )))
    }
}

/// The URIs to be dialled, in this order.
pub fn choose(uris: &[NbdUri], served: Option<&Served>, goal: &Goal) -> Vec<NbdUri> {
    let (peers, bound): (&[String], bool) = match goal {
        Goal::Replace { all, peers, .. } => (peers, !all),
        Goal::Adopt { peers, .. } => (peers, true),
        _ => (&[], false),
    };
    let Some(served) = served.filter(|served| bound && served.holds(peers)) else {
        return uris.to_vec();
    };
    let same = uris.iter().filter(|uri| served.is(uri, peers));
    let mut chosen: Vec<NbdUri> = same.cloned().collect();
    let is_it = |uri: &NbdUri| uri.place == served.uri.place;
    // The configuration may have another server meanwhile, which no handover has reached yet.
    if !chosen.iter().any(is_it) && matches!(goal, Goal::Replace { .. }) {
        chosen.push(served.uri.clone());
    }
    chosen.sort_by_key(|uri| !is_it(uri));
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uris(texts: &[&str]) -> Vec<NbdUri> {
        let parse = |text: &&str| NbdUri::parse(text).unwrap();
        texts.iter().map(parse).collect()
    }

    fn served(uri: &str) -> Served {
        Served {
            uri: NbdUri::parse(uri).unwrap(),
            address: "127.0.0.1:1".into(),
            connections: None,
        }
    }

    fn replace(all: bool, peers: &[&str]) -> Goal {
        Goal::Replace {
            dead: Some(1),
            all,
            peers: peers.iter().map(ToString::to_string).collect(),
        }
    }

    /// Without addresses, as with nbd.ko, only the very same server will do, whatever the configuration says now.
    #[test]
    fn one_dead_connection_stays_with_its_server() {
        let old = served("nbd://a/x");
        let chosen = |texts: &[&str], goal: &Goal| choose(&uris(texts), Some(&old), goal);
        let partial = replace(false, &[]);
        assert_eq!(chosen(&["nbd://b/x"], &partial), uris(&["nbd://a/x"]));
        assert_eq!(
            chosen(&["nbd://b/x", "nbd://a/x"], &partial),
            uris(&["nbd://a/x"])
        );
        assert_eq!(chosen(&["nbd://a/new"], &partial), uris(&["nbd://a/x"]));
        let handover = Goal::HandOver { connections: 2 };
        assert_eq!(chosen(&["nbd://b/x"], &handover), uris(&["nbd://b/x"]));
        assert_eq!(
            chosen(&["nbd://b/new"], &replace(true, &[])),
            uris(&["nbd://b/new"])
        );
    }

    /// With addresses, they decide, but not on the export.
    #[test]
    fn one_dead_connection_stays_with_its_export() {
        let old = served("nbd://a/x");
        let chosen = |texts: &[&str], goal: &Goal| choose(&uris(texts), Some(&old), goal);
        let partial = replace(false, &["127.0.0.1:1"]);
        assert_eq!(chosen(&["nbd://a/new"], &partial), uris(&["nbd://a/x"]));
        let names = ["nbd://b/x", "nbd://a/x", "nbd://b/new"];
        assert_eq!(chosen(&names, &partial), uris(&["nbd://a/x", "nbd://b/x"]));
        // Somebody else has handed the connections over.
        let moved = replace(false, &["127.0.0.2:1"]);
        assert_eq!(chosen(&["nbd://b/new"], &moved), uris(&["nbd://b/new"]));
    }

    #[test]
    fn an_edited_configuration_is_not_that_of_the_device() {
        let old = served("nbd://a/x");
        let exit = |texts: &[&str], peers: &[&str]| {
            let peers: Vec<String> = peers.iter().map(ToString::to_string).collect();
            let checked = old.check(&uris(texts), &peers, Path::new("/run/x"));
            checked.map_err(|failure| failure.exit)
        };
        assert_eq!(exit(&["nbd://a/x"], &[]), Ok(()));
        assert_eq!(exit(&["nbd://a/new"], &[]), Err(Exit::Busy));
        assert_eq!(exit(&["nbd://b/x"], &[]), Err(Exit::Busy));
        assert_eq!(exit(&["nbd://a/new"], &["127.0.0.1:1"]), Err(Exit::Busy));
        assert_eq!(exit(&["nbd://alias/x"], &["127.0.0.1:1"]), Ok(()));
        assert_eq!(
            exit(&["nbd://a/new"], &["127.0.0.2:1"]),
            Ok(()),
            "it was handed over"
        );
    }

    #[test]
    fn it_is_remembered_for_a_session() {
        let path = std::env::temp_dir().join(format!("rnbdctl-served-{}", std::process::id()));
        let old = served("nbds://a/x?tls-hostname=h");
        let mut device = Device::unused(3);
        device.pid = Some(7);
        assert_eq!(Served::recall(&path, &device), None);
        device.session_file = Some(100);
        old.remember(&path, 3, device.session()).unwrap();
        assert_eq!(Served::recall(&path, &device), Some(old));
        device.pid = Some(8);
        assert_eq!(Served::recall(&path, &device), None);
        device.pid = Some(7);
        device.session_file = Some(101);
        assert_eq!(Served::recall(&path, &device), None, "connected anew");
        let written = fs::read_to_string(&path).unwrap();
        fs::write(&path, written.replace("\"file\":100,", "")).unwrap();
        assert!(Served::recall(&path, &device).is_some(), "{written}");
        fs::write(&path, "x").unwrap();
        assert_eq!(Served::recall(&path, &device), None);
        fs::remove_file(path).unwrap();
    }
}
