// SPDX-License-Identifier: GPL-2.0
//! Maps block layer operations and statuses to those of NBD, and back.

#![forbid(unsafe_code)]

use crate::{
    kapi::block::request::{
        Extent,
        Op,
        Status, //
    },
    pure::{
        chunk::Text,
        cmd::Cookie,
        proto::{
            self as proto,
            Command,
            ServerError, //
        },
    },
};

/// Returns the header of the NBD request for a block layer request (`nbd_send_cmd()`), or `None` if
/// NBD has no such command.
pub(crate) fn wire_of(extent: &Extent, cookie: Cookie) -> Option<proto::RequestHeader> {
    let command = command_of(extent.op)?;
    let mut flags = 0;
    if extent.fua {
        flags |= proto::CMD_FLAG_FUA;
    }
    if extent.nounmap && command == Command::WriteZeroes {
        flags |= proto::CMD_FLAG_NO_HOLE;
    }
    Some(proto::RequestHeader {
        command,
        flags,
        cookie: cookie.0,
        offset_bytes: extent.offset_bytes,
        len_bytes: extent.len_bytes,
    })
}

/// Returns the NBD command for an operation (`req_to_nbd_cmd_type()`).
pub(crate) fn command_of(op: Op) -> Option<Command> {
    Some(match op {
        Op::Read => Command::Read,
        Op::Write => Command::Write,
        Op::Flush => Command::Flush,
        Op::Discard => Command::Trim,
        Op::WriteZeroes => Command::WriteZeroes,
        Op::Other => return None,
    })
}

/// Formats a request for the log.
pub(crate) struct RequestDescription<'a>(pub(crate) &'a Extent);

impl kernel::fmt::Display for RequestDescription<'_> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        let Extent {
            op,
            offset_bytes,
            len_bytes,
            ..
        } = *self.0;
        let name = command_of(op).map_or("request", Command::name);
        if op == Op::Flush {
            return f.write_str(name);
        }
        write!(f, "{name} of {len_bytes} bytes at {offset_bytes}")
    }
}

/// Formats what a server has told of an error for the log.
///
/// Only printable characters of ASCII stay as they are, except for quotation marks and backslashes, so that this is one
/// line, and its end can be found.
pub(crate) struct ServersWords<'a> {
    /// The offset in the export where the error is.
    pub(crate) at: Option<u64>,
    pub(crate) text: &'a Text,
}

impl kernel::fmt::Display for ServersWords<'_> {
    fn fmt(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        if let Some(at) = self.at {
            write!(f, ", at byte {at}")?;
        }
        let text = self.text.as_bytes();
        if text.is_empty() {
            return Ok(());
        }
        write!(f, ": \"")?;
        for &byte in text {
            match byte {
                b'\'' => write!(f, "'")?,
                byte => write!(f, "{}", core::ascii::escape_default(byte))?,
            }
        }
        write!(f, "\"{}", if self.text.is_cut() { "..." } else { "" })
    }
}

/// Returns the block layer status for a server's error.
pub(crate) fn status_of(error: ServerError, op: Op) -> Status {
    let optional = matches!(op, Op::Discard | Op::WriteZeroes);
    match error {
        ServerError::NoSpace => Status::NOSPC,
        ServerError::NotPermitted => Status::TARGET,
        // A server reports a command that it does not know as invalid. The block layer can do
        // without these two operations.
        ServerError::NotSupported | ServerError::Invalid if optional => Status::NOTSUPP,
        _ => Status::IOERR,
    }
}
