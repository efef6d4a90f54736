// SPDX-License-Identifier: GPL-2.0
//! The records of a TLS connection that are no data, as the kernel passes them on when it has decrypted them.
//!
//! The handshake is over before the driver is given a socket. After it, a server may send alerts, session
//! tickets and key updates at any time.
//!
//! Source: RFC 8446 (TLS 1.3), sections 4.6, 5.1 and 6, and RFC 5246 (TLS 1.2).
//!
//! C header: [`include/net/tls_prot.h`](srctree/include/net/tls_prot.h)

#![forbid(unsafe_code)]

/// The types of records (`TLS_RECORD_TYPE_*`).
mod record {
    pub(super) const ALERT: u8 = 21;
    pub(super) const HANDSHAKE: u8 = 22;
}

/// The types of handshake messages that are expected after the handshake.
mod handshake {
    /// TLS 1.2: the server wants another handshake. A client may ignore that.
    pub(super) const HELLO_REQUEST: u8 = 0;
    /// A later handshake could use it.
    pub(super) const NEW_SESSION_TICKET: u8 = 4;
    /// TLS 1.3: all that follows is encrypted with the server's next key.
    pub(super) const KEY_UPDATE: u8 = 24;
}

/// The size of a handshake message's header: its type, and 24 bits of length.
const HANDSHAKE_HEADER_BYTES: usize = 4;

/// What a record, or a part of it, means to the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Nothing.
    Nothing,
    /// The server sends no more data (`close_notify`).
    Closed,
    /// The server has given up the connection.
    Alert(Alert),
    /// The server encrypts with another key from here on.
    KeyUpdate,
    /// The server must not send this.
    Unexpected(Unexpected),
}

/// An alert other than `close_notify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alert {
    level: u8,
    /// Which alert it is (`TLS_ALERT_DESC_*`).
    pub(crate) description: u8,
}

/// What a server must not send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unexpected {
    /// A record of this type.
    Record(u8),
    /// An alert whose record has not two bytes.
    AlertSize,
    /// A record of handshake messages that has none.
    Empty,
    /// A handshake message of this type.
    Handshake(u8),
}

impl Alert {
    const CLOSE_NOTIFY: u8 = 0;
    /// The server gives up for a reason that is none of the protocol's. `close_notify` follows.
    const USER_CANCELED: u8 = 90;

    /// Returns the name that the RFC has for the level.
    pub(crate) fn level_name(self) -> &'static str {
        match self.level {
            1 => "warning",
            2 => "fatal",
            _ => "unknown level",
        }
    }

    /// Returns the name that the RFC has for the alert.
    pub(crate) fn name(self) -> &'static str {
        match self.description {
            10 => "unexpected_message",
            20 => "bad_record_mac",
            22 => "record_overflow",
            40 => "handshake_failure",
            42 => "bad_certificate",
            43 => "unsupported_certificate",
            44 => "certificate_revoked",
            45 => "certificate_expired",
            46 => "certificate_unknown",
            47 => "illegal_parameter",
            48 => "unknown_ca",
            49 => "access_denied",
            50 => "decode_error",
            51 => "decrypt_error",
            70 => "protocol_version",
            71 => "insufficient_security",
            80 => "internal_error",
            86 => "inappropriate_fallback",
            100 => "no_renegotiation",
            109 => "missing_extension",
            110 => "unsupported_extension",
            112 => "unrecognized_name",
            113 => "bad_certificate_status_response",
            115 => "unknown_psk_identity",
            116 => "certificate_required",
            120 => "no_application_protocol",
            _ => "unknown alert",
        }
    }
}

/// What was received of records that are no data.
///
/// Handshake messages may be spread over several records, and one record may have several of them. No more of
/// them is kept than a header.
pub(crate) struct Records {
    header: [u8; HANDSHAKE_HEADER_BYTES],
    /// The number of bytes of the header that were received.
    have: usize,
    /// The number of bytes that are missing of the current message, after its header.
    left_bytes: u32,
}

impl Records {
    /// Returns the state at the start of a connection: between two messages.
    pub(crate) fn new() -> Self {
        Records {
            header: [0; HANDSHAKE_HEADER_BYTES],
            have: 0,
            left_bytes: 0,
        }
    }

    /// Takes a record of the type `kind`, or the next part of it, and returns what that means. A record that has
    /// room in a part must come as a whole, and an alert has. Unless the answer is [`Meaning::Nothing`], nothing
    /// more may be taken.
    pub(crate) fn take(&mut self, kind: u8, bytes: &[u8]) -> Meaning {
        match kind {
            record::ALERT => alert(bytes),
            record::HANDSHAKE if bytes.is_empty() => Meaning::Unexpected(Unexpected::Empty),
            record::HANDSHAKE => self.take_handshake(bytes),
            other => Meaning::Unexpected(Unexpected::Record(other)),
        }
    }

    /// Takes bytes of handshake messages.
    fn take_handshake(&mut self, mut bytes: &[u8]) -> Meaning {
        while let Some((&first, after_first)) = bytes.split_first() {
            if self.left_bytes > 0 {
                let skipped = bytes.len().min(self.left_bytes as usize);
                self.left_bytes -= skipped as u32;
                (_, bytes) = bytes.split_at(skipped);
                continue;
            }
            bytes = after_first;
            if let Some(place) = self.header.get_mut(self.have) {
                *place = first;
                self.have += 1;
            }
            if self.have < HANDSHAKE_HEADER_BYTES {
                continue;
            }
            let [kind, a, b, c] = self.header;
            self.have = 0;
            self.left_bytes = u32::from_be_bytes([0, a, b, c]);
            match kind {
                handshake::HELLO_REQUEST | handshake::NEW_SESSION_TICKET => {}
                handshake::KEY_UPDATE => return Meaning::KeyUpdate,
                other => return Meaning::Unexpected(Unexpected::Handshake(other)),
            }
        }
        Meaning::Nothing
    }
}

/// Returns what a record of the type alert means. It has one alert.
fn alert(bytes: &[u8]) -> Meaning {
    let &[level, description] = bytes else {
        return Meaning::Unexpected(Unexpected::AlertSize);
    };
    match description {
        Alert::CLOSE_NOTIFY => Meaning::Closed,
        Alert::USER_CANCELED => Meaning::Nothing,
        // TLS 1.3 has no others that the connection survives, whatever their level is. Those of TLS 1.2 are
        // answers to a handshake, which is over.
        _ => Meaning::Alert(Alert { level, description }),
    }
}
