// SPDX-License-Identifier: GPL-2.0
//! Files that do not depend on the kernel, except for atomics and memory: the protocol, and state
//! that is shared through a single atomic word.
//!
//! The tests compile these files as they are on the host, where a model checker and a fuzzer can be
//! used.

#![forbid(unsafe_code)]

pub(crate) mod atomic;
pub(crate) mod chunk;
pub(crate) mod cmd;
pub(crate) mod coverage;
pub(crate) mod fate;
pub(crate) mod proto;
pub(crate) mod ring;
pub(crate) mod time;
pub(crate) mod tls;
