// SPDX-License-Identifier: GPL-2.0

//! Numbers of the NBD handshake, and what is read from the bytes that a server has sent.

/// What a server greets with.
pub const MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub const NEWSTYLE: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
pub const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Flags of the greeting and of its answer.
pub const FIXED_NEWSTYLE: u16 = 1 << 0;
pub const NO_ZEROES: u16 = 1 << 1;

/// Kinds of information about an export.
pub const INFO_EXPORT: u16 = 0;
pub const INFO_DESCRIPTION: u16 = 2;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Kinds of replies to an option.
pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_ERROR: u32 = 1 << 31;

/// Flags of an export.
pub const HAS_FLAGS: u16 = 1 << 0;
pub const READ_ONLY: u16 = 1 << 1;
/// Only a server that has agreed on structured replies may say this.
pub const SEND_DF: u16 = 1 << 7;
pub const CAN_MULTI_CONN: u16 = 1 << 8;

const FLAGS: [(u16, &str); 11] = [
    (READ_ONLY, "read-only"),
    (1 << 2, "flush"),
    (1 << 3, "fua"),
    (1 << 4, "rotational"),
    (1 << 5, "trim"),
    (1 << 6, "write-zeroes"),
    (SEND_DF, "df"),
    (CAN_MULTI_CONN, "multi-conn"),
    (1 << 9, "resize"),
    (1 << 10, "cache"),
    (1 << 11, "fast-zero"),
];

/// Flags mean something only if the first one is set. A driver is always told that it is.
pub fn effective(flags: u16) -> u16 {
    match flags & HAS_FLAGS {
        0 => HAS_FLAGS,
        _ => flags,
    }
}

/// The names of an export's flags. Those that have none are numbers.
pub fn flag_names(flags: u16) -> Vec<String> {
    (1..16)
        .map(|bit| 1 << bit)
        .filter(|flag| flags & flag != 0)
        .map(
            |flag| match FLAGS.iter().find(|(known, _)| *known == flag) {
                Some((_, name)) => (*name).to_owned(),
                None => format!("{flag:#x}"),
            },
        )
        .collect()
}

/// Options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opt {
    ExportName = 1,
    Abort = 2,
    List = 3,
    StartTls = 5,
    Info = 6,
    Go = 7,
    StructuredReply = 8,
}

impl Opt {
    pub fn name(self) -> &'static str {
        match self {
            Self::ExportName => "EXPORT_NAME",
            Self::Abort => "ABORT",
            Self::List => "LIST",
            Self::StartTls => "STARTTLS",
            Self::Info => "INFO",
            Self::Go => "GO",
            Self::StructuredReply => "STRUCTURED_REPLY",
        }
    }
}

/// Why a server refuses an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Unsupported,
    Policy,
    Invalid,
    Platform,
    TlsRequired,
    Unknown,
    Shutdown,
    BlockSizeRequired,
    TooBig,
    Other(u32),
}

impl From<u32> for Refusal {
    fn from(kind: u32) -> Self {
        match kind & !REP_ERROR {
            1 => Self::Unsupported,
            2 => Self::Policy,
            3 => Self::Invalid,
            4 => Self::Platform,
            5 => Self::TlsRequired,
            6 => Self::Unknown,
            7 => Self::Shutdown,
            8 => Self::BlockSizeRequired,
            9 => Self::TooBig,
            other => Self::Other(other),
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "it does not know the option (NBD_REP_ERR_UNSUP)",
            Self::Policy => "its policy forbids it (NBD_REP_ERR_POLICY)",
            Self::Invalid => "it calls the request invalid (NBD_REP_ERR_INVALID)",
            Self::Platform => "its platform cannot do it (NBD_REP_ERR_PLATFORM)",
            Self::TlsRequired => "it requires TLS (NBD_REP_ERR_TLS_REQD)",
            Self::Unknown => "it has no such export (NBD_REP_ERR_UNKNOWN)",
            Self::Shutdown => "it is shutting down (NBD_REP_ERR_SHUTDOWN)",
            Self::BlockSizeRequired => {
                "it requires block sizes to be asked for (NBD_REP_ERR_BLOCK_SIZE_REQD)"
            }
            Self::TooBig => "it calls the request too big (NBD_REP_ERR_TOO_BIG)",
            Self::Other(number) => return write!(f, "for a reason with the number {number}"),
        })
    }
}

/// Bytes of a server, read from the front. Each read is `None` if there are not enough.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*front)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: u32) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(usize::try_from(len).ok()?)?;
        self.0 = rest;
        Some(front)
    }

    /// All that is left, as text.
    pub fn text(self) -> String {
        String::from_utf8_lossy(self.0).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_have_names() {
        assert_eq!(flag_names(HAS_FLAGS), [""; 0]);
        assert_eq!(flag_names(0x0103), ["read-only", "multi-conn"]);
        assert_eq!(flag_names(0x8000), ["0x8000"]);
    }

    #[test]
    fn fields_end() {
        let mut fields = Fields(&[0, 1, 0, 0, 0, 2, b'a', b'b', b'c']);
        assert_eq!(fields.u16(), Some(1));
        assert_eq!(fields.u32(), Some(2));
        assert_eq!(fields.bytes(4), None);
        assert_eq!(fields.bytes(u32::MAX), None);
        assert_eq!(fields.bytes(2), Some(&b"ab"[..]));
        assert_eq!(fields.u16(), None);
        assert_eq!(fields.text(), "c");
    }
}
