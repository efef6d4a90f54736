// SPDX-License-Identifier: GPL-2.0

//! The tasks that carry out a sequence. One that does not come back soon is left to itself, and
//! asked again after each operation.

use std::cell::OnceCell;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use rustix::thread::{CapabilitySet, Pid, capabilities, gettid, set_capabilities};

use crate::differential::operations::{Dev, Who};
use crate::netlink::Netlink;

pub type Job = Box<dyn FnOnce() -> Answer + Send>;

/// What an operation answered, and the file that it opened.
#[derive(Default)]
pub struct Answer {
    pub text: String,
    pub opened: Option<(usize, Opened)>,
}

impl From<String> for Answer {
    fn from(text: String) -> Self {
        Self { text, opened: None }
    }
}

#[derive(Clone)]
pub struct Opened {
    pub device: Dev,
    pub file: Arc<File>,
}

thread_local! {
    static NETLINK: OnceCell<Netlink> = const { OnceCell::new() };
}

pub fn with_netlink<T>(f: impl FnOnce(&Netlink) -> T) -> T {
    NETLINK.with(|netlink| f(netlink.get_or_init(Netlink::open)))
}

/// A task that does what it is told, one thing after the other.
pub struct Actor {
    pub tid: Pid,
    pub jobs: Sender<Job>,
    pub answers: Receiver<Answer>,
}

impl Actor {
    pub fn new(who: Who) -> Self {
        let (jobs, to_do) = mpsc::channel::<Job>();
        let (tell, answers) = mpsc::channel();
        let (tell_tid, tid) = mpsc::channel();
        let life = move || {
            if who == Who::Nobody {
                let mut sets = capabilities(None).expect("capabilities");
                sets.effective.remove(CapabilitySet::SYS_ADMIN);
                set_capabilities(None, sets).expect("to lose a capability");
            }
            let _ = tell_tid.send(gettid());
            for job in to_do {
                let _ = tell.send(job());
            }
        };
        let thread = thread::Builder::new().name(format!("{who:?}")).spawn(life);
        thread.expect("a thread");
        Self {
            tid: tid.recv().expect("a thread"),
            jobs,
            answers,
        }
    }
}

/// An operation that has not come back yet.
pub struct Waiting {
    pub step: usize,
    pub actor: Actor,
    /// The device, if it is NBD_DO_IT.
    pub runs: Option<Dev>,
    pub answer: Option<Answer>,
}

impl Waiting {
    pub fn look_for_answer(&mut self) {
        if self.answer.is_none() {
            self.answer = self.actor.answers.try_recv().ok();
        }
    }

    pub fn take_answer(&mut self) -> Option<Answer> {
        self.look_for_answer();
        self.answer.take()
    }
}
