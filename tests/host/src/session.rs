// SPDX-License-Identifier: GPL-2.0
//! Commands are handed to connections that die meanwhile and come back, in a session that may end:
//! `pure/cmd.rs`, `pure/fate.rs` and `kapi/llist.rs` in the hands of their users.
//!
//! The steps of `rnbd_session.rs` are repeated here, in the same order and under the same names, those of
//! a connection in `connection`: keep them alike.

use crate::{
    blk_mq::{Unanswered, Unsent, Verdict},
    connection::{Conditions, Connection, LeftOut, Table},
    parts::{Commands, Fates, Module, Parts, Snapshots, explore, models},
    sync::atomic::{Acquire, Atomic, Full},
};
use loom::{
    sync::{Condvar, Mutex, RwLock},
    thread::{self, JoinHandle},
};
use std::sync::{Arc, atomic::Ordering};

/// Why a request was not taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Status {
    IoErr,
    /// The block layer dispatches it again when the queues run.
    DevResource,
}

struct Session<P: Parts> {
    table: Arc<Table<P>>,
    /// All connections that there ever are.
    all: Vec<Connection<P>>,
    /// Which of them are in the session's places, as dispatches see it: `Dispatched`.
    slots: Vec<Atomic<u64>>,
    /// A dispatch runs: what `blk_mq_quiesce_queue()` waits for.
    dispatching: RwLock<()>,
    /// Which are in its places, for everybody else.
    connections: Mutex<Vec<usize>>,
    /// Requests wait for a connection to come back, for as long as it takes.
    may_wait: bool,
    /// A server answers what it has not got.
    has_liar: bool,
    /// The queues run again: by who reconnects, or since it is time to look again.
    runs: Mutex<usize>,
    run: Condvar,
}

/// How a session is in a model.
struct Setup {
    left_out: LeftOut,
    tags: usize,
    /// The indexes of the connections, and how they are. The first ones are in the places.
    connections: [(u16, Conditions); 2],
    places: usize,
    may_wait: bool,
    has_liar: bool,
}

const GOOD: Conditions = Conditions {
    limit: None,
    is_silent: false,
    has_worker: false,
};
const SILENT: Conditions = Conditions {
    is_silent: true,
    ..GOOD
};
const CLEARED_AWAY_BY_ANOTHER: Conditions = Conditions {
    has_worker: true,
    ..SILENT
};
const TWO_GOOD: Setup = Setup {
    left_out: LeftOut::Nothing,
    tags: 1,
    connections: [(0, GOOD), (1, GOOD)],
    places: 2,
    may_wait: false,
    has_liar: false,
};
const ONE_AFTER_THE_OTHER: Setup = Setup {
    connections: [(0, GOOD), (0, GOOD)],
    places: 1,
    ..TWO_GOOD
};

impl<P: Parts> Session<P> {
    fn new(setup: Setup) -> Arc<Self> {
        let table = Table::new(setup.left_out, setup.tags);
        let connect = |(index, conditions)| Connection::new(index, &table, conditions);
        let all = setup.connections.map(connect).into();
        for _ in 0..setup.places {
            table.add_connection();
        }
        Arc::new(Session {
            all,
            table,
            slots: (0..setup.places).map(|i| Atomic::new(i as u64)).collect(),
            dispatching: RwLock::new(()),
            connections: Mutex::new((0..setup.places).collect()),
            may_wait: setup.may_wait,
            has_liar: setup.has_liar,
            runs: Mutex::new(0),
            run: Condvar::new(),
        })
    }

    fn spawn(self: &Arc<Self>, run: impl FnOnce(&Self) + 'static) -> JoinHandle<()> {
        let session = self.clone();
        thread::spawn(move || run(&session))
    }

    fn run_queues(&self) {
        *self.runs.lock().unwrap() += 1;
        self.run.notify_all();
    }

    /// Waits until the queues run again after that one.
    fn wait_run(&self, last: &mut usize) {
        let mut runs = self.runs.lock().unwrap();
        while *runs == *last {
            runs = self.run.wait(runs).unwrap();
        }
        *last = *runs;
    }

    fn queue_rq(&self, tag: usize) -> Result<(), Status> {
        let _cx = self.dispatching.read().unwrap();
        let connection = self.pick_or_refuse()?;
        let (transmit, other) = self.table.tags[tag].start();
        self.dispatch(connection, tag, transmit, other);
        Ok(())
    }

    fn dispatch<'a>(
        &'a self,
        mut connection: &'a Connection<P>,
        tag: usize,
        mut transmit: Unsent,
        mut other: Unanswered,
    ) {
        let slot = &self.table.slots[tag];
        loop {
            slot.start(connection.index, other);
            let Err(back) = connection.push(transmit) else {
                connection.kick();
                connection.is_used();
                return;
            };
            connection.is_used();
            transmit = back;
            let Some(ours) = slot.withdraw(connection.index) else {
                transmit.overrule(Verdict::Requeue);
                return;
            };
            other = ours;
            match self.pick(self.table.fate.snapshot()) {
                Some(next) => connection = next,
                None => {
                    other.finish(Verdict::Requeue);
                    return;
                }
            }
        }
    }

    fn connection(&self, place: usize) -> &Connection<P> {
        &self.all[self.slots[place].load(Acquire) as usize]
    }

    fn pick_or_refuse(&self) -> Result<&Connection<P>, Status> {
        loop {
            let fate = self.table.fate.snapshot();
            if let Some(connection) = self.pick(fate) {
                return Ok(connection);
            }
            if let Some(status) = self.wait_or_fail(fate) {
                return Err(status);
            }
        }
    }

    fn pick(&self, fate: <P::Fate as Fates>::Snapshot) -> Option<&Connection<P>> {
        if fate.is_over() {
            return None;
        }
        (0..self.slots.len())
            .map(|place| self.connection(place))
            .find(|connection| {
                connection.is_used();
                connection.is_alive()
            })
    }

    fn wait_or_fail(&self, fate: <P::Fate as Fates>::Snapshot) -> Option<Status> {
        let waits = !fate.is_disconnected() && self.may_wait;
        if waits {
            return Some(Status::DevResource);
        }
        self.table.fate.exhaust(fate).then_some(Status::IoErr)
    }

    fn end(&self) {
        self.table.fate.end();
        for index in &*self.connections.lock().unwrap() {
            self.all[*index].mark_dead();
        }
        self.table.wait_all_reaped();
    }

    /// Puts the second connection in the place of the first, which was declared dead.
    fn reconnect(&self) {
        let (old, new) = (0, 1);
        let left_out = self.table.left_out;
        let mut connections = self.connections.lock().unwrap();
        if left_out != LeftOut::WaitingForReaped {
            self.all[old].wait_reaped();
        }
        self.table.add_connection();
        connections[0] = new;
        if left_out == LeftOut::ReplacingBeforeReviving {
            self.table.fate.revive();
            self.replace(old, new);
        } else {
            self.replace(old, new);
            self.table.fate.revive();
        }
        drop(connections);
        self.run_queues();
    }

    /// `Dispatched::replace()`
    fn replace(&self, old: usize, new: usize) {
        self.slots[0].xchg(new as u64, Full);
        if self.table.left_out != LeftOut::Quiescing {
            drop(self.dispatching.write().unwrap());
        }
        self.all[old].free();
    }

    /// The block layer: dispatches a request until it is over. `lives`: what was sent by then over this
    /// connection, which does not die, is answered.
    fn run_request(&self, tag: usize, lives: Option<usize>) -> Verdict {
        let mut runs = 0;
        loop {
            match self.queue_rq(tag) {
                Ok(()) => {}
                Err(Status::IoErr) => return Verdict::Fail,
                Err(Status::DevResource) => {
                    self.wait_run(&mut runs);
                    continue;
                }
            }
            if let Some(index) = lives {
                self.all[index].leave();
                self.all[index].receive_work();
            }
            match self.table.tags[tag].wait_ended() {
                Verdict::Requeue => {}
                verdict => {
                    if verdict == Verdict::Complete {
                        self.assert_done(tag);
                    }
                    return verdict;
                }
            }
        }
    }

    /// The tag's last request has completed: a server had got it, or it was sent to one that lies.
    fn assert_done(&self, tag: usize) {
        if self.has_liar {
            let sent = self.all.iter().any(|c| c.sent().0 > 0);
            return assert!(sent, "it was never sent");
        }
        let use_number = self.table.tags[tag].use_number() - 1;
        let got = self.all.iter().any(|c| c.server_got(tag, use_number));
        assert!(got, "no server has got it");
    }

    /// What was sent over a connection leaves and is answered; it dies; what is left leaves later.
    fn mark_dead(&self, connection: usize) {
        let connection = &self.all[connection];
        connection.leave();
        connection.mark_dead();
        connection.leave();
    }
}

/// One connection dies: whenever that is, the other one sees the command through.
pub(crate) fn the_other_connection_takes_over<P: Parts>() {
    let session = Session::<P>::new(TWO_GOOD);
    let dying = session.spawn(|s| s.mark_dead(0));
    assert_eq!(session.run_request(0, Some(1)), Verdict::Complete);
    dying.join().unwrap();
}

/// A connection dies whose server does not answer, and its work item runs at any time: nothing leaves
/// any more when the other one has got the command.
fn nothing_leaves_late_without<P: Parts>(left_out: LeftOut) {
    let session = Session::<P>::new(Setup {
        left_out,
        connections: [(0, SILENT), (1, GOOD)],
        ..TWO_GOOD
    });
    let dying = session.spawn(|s| {
        s.all[0].mark_dead();
        s.all[0].leave();
    });
    let working = session.spawn(|s| {
        s.all[0].receive_work();
        s.all[0].leave();
    });
    assert_eq!(session.run_request(0, Some(1)), Verdict::Complete);
    dying.join().unwrap();
    working.join().unwrap();
}

fn nothing_leaves_late<P: Parts>() {
    nothing_leaves_late_without::<P>(LeftOut::Nothing);
}

/// The only connection dies and comes back, and the requests wait for it: the new one, under the same
/// number, sees the command through.
pub(crate) fn the_connection_comes_back<P: Parts>() {
    let session = Session::<P>::new(Setup {
        may_wait: true,
        ..ONE_AFTER_THE_OTHER
    });
    let dying = session.spawn(|s| {
        s.mark_dead(0);
        s.reconnect();
    });
    assert_eq!(
        session.run_request(0, Some(1)),
        Verdict::Complete,
        "it was to wait"
    );
    dying.join().unwrap();
}

/// The same where no request waits: some may fail, but none once there is a connection that lives.
fn nobody_waits_for_the_connection_without<P: Parts>(left_out: LeftOut) {
    let session = Session::<P>::new(Setup {
        left_out,
        ..ONE_AFTER_THE_OTHER
    });
    let dying = session.spawn(|s| {
        s.mark_dead(0);
        s.reconnect();
    });
    session.run_request(0, Some(1));
    session.run_request(0, Some(1));
    dying.join().unwrap();
    assert_eq!(
        session.run_request(0, Some(1)),
        Verdict::Complete,
        "I/O fails although a connection lives"
    );
    assert_eq!(session.table.told.load(Ordering::Relaxed), 1);
}

pub(crate) fn nobody_waits_for_the_connection<P: Parts>() {
    nobody_waits_for_the_connection_without::<P>(LeftOut::Nothing);
}

/// The connection is cleared away by another task than that which reconnects: not before that may anything
/// be in flight under its number.
fn cleared_away_meanwhile_without<P: Parts>(left_out: LeftOut) {
    let session = Session::<P>::new(Setup {
        left_out,
        may_wait: true,
        connections: [(0, CLEARED_AWAY_BY_ANOTHER), (0, GOOD)],
        ..ONE_AFTER_THE_OTHER
    });
    let working = session.spawn(clear_away_the_first);
    let reconnecting = session.spawn(|s| {
        s.all[0].mark_dead();
        s.reconnect();
    });
    assert_eq!(session.run_request(0, Some(1)), Verdict::Complete);
    reconnecting.join().unwrap();
    working.join().unwrap();
}

fn cleared_away_meanwhile<P: Parts>() {
    cleared_away_meanwhile_without::<P>(LeftOut::Nothing);
}

/// The work item of the first connection runs, which was declared dead.
fn clear_away_the_first<P: Parts>(session: &Session<P>) {
    let first = &session.all[0];
    first.receive_work.wait_queued();
    first.receive_work();
    first.leave();
}

/// The user has asked for the disconnect, the connection dies and is cleared away by another task, and
/// then the device is connected anew: it waits for connections again.
fn connected_anew_without<P: Parts>(left_out: LeftOut) {
    let session = Session::<P>::new(Setup {
        left_out,
        may_wait: true,
        connections: [(0, CLEARED_AWAY_BY_ANOTHER), (0, GOOD)],
        ..ONE_AFTER_THE_OTHER
    });
    let working = session.spawn(clear_away_the_first);
    let reconnecting = session.spawn(|s| {
        s.table.fate.request_disconnect();
        s.all[0].mark_dead();
        s.reconnect();
    });
    session.run_request(0, Some(1));
    reconnecting.join().unwrap();
    working.join().unwrap();
    let fate = session.table.fate.snapshot();
    assert!(!fate.is_disconnected(), "it does not know that it goes on");
    assert_eq!(session.run_request(0, Some(1)), Verdict::Complete);
}

pub(crate) fn connected_anew<P: Parts>() {
    connected_anew_without::<P>(LeftOut::Nothing);
}

/// Both die: the command is answered before that, or it fails. It does not get lost.
pub(crate) fn both_connections_die<P: Parts>() {
    let session = Session::<P>::new(TWO_GOOD);
    let dying = [0, 1].map(|index| session.spawn(move |s| s.mark_dead(index)));
    let verdict = session.run_request(0, None);
    assert!(matches!(verdict, Verdict::Complete | Verdict::Fail));
    for connection in dying {
        connection.join().unwrap();
    }
    let told = session.table.told.load(Ordering::Relaxed);
    assert_eq!(told, 2, "nobody was told of a death");
}

/// Two tasks submit while the only connection dies, so that one may have left its command to the other.
fn left_to_a_sender<P: Parts>() {
    let session = Session::<P>::new(Setup {
        tags: 2,
        places: 1,
        connections: [(0, SILENT), (1, SILENT)],
        ..TWO_GOOD
    });
    let other = session.spawn(|s| assert_eq!(s.run_request(1, None), Verdict::Fail));
    let dying = session.spawn(|s| {
        s.all[0].mark_dead();
        s.all[0].leave();
    });
    assert_eq!(session.run_request(0, None), Verdict::Fail);
    other.join().unwrap();
    dying.join().unwrap();
}

/// The session ends: what is in flight then is answered or fails, and is not lost, nor does it wait;
/// what comes later fails.
pub(crate) fn the_session_ends<P: Parts>() {
    let session = Session::<P>::new(Setup {
        may_wait: true,
        ..TWO_GOOD
    });
    let ending = session.spawn(|s| {
        s.all[0].leave();
        s.end();
        s.run_queues();
        s.all[0].leave();
    });
    let verdict = session.run_request(0, None);
    assert!(matches!(verdict, Verdict::Complete | Verdict::Fail));
    ending.join().unwrap();
    assert_eq!(session.run_request(0, None), Verdict::Fail);
}

/// The user asks for the disconnect, and the server closes the connection: nobody waits for another.
pub(crate) fn the_user_disconnects<P: Parts>() {
    let session = Session::<P>::new(Setup {
        may_wait: true,
        ..ONE_AFTER_THE_OTHER
    });
    let ending = session.spawn(|s| {
        s.table.fate.request_disconnect();
        s.mark_dead(0);
        s.run_queues();
    });
    let verdict = session.run_request(0, None);
    assert!(matches!(verdict, Verdict::Complete | Verdict::Fail));
    ending.join().unwrap();
    assert_eq!(session.run_request(0, None), Verdict::Fail);
}

/// A server answers what it has not been sent, and its connection dies: the command is sent again.
fn answered_before_it_was_sent_without<P: Parts>(left_out: LeftOut) {
    let session = Session::<P>::new(Setup {
        left_out,
        has_liar: true,
        ..TWO_GOOD
    });
    let dying = session.spawn(|s| {
        if let Some(request) = s.table.slots[0].claim(1, 0) {
            request.finish(Verdict::Complete);
        }
        s.all[0].mark_dead();
    });
    assert_eq!(session.run_request(0, Some(1)), Verdict::Complete);
    dying.join().unwrap();
}

fn answered_before_it_was_sent<P: Parts>() {
    answered_before_it_was_sent_without::<P>(LeftOut::Nothing);
}

// Without bounds all of these take minutes. Where two tasks run beside the one that submits the bound is
// lower than where it is one.
models! {
    the_other_connection_takes_over within 6 preemptions,
    answered_before_it_was_sent within 6 preemptions,
    the_user_disconnects within 6 preemptions,
    the_session_ends within 5 preemptions,
    the_connection_comes_back within 4 preemptions,
    nobody_waits_for_the_connection within 4 preemptions,
    nothing_leaves_late within 3 preemptions,
    connected_anew within 3 preemptions,
    both_connections_die within 3 preemptions,
    cleared_away_meanwhile within 2 preemptions,
    left_to_a_sender within 2 preemptions,
}

#[test]
#[should_panic(expected = "it left the socket after it was given up")]
fn what_is_owed_must_be_reset() {
    explore(
        || nothing_leaves_late_without::<Module>(LeftOut::Resetting),
        Some(2),
    );
}

#[test]
#[should_panic(expected = "it left the socket after it was given up")]
fn the_socket_must_end_before_it_is_cleared_away() {
    explore(
        || nothing_leaves_late_without::<Module>(LeftOut::EndingBeforeReaping),
        Some(2),
    );
}

#[test]
#[should_panic(expected = "it was never sent")]
fn what_was_not_sent_must_be_overruled() {
    explore(
        || answered_before_it_was_sent_without::<Module>(LeftOut::Overruling),
        Some(3),
    );
}

#[test]
#[should_panic(expected = "I/O fails although a connection lives")]
fn the_session_must_be_revived_last() {
    explore(
        || nobody_waits_for_the_connection_without::<Module>(LeftOut::ReplacingBeforeReviving),
        Some(3),
    );
}

#[test]
#[should_panic(expected = "a good reply was refused")]
fn who_reconnects_must_wait_for_the_clearing_away() {
    explore(
        || cleared_away_meanwhile_without::<Module>(LeftOut::WaitingForReaped),
        Some(2),
    );
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn who_reconnects_must_wait_for_dispatches() {
    explore(
        || nobody_waits_for_the_connection_without::<Module>(LeftOut::Quiescing),
        Some(3),
    );
}

#[test]
#[should_panic(expected = "it does not know that it goes on")]
fn a_connection_must_be_counted_before_it_is_replaced() {
    explore(
        || connected_anew_without::<Module>(LeftOut::CountingBeforeTelling),
        Some(2),
    );
}
