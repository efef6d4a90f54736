// SPDX-License-Identifier: GPL-2.0

use super::super::find::Found;
use super::super::served::Served;
use super::*;
use crate::device::{Device, Session, State};
use crate::negotiate::Export;
use std::fs;

/// A keeper of two servers on one host, with a file of its own.
fn keeper(name: &str) -> Keeper {
    let path = std::env::temp_dir().join(format!("rnbdctl-{name}-{}.toml", std::process::id()));
    fs::write(&path, "uris = ['nbd://127.0.0.1:1', 'nbd://127.0.0.1:2']").unwrap();
    let keeper = Keeper::new(0, path.clone()).unwrap();
    fs::remove_file(path).unwrap();
    keeper
}

fn replace(all: bool, peers: &[&str]) -> Goal {
    Goal::Replace {
        dead: Some(1),
        all,
        peers: peers.iter().map(ToString::to_string).collect(),
    }
}

/// Otherwise a service manager would mount it.
#[test]
fn what_is_refused_is_not_settled() {
    let mut keeper = keeper("refused");
    keeper.task = Task::Ended(Some(Exit::Busy));
    assert!(!keeper.is_settled());
    keeper.task = Task::Ended(None);
    assert!(keeper.is_settled());
}

/// A device that is gone before all was ready is no device that works.
#[test]
fn nothing_is_not_ready() {
    let mut keepers = [keeper("gone"), keeper("works")];
    keepers[0].task = Task::Ended(None);
    assert!(!super::super::is_ready(&keepers[..1]));
    keepers[1].kept.index = Some(0);
    keepers[1].is_alive = true;
    assert!(super::super::is_ready(&keepers));
}

#[test]
fn what_is_lost_is_not_settled() {
    let mut keeper = keeper("lost");
    assert!(!keeper.is_settled());
    keeper.kept.index = Some(0);
    assert!(!keeper.is_settled());
    keeper.is_alive = true;
    assert!(keeper.is_settled());
    keeper.wants_handover = Some(Instant::now());
    assert!(!keeper.is_settled());
}

/// The connection that was being replaced when the configuration was read again is still dead.
#[test]
fn a_reload_forgets_no_death() {
    let mut keeper = keeper("reload");
    fs::write(&keeper.kept.path, "uris = ['nbd://127.0.0.1:3']").unwrap();
    keeper.task = Task::Dial(replace(false, &[]));
    keeper.reload(Instant::now());
    fs::remove_file(&keeper.kept.path).unwrap();
    assert_eq!(keeper.kept.config.uris.len(), 1);
    assert!(matches!(keeper.task, Task::Look));
    assert_eq!(keeper.kept.deaths.number, 1);
}

/// Until a handover has succeeded, the old server's connections are the device's.
#[test]
fn a_reload_does_not_change_where_lost_connections_are_made_to() {
    let mut keeper = keeper("order");
    let old = keeper.kept.config.uris[1].clone();
    keeper.kept.served = Some(Served {
        uri: old.clone(),
        address: "127.0.0.1:2".into(),
        connections: None,
    });
    let uris =
        |keeper: &Keeper, goal: &Goal| Order::new(&keeper.kept, goal, Wanted::No).unwrap().uris;
    let both = keeper.kept.config.uris.clone();
    assert_eq!(uris(&keeper, &replace(true, &[])), both);
    assert_eq!(uris(&keeper, &replace(false, &[])), [old.clone()]);
    fs::write(&keeper.kept.path, "uris = ['nbd://127.0.0.1:3']").unwrap();
    keeper.reload(Instant::now());
    fs::remove_file(&keeper.kept.path).unwrap();
    assert_eq!(uris(&keeper, &replace(false, &[])), [old]);
    let new = keeper.kept.config.uris.clone();
    assert_eq!(uris(&keeper, &Goal::HandOver { connections: 2 }), new);
}

/// A kernel that refuses the timeouts once is asked again.
#[test]
fn what_has_not_got_its_timeouts_is_not_adopted() {
    let mut keeper = keeper("timeouts");
    // No device has this index.
    assert!(keeper.adopt(u32::MAX, Session::default()).is_err());
    assert_eq!(keeper.kept.index, None);
}

/// The end of the program must not take the device for one that works.
#[test]
fn what_is_dialled_for_is_dead_at_the_end() {
    let mut keeper = keeper("abandon");
    keeper.task = Task::Dial(replace(false, &[]));
    keeper.abandon();
    assert_eq!(keeper.kept.deaths.number, 1);
    keeper.abandon();
    assert_eq!(keeper.kept.deaths.number, 1, "once");
}

/// Whether there is a device is not known yet. If there is one, its connections may lead to another server.
#[test]
fn a_reload_before_the_device_is_found_hands_over() {
    let mut keeper = keeper("early");
    fs::write(&keeper.kept.path, "uris = ['nbd://127.0.0.1:3']").unwrap();
    keeper.task = Task::Dial(Goal::Adopt {
        index: 0,
        session: Session::default(),
        peers: vec!["127.0.0.1:1".into()],
    });
    keeper.reload(Instant::now());
    fs::remove_file(&keeper.kept.path).unwrap();
    assert!(keeper.wants_handover.is_some());
}

/// What somebody else has disconnected stays so.
#[test]
fn a_reload_tries_again_what_was_refused() {
    let mut keeper = keeper("again");
    fs::write(&keeper.kept.path, "uris = ['nbd://127.0.0.1:3']").unwrap();
    keeper.task = Task::Ended(None);
    keeper.reload(Instant::now());
    assert_eq!(keeper.ended(), Some(None));
    keeper.task = Task::Ended(Some(Exit::Busy));
    keeper.reload(Instant::now());
    fs::remove_file(&keeper.kept.path).unwrap();
    assert!(matches!(keeper.task, Task::Look));
}

/// Its servers may hang one after the other. Whoever has sent the signal waits.
#[test]
fn a_handover_does_not_take_for_ever() {
    let mut keeper = keeper("limit");
    fs::write(&keeper.kept.path, "uris = ['nbd://127.0.0.1:3']").unwrap();
    let now = Instant::now();
    keeper.reload(now);
    fs::remove_file(&keeper.kept.path).unwrap();
    let limit = now + Duration::from_secs(60);
    keeper.task = Task::Dial(Goal::HandOver { connections: 2 });
    assert_eq!(keeper.due(now), Some(limit));
    let orders = keeper.orders;
    keeper.give_up_handover();
    assert!(keeper.wants_handover.is_none());
    assert!(keeper.orders > orders, "what comes of it must not count");
    assert!(matches!(keeper.task, Task::Look));
    // What is lost is still dialled for.
    keeper.reload(now);
    keeper.task = Task::Dial(replace(false, &[]));
    keeper.give_up_handover();
    assert!(matches!(keeper.task, Task::Dial(Goal::Replace { .. })));
}

/// Another run of the program may keep a device again that somebody has disconnected.
#[test]
fn what_has_ended_is_not_locked() {
    let mut keeper = keeper("unlocked");
    let gone = |exit| Trouble::End(Failure::new(exit, "device", "gone"));
    let now = Instant::now();
    keeper.lock = Some(Lock::none());
    // A reload may find that it is not refused any more.
    keeper.give_way(gone(Exit::Busy), now);
    assert!(keeper.lock.is_some());
    keeper.kept.index = Some(0);
    keeper.give_way(gone(Exit::NoDevice), now);
    assert_eq!(keeper.ended(), Some(None));
    assert!(keeper.lock.is_none());
}

/// While it waits for a server, another driver may be loaded, for which the configuration makes no sense.
#[test]
fn a_driver_that_cannot_reach_the_server() {
    let mut keeper = keeper("driver");
    keeper.kept.config = toml::from_str("uris = ['nbd+vsock://2/']").unwrap();
    let now = Instant::now();
    for driver in [None, Some(Driver::Rnbd)] {
        keeper.driver_changed(driver, now);
        assert!(keeper.ended().is_none(), "{driver:?}");
    }
    keeper.driver_changed(Some(Driver::Nbd), now);
    assert_eq!(keeper.ended(), Some(Some(Exit::Usage)));
}

/// Whoever changes the driver unloads the old one first.
#[test]
fn between_two_drivers_it_waits() {
    let mut keeper = keeper("between");
    let gone = || Failure::new(Exit::NoDevice, "driver", "none is loaded");
    assert!(matches!(keeper.without_driver(gone()), Trouble::Retry(_)));
    keeper.kept.index = Some(0);
    assert!(matches!(keeper.without_driver(gone()), Trouble::End(_)));
}

/// Somebody else has disconnected it and connected it again, to something else, between two looks.
#[test]
fn the_next_session_is_another_device() {
    let mut device = Device::unused(0);
    (device.pid, device.session_file) = (Some(7), Some(100));
    let known = |device: &Device| {
        let mut keeper = keeper("session");
        keeper.kept.index = Some(0);
        keeper.kept.session = device.session();
        keeper.kept.known = Some(Export::of(1, 1));
        keeper.kept.served = Some(Served {
            uri: keeper.kept.config.uris[0].clone(),
            address: "127.0.0.1:1".into(),
            connections: None,
        });
        keeper.kept.deaths.number = 1;
        keeper.is_alive = true;
        keeper
    };
    let mut same = known(&device);
    same.recognise(&device);
    assert_eq!((same.kept.index, same.kept.deaths.number), (Some(0), 1));
    assert!(same.kept.known.is_some() && same.kept.served.is_some() && same.is_settled());
    let mut others = [device.clone(), device.clone(), device.clone()];
    others[0].pid = Some(8);
    // One process may have connected both.
    others[1].session_file = Some(101);
    others[2].index = 1;
    for other in others {
        let mut keeper = known(&device);
        assert!(!keeper.kept.is(&other), "{other:?}");
        keeper.recognise(&other);
        assert_eq!(
            (keeper.kept.index, keeper.kept.deaths),
            (None, Deaths::default())
        );
        assert!(keeper.kept.known.is_none() && keeper.kept.served.is_none());
        assert!(!keeper.is_settled());
    }
}

/// nbd.ko does not tell where connections lead. A host name may have several addresses.
#[test]
fn a_lost_connection_stays_with_its_address() {
    let mut keeper = keeper("address");
    let peers = |keeper: &Keeper, goal: &Goal| {
        let order = Order::new(&keeper.kept, goal, Wanted::No);
        order.unwrap().peers
    };
    let partial = replace(false, &[]);
    assert!(peers(&keeper, &partial).is_empty(), "nothing is known");
    let served = |connections| Served {
        uri: keeper.kept.config.uris[0].clone(),
        address: "127.0.0.1:1".into(),
        connections,
    };
    let (unknown, one, two) = (served(None), served(Some(1)), served(Some(2)));
    for several in [unknown, two] {
        keeper.kept.served = Some(several);
        assert_eq!(peers(&keeper, &partial), ["127.0.0.1:1"]);
        assert_eq!(peers(&keeper, &replace(false, &["a:1"])), ["a:1"]);
        assert!(peers(&keeper, &replace(true, &[])).is_empty());
        assert!(peers(&keeper, &Goal::HandOver { connections: 2 }).is_empty());
    }
    keeper.kept.served = Some(one);
    assert!(peers(&keeper, &partial).is_empty(), "it was the only one");
}

/// The kernel does not compare identifiers.
#[test]
fn a_second_device_with_the_identifier() {
    let device = |index, pid| {
        let mut device = Device::unused(index);
        device.state = State::Connected;
        device.backend = keeper("second").kept.config.backend().map(str::to_owned);
        device.pid = Some(pid);
        device
    };
    let devices = [device(0, 8), device(1, 7)];
    let mut keeper = keeper("second");
    let index = |keeper: &Keeper, devices: &[Device]| match keeper.kept.find(devices) {
        Ok(Found::Device(device)) => Some(device.index),
        _ => None,
    };
    assert_eq!(index(&keeper, &devices), Some(0));
    keeper.kept.index = Some(1);
    keeper.kept.session = devices[1].session();
    assert_eq!(index(&keeper, &devices), Some(1));
    let ended = [device(0, 8), Device::unused(1)];
    assert_eq!(index(&keeper, &ended), Some(0));
}
