// SPDX-License-Identifier: GPL-2.0
//! The wire, against the protocol's text (`doc/proto.md` of the NBD project) and `linux/nbd.h`.
//!
//! Numbers and bytes are written out here once more, by hand: a constant of the module that is wrong
//! must not make its own test pass.

use crate::{
    pure::cmd::Cookie,
    pure::proto::{
        CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, COOKIE_AT, Command, REPLY_BYTES, REQUEST_BYTES,
        ReplyHeader, RequestHeader, ServerError, WrongMagic, flags,
    },
};
use proptest::prelude::*;

const COMMANDS: [(Command, u16, &str); 6] = [
    (Command::Read, 0, "read"),
    (Command::Write, 1, "write"),
    (Command::Disconnect, 2, "disconnect"),
    (Command::Flush, 3, "flush"),
    (Command::Trim, 4, "trim/discard"),
    (Command::WriteZeroes, 6, "write-zeroes"),
];

/// What stands before the cookie of a request, and what stands after it.
fn assert_encodes(command: Command, flags: u16, head: [u8; 8], range: [u8; 12]) {
    let request = RequestHeader {
        command,
        flags,
        cookie: 0x0123_4567_89ab_cdef,
        offset_bytes: 0x0000_0102_0304_0600,
        len_bytes: 0x0002_1000,
    };
    let mut expected = Vec::new();
    expected.extend(head);
    expected.extend([0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
    expected.extend(range);
    assert_eq!(request.encode()[..], expected, "{command:?}");
}

const RANGE: [u8; 12] = [0, 0, 1, 2, 3, 4, 6, 0, 0, 2, 0x10, 0];

#[test]
fn a_request_is_28_bytes_in_network_byte_order() {
    assert_eq!(REQUEST_BYTES, 28);
    assert_eq!(COOKIE_AT, 8);
    assert_encodes(Command::Read, 0, *b"\x25\x60\x95\x13\0\0\0\0", RANGE);
    assert_encodes(Command::Write, 0, *b"\x25\x60\x95\x13\0\0\0\x01", RANGE);
    assert_encodes(Command::Trim, 0, *b"\x25\x60\x95\x13\0\0\0\x04", RANGE);
    assert_encodes(
        Command::WriteZeroes,
        0,
        *b"\x25\x60\x95\x13\0\0\0\x06",
        RANGE,
    );
}

#[test]
fn command_flags_are_the_upper_half_of_the_type() {
    assert_eq!((CMD_FLAG_FUA, CMD_FLAG_NO_HOLE), (1, 2));
    assert_encodes(
        Command::Write,
        CMD_FLAG_FUA,
        *b"\x25\x60\x95\x13\0\x01\0\x01",
        RANGE,
    );
    assert_encodes(
        Command::WriteZeroes,
        CMD_FLAG_FUA | CMD_FLAG_NO_HOLE,
        *b"\x25\x60\x95\x13\0\x03\0\x06",
        RANGE,
    );
    assert_encodes(
        Command::Trim,
        0x8000,
        *b"\x25\x60\x95\x13\x80\0\0\x04",
        RANGE,
    );
}

#[test]
fn flush_and_disconnect_carry_no_range() {
    assert_encodes(Command::Flush, 0, *b"\x25\x60\x95\x13\0\0\0\x03", [0; 12]);
    assert_encodes(
        Command::Disconnect,
        0,
        *b"\x25\x60\x95\x13\0\0\0\x02",
        [0; 12],
    );
}

#[test]
fn the_goodbye_is_a_disconnect_and_nothing_else() {
    let expected = *b"\x25\x60\x95\x13\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(RequestHeader::DISCONNECT.encode(), expected);
}

#[test]
fn a_reply_is_16_bytes_in_network_byte_order() {
    assert_eq!(REPLY_BYTES, 16);
    assert_eq!(
        ReplyHeader::decode(b"\x67\x44\x66\x98\0\0\0\x1c\x01\x23\x45\x67\x89\xab\xcd\xef"),
        Ok(ReplyHeader {
            cookie: 0x0123_4567_89ab_cdef,
            error: 28
        })
    );
}

#[test]
fn other_magic_numbers_of_the_protocol_start_no_reply() {
    // A request's, a structured reply's, an extended one's, and the two that nbd.h warns of.
    let magics = [
        0x2560_9513_u32,
        0x668e_33ef,
        0x6e8a_278c,
        0x1256_0953,
        0x9674_4668,
    ];
    for magic in magics {
        let mut wire = [0; 16];
        wire[..4].copy_from_slice(&magic.to_be_bytes());
        assert_eq!(ReplyHeader::decode(&wire), Err(WrongMagic(magic)));
    }
}

#[test]
fn commands_have_the_protocols_numbers_and_nbds_names() {
    for (command, number, name) in COMMANDS {
        assert_eq!(command as u16, number);
        assert_eq!(command.name(), name);
    }
}

#[test]
fn server_flags_have_the_protocols_bits() {
    assert_eq!(flags::READ_ONLY, 0x002);
    assert_eq!(flags::SEND_FLUSH, 0x004);
    assert_eq!(flags::SEND_FUA, 0x008);
    assert_eq!(flags::ROTATIONAL, 0x010);
    assert_eq!(flags::SEND_TRIM, 0x020);
    assert_eq!(flags::SEND_WRITE_ZEROES, 0x040);
    assert_eq!(flags::SEND_DF, 0x080);
    assert_eq!(flags::CAN_MULTI_CONN, 0x100);
    assert_eq!(flags::SEND_FAST_ZERO, 0x800);
}

const ERRORS: [(u32, Option<ServerError>); 9] = [
    (0, None),
    (1, Some(ServerError::NotPermitted)),
    (5, Some(ServerError::Io)),
    (12, Some(ServerError::NoMemory)),
    (22, Some(ServerError::Invalid)),
    (28, Some(ServerError::NoSpace)),
    (75, Some(ServerError::Overflow)),
    (95, Some(ServerError::NotSupported)),
    (108, Some(ServerError::Shutdown)),
];

/// Some number is an error, whatever it is: a server's nonsense must not look like success.
fn assert_error_is_understood(number: u32) {
    let known = ERRORS.iter().find(|(known, _)| *known == number);
    let expected = known.map_or(Some(ServerError::Unknown), |(_, error)| *error);
    assert_eq!(ServerError::from_wire(number), expected, "{number}");
}

#[test]
fn small_error_numbers_mean_what_the_protocol_says() {
    (0..=4096).for_each(assert_error_is_understood);
}

/// An integer from the wire, by arithmetic and not by the functions that the module uses.
fn integer(wire: &[u8]) -> u64 {
    wire.iter()
        .fold(0, |value, byte| value * 256 + u64::from(*byte))
}

fn requests() -> impl Strategy<Value = RequestHeader> {
    let commands = COMMANDS.map(|(command, ..)| command).to_vec();
    let fields = (
        prop::sample::select(commands),
        any::<(u16, u64, u64, u32)>(),
    );
    fields.prop_map(
        |(command, (flags, cookie, offset_bytes, len_bytes))| RequestHeader {
            command,
            flags,
            cookie,
            offset_bytes,
            len_bytes,
        },
    )
}

proptest! {
    #[test]
    fn what_is_encoded_can_be_read_back(request in requests()) {
        let wire = request.encode();
        let number = COMMANDS.iter().find(|(c, ..)| *c == request.command).unwrap().1;
        let ranged = u64::from(!matches!(number, 2 | 3));
        prop_assert_eq!(integer(&wire[..4]), 0x2560_9513);
        prop_assert_eq!(
            integer(&wire[4..8]),
            u64::from(request.flags) * 65_536 + u64::from(number)
        );
        prop_assert_eq!(integer(&wire[8..16]), request.cookie);
        prop_assert_eq!(integer(&wire[16..24]), ranged * request.offset_bytes);
        prop_assert_eq!(integer(&wire[24..]), ranged * u64::from(request.len_bytes));
    }

    #[test]
    fn any_16_bytes_are_a_reply_or_no_reply(mut wire: [u8; 16], is_reply: bool) {
        if is_reply {
            wire[..4].copy_from_slice(&[0x67, 0x44, 0x66, 0x98]);
        }
        match ReplyHeader::decode(&wire) {
            Ok(reply) => {
                prop_assert_eq!(&wire[..4], &[0x67, 0x44, 0x66, 0x98]);
                prop_assert_eq!(u64::from(reply.error), integer(&wire[4..8]));
                prop_assert_eq!(reply.cookie, integer(&wire[8..]));
            }
            Err(WrongMagic(magic)) => {
                prop_assert!(!is_reply && magic != 0x6744_6698);
                prop_assert_eq!(u64::from(magic), integer(&wire[..4]));
            }
        }
    }

    #[test]
    fn any_error_number_is_understood(number: u32) {
        assert_error_is_understood(number);
    }

    #[test]
    fn a_cookie_keeps_its_halves(generation: u32, slot: u32) {
        let cookie = Cookie::new(generation, slot);
        prop_assert_eq!((cookie.generation(), cookie.slot()), (generation, slot));
        prop_assert_eq!(cookie.0, u64::from(generation) * (1 << 32) + u64::from(slot));
    }

    #[test]
    fn any_cookie_from_the_wire_has_two_halves(wire: u64) {
        let cookie = Cookie(wire);
        prop_assert_eq!(Cookie::new(cookie.generation(), cookie.slot()), cookie);
    }
}
