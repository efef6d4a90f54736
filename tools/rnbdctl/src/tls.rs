// SPDX-License-Identifier: GPL-2.0

//! TLS: the handshake in this process, the keys to the kernel.
//!
//! - `options` has what the command line and the URI say of TLS
//! - `client` reads certificates and keys, and says which ciphers are offered; `client_error` is what is wrong there
//! - `session` is the connection while this process encrypts: during the handshakes of TLS and of NBD
//! - `kernel` hands the keys to the kernel, which encrypts from then on
//! - `problem` says what went wrong
//!
//! The handshake of NBD is done here, too, and not over the kernel's TLS: what a server sends behind the
//! handshake of TLS, such as session tickets, then is read by the library that understands it, before the
//! keys and the numbers of the next records are handed over. Records are read one at a time, so that nothing
//! that belongs to the kernel is read here.

mod client;
mod client_error;
mod kernel;
mod options;
mod problem;
mod session;
#[cfg(test)]
mod tests;

pub use client::Client;
pub use options::{TlsArgs, UriTls};
pub use problem::Problem;
pub use session::Session;
