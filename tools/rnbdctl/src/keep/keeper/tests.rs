// SPDX-License-Identifier: GPL-2.0

use super::*;
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

#[test]
fn what_is_lost_is_not_settled() {
    let mut keeper = keeper("lost");
    assert!(!keeper.is_settled());
    keeper.kept.index = Some(0);
    assert!(!keeper.is_settled());
    keeper.is_alive = true;
    assert!(keeper.is_settled());
    keeper.wants_handover = true;
    assert!(!keeper.is_settled());
}

/// The connection that was being replaced when the configuration was read again is still dead.
#[test]
fn a_reload_forgets_no_death() {
    let mut keeper = keeper("reload");
    fs::write(&keeper.kept.path, "uris = ['nbd://127.0.0.1:3']").unwrap();
    keeper.task = Task::Dial(replace(false, &[]));
    keeper.reload();
    fs::remove_file(&keeper.kept.path).unwrap();
    assert_eq!(keeper.kept.config.uris.len(), 1);
    assert!(matches!(keeper.task, Task::Look));
    assert_eq!(keeper.kept.deaths.number, 1);
}

#[test]
fn where_lost_connections_are_made_to() {
    let mut keeper = keeper("order");
    let places = |keeper: &Keeper, goal: &Goal| -> Vec<usize> {
        let order = keeper.order(goal);
        let order = order.unwrap();
        order.uris.iter().map(|(place, _)| *place).collect()
    };
    keeper.kept.in_use = Some(1);
    assert_eq!(places(&keeper, &replace(true, &[])), [0, 1]);
    assert_eq!(places(&keeper, &replace(false, &[])), [1]);
    // Somebody else may have handed the others over. The address decides, and what was used last comes first.
    assert_eq!(places(&keeper, &replace(false, &["127.0.0.1:1"])), [1, 0]);
    keeper.kept.in_use = None;
    assert_eq!(places(&keeper, &replace(false, &[])), [0, 1]);
}
