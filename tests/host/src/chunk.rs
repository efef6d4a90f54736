// SPDX-License-Identifier: GPL-2.0
//! Chunks of structured replies, against bytes written by hand from the protocol's text.

use crate::pure::chunk::{Chunk, Content, Violation};
use proptest::prelude::*;

/// Parses a chunk whose header has these flags and this type, and which has this payload.
fn parse(flags: u8, kind: u16, payload: &[u8]) -> Result<(Option<Content>, Vec<u8>), Violation> {
    parse_with(flags, kind, payload.len() as u32, payload)
}

fn parse_with(
    flags: u8,
    kind: u16,
    len: u32,
    payload: &[u8],
) -> Result<(Option<Content>, Vec<u8>), Violation> {
    let mut header = *b"\x66\x8e\x33\xef\0\0\0\0\x01\x23\x45\x67\x89\xab\xcd\xef";
    header[5] = flags;
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    let mut chunk = Chunk::begin(&header).expect("a chunk");
    assert_eq!(chunk.cookie, 0x0123_4567_89ab_cdef);
    assert_eq!(chunk.is_last, flags & 1 == 1);
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend(payload);
    let mut left = &bytes[..];
    loop {
        let wanted = chunk.wanted_bytes();
        assert!((1..=64).contains(&wanted));
        if wanted > left.len() {
            return Ok((None, chunk.text().as_bytes().to_vec()));
        }
        let (part, rest) = left.split_at(wanted);
        left = rest;
        if let Some(content) = chunk.take(part)? {
            return Ok((Some(content), chunk.text().as_bytes().to_vec()));
        }
    }
}

fn content(flags: u8, kind: u16, payload: &[u8]) -> Content {
    parse(flags, kind, payload)
        .unwrap()
        .0
        .expect("not complete")
}

const OFFSET: &[u8] = b"\0\0\x01\x02\x03\x04\x06\0";

#[test]
fn content_is_data_or_a_hole() {
    let offset = 0x0102_0304_0600;
    let data = [OFFSET, b"abcde"].concat();
    assert_eq!(content(0, 1, &data), Content::Data { offset, len: 5 });
    let hole = [OFFSET, b"\0\x01\0\x02"].concat();
    let len = 0x0001_0002;
    assert_eq!(content(1, 2, &hole), Content::Hole { offset, len });
    assert_eq!(content(1, 0, b""), Content::None);
    // Flags that nobody knows mean nothing.
    assert_eq!(content(0xff, 0, b""), Content::None);
    let none: [u8; 16] = *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\0";
    assert!(Chunk::begin(&none).is_none());
}

#[test]
fn errors_have_words_and_places() {
    let (error, offset) = (5, Some(0x0102_0304_0600));
    let words = [b"\0\0\0\x05\0\x04disk", OFFSET].concat();
    let told = parse(1, 0x8002, &words).unwrap();
    assert_eq!(
        told,
        (Some(Content::Error { error, offset }), b"disk".to_vec())
    );
    let told = parse(1, 0x8001, b"\0\0\0\x05\0\x04disk").unwrap();
    let offset = None;
    assert_eq!(
        told,
        (Some(Content::Error { error, offset }), b"disk".to_vec())
    );
    // Of another type, and with more behind the words.
    let told = parse(0, 0x9234, b"\0\0\0\x05\0\x04disk and so on").unwrap();
    assert_eq!(
        told,
        (Some(Content::Error { error, offset }), b"disk".to_vec())
    );
    // Without words.
    let told = parse(0, 0x8001, b"\0\0\0\x05\0\0").unwrap();
    assert_eq!(told, (Some(Content::Error { error, offset }), Vec::new()));
    // The length of the words is in the wrong order.
    let told = parse(1, 0x8001, b"\0\0\0\x05\x04\0disk").unwrap();
    assert_eq!(told, (Some(Content::Error { error, offset }), Vec::new()));
    let told = parse(1, 0x8002, &[b"\0\0\0\x05\x04\0disk", OFFSET].concat()).unwrap();
    assert_eq!(told, (Some(Content::Error { error, offset }), Vec::new()));
    // A zero byte ends them, and only so many are kept.
    let told = parse(1, 0x8001, b"\0\0\0\x05\0\x05di\0sk").unwrap();
    assert_eq!(told.1, b"di");
    let long = [b"\0\0\0\x05\x10\0".as_slice(), &[b'x'; 4096]].concat();
    assert_eq!(parse(1, 0x8001, &long).unwrap().1, [b'x'; 120]);
}

#[test]
fn what_cannot_be_ends_the_connection() {
    let fails = |flags, kind, payload: &[u8]| parse(flags, kind, payload).unwrap_err();
    assert_eq!(fails(0, 0, b""), Violation::NotDone);
    assert_eq!(fails(1, 0, b"x"), Violation::WrongLength(0, 1));
    assert_eq!(fails(1, 1, OFFSET), Violation::WrongLength(1, 8));
    assert_eq!(fails(1, 2, OFFSET), Violation::WrongLength(2, 8));
    let hole = [OFFSET, b"\0\0\0\0"].concat();
    assert_eq!(fails(1, 2, &hole), Violation::EmptyHole);
    assert_eq!(fails(1, 3, OFFSET), Violation::UnknownType(3));
    assert_eq!(fails(1, 0x8001, b"\0\0\0\0\0\0"), Violation::NoError);
    assert_eq!(
        fails(1, 0x8001, b"\0\0\0"),
        Violation::WrongLength(0x8001, 3)
    );
    // Such a length is refused before anything of it has come.
    let endless = parse_with(1, 0x8001, u32::MAX, b"").unwrap_err();
    assert_eq!(endless, Violation::WrongLength(0x8001, u32::MAX));
    let long = [b"\0\0\0\x05\x10\x01".as_slice(), &[b'x'; 4097]].concat();
    assert_eq!(
        fails(1, 0x8001, &long),
        Violation::WrongLength(0x8001, 4103)
    );
}

proptest! {
    /// No server can make the parser panic.
    #[test]
    fn anything_is_parsed(flags: u8, kind: u16, len: u32, payload: Vec<u8>) {
        for kind in [kind, kind % 4, 0x8000 | (kind % 4)] {
            let _ = parse_with(flags, kind, len, &payload);
            let _ = parse(flags, kind, &payload);
        }
    }
}
