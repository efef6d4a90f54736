// SPDX-License-Identifier: GPL-2.0

//! One connection of a server.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sockopt};

use super::State;
use super::sockets::send_empty_record;
use crate::proto::{self, Command, REQUEST_LEN, REQUEST_MAGIC, Request};
use crate::sys::send_tls_record;

/// One connection, in the hands of a script.
pub struct Conn {
    state: Arc<State>,
    socket: UnixStream,
    pub index: usize,
    /// Replies that [`Conn::defer`] keeps back.
    deferred: Vec<Vec<u8>>,
}

impl Conn {
    pub(super) fn new(state: Arc<State>, socket: UnixStream, index: usize) -> Self {
        Self {
            state,
            socket,
            index,
            deferred: Vec::new(),
        }
    }

    /// Lives until either side ends it.
    pub(super) fn live(mut self) {
        // However it ends, the client is to see the end.
        let _ = self.run();
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            if !self.deferred.is_empty() && !self.readable_within(Duration::from_millis(30))? {
                self.send_deferred()?;
            }
            let request = self.next_request()?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let script = Arc::clone(&self.state.script.read().unwrap());
            script(self, &request)?;
        }
    }

    pub fn next_request(&mut self) -> io::Result<Request> {
        let mut header = [0; REQUEST_LEN];
        self.read_exact(&mut header)?;
        let request = Request::parse(self.index, &header);
        // Part of what every test asserts: nothing but whole requests is ever sent.
        if request.magic != REQUEST_MAGIC {
            crate::harness::complain(format!("the client sent garbage: {header:02x?}"));
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.state.requests.lock().unwrap().push(request.clone());
        self.state.arrival.notify_all();
        Ok(request)
    }

    /// Does what is asked and says so.
    pub fn serve(&mut self, request: &Request) -> io::Result<()> {
        let reply = self.answer(request)?;
        self.send(&reply)
    }

    /// Does what is asked; the whole reply is the caller's to send.
    pub fn answer(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        let mut reply = ok(request).to_vec();
        match request.command {
            Command::Read => reply.extend(self.stored(request)),
            Command::Write => {
                let data = self.read_data(request)?;
                self.state
                    .store
                    .lock()
                    .unwrap()
                    .write(request.offset, &data);
            }
            Command::Trim | Command::WriteZeroes => {
                self.state
                    .store
                    .lock()
                    .unwrap()
                    .zero(request.offset, request.len.into());
            }
            Command::Flush => {}
            Command::Disconnect | Command::Unknown(_) => {
                crate::harness::complain(format!("the client sent {request:?}"));
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(reply)
    }

    /// Refuses, with an error number; a write's data is read and dropped.
    pub fn refuse(&mut self, request: &Request, error: u32) -> io::Result<()> {
        if request.command == Command::Write {
            self.read_data(request)?;
        }
        self.send(&proto::reply(proto::REPLY_MAGIC, error, request.cookie))
    }

    /// The data of a write.
    pub fn read_data(&mut self, request: &Request) -> io::Result<Vec<u8>> {
        self.read_bytes(request.len as usize)
    }

    /// Reads `len` bytes of whatever comes.
    pub fn read_bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.read_exact(&mut data)?;
        Ok(data)
    }

    fn read_exact(&mut self, mut room: &mut [u8]) -> io::Result<()> {
        while !room.is_empty() {
            match self.socket.read(room) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    self.state.received.fetch_add(read, Ordering::Relaxed);
                    room = &mut room[read..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What a read is to be answered with.
    pub fn stored(&self, request: &Request) -> Vec<u8> {
        let mut data = vec![0; request.len as usize];
        self.state
            .store
            .lock()
            .unwrap()
            .read(request.offset, &mut data);
        data
    }

    /// Stores the data of a write.
    pub fn store(&self, request: &Request, data: &[u8]) {
        self.state.store.lock().unwrap().write(request.offset, data);
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends bytes that are no data, in TLS records of this type.
    pub fn send_record(&mut self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let sent = send_tls_record(&self.socket, kind, bytes)?;
        assert_eq!(sent, bytes.len());
        Ok(())
    }

    /// Sends an empty record of data; see [`send_empty_record`].
    pub fn send_empty_record(&mut self) -> io::Result<()> {
        send_empty_record(&self.socket)
    }

    /// Sends a byte that is not part of the stream.
    pub fn send_urgent(&mut self, byte: u8) -> io::Result<()> {
        rustix::net::send(&self.socket, &[byte], SendFlags::OOB)?;
        Ok(())
    }

    /// Sends, and a descriptor with it. The socket must be a UNIX one.
    pub fn send_with_descriptor(&mut self, bytes: &[u8], descriptor: impl AsFd) -> io::Result<()> {
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let slices = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.socket, &slices, &mut ancillary, SendFlags::empty())?;
        self.send(&bytes[sent..])
    }

    /// Does what is asked, but keeps the reply until no request has come for a while.
    pub fn defer(&mut self, request: &Request) -> io::Result<()> {
        let reply = self.answer(request)?;
        self.deferred.push(reply);
        Ok(())
    }

    pub fn deferred(&self) -> usize {
        self.deferred.len()
    }

    /// Sends what was kept, the last first, in one piece.
    pub fn send_deferred(&mut self) -> io::Result<()> {
        let replies: Vec<u8> = self.deferred.drain(..).rev().flatten().collect();
        self.send(&replies)
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Does nothing more until the connection is ended, by whomever.
    pub fn stall(&mut self) -> io::Result<()> {
        self.wait(PollFlags::RDHUP, None)?;
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Whether the other side, or somebody from outside, has ended it.
    pub fn is_ended(&self) -> bool {
        self.wait(PollFlags::RDHUP, Some(Duration::ZERO))
            .unwrap_or(true)
    }

    /// Tells the other side that nothing is read any more, and goes on sending.
    pub fn stop_reading(&self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Read)
    }

    /// Ends the connection here.
    pub fn close(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Ends the connection as a crashed machine does: TCP sends a reset.
    pub fn reset(&mut self) -> io::Result<()> {
        sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO))?;
        self.close()
    }

    /// Sends nothing more, but goes on to read.
    pub fn half_close(&mut self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write)
    }

    pub fn readable_within(&self, timeout: Duration) -> io::Result<bool> {
        self.wait(PollFlags::IN, Some(timeout))
    }

    fn wait(&self, events: PollFlags, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).expect("a timeout"));
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), events)];
        Ok(poll(&mut fds, timeout.as_ref())? > 0)
    }
}

/// The header of a reply that says yes.
pub fn ok(request: &Request) -> [u8; proto::REPLY_LEN] {
    proto::reply(proto::REPLY_MAGIC, 0, request.cookie)
}
