// SPDX-License-Identifier: GPL-2.0

//! What no server may send, most of it simple replies. Each lie may be told before there was a request.

use std::io;

use super::{Liar, Lies, MARK, OTHER_MAGICS, READ_AT};
use crate::proto::{self, Command, REPLY_LEN, REPLY_MAGIC, REQUEST_MAGIC, Request};
use crate::server::ok;

impl Liar<'_> {
    /// The next request, or one that was never sent.
    pub(super) fn any_request(&mut self) -> Request {
        self.take().unwrap_or_else(|| self.no_request())
    }

    /// A read that was never sent.
    pub(super) fn no_request(&self) -> Request {
        Request {
            connection: self.conn.index,
            magic: REQUEST_MAGIC,
            flags: 0,
            command: Command::Read,
            cookie: self.newest.wrapping_add(1 << 32),
            offset: READ_AT,
            len: 4096,
        }
    }

    /// A reply that names `cookie`, with data after it. `never`: no request has this cookie here and now,
    /// and the driver has to know.
    pub(super) fn with_cookie(&mut self, cookie: u64, never: bool) -> io::Result<()> {
        let mut reply = proto::reply(REPLY_MAGIC, 0, cookie).to_vec();
        reply.extend(self.data_for_nobody(never));
        self.send(&reply)
    }

    /// Data that would show if it were believed, where `never` is so and nothing was said before that
    /// makes a driver take it for the rest of something else.
    pub(super) fn data_for_nobody(&mut self, never: bool) -> Vec<u8> {
        let first = |lies: &Lies| lies.lock().unwrap().is_empty();
        let len = self.random.usize(..1024);
        if never && self.lies.as_ref().is_some_and(first) {
            MARK.repeat(len)
        } else {
            (0..len * 8).map(|_| self.random.u8(..)).collect()
        }
    }

    pub(super) fn wrong_magic(&mut self) -> io::Result<()> {
        let request = self.any_request();
        let magic = match self.random.u8(..3) {
            0 => self.random.u32(..),
            1 => REPLY_MAGIC ^ (1 << self.random.u32(..32)),
            _ => OTHER_MAGICS[self.random.usize(..OTHER_MAGICS.len())],
        };
        let mut reply = proto::reply(magic, 0, request.cookie).to_vec();
        reply.extend(self.data(&request));
        self.send(&reply)
    }

    /// As the protocol has it for who has agreed to it.
    pub(super) fn structured_reply(&mut self) -> io::Result<()> {
        let request = self.any_request();
        let data = self.data(&request);
        let mut reply = 0x668e_33ef_u32.to_be_bytes().to_vec();
        reply.extend([0, 1, 0, 1]); // NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_OFFSET_DATA
        reply.extend(request.cookie.to_be_bytes());
        reply.extend((data.len() as u32 + 8).to_be_bytes());
        reply.extend(request.offset.to_be_bytes());
        reply.extend(data);
        self.send(&reply)
    }

    pub(super) fn flip(&mut self, within: Option<usize>) -> io::Result<()> {
        let request = self.any_request();
        let mut reply = self.right(&request);
        for _ in 0..self.random.u8(1..=4) {
            let at = self.random.usize(..within.unwrap_or(reply.len()));
            reply[at] ^= 1 << self.random.u8(..8);
        }
        self.send(&reply)
    }

    pub(super) fn flip_bits(&mut self) -> io::Result<()> {
        self.flip(None)
    }

    pub(super) fn flip_header_bits(&mut self) -> io::Result<()> {
        self.flip(Some(REPLY_LEN))
    }

    pub(super) fn old_cookie(&mut self) -> io::Result<()> {
        let old = self
            .random
            .choice(&*self.shared.answered.lock().unwrap())
            .copied();
        self.with_cookie(old.unwrap_or(u64::MAX), true)
    }

    /// Perhaps somebody has been given it meanwhile: then the reply is a right one.
    pub(super) fn future_cookie(&mut self) -> io::Result<()> {
        let request = self.any_request();
        let cookie = request.cookie.wrapping_add(self.random.u64(1..4) << 32);
        self.with_cookie(cookie, false)
    }

    pub(super) fn foreign_cookie(&mut self) -> io::Result<()> {
        let in_flight = self.shared.in_flight.lock().unwrap();
        let others = in_flight
            .iter()
            .filter(|(index, _)| **index != self.conn.index);
        let cookies: Vec<u64> = others.flat_map(|(_, cookies)| cookies).copied().collect();
        drop(in_flight);
        let foreign = self.random.choice(cookies);
        self.with_cookie(foreign.unwrap_or(u64::MAX), true)
    }

    pub(super) fn any_cookie(&mut self) -> io::Result<()> {
        let cookie = match self.random.u8(..4) {
            0 => self.random.u64(..),
            1 => self.random.u64(..256),
            2 => 0xffff << self.random.u32(..64),
            _ => self.newest ^ (1 << self.random.u32(..64)),
        };
        self.with_cookie(cookie, false)
    }

    pub(super) fn reply_twice(&mut self) -> io::Result<()> {
        let Some(request) = self.take() else {
            return self.garbage();
        };
        let mut replies = self.right(&request);
        replies.extend(ok(&request));
        replies.extend(self.data_for_nobody(true));
        self.send(&replies)
    }

    pub(super) fn replay(&mut self) -> io::Result<()> {
        let old = self
            .random
            .choice(&*self.shared.history.lock().unwrap())
            .cloned();
        self.send(&old.unwrap_or_default())
    }

    pub(super) fn error_and_data(&mut self) -> io::Result<()> {
        let request = self.any_request();
        let mut reply = proto::reply(REPLY_MAGIC, self.error(), request.cookie).to_vec();
        reply.extend(self.data(&request));
        self.send(&reply)
    }

    /// And then it goes away, says nothing more, or goes on as if nothing had been.
    pub(super) fn short_data(&mut self) -> io::Result<()> {
        let request = self.any_request();
        let mut reply = self.right(&request);
        reply.truncate(self.random.usize(..reply.len()));
        self.send(&reply)?;
        match self.random.u8(..8) {
            0 | 1 => self.close(),
            2 | 3 => self.reset(),
            4 => self.half_close(),
            5 => self.be_silent(),
            _ => Ok(()),
        }
    }

    pub(super) fn long_data(&mut self) -> io::Result<()> {
        let request = self.any_request();
        let mut reply = self.right(&request);
        let more = 1 << self.random.u32(..15);
        reply.extend((0..more).map(|_| self.random.u8(..)));
        self.send(&reply)
    }

    pub(super) fn garbage(&mut self) -> io::Result<()> {
        let longest = 1 << self.random.u32(..17);
        let len = self.random.usize(1..=longest);
        let garbage: Vec<u8> = (0..len).map(|_| self.random.u8(..)).collect();
        self.send(&garbage)
    }

    /// Thousands of replies at once.
    pub(super) fn flood(&mut self) -> io::Result<()> {
        let old = self.shared.answered.lock().unwrap().clone();
        let headers = (0..self.random.u32(1000..4000)).flat_map(|_| {
            let cookie = self.random.choice(&old).copied();
            proto::reply(REPLY_MAGIC, 0, cookie.unwrap_or(0))
        });
        let flood: Vec<u8> = headers.collect();
        self.send(&flood)
    }

    pub(super) fn be_silent(&mut self) -> io::Result<()> {
        if self.random.bool() {
            return self.conn.stall();
        }
        loop {
            let request = self.conn.next_request()?;
            if request.command == Command::Write {
                self.conn.read_data(&request)?;
            }
        }
    }

    pub(super) fn half_close(&mut self) -> io::Result<()> {
        self.conn.half_close()?;
        self.be_silent()
    }

    pub(super) fn close(&mut self) -> io::Result<()> {
        self.conn.close()
    }

    pub(super) fn reset(&mut self) -> io::Result<()> {
        self.conn.reset()
    }
}
