// SPDX-License-Identifier: GPL-2.0
//! What comes in is received by a socket's callback, by a task that has sent it, or by a work item,
//! whoever has the lock that nobody waits for: `kapi/try_lock.rs` in the hands of its users.
//!
//! The steps of `rnbd_sock.rs` and `rnbd_sock/receiving.rs` are repeated here, in the same order and
//! under the same names: keep them alike.

use crate::{parts::explore, try_lock::TryLock};
use loom::{
    cell::UnsafeCell,
    sync::{
        Mutex, Notify, RwLock,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Acquire, Relaxed, SeqCst},
        },
    },
    thread,
};
use std::sync::Arc;

const ALIVE: usize = 0;
/// Declared dead, and its socket was ended: one step here, for nothing depends on the time in between.
const ENDED: usize = 2;
const REAPED: usize = 3;

/// Less than in the driver, so that the last one is among what is tried.
const ROUNDS: usize = 2;

/// The step of the protocol that is left out, to see that the models notice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LeftOut {
    Nothing,
    /// A work item does not look again where others were turned away meanwhile.
    LookingAgain,
    /// A callback does not have the work item look where others were turned away meanwhile.
    HandingOver,
    /// Who clears the connection away does not stop the callbacks.
    StoppingCallbacks,
    /// A task that receives after its callback does not look whether the connection was cleared away.
    LookingWhetherDead,
}

/// A work item, as the kernel's workqueues treat it: to queue it again while it is queued does
/// nothing, and while it runs has it run once more.
struct Work {
    queued: AtomicBool,
    wake: Notify,
}

impl Work {
    fn queue(&self) {
        if !self.queued.swap(true, SeqCst) {
            self.wake.notify();
        }
    }

    fn wait_queued(&self) {
        self.wake.wait();
        // An exchange, since the kernel's sees all that came before a `queue_work()` that found it
        // queued (`set_work_pool_and_clear_pending()`).
        self.queued.swap(false, SeqCst);
    }
}

/// `rnbd_sock/stream.rs`'s `Receive`: how much was understood. Loom objects to uses that nothing orders.
struct Receive {
    understood: UnsafeCell<usize>,
    /// It was cleared away: the test's own.
    reaped: bool,
}

// SAFETY: There is no more in it than a number.
unsafe impl Send for Receive {}

struct Connection {
    left_out: LeftOut,
    state: AtomicUsize,
    /// How much is in the socket: the lock is the socket's.
    socket: Mutex<usize>,
    /// Whether the callbacks are ours: the lock is `sk_callback_lock`.
    hooked: RwLock<bool>,
    receive: TryLock<Receive>,
    work: Work,
    /// What was understood, for those who wait for it.
    told: AtomicUsize,
    tell: Notify,
}

impl Connection {
    fn new(left_out: LeftOut) -> Arc<Self> {
        Arc::new(Connection {
            left_out,
            state: AtomicUsize::new(ALIVE),
            socket: Mutex::new(0),
            hooked: RwLock::new(true),
            receive: TryLock::new(Receive {
                understood: UnsafeCell::new(0),
                reaped: false,
            }),
            work: Work {
                queued: AtomicBool::new(false),
                wake: Notify::new(),
            },
            told: AtomicUsize::new(0),
            tell: Notify::new(),
        })
    }

    /// Something comes in, and the callback is called with the socket locked.
    fn arrives(&self, large: bool) {
        let mut socket = self.socket.lock().unwrap();
        *socket += 1;
        let hooked = self.hooked.read().unwrap();
        if !*hooked {
            return;
        }
        self.try_receive(|receive| {
            // `receive_in_callback()`
            if !large {
                self.parse(receive, std::mem::take(&mut *socket));
            }
            large
        });
    }

    /// Something comes in, and the callback only tells of it: `input_ready()`.
    fn becomes_readable(&self) {
        *self.socket.lock().unwrap() += 1;
        let hooked = self.hooked.read().unwrap();
        if *hooked && !self.receive.mark_wanted() {
            self.work.queue();
        }
    }

    /// Something is sent by a task of this machine, which receives it itself: without the lock of the
    /// socket's callbacks, which it had when it was asked to.
    fn arrives_from_here(&self) {
        *self.socket.lock().unwrap() += 1;
        if !*self.hooked.read().unwrap() {
            return;
        }
        self.try_receive(|receive| {
            let dead = self.state.load(Acquire) == REAPED;
            if !dead || self.left_out == LeftOut::LookingWhetherDead {
                let got = std::mem::take(&mut *self.socket.lock().unwrap());
                self.parse(receive, got);
            }
            false
        });
    }

    fn try_receive(&self, receive: impl FnOnce(&mut Receive) -> bool) {
        if let Some((left, contended)) = self.receive.try_with(receive) {
            if left || contended && self.left_out != LeftOut::HandingOver {
                self.work.queue();
            }
        }
    }

    fn parse(&self, receive: &mut Receive, got: usize) {
        assert!(!receive.reaped, "received after it was cleared away");
        receive.understood.with_mut(|understood| {
            // SAFETY: Whoever has the `Receive` is alone with it, and loom looks.
            unsafe { *understood += got }
        });
        self.told.fetch_add(got, SeqCst);
        self.tell.notify();
    }

    /// Returns whether it was the last run.
    fn receive_work(&self) -> bool {
        for _ in 0..ROUNDS {
            if self.state.load(Acquire) == REAPED {
                return true;
            }
            match self
                .receive
                .try_with(|receive| self.receive_or_reap(receive))
            {
                Some((_, true)) if self.left_out != LeftOut::LookingAgain => {}
                _ => return self.state.load(Acquire) == REAPED,
            }
        }
        self.work.queue();
        false
    }

    fn receive_or_reap(&self, receive: &mut Receive) {
        loop {
            let got = std::mem::take(&mut *self.socket.lock().unwrap());
            if got == 0 {
                break;
            }
            self.parse(receive, got);
        }
        let ended = self.state.compare_exchange(ENDED, REAPED, SeqCst, Relaxed);
        if ended.is_ok() {
            if self.left_out != LeftOut::StoppingCallbacks {
                *self.hooked.write().unwrap() = false;
            }
            receive.reaped = true;
        }
    }

    fn mark_dead(&self) {
        if self
            .state
            .compare_exchange(ALIVE, ENDED, SeqCst, Relaxed)
            .is_ok()
        {
            self.work.queue();
        }
    }

    /// What was understood is not less than this; else it waits, for ever if something is lost, which
    /// loom calls a deadlock.
    fn wait_understood(&self, count: usize) {
        while self.told.load(SeqCst) < count {
            self.tell.wait();
        }
    }
}

/// Runs the connection's work item until it has cleared the connection away.
fn work(connection: &Arc<Connection>) -> thread::JoinHandle<()> {
    let connection = connection.clone();
    thread::spawn(move || {
        loop {
            connection.work.wait_queued();
            if connection.receive_work() {
                return;
            }
        }
    })
}

/// All that comes in is understood, although nothing comes after it.
fn everything_is_understood(second: fn(&Connection), left_out: LeftOut) {
    let connection = Connection::new(left_out);
    let worker = work(&connection);
    connection.arrives(true);
    second(&connection);
    connection.wait_understood(2);
    connection.mark_dead();
    worker.join().unwrap();
}

fn everything_received_here_is_understood(left_out: LeftOut) {
    everything_is_understood(|connection| connection.arrives(false), left_out);
}

/// The same where the second is only told of.
fn everything_told_of_is_understood(left_out: LeftOut) {
    everything_is_understood(Connection::becomes_readable, left_out);
}

/// The same where the task that sends the second receives.
fn everything_sent_here_is_understood(left_out: LeftOut) {
    everything_is_understood(Connection::arrives_from_here, left_out);
}

/// It dies while something comes in: it is cleared away once, and nothing is received after that.
fn dies_while(arrives: fn(&Connection), left_out: LeftOut) {
    let connection = Connection::new(left_out);
    let worker = work(&connection);
    let dying = {
        let connection = connection.clone();
        thread::spawn(move || connection.mark_dead())
    };
    arrives(&connection);
    dying.join().unwrap();
    worker.join().unwrap();
}

fn dies_while_something_comes_in(left_out: LeftOut) {
    dies_while(|connection| connection.arrives(false), left_out);
}

/// The same where the task that sends receives.
fn dies_while_something_is_sent_here(left_out: LeftOut) {
    dies_while(Connection::arrives_from_here, left_out);
}

#[test]
fn understands_everything() {
    explore(
        || everything_received_here_is_understood(LeftOut::Nothing),
        Some(5),
    );
    explore(
        || everything_told_of_is_understood(LeftOut::Nothing),
        Some(3),
    );
    explore(
        || everything_sent_here_is_understood(LeftOut::Nothing),
        Some(1),
    );
}

#[test]
fn dies_in_order() {
    explore(|| dies_while_something_comes_in(LeftOut::Nothing), None);
    explore(
        || dies_while_something_is_sent_here(LeftOut::Nothing),
        Some(5),
    );
}

#[test]
#[should_panic(expected = "deadlock")]
fn somebody_must_look_again() {
    explore(
        || everything_received_here_is_understood(LeftOut::LookingAgain),
        None,
    );
}

#[test]
#[should_panic(expected = "deadlock")]
fn what_is_told_of_must_be_looked_at() {
    explore(
        || everything_told_of_is_understood(LeftOut::LookingAgain),
        None,
    );
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_callback_must_hand_over() {
    explore(|| dies_while_something_comes_in(LeftOut::HandingOver), None);
}

#[test]
#[should_panic(expected = "received after it was cleared away")]
fn callbacks_must_be_stopped() {
    explore(
        || dies_while_something_comes_in(LeftOut::StoppingCallbacks),
        None,
    );
}

#[test]
#[should_panic(expected = "received after it was cleared away")]
fn who_receives_must_look_whether_it_is_dead() {
    explore(
        || dies_while_something_is_sent_here(LeftOut::LookingWhetherDead),
        None,
    );
}
