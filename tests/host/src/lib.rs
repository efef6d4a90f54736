// SPDX-License-Identifier: GPL-2.0
//! The tests of rnbd that need no kernel: they compile the module's own pure source files.
//!
//! - `wire`: what goes over the wire, against bytes written by hand from the protocol's text
//! - `ring`: the queue, against one that is known to work
//! - `stream`: what a server sends, in whatever pieces: what `make fuzz` has found, once more
//! - `ownership`: who ends a command, in all interleavings that the memory model allows ([loom])
//! - `session`: the same for a command that is handed to connections which die meanwhile
//! - `receiving`: the lock that nobody waits for, between a socket's callback and a work item
//! - `mutants`: that `ownership` and `session` would notice if `rnbd_cmd.rs` were wrong
//!
//! `cargo test` runs all of it.
#![cfg(test)]

// What the module calls `kernel::` is the shim's here.
extern crate self as kernel;
mod memory;
mod shim;
use shim::{alloc, prelude, sync};

// The module's files, which are formatted and linted with the module.
#[allow(clippy::all)]
#[rustfmt::skip]
#[path = "../../../atomic.rs"]
mod atomic;
#[allow(clippy::all)]
#[rustfmt::skip]
#[path = "../../../rnbd_cmd.rs"]
mod rnbd_cmd;
#[allow(clippy::all)]
#[rustfmt::skip]
#[path = "../../../rnbd_proto.rs"]
mod rnbd_proto;
#[allow(clippy::all)]
#[rustfmt::skip]
#[path = "../../../rnbd_ring.rs"]
mod rnbd_ring;
#[allow(clippy::all)]
#[rustfmt::skip]
#[path = "../../../kapi/try_lock.rs"]
mod try_lock;

mod blk_mq;
mod mutants;
mod ownership;
mod receiving;
mod ring;
mod session;
mod stream;
mod wire;
