// SPDX-License-Identifier: GPL-2.0

//! Servers that shut down in an orderly way: they answer commands with ESHUTDOWN.

pub mod draining;
mod ended;
mod replaced;

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;

use crate::device::{assert_pattern, errno, store_pattern};
use crate::harness::Test;
use crate::netlink::Link;
use crate::proto::{self, Command, Request};
use crate::server::{Conn, Server};
use crate::sys::{Buffer, SysResult};

pub fn tests() -> Vec<Test> {
    [replaced::tests(), draining::tests(), ended::tests()]
        .into_iter()
        .flatten()
        .collect()
}

const MIB: u64 = 1 << 20;
const ESHUTDOWN: u32 = 108;

/// nbd.ko takes ESHUTDOWN for an error of the command.
const DIFFERENCE: &str = "shutting-down-is-not-an-error";

/// A script in which the first `count` connections refuse every command, and the others are honest.
fn refuse_on_first(count: usize) -> impl Fn(&mut Conn, &Request) -> io::Result<()> {
    move |conn, request| {
        if conn.index < count {
            conn.refuse(request, ESHUTDOWN)
        } else {
            conn.serve(request)
        }
    }
}

/// The commands that came over one connection.
fn commands_on(server: &Server, connection: usize) -> Vec<Command> {
    let requests = server.requests().into_iter();
    let ours = requests.filter(|request| request.connection == connection);
    ours.map(|request| request.command).collect()
}

fn wait_for_goodbye(server: &Server, connection: usize) {
    server.wait_for("a goodbye", |requests| {
        let mut ours = requests.iter().filter(|r| r.connection == connection);
        ours.any(|request| request.command == Command::Disconnect)
    });
}

/// Answers no request of connection 0 until there are `count`, and then calls `act` with them all. Other
/// connections are honest.
fn hold_back(
    server: &Server,
    count: usize,
    act: impl Fn(&mut Conn, &[Request]) -> io::Result<()> + Send + Sync + 'static,
) {
    let kept = Mutex::new(Vec::new());
    server.script(move |conn, request| {
        if conn.index > 0 {
            return conn.serve(request);
        }
        if request.command == Command::Write {
            conn.read_data(request)?;
        }
        let mut requests = kept.lock().unwrap();
        requests.push(request.clone());
        let all = requests.clone();
        drop(requests);
        if all.len() == count {
            act(conn, &all)
        } else {
            Ok(())
        }
    });
}

/// Starts `readers` threads, each of which reads 32 KiB, and calls `meanwhile`. Returns the results of the
/// reads. There are gaps between them, so that the block layer does not merge them.
fn while_reading(link: &Link, readers: u64, meanwhile: impl FnOnce()) -> Vec<SysResult<()>> {
    const LEN: usize = 32 << 10;
    for reader in 0..readers {
        let offset = reader * 2 * LEN as u64;
        store_pattern(&link.server, 1, offset, LEN);
    }
    let direct = link.direct();
    let read = |offset| {
        let mut back = Buffer::new(LEN);
        errno(direct.read_exact_at(&mut back, offset))?;
        assert_pattern(1, offset, &back);
        Ok(())
    };
    thread::scope(|scope| {
        let read = &read;
        let threads: Vec<_> = (0..readers)
            .map(|reader| scope.spawn(move || read(reader * 2 * LEN as u64)))
            .collect();
        meanwhile();
        let results = threads.into_iter().map(|thread| thread.join().unwrap());
        results.collect()
    })
}

fn failures(results: &[SysResult<()>]) -> usize {
    let failed = results.iter().filter(|result| result.is_err());
    failed.count()
}

fn refusal(request: &Request) -> [u8; proto::REPLY_LEN] {
    proto::reply(proto::REPLY_MAGIC, ESHUTDOWN, request.cookie)
}

/// Refuses the first of three commands, and never answers the other two. With nbd.ko those hang until
/// something else ends them.
fn refuse_one_of_three(server: &Server) {
    hold_back(server, 3, |conn, requests| {
        conn.send(&refusal(&requests[0]))
    });
}

fn wait_for_three_requests(server: &Server) {
    server.wait_for("three requests", |requests| requests.len() >= 3);
}
