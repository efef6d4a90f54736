// SPDX-License-Identifier: GPL-2.0

//! A server whose disk has a volatile cache, and that can crash: what was neither flushed nor
//! written with FUA is then kept, lost or torn, at random.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use fastrand::Rng;

use crate::proto::{CMD_FLAG_FUA, Command, Request};
use crate::server::{Conn, Server, Transport, ok};

/// How a server keeps its promises. All but the first are bugs of a server, which the tests of the
/// tests put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Honesty {
    Honest,
    /// A flush does nothing; FUA is heeded.
    NoFlush,
    /// Neither a flush nor FUA does anything.
    Careless,
    /// A flush is for what the same connection wrote, as if the server could not do several.
    FlushOfOneConnection,
    /// Now and then a write goes to a sector where it does not belong.
    Misplaced,
}

/// A write, or zeroes, that a crash may undo.
struct Entry {
    connection: usize,
    offset: usize,
    len: usize,
    /// None: zeroes.
    data: Option<Vec<u8>>,
    /// It is on the disk already, in its place in the order of writes.
    forced: bool,
}

impl Entry {
    /// Puts `from..to` of it, in bytes of its own, onto `image`.
    fn apply(&self, image: &mut [u8], from: usize, to: usize) {
        let target = &mut image[self.offset + from..self.offset + to];
        match &self.data {
            Some(data) => target.copy_from_slice(&data[from..to]),
            None => target.fill(0),
        }
    }
}

struct Contents {
    /// What a read is answered with.
    cached: Vec<u8>,
    /// What was there at the last flush.
    stable: Vec<u8>,
    /// What was written since, in order.
    log: Vec<Entry>,
    log_bytes: usize,
    /// Connections of which nothing more is to take effect, though their threads may run on.
    fenced: BTreeSet<usize>,
    /// Nobody is answered.
    stuck: bool,
}

/// More than this is not kept in the cache.
const CACHE_BYTES: usize = 64 << 20;

impl Contents {
    fn push(&mut self, entry: Entry) {
        entry.apply(&mut self.cached, 0, entry.len);
        self.log_bytes += entry.data.as_ref().map_or(0, Vec::len);
        self.log.push(entry);
        if self.log_bytes > CACHE_BYTES {
            self.commit(|_| true);
        }
    }

    /// Brings the entries that `belongs` is for onto the disk.
    fn commit(&mut self, belongs: impl Fn(&Entry) -> bool) {
        if self.log.iter().all(&belongs) {
            for entry in self.log.drain(..) {
                entry.apply(&mut self.stable, 0, entry.len);
            }
            self.log_bytes = 0;
        } else {
            for entry in &mut self.log {
                entry.forced |= belongs(entry);
            }
        }
    }

    /// Loses the cache. What was torn is whole in pieces of `granule` bytes.
    fn crash(&mut self, random: &mut Rng, granule: usize) {
        let log = std::mem::take(&mut self.log);
        self.log_bytes = 0;
        for entry in &log {
            match random.u32(..3) {
                _ if entry.forced => entry.apply(&mut self.stable, 0, entry.len),
                0 => entry.apply(&mut self.stable, 0, entry.len),
                1 => {}
                _ => self.tear(entry, random, granule),
            }
        }
        for entry in &log {
            let range = entry.offset..entry.offset + entry.len;
            self.cached[range.clone()].copy_from_slice(&self.stable[range]);
        }
    }

    fn tear(&mut self, entry: &Entry, random: &mut Rng, granule: usize) {
        let mut from = 0;
        while from < entry.len {
            let to = ((entry.offset + from) / granule + 1) * granule - entry.offset;
            let to = to.min(entry.len);
            if random.bool() {
                entry.apply(&mut self.stable, from, to);
            }
            from = to;
        }
    }
}

/// The disk, which outlives its servers.
pub struct Disk {
    pub size: u64,
    honesty: Honesty,
    contents: Mutex<Contents>,
    unstuck: Condvar,
    /// Counts crashes.
    incarnation: AtomicU64,
}

impl Disk {
    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::SeqCst)
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap()
    }

    fn serve(&self, incarnation: u64, conn: &mut Conn, request: &Request) -> io::Result<()> {
        let data = match request.command {
            Command::Write => Some(conn.read_data(request)?),
            _ => None,
        };
        let mut contents = self.contents();
        while contents.stuck {
            contents = self.unstuck.wait(contents).unwrap();
        }
        // The server that this thread belonged to may be no more.
        if self.incarnation() != incarnation || contents.fenced.contains(&conn.index) {
            return conn.close();
        }
        let reply = self.carry_out(&mut contents, conn.index, request, data)?;
        drop(contents);
        conn.send(&reply)
    }

    fn carry_out(
        &self,
        contents: &mut Contents,
        connection: usize,
        request: &Request,
        data: Option<Vec<u8>>,
    ) -> io::Result<Vec<u8>> {
        let mut reply = ok(request).to_vec();
        let (offset, len) = (request.offset as usize, request.len as usize);
        let in_range = request.offset + u64::from(request.len) <= self.size;
        match request.command {
            Command::Read if in_range => reply.extend(&contents.cached[offset..offset + len]),
            Command::Write | Command::Trim | Command::WriteZeroes if in_range => {
                let fua = request.flags & CMD_FLAG_FUA != 0;
                contents.push(Entry {
                    connection,
                    offset: self.place(offset, len),
                    len,
                    data,
                    forced: fua && self.honesty != Honesty::Careless,
                });
            }
            Command::Flush => match self.honesty {
                Honesty::NoFlush | Honesty::Careless => {}
                Honesty::FlushOfOneConnection => {
                    contents.commit(|entry| entry.connection == connection);
                }
                _ => contents.commit(|_| true),
            },
            _ => {
                crate::harness::complain(format!("the client sent {request:?}"));
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(reply)
    }

    fn place(&self, offset: usize, len: usize) -> usize {
        let wrong = self.honesty == Honesty::Misplaced && (offset / 512) % 50 == 7;
        if wrong && offset + len + 512 <= self.size as usize {
            offset + 512
        } else {
            offset
        }
    }
}

/// A disk and the server in front of it.
pub struct Host {
    pub disk: Arc<Disk>,
    server: Server,
    connections: AtomicUsize,
}

impl Host {
    pub fn new(size: u64, honesty: Honesty) -> Self {
        let contents = Contents {
            cached: vec![0; size as usize],
            stable: vec![0; size as usize],
            log: Vec::new(),
            log_bytes: 0,
            fenced: BTreeSet::new(),
            stuck: false,
        };
        let disk = Arc::new(Disk {
            size,
            honesty,
            contents: Mutex::new(contents),
            unstuck: Condvar::new(),
            incarnation: AtomicU64::new(0),
        });
        Self {
            server: start(&disk),
            disk,
            connections: AtomicUsize::new(0),
        }
    }

    /// A new connection; the answer is the client's end.
    pub fn connect(&self, transport: Transport) -> OwnedFd {
        self.connections.fetch_add(1, Ordering::SeqCst);
        self.server.connect(transport)
    }

    /// Serves a socket that somebody else has made.
    pub fn serve_socket(&self, socket: UnixStream) {
        self.connections.fetch_add(1, Ordering::SeqCst);
        self.server.serve_socket(socket);
    }

    /// Connections that neither side has ended.
    pub fn living(&self) -> usize {
        self.server.living()
    }

    /// Lets a server that has run for long forget what it has been asked.
    pub fn forget_requests(&self) {
        self.server.forget_requests();
    }

    /// Ends every connection; the server lives on and has lost nothing.
    pub fn reset(&self) {
        let made = self.connections.load(Ordering::SeqCst);
        self.disk.contents().fenced.extend(0..made);
        self.server.abort();
    }

    /// Ends one of the connections; the others go on.
    pub fn cut(&self, connection: usize) {
        self.disk.contents().fenced.insert(connection);
        self.server.kill_connection(connection);
    }

    /// Connections so far, for [`Self::cut`].
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Lets nobody be answered, or all be answered again.
    pub fn stick(&self, stuck: bool) {
        self.disk.contents().stuck = stuck;
        self.disk.unstuck.notify_all();
    }

    /// The machine is gone, with what it had not brought onto the disk. Another server is there at
    /// once.
    pub fn crash(&mut self, random: &mut Rng, granule: usize) {
        let mut contents = self.disk.contents();
        self.disk.incarnation.fetch_add(1, Ordering::SeqCst);
        contents.crash(random, granule);
        contents.fenced.clear();
        contents.stuck = false;
        drop(contents);
        self.disk.unstuck.notify_all();
        self.server.abort();
        self.server = start(&self.disk);
        self.connections.store(0, Ordering::SeqCst);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stick(false);
    }
}

fn start(disk: &Arc<Disk>) -> Server {
    let (server, disk) = (Server::new(), Arc::clone(disk));
    let incarnation = disk.incarnation();
    server.script(move |conn, request| disk.serve(incarnation, conn, request));
    server
}
