// SPDX-License-Identifier: GPL-2.0
//! The wire: requests, replies, flags and error numbers of the NBD protocol's transmission phase.
//!
//! Pure: no kernel, no memory of its own, no state. The tests compile this very file on the host.
//! Source: the NBD protocol text (`doc/proto.md` of the NBD project) and
//! `include/uapi/linux/nbd.h`.

#![forbid(unsafe_code)]

/// Bytes of a request on the wire (`struct nbd_request`).
pub(crate) const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply's header on the wire (`struct nbd_reply`).
pub(crate) const REPLY_BYTES: usize = 16;

/// First word of every request (`NBD_REQUEST_MAGIC`).
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of every simple reply (`NBD_REPLY_MAGIC`).
pub(crate) const REPLY_MAGIC: u32 = 0x6744_6698;

/// Command flag: the server answers only when the data is on stable storage.
pub(crate) const CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of [`Command::WriteZeroes`]: the server must not punch a hole.
pub(crate) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// What a server can do, as `NBD_SET_FLAGS` and netlink hand it over (`NBD_FLAG_*`).
pub(crate) mod flags {
    /// The export cannot be written.
    pub(crate) const READ_ONLY: u32 = 1 << 1;
    /// The server understands [`super::Command::Flush`].
    pub(crate) const SEND_FLUSH: u32 = 1 << 2;
    /// The server understands [`super::CMD_FLAG_FUA`].
    pub(crate) const SEND_FUA: u32 = 1 << 3;
    /// The export lies on a rotating disk.
    pub(crate) const ROTATIONAL: u32 = 1 << 4;
    /// The server understands [`super::Command::Trim`].
    pub(crate) const SEND_TRIM: u32 = 1 << 5;
    /// The server understands [`super::Command::WriteZeroes`].
    pub(crate) const SEND_WRITE_ZEROES: u32 = 1 << 6;
    /// Several connections to the export see one another's flushed writes.
    pub(crate) const CAN_MULTI_CONN: u32 = 1 << 8;
}

/// A command that a client sends (`NBD_CMD_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Command {
    /// Read `len` bytes; the reply carries them.
    Read = 0,
    /// Write the `len` bytes that follow the request.
    Write = 1,
    /// The client goes away; there is no reply.
    Disconnect = 2,
    /// Everything that was answered before goes to stable storage.
    Flush = 3,
    /// The range is no longer needed.
    Trim = 4,
    /// The range reads as zeroes afterwards.
    WriteZeroes = 6,
}

impl Command {
    /// The command's name in log lines: nbd.c's `nbdcmd_to_ascii()`, and write-zeroes, which that
    /// function forgot.
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

/// One request, before it is put on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    /// What to do.
    pub(crate) command: Command,
    /// `CMD_FLAG_*`.
    pub(crate) flags: u16,
    /// Opaque to the server, which copies it into the reply.
    pub(crate) cookie: u64,
    /// Where, in bytes from the start of the export.
    pub(crate) offset_bytes: u64,
    /// How much.
    pub(crate) len_bytes: u32,
}

impl RequestHeader {
    /// What ends a session.
    pub(crate) const DISCONNECT: RequestHeader = RequestHeader {
        command: Command::Disconnect,
        flags: 0,
        cookie: 0,
        offset_bytes: 0,
        len_bytes: 0,
    };

    /// The request as it goes over the wire (`struct nbd_request`, all big endian).
    ///
    /// A flush and a disconnect carry neither offset nor length: the protocol says that both must be
    /// zero.
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

/// The first word of what should have been a reply was this instead of [`REPLY_MAGIC`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrongMagic(pub(crate) u32);

/// A reply's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReplyHeader {
    /// The cookie of the request that this answers.
    pub(crate) cookie: u64,
    /// 0, or what went wrong (see [`ServerError`]). Data follows only where this is 0.
    pub(crate) error: u32,
}

impl ReplyHeader {
    /// Reads a reply's header (`struct nbd_reply`).
    ///
    /// # Errors
    ///
    /// [`WrongMagic`]: the stream cannot be understood from here on.
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

/// What a server's error number means (the protocol's own numbers, whatever the server's system).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServerError {
    /// `NBD_EPERM`: not permitted, such as a write on a read-only export.
    NotPermitted,
    /// `NBD_EIO`.
    Io,
    /// `NBD_ENOMEM`: the server lacks memory.
    NoMemory,
    /// `NBD_EINVAL`: also what a server says to a command that it does not know.
    Invalid,
    /// `NBD_ENOSPC`.
    NoSpace,
    /// `NBD_EOVERFLOW`.
    Overflow,
    /// `NBD_ENOTSUP`.
    NotSupported,
    /// `NBD_ESHUTDOWN`: the server is about to go.
    Shutdown,
    /// A number that the protocol does not know.
    Unknown,
}

impl ServerError {
    /// The meaning of a reply's error number; `None` for 0, which is success.
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
