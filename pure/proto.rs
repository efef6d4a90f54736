// SPDX-License-Identifier: GPL-2.0
//! The wire format of the NBD protocol's transmission phase: requests, replies, flags and error
//! numbers.
//!
//! This file depends neither on the kernel nor on memory or state of its own. The host tests
//! compile it as it is.
//!
//! Source: the NBD protocol text (`doc/proto.md` of the NBD project).
//!
//! C header: [`include/uapi/linux/nbd.h`](srctree/include/uapi/linux/nbd.h)

#![forbid(unsafe_code)]

/// The size of a request on the wire (`struct nbd_request`).
pub(crate) const REQUEST_BYTES: usize = 28;
/// Where the cookie is in a request.
pub(crate) const COOKIE_AT: usize = 8;
/// The size of a simple reply's header on the wire (`struct nbd_reply`).
pub(crate) const REPLY_BYTES: usize = 16;

/// The first word of each request (`NBD_REQUEST_MAGIC`).
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The first word of each simple reply (`NBD_REPLY_MAGIC`).
pub(crate) const REPLY_MAGIC: u32 = 0x6744_6698;

/// Command flag: the server replies only when the data is on stable storage (`NBD_CMD_FLAG_FUA`).
pub(crate) const CMD_FLAG_FUA: u16 = 1;
/// Command flag of [`Command::WriteZeroes`]: the server must not punch a hole
/// (`NBD_CMD_FLAG_NO_HOLE`).
pub(crate) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// The transmission flags of a server, as passed by `NBD_SET_FLAGS` or netlink (`NBD_FLAG_*`).
pub(crate) mod flags {
    /// The export is read-only.
    pub(crate) const READ_ONLY: u32 = 1 << 1;
    /// The server supports [`super::Command::Flush`].
    pub(crate) const SEND_FLUSH: u32 = 1 << 2;
    /// The server supports [`super::CMD_FLAG_FUA`].
    pub(crate) const SEND_FUA: u32 = 1 << 3;
    /// The export is on a rotating disk.
    pub(crate) const ROTATIONAL: u32 = 1 << 4;
    /// The server supports [`super::Command::Trim`].
    pub(crate) const SEND_TRIM: u32 = 1 << 5;
    /// The server supports [`super::Command::WriteZeroes`].
    pub(crate) const SEND_WRITE_ZEROES: u32 = 1 << 6;
    /// The server supports `NBD_CMD_FLAG_DF`, which it can only say if structured replies were agreed on.
    pub(crate) const SEND_DF: u32 = 1 << 7;
    /// A flush on one connection covers the writes that were completed on the others.
    pub(crate) const CAN_MULTI_CONN: u32 = 1 << 8;
    /// The server can be asked to fail rather than to write zeroes one by one (`NBD_CMD_FLAG_FAST_ZERO`).
    pub(crate) const SEND_FAST_ZERO: u32 = 1 << 11;
}

/// A command (`NBD_CMD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Command {
    /// Reads the range. The reply carries the data.
    Read = 0,
    /// Writes the data that follows the request.
    Write = 1,
    /// Ends the session. There is no reply.
    Disconnect = 2,
    /// Writes everything that was answered before to stable storage.
    Flush = 3,
    /// Tells the server that the range is no longer needed.
    Trim = 4,
    /// Makes the range read as zeroes.
    WriteZeroes = 6,
}

impl Command {
    /// Returns the command's name in log messages (`nbdcmd_to_ascii()`, with `write-zeroes` added).
    pub(crate) fn name(self) -> &'static str {
        match self {
            Command::Read => "read",
            Command::Write => "write",
            Command::Disconnect => "disconnect",
            Command::Flush => "flush",
            Command::Trim => "trim/discard",
            Command::WriteZeroes => "write-zeroes",
        }
    }
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    /// The command.
    pub(crate) command: Command,
    /// The command flags (`CMD_FLAG_*`).
    pub(crate) flags: u16,
    /// The cookie, which the server copies into the reply.
    pub(crate) cookie: u64,
    /// The offset in the export.
    pub(crate) offset_bytes: u64,
    /// The length of the range.
    pub(crate) len_bytes: u32,
}

impl RequestHeader {
    /// The request that ends a session.
    pub(crate) const DISCONNECT: RequestHeader = RequestHeader {
        command: Command::Disconnect,
        flags: 0,
        cookie: 0,
        offset_bytes: 0,
        len_bytes: 0,
    };

    /// Returns the request as it goes over the wire (`struct nbd_request`, all big endian).
    ///
    /// The offset and the length of a flush or a disconnect are zero, as the protocol requires.
    pub(crate) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let ranged = !matches!(self.command, Command::Flush | Command::Disconnect);
        let (offset, len) = if ranged {
            (self.offset_bytes, self.len_bytes)
        } else {
            (0, 0)
        };
        let mut wire = [0; REQUEST_BYTES];
        wire[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        wire[4..6].copy_from_slice(&self.flags.to_be_bytes());
        wire[6..8].copy_from_slice(&(self.command as u16).to_be_bytes());
        wire[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        wire[16..24].copy_from_slice(&offset.to_be_bytes());
        wire[24..28].copy_from_slice(&len.to_be_bytes());
        wire
    }
}

/// The first word of a reply is not [`REPLY_MAGIC`], but this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrongMagic(pub(crate) u32);

/// The header of a simple reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReplyHeader {
    /// The cookie of the request that this is a reply to.
    pub(crate) cookie: u64,
    /// The error number of the protocol (see [`ServerError`]), or 0. Data follows only if this is
    /// 0.
    pub(crate) error: u32,
}

impl ReplyHeader {
    /// Decodes a reply's header (`struct nbd_reply`).
    ///
    /// # Errors
    ///
    /// [`WrongMagic`]: the stream cannot be parsed any further.
    pub(crate) fn decode(wire: &[u8; REPLY_BYTES]) -> Result<ReplyHeader, WrongMagic> {
        let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = *wire;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != REPLY_MAGIC {
            return Err(WrongMagic(magic));
        }
        Ok(ReplyHeader {
            cookie: u64::from_be_bytes(cookie),
            error: u32::from_be_bytes([e0, e1, e2, e3]),
        })
    }
}

/// The error numbers of the protocol. They do not depend on the server's operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServerError {
    /// `NBD_EPERM`: not permitted, such as a write to a read-only export.
    NotPermitted,
    /// `NBD_EIO`.
    Io,
    /// `NBD_ENOMEM`: the server lacks memory.
    NoMemory,
    /// `NBD_EINVAL`: also the reply to a command that the server does not know.
    Invalid,
    /// `NBD_ENOSPC`.
    NoSpace,
    /// `NBD_EOVERFLOW`.
    Overflow,
    /// `NBD_ENOTSUP`.
    NotSupported,
    /// `NBD_ESHUTDOWN`: the server is shutting down.
    Shutdown,
    /// A number that the protocol does not define.
    Unknown,
}

impl ServerError {
    /// Returns the meaning of a reply's error number, or `None` for 0, which is success.
    pub(crate) fn from_wire(error: u32) -> Option<ServerError> {
        Some(match error {
            0 => return None,
            1 => ServerError::NotPermitted,
            5 => ServerError::Io,
            12 => ServerError::NoMemory,
            22 => ServerError::Invalid,
            28 => ServerError::NoSpace,
            75 => ServerError::Overflow,
            95 => ServerError::NotSupported,
            108 => ServerError::Shutdown,
            _ => ServerError::Unknown,
        })
    }
}
