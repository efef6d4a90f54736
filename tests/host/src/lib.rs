// SPDX-License-Identifier: GPL-2.0
//! The tests of rnbd that need no kernel: they compile the module's own pure source files.
//!
//! - `wire`: what goes over the wire, against bytes written by hand from the protocol's text
//! - `chunk`: chunks of structured replies, against bytes written by hand
//! - `coverage`: what of a read was answered by chunks, and how that is kept
//! - `tls`: what a server sends over TLS that is no data
//! - `ring`: the queue, against one that is known to work
//! - `ownership`: who ends a command, in all interleavings that the memory model allows ([loom])
//! - `fate`: whether a session goes on, by itself
//! - `list`: the list of what waits to be sent, while it is filled, emptied and closed
//! - `sending`: who sends what waits, and when there is room
//! - `session`: a command that is handed to connections which die meanwhile and come back, and the
//!   session's fate
//! - `receiving`: the lock that nobody waits for, between a socket's callback and a work item
//! - `mutants`: that the models would notice if `pure/cmd.rs`, `pure/fate.rs` or `kapi/llist.rs` were
//!   wrong
//!
//! `cargo test` runs all of it.
#![cfg(test)]

// What the module calls `kernel::` is the shim's here.
extern crate self as kernel;
mod memory;
mod shim;
use shim::{alloc, prelude, sync};

// The module's files, which are formatted and linted with the module.
#[allow(clippy::all, dead_code)]
#[rustfmt::skip]
#[path = "../../../pure/mod.rs"]
mod pure;
#[allow(clippy::all)]
#[rustfmt::skip]
#[path = "../../../kapi/llist.rs"]
mod llist;
#[allow(clippy::all)]
#[rustfmt::skip]
#[path = "../../../kapi/try_lock.rs"]
mod try_lock;

mod blk_mq;
mod chunk;
mod connection;
mod coverage;
mod fate;
mod list;
mod mutants;
mod ownership;
mod parts;
mod queueing;
mod receiving;
mod ring;
mod sending;
mod session;
mod socket;
mod time;
mod tls;
mod waits;
mod wire;
