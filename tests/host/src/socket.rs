// SPDX-License-Identifier: GPL-2.0
//! A socket, what is sent over it, and the server at its other end. For the model of a connection.

use crate::{
    blk_mq::{Tag, Unsent},
    connection::LeftOut,
    sync::{atomic::Full, barrier::smp_mb},
};
use loom::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
use std::{collections::VecDeque, sync::Arc};

/// A command on the wire: a request's use of a tag, and the generation that names it.
#[derive(Clone)]
pub(crate) struct Command {
    pub(crate) tag: Arc<Tag>,
    pub(crate) use_number: usize,
    pub(crate) generation: u32,
}

/// A message: a command, or else a goodbye.
pub(crate) struct Message(pub(crate) Option<Command>);

/// What is staged, with the request that is let go of when it was sent.
pub(crate) struct Outgoing {
    pub(crate) message: Message,
    pub(crate) request: Option<Unsent>,
}

/// What becomes of what has not left yet when a socket ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Polite,
    Reset,
}

/// A socket, and the server at its other end.
pub(crate) struct Socket {
    pub(crate) stream: Mutex<Stream>,
    /// How many messages it takes before they are acknowledged; none: any number.
    limit: Option<usize>,
    /// How many it has taken.
    pub(crate) used: AtomicUsize,
    /// `SOCK_NOSPACE`: it reports room. Only ever exchanged, as bits are.
    pub(crate) reports: AtomicBool,
}

#[derive(Default)]
pub(crate) struct Stream {
    pub(crate) ended: bool,
    /// It was reset. The test's own.
    pub(crate) reset: bool,
    /// What was sent and has not left yet.
    queue: VecDeque<Message>,
    /// What the server has answered.
    pub(crate) replies: Vec<Command>,
    /// What was ever sent: how many commands, how many goodbyes. The test's own.
    pub(crate) sent: (usize, usize),
    /// What the server has got: of which tag, and which use of it. The test's own.
    pub(crate) got: Vec<(usize, usize)>,
}

/// Sending is over.
pub(crate) struct Ended;

impl Socket {
    /// A socket that has taken as much as it can.
    pub(crate) fn full(limit: Option<usize>) -> Self {
        Socket {
            stream: Mutex::default(),
            limit,
            used: AtomicUsize::new(limit.unwrap_or(0)),
            reports: AtomicBool::new(false),
        }
    }

    /// Sends as much of `staged` as fits; returns how much that is.
    pub(crate) fn send(&self, staged: &[Outgoing]) -> Result<usize, Ended> {
        let mut stream = self.stream.lock().unwrap();
        if stream.ended {
            return Err(Ended);
        }
        let mut count = 0;
        for outgoing in staged {
            if !self.takes_one() {
                break;
            }
            match &outgoing.message.0 {
                Some(_) => stream.sent.0 += 1,
                None => stream.sent.1 += 1,
            }
            stream.queue.push_back(Message(outgoing.message.0.clone()));
            count += 1;
        }
        Ok(count)
    }

    fn takes_one(&self) -> bool {
        let Some(limit) = self.limit else {
            return true;
        };
        // What it sees here may be out of date, as for a UNIX socket.
        let takes = self.used.load(Ordering::Relaxed) < limit;
        if takes {
            self.used.fetch_add(1, Ordering::Relaxed);
        } else {
            self.reports.swap(true, Ordering::Relaxed);
        }
        takes
    }

    pub(crate) fn has_room(&self) -> bool {
        self.limit
            .is_none_or(|limit| self.used.load(Ordering::Relaxed) < limit)
    }

    pub(crate) fn has_room_or_requests_report(&self, left_out: LeftOut) -> bool {
        if self.has_room() {
            return true;
        }
        if left_out != LeftOut::AskingForRoom {
            self.reports.swap(true, Ordering::Relaxed);
        }
        if left_out != LeftOut::BarrierBeforeLookingForRoom {
            smp_mb(Full);
        }
        self.has_room()
    }

    /// The network: what was sent leaves, in its own time, unless the socket was reset. A server that
    /// `answers` does so at once.
    pub(crate) fn leave(&self, answers: bool) {
        let mut stream = self.stream.lock().unwrap();
        while let Some(message) = stream.queue.pop_front() {
            let Some(command) = message.0 else {
                continue;
            };
            let given_up = command.tag.was_given_up(command.use_number);
            assert!(!given_up, "it left the socket after it was given up");
            stream.got.push((command.tag.number, command.use_number));
            if answers && !stream.ended {
                stream.replies.push(command);
            }
        }
    }

    pub(crate) fn end(&self, ending: Ending) {
        let mut stream = self.stream.lock().unwrap();
        stream.ended = true;
        if ending == Ending::Reset {
            stream.reset = true;
            stream.queue.clear();
        }
    }
}
