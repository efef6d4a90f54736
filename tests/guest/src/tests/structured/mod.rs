// SPDX-License-Identifier: GPL-2.0

//! Structured replies: reads that are answered by chunks of data, by holes and by errors with words.

mod contents;
mod endings;
mod errors;
mod flood;
mod programs;
mod switch;
mod violations;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::{Plan, USUAL_FLAGS, pattern};
use crate::harness::Test;
use crate::netlink::Setup;
use crate::proto::{CAN_MULTI_CONN, Command, Request, SEND_DF};
use crate::server::{Conn, Server};

pub fn tests() -> Vec<Test> {
    [
        switch::tests(),
        contents::tests(),
        errors::tests(),
        violations::tests(),
        endings::tests(),
        programs::tests(),
        flood::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SIZE: u64 = 8 << 20;

/// What a server says of its export that has agreed on structured replies.
const FLAGS: u64 = USUAL_FLAGS | SEND_DF;

/// Device 0, connected by ioctls.
fn plan() -> Plan {
    Plan::new(SIZE).flags(FLAGS)
}

/// Device 0, connected by netlink.
fn setup() -> Setup {
    Setup::new(SIZE).index(0).flags(FLAGS | CAN_MULTI_CONN)
}

/// Stores data that has zeroes in every third piece of 12 KiB.
fn store_with_zeroes(server: &Server) {
    const PIECE: usize = 12 << 10;
    let mut data = vec![0; SIZE as usize];
    pattern(0x57, 0, &mut data);
    for piece in data.chunks_mut(PIECE).step_by(3) {
        piece.fill(0);
    }
    server.poke(0, &data);
}

/// A script by which the first read is answered as `first` says, whatever connection it comes by, and all
/// else is served.
fn once(
    first: impl Fn(&mut Conn, &Request) -> io::Result<()> + Send + Sync,
) -> impl Fn(&mut Conn, &Request) -> io::Result<()> + Send + Sync {
    let is_over = AtomicBool::new(false);
    move |conn, request| {
        let is_first = request.command == Command::Read && !is_over.swap(true, Ordering::SeqCst);
        match is_first {
            true => first(conn, request),
            false => conn.serve(request),
        }
    }
}
