// SPDX-License-Identifier: GPL-2.0
//! What needs no kernel but for atomics and memory: the protocol, and what several tasks agree on by a
//! single word.
//!
//! The tests compile these very files on the host, where a model checker and a fuzzer can reach them.

#![forbid(unsafe_code)]

pub(crate) mod atomic;
pub(crate) mod cmd;
pub(crate) mod fate;
pub(crate) mod proto;
pub(crate) mod ring;
