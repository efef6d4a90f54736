// SPDX-License-Identifier: GPL-2.0

//! A server that lies: it answers live requests with a mixture, drawn from a seed, of right replies
//! and of everything that no server may send. It knows what it has said, so that whoever reads can
//! find out whether the driver has made anything up.

mod chunks;
mod lies;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use fastrand::Rng;

use crate::device::pattern;
use crate::harness::complain;
use crate::proto::{self, Command, REPLY_MAGIC, REQUEST_MAGIC, Request};
use crate::server::{Conn, ok};

/// Where what is done; each area is this long.
pub const AREA: u64 = 8 << 20;
pub const READ_AT: u64 = 0;
pub const WRITE_AT: u64 = AREA;
pub const ZERO_AT: u64 = 2 * AREA;
pub const TRIM_AT: u64 = 3 * AREA;
pub const SIZE: u64 = 4 * AREA;

/// What belongs into the areas that are read and written.
const READ_SEED: u64 = 0x5ead;
const WRITE_SEED: u64 = 0x317e;

/// What follows a reply that no driver may believe, and nothing else.
const MARK: [u8; 8] = *b"Believe!";

/// Magic numbers that begin no simple reply: a request's, a structured and an extended reply's.
const OTHER_MAGICS: [u32; 4] = [REQUEST_MAGIC, 0x668e_33ef, 0x6e8a_278c, 0x1256_0953];

const ERRORS: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];

/// A connection ends when it has sent so much since its first lie.
const LONGEST_LIE: usize = 4 << 20;

/// Replies and pieces of streams that may be sent again.
const HISTORY: usize = 256;

/// What was sent on a connection since its first lie.
type Lies = Arc<Mutex<Vec<u8>>>;

/// What all connections to one device share.
pub struct Mischief {
    seed: u64,
    structured: bool,
    counts: Arc<Counts>,
    /// Cookies of requests that were answered, and so of none that is in flight.
    answered: Mutex<VecDeque<u64>>,
    /// Cookies of the requests that each connection has yet to answer.
    in_flight: Mutex<HashMap<usize, Vec<u64>>>,
    /// What was sent lately, by anybody.
    history: Mutex<VecDeque<Vec<u8>>>,
    lies: Mutex<Vec<Lies>>,
}

/// How often what was done.
#[derive(Default)]
pub struct Counts {
    by_name: Mutex<BTreeMap<&'static str, u64>>,
    /// Each reply; a flood of them, or garbage, is one.
    replies: AtomicU64,
}

impl Counts {
    /// How many there were.
    pub fn replies(&self) -> u64 {
        self.replies.load(Ordering::Relaxed)
    }

    fn count(&self, name: &'static str, replies: u64) {
        *self.by_name.lock().unwrap().entry(name).or_default() += replies;
        self.replies.fetch_add(replies, Ordering::Relaxed);
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = self.by_name.lock().unwrap();
        let counts = counts.iter().map(|(name, count)| format!("{count} {name}"));
        let counts: Vec<String> = counts.collect();
        f.write_str(&counts.join(", "))
    }
}

/// What a read has brought.
pub enum Brought {
    /// What is stored there.
    Stored,
    /// What a connection sent instead after its first lie.
    Lie,
    /// Nothing that can be: why.
    Impossible(&'static str),
}

/// What a buffer has in it before it is read into, and after it was written.
pub const POISON: u8 = 0xa5;

/// The data that a write to `offset` has.
pub fn to_write(offset: u64, data: &mut [u8]) {
    pattern(WRITE_SEED, offset, data);
}

impl Mischief {
    /// `structured`: lies about chunks are told.
    pub fn new(seed: u64, counts: Arc<Counts>, structured: bool) -> Self {
        Self {
            seed,
            structured,
            counts,
            answered: Mutex::default(),
            in_flight: Mutex::default(),
            history: Mutex::default(),
            lies: Mutex::default(),
        }
    }

    /// The script of every connection: takes it over with its first request.
    pub fn serve(&self, conn: &mut Conn, first: &Request) -> io::Result<()> {
        let mut random = Rng::with_seed(self.seed ^ ((conn.index as u64) << 32));
        // Each lie about chunks ends its connection, and has everything in flight sent again.
        let least = if self.structured { 0.7 } else { 0.3 };
        let honesty = [least, 0.8, 0.95, 0.99][random.usize(..4)];
        let index = conn.index;
        let mut liar = Liar {
            conn,
            shared: self,
            random,
            honesty,
            pending: Vec::new(),
            newest: first.cookie,
            lies: None,
        };
        let end = liar.accept(first.clone()).and_then(|()| liar.live());
        self.in_flight.lock().unwrap().remove(&index);
        end
    }

    /// What a successful read from `offset` has brought into a buffer of [`POISON`].
    pub fn judge(&self, offset: u64, data: &[u8]) -> Brought {
        let mut stored = vec![0; data.len()];
        self.stored(offset, &mut stored);
        if data == stored {
            return Brought::Stored;
        }
        let has = |word: [u8; 8]| data.chunks_exact(8).any(|chunk| chunk == word);
        if has(MARK) {
            return Brought::Impossible("brought what followed an old or foreign reply");
        }
        if has([POISON; 8]) {
            return Brought::Impossible("left a part of the memory as it was");
        }
        // Lies about chunks have the right data in them, or none.
        if self.structured {
            return Brought::Impossible("brought what is not stored there");
        }
        let lies = self.lies.lock().unwrap().clone();
        if lies
            .iter()
            .any(|lies| contains(&lies.lock().unwrap(), data))
        {
            return Brought::Lie;
        }
        Brought::Impossible("brought what nobody has sent")
    }

    /// What is stored at `offset` of the area that is read. Chunks need zeroes.
    fn stored(&self, offset: u64, data: &mut [u8]) {
        const PIECE: u64 = 4096;
        pattern(READ_SEED, offset, data);
        if !self.structured {
            return;
        }
        for (index, sector) in data.chunks_mut(512).enumerate() {
            if (offset + index as u64 * 512) / PIECE % 3 == 0 {
                sector.fill(0);
            }
        }
    }

    fn remember(&self, bytes: &[u8]) {
        let mut history = self.history.lock().unwrap();
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(bytes[..bytes.len().min(16 << 10)].to_vec());
    }
}

fn contains(stream: &[u8], data: &[u8]) -> bool {
    let Some((first, _)) = data.split_first_chunk::<16>() else {
        return true;
    };
    let starts = stream.windows(16).enumerate();
    starts
        .filter(|(_, window)| window == first)
        .any(|(at, _)| stream[at..].starts_with(data))
}

/// What is done next: how likely, what it is called, how many replies that are, and how.
type Act = (u32, &'static str, fn(&mut Liar<'_>) -> io::Result<()>);

/// What a server may do, though no sane one does all of it.
const HONEST: &[Act] = &[
    (60, "right", |liar| liar.reply_rightly()),
    (10, "right, in one piece", |liar| liar.reply_to_all()),
    (6, "right, with a pause", |liar| liar.reply_with_a_pause()),
    (6, "errors", |liar| liar.reply_with_an_error()),
];

const LIES: &[Act] = &[
    (6, "wrong magic", |liar| liar.wrong_magic()),
    (3, "structured", |liar| liar.structured_reply()),
    (6, "bits flipped", |liar| liar.flip_bits()),
    (6, "bits of a header flipped", |liar| {
        liar.flip_header_bits()
    }),
    (6, "old cookie", |liar| liar.old_cookie()),
    (6, "cookie to come", |liar| liar.future_cookie()),
    (6, "cookie of another connection", |liar| {
        liar.foreign_cookie()
    }),
    (6, "any cookie", |liar| liar.any_cookie()),
    (6, "twice", |liar| liar.reply_twice()),
    (6, "replayed", |liar| liar.replay()),
    (6, "error and data", |liar| liar.error_and_data()),
    (8, "data too short", |liar| liar.short_data()),
    (4, "data too long", |liar| liar.long_data()),
    (6, "garbage", |liar| liar.garbage()),
    (2, "flood of old replies", |liar| liar.flood()),
    (4, "silence", |liar| liar.be_silent()),
    (3, "half closed", |liar| liar.half_close()),
    (3, "closed", |liar| liar.close()),
    (3, "reset", |liar| liar.reset()),
];

/// One connection.
struct Liar<'a> {
    conn: &'a mut Conn,
    shared: &'a Mischief,
    random: Rng,
    /// How likely the next thing is right.
    honesty: f64,
    /// Read, and not answered.
    pending: Vec<Request>,
    newest: u64,
    /// There from the first lie on.
    lies: Option<Lies>,
}

impl Liar<'_> {
    fn live(&mut self) -> io::Result<()> {
        loop {
            self.listen()?;
            let honest = self.random.f64() < self.honesty && !self.pending.is_empty();
            let acts = match (honest, self.shared.structured) {
                (true, false) => HONEST,
                (false, false) => LIES,
                (true, true) => chunks::HONEST,
                (false, true) => chunks::LIES,
            };
            if !honest {
                self.begin_to_lie();
            }
            let (_, name, act) = self.draw(acts);
            // Before it happens: the driver may have ended the connection by the time that it has.
            self.shared.counts.count(name, 1);
            act(self)?;
        }
    }

    fn draw(&mut self, acts: &[Act]) -> Act {
        let all: u32 = acts.iter().map(|(weight, ..)| weight).sum();
        let mut at = self.random.u32(..all);
        for act in acts {
            if at < act.0 {
                return *act;
            }
            at -= act.0;
        }
        unreachable!("the weights add up")
    }

    /// Reads some requests; waits for one unless it is in a mood to answer what nobody has asked.
    fn listen(&mut self) -> io::Result<()> {
        let enough = self.random.usize(1..=12);
        if self.pending.is_empty() && self.random.u8(..50) > 0 {
            let request = self.conn.next_request()?;
            self.accept(request)?;
        }
        while self.pending.len() < enough && self.conn.readable_within(Duration::from_millis(1))? {
            let request = self.conn.next_request()?;
            self.accept(request)?;
        }
        let cookies = self.pending.iter().map(|request| request.cookie).collect();
        let index = self.conn.index;
        self.shared.in_flight.lock().unwrap().insert(index, cookies);
        Ok(())
    }

    fn accept(&mut self, request: Request) -> io::Result<()> {
        self.newest = request.cookie;
        match request.command {
            Command::Disconnect => return self.conn.close(),
            Command::Write => return self.accept_write(request),
            _ => self.pending.push(request),
        }
        Ok(())
    }

    fn accept_write(&mut self, request: Request) -> io::Result<()> {
        let mut early = Vec::new();
        match self.random.u8(..16) {
            0 => early = ok(&request).into(),
            1 => early = proto::reply(REPLY_MAGIC, self.error(), request.cookie).into(),
            2 => thread::sleep(Duration::from_millis(self.random.u64(..10))),
            _ => {}
        }
        if !early.is_empty() {
            self.shared.counts.count("before the data was read", 1);
            self.send(&early)?;
        }
        let data = self.conn.read_data(&request)?;
        self.check_written(&request, &data);
        if early.is_empty() {
            self.pending.push(request);
        } else {
            self.done(&request);
        }
        Ok(())
    }

    /// What a driver sends is right, whatever it was told.
    fn check_written(&self, request: &Request, data: &[u8]) {
        let mut expected = vec![0; data.len()];
        if (WRITE_AT..WRITE_AT + AREA).contains(&request.offset) {
            to_write(request.offset, &mut expected);
        }
        if data != expected {
            complain(format!("the client wrote wrong data: {request:?}"));
        }
    }

    /// The request that is answered next, most often the first.
    fn take(&mut self) -> Option<Request> {
        if self.pending.is_empty() {
            return None;
        }
        let at = if self.random.u8(..4) == 0 {
            self.random.usize(..self.pending.len())
        } else {
            0
        };
        Some(self.pending.remove(at))
    }

    fn done(&self, request: &Request) {
        let mut answered = self.shared.answered.lock().unwrap();
        if answered.len() == HISTORY {
            answered.pop_front();
        }
        answered.push_back(request.cookie);
    }

    fn begin_to_lie(&mut self) {
        if self.lies.is_none() {
            let lies = Lies::default();
            self.lies = Some(Arc::clone(&lies));
            self.shared.lies.lock().unwrap().push(lies);
        }
    }

    /// Sends it in whatever pieces.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(lies) = &self.lies {
            let mut lies = lies.lock().unwrap();
            lies.extend(bytes);
            if lies.len() > LONGEST_LIE {
                return self.conn.close();
            }
        }
        if self.random.u8(..8) == 0 {
            self.shared.remember(bytes);
        }
        let mut rest = bytes;
        let (pieces, longest) = match self.random.u8(..16) {
            0 => (40, 1),
            1 => (16, 7),
            2 => (8, 4096),
            _ => (0, 1),
        };
        for _ in 0..pieces {
            let len = self.random.usize(1..=longest).min(rest.len());
            let (piece, after) = rest.split_at(len);
            self.conn.send(piece)?;
            rest = after;
        }
        self.conn.send(rest)
    }

    fn error(&mut self) -> u32 {
        match self.random.u8(..4) {
            0 => self.random.u32(1..),
            _ => ERRORS[self.random.usize(..ERRORS.len())],
        }
    }

    /// What follows a reply's header.
    fn data(&self, request: &Request) -> Vec<u8> {
        let mut data = Vec::new();
        if request.command == Command::Read {
            data.resize(request.len as usize, 0);
            self.shared.stored(request.offset, &mut data);
        }
        data
    }

    fn right(&self, request: &Request) -> Vec<u8> {
        let mut reply = ok(request).to_vec();
        reply.extend(self.data(request));
        reply
    }

    // The truth.

    fn reply_rightly(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        self.send(&self.right(&request))
    }

    fn reply_to_all(&mut self) -> io::Result<()> {
        let mut replies = Vec::new();
        let mut count = 0;
        while let Some(request) = self.take() {
            self.done(&request);
            replies.extend(self.right(&request));
            count += 1;
        }
        self.shared.counts.count("right, in one piece", count - 1);
        self.send(&replies)
    }

    fn reply_with_a_pause(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        let reply = self.right(&request);
        let (first, rest) = reply.split_at(self.random.usize(..reply.len()));
        self.send(first)?;
        thread::sleep(Duration::from_millis(self.random.u64(..10)));
        self.send(rest)
    }

    fn reply_with_an_error(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return Ok(());
        };
        self.done(&request);
        let error = self.error();
        self.send(&proto::reply(REPLY_MAGIC, error, request.cookie))
    }
}
