// SPDX-License-Identifier: GPL-2.0

//! Numbers of linux/nbd.h and of the NBD protocol's transmission phase, and ioctls of linux/fs.h.

/// ioctls: `_IO(0xab, n)`.
pub const SET_SOCK: u32 = 0xab00;
pub const SET_BLKSIZE: u32 = 0xab01;
pub const SET_SIZE: u32 = 0xab02;
pub const DO_IT: u32 = 0xab03;
pub const CLEAR_SOCK: u32 = 0xab04;
pub const CLEAR_QUE: u32 = 0xab05;
pub const PRINT_DEBUG: u32 = 0xab06;
pub const SET_SIZE_BLOCKS: u32 = 0xab07;
pub const DISCONNECT: u32 = 0xab08;
pub const SET_TIMEOUT: u32 = 0xab09;
pub const SET_FLAGS: u32 = 0xab0a;

/// ioctls of every block device (linux/fs.h).
pub const BLKROSET: u32 = 0x125d;
pub const BLKROGET: u32 = 0x125e;
pub const BLKRRPART: u32 = 0x125f;
pub const BLKFLSBUF: u32 = 0x1261;
pub const BLKSSZGET: u32 = 0x1268;
pub const BLKDISCARD: u32 = 0x1277;
pub const BLKPBSZGET: u32 = 0x127b;
pub const BLKZEROOUT: u32 = 0x127f;
pub const BLKGETSIZE64: u32 = 0x8008_1272;

/// Flags of an export.
pub const HAS_FLAGS: u64 = 1 << 0;
pub const READ_ONLY: u64 = 1 << 1;
pub const SEND_FLUSH: u64 = 1 << 2;
pub const SEND_FUA: u64 = 1 << 3;
pub const ROTATIONAL: u64 = 1 << 4;
pub const SEND_TRIM: u64 = 1 << 5;
pub const SEND_WRITE_ZEROES: u64 = 1 << 6;
/// Tells a driver that replies to reads may be structured.
pub const SEND_DF: u64 = 1 << 7;
pub const CAN_MULTI_CONN: u64 = 1 << 8;
pub const SEND_FAST_ZERO: u64 = 1 << 11;

/// Flags of a command.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub const CMD_FLAG_DF: u16 = 1 << 2;

pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const REPLY_MAGIC: u32 = 0x6744_6698;
pub const REQUEST_LEN: usize = 28;
pub const REPLY_LEN: usize = 16;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    Unknown(u16),
}

impl From<u16> for Command {
    fn from(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            6 => Self::WriteZeroes,
            other => Self::Unknown(other),
        }
    }
}

/// The 28 bytes in front of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The connection that it came by, counted from 0 in the order they were made.
    pub connection: usize,
    pub magic: u32,
    pub flags: u16,
    pub command: Command,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl Request {
    pub fn parse(connection: usize, header: &[u8; REQUEST_LEN]) -> Self {
        let be16 = |at: usize| u16::from_be_bytes(header[at..at + 2].try_into().unwrap());
        let be32 = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let be64 = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
        Self {
            connection,
            magic: be32(0),
            flags: be16(4),
            command: be16(6).into(),
            cookie: be64(8),
            offset: be64(16),
            len: be32(24),
        }
    }

    /// (command, flags, offset, length): what most tests compare.
    pub fn essence(&self) -> (Command, u16, u64, u32) {
        (self.command, self.flags, self.offset, self.len)
    }
}

/// A simple reply's 16 bytes.
pub fn reply(magic: u32, error: u32, cookie: u64) -> [u8; REPLY_LEN] {
    let mut bytes = [0; REPLY_LEN];
    bytes[..4].copy_from_slice(&magic.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}
