// SPDX-License-Identifier: GPL-2.0
//! A command is handed to connections that die meanwhile: `rnbd_cmd.rs` in the hands of its users.
//!
//! `rnbd_session.rs`, `rnbd_sock.rs` and `rnbd_table.rs` need the kernel, so the steps of theirs that
//! matter are repeated here, in the same order and under the same names: keep them alike.

use crate::{
    blk_mq::{Request, Tag, Verdict},
    ownership::{Commands, models},
};
use loom::{
    sync::{
        Mutex, Notify,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
        },
    },
    thread::{self, JoinHandle},
};
use std::{mem::take, sync::Arc};

/// A message to be sent: all of its header that matters is its generation.
struct Queued {
    request: Request,
    generation: u32,
}

#[derive(Default)]
struct Backlog {
    queue: Vec<Queued>,
    closed: bool,
}

struct Connection {
    index: u16,
    alive: AtomicBool,
    backlog: Mutex<Backlog>,
    /// What is staged.
    transmit: Mutex<Vec<Queued>>,
    /// What the server has got, and answers at once.
    server: Mutex<Vec<u32>>,
    /// Whether it ever got something: the test's own, and no business of loom's.
    got_any: std::sync::atomic::AtomicBool,
}

impl Connection {
    fn new(index: u16) -> Self {
        Connection {
            index,
            alive: AtomicBool::new(true),
            backlog: Mutex::default(),
            transmit: Mutex::default(),
            server: Mutex::default(),
            got_any: Default::default(),
        }
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Acquire)
    }

    fn push(&self, request: Request, generation: u32) -> Result<(), Request> {
        let mut backlog = self.backlog.lock().unwrap();
        if backlog.closed {
            return Err(request);
        }
        backlog.queue.push(Queued {
            request,
            generation,
        });
        Ok(())
    }

    fn kick(&self) {
        if !self.is_alive() {
            return;
        }
        let Ok(mut staged) = self.transmit.try_lock() else {
            return;
        };
        staged.append(&mut self.backlog.lock().unwrap().queue);
        for message in staged.drain(..) {
            message.request.read_pages();
            self.server.lock().unwrap().push(message.generation);
            self.got_any.store(true, Relaxed);
        }
    }

    fn give_back_unsent(&self, verdict: Verdict) {
        let mut staged = self.transmit.lock().unwrap();
        for message in staged.drain(..) {
            message.request.decide(verdict);
        }
        let queue = {
            let mut backlog = self.backlog.lock().unwrap();
            backlog.closed = true;
            take(&mut backlog.queue)
        };
        for message in queue {
            message.request.decide(verdict);
        }
    }
}

/// A session, and the only tag of its first hardware queue.
struct Session<S> {
    tag: Arc<Tag>,
    slot: S,
    /// All connections that there ever are.
    connections: [Connection; 2],
    /// Which of them are in the session's places.
    places: Vec<AtomicUsize>,
    disconnected: AtomicBool,
    came_back: Notify,
}

impl<S: Commands> Session<S> {
    fn new(indexes: [u16; 2], places: usize) -> Arc<Self> {
        Arc::new(Session {
            tag: Tag::new(),
            slot: S::new(),
            connections: indexes.map(Connection::new),
            places: (0..places).map(AtomicUsize::new).collect(),
            disconnected: AtomicBool::new(false),
            came_back: Notify::new(),
        })
    }

    fn pick(&self) -> Option<&Connection> {
        if self.disconnected.load(Acquire) {
            return None;
        }
        self.places
            .iter()
            .map(|place| &self.connections[place.load(Acquire)])
            .find(|connection| connection.is_alive())
    }

    fn mark_disconnected(&self) {
        self.disconnected.store(true, SeqCst);
    }

    fn verdict_of_lost(&self) -> Verdict {
        match self.disconnected.load(Acquire) {
            true => Verdict::Fail,
            false => Verdict::Requeue,
        }
    }

    /// Puts the request in flight; returns whether there is a connection for it.
    fn queue_rq(&self) -> bool {
        let Some(connection) = self.pick() else {
            return false;
        };
        let (transmit, other) = self.tag.start();
        self.dispatch(connection, transmit, other);
        true
    }

    fn dispatch<'a>(
        &'a self,
        mut connection: &'a Connection,
        mut transmit: Request,
        mut other: Request,
    ) {
        loop {
            let generation = self.slot.start(connection.index, other);
            let Err(back) = connection.push(transmit, generation) else {
                connection.kick();
                return;
            };
            transmit = back;
            let Some(ours) = self.slot.claim(generation, connection.index) else {
                transmit.decide(Verdict::Requeue);
                return;
            };
            other = ours;
            match self.pick() {
                Some(next) => connection = next,
                None => {
                    other.decide(Verdict::Requeue);
                    return;
                }
            }
        }
    }

    fn receive(&self, connection: &Connection) {
        let replies = take(&mut *connection.server.lock().unwrap());
        for generation in replies {
            let claimed = self.slot.claim(generation, connection.index);
            claimed
                .expect("a good reply was refused")
                .decide(Verdict::Complete);
        }
    }

    /// Somebody declares the connection dead, and its work item clears it away.
    fn die(&self, connection: &Connection) {
        connection.alive.store(false, SeqCst);
        self.receive(connection);
        self.reap(connection);
    }

    fn reap(&self, connection: &Connection) {
        connection.give_back_unsent(self.verdict_of_lost());
        if let Some(request) = self.slot.reclaim(connection.index) {
            request.decide(self.verdict_of_lost());
        }
    }

    fn spawn(self: &Arc<Self>, run: impl FnOnce(&Self) + 'static) -> JoinHandle<()> {
        let session = self.clone();
        thread::spawn(move || run(&session))
    }

    /// A connection takes a dead one's place, and number.
    fn reconnect(&self, place: usize, new: usize) {
        self.places[place].store(new, Release);
        self.came_back.notify();
    }

    /// The block layer: dispatches the request until it is over. `lives`: after each dispatch the
    /// server of that connection, which does not die, may have answered.
    fn run_request(&self, lives: Option<usize>, waits_for_reconnect: bool) -> Verdict {
        let mut requests = 0;
        loop {
            if !self.queue_rq() {
                if waits_for_reconnect {
                    self.came_back.wait();
                    continue;
                }
                return Verdict::Fail;
            }
            requests += 1;
            if let Some(index) = lives {
                self.receive(&self.connections[index]);
            }
            match self.tag.wait_ended(requests) {
                Verdict::Requeue => {}
                verdict => {
                    let got_any = |c: &Connection| c.got_any.load(Relaxed);
                    let sent = self.connections.iter().any(got_any);
                    assert!(sent || verdict != Verdict::Complete, "it was never sent");
                    return verdict;
                }
            }
        }
    }
}

/// One connection dies: whenever that is, the other one sees the command through.
pub(crate) fn the_other_connection_takes_over<S: Commands>() {
    let session = Session::<S>::new([0, 1], 2);
    let dying = session.spawn(|s| s.die(&s.connections[0]));
    assert_eq!(session.run_request(Some(1), false), Verdict::Complete);
    dying.join().unwrap();
}

/// The only connection dies and comes back: the new one, under the same number, sees the command
/// through.
fn the_connection_comes_back<S: Commands>() {
    let session = Session::<S>::new([0, 0], 1);
    let dying = session.spawn(|s| {
        s.die(&s.connections[0]);
        s.reconnect(0, 1);
    });
    assert_eq!(session.run_request(Some(1), true), Verdict::Complete);
    dying.join().unwrap();
}

/// Both die: the command is answered before that, or it fails. It does not get lost.
fn both_connections_die<S: Commands>() {
    let session = Session::<S>::new([0, 1], 2);
    let dying = [0, 1].map(|index| session.spawn(move |s| s.die(&s.connections[index])));
    let verdict = session.run_request(None, false);
    assert!(matches!(verdict, Verdict::Complete | Verdict::Fail));
    for connection in dying {
        connection.join().unwrap();
    }
}

/// The session ends: what is in flight then is answered or fails, and is not lost either.
fn the_session_ends<S: Commands>() {
    let session = Session::<S>::new([0, 1], 2);
    let ending = session.spawn(|s| {
        s.mark_disconnected();
        s.die(&s.connections[0]);
        s.die(&s.connections[1]);
    });
    let verdict = session.run_request(None, false);
    assert!(matches!(verdict, Verdict::Complete | Verdict::Fail));
    ending.join().unwrap();
}

/// A server answers what it has not been sent, and its connection dies: the command is sent again.
fn answered_before_it_was_sent<S: Commands>() {
    let session = Session::<S>::new([0, 1], 2);
    let dying = session.spawn(|s| {
        if let Some(request) = s.slot.claim(1, 0) {
            request.decide(Verdict::Complete);
        }
        s.connections[0].alive.store(false, SeqCst);
        s.reap(&s.connections[0]);
    });
    assert_eq!(session.run_request(Some(1), false), Verdict::Complete);
    dying.join().unwrap();
}

// Without bounds these take minutes, but for the first.
models! {
    the_other_connection_takes_over,
    the_connection_comes_back within 4 preemptions,
    both_connections_die within 3 preemptions,
    the_session_ends within 4 preemptions,
    answered_before_it_was_sent within 4 preemptions,
}
