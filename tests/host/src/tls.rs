// SPDX-License-Identifier: GPL-2.0
//! The records of TLS that are no data, against the text of RFC 8446. Numbers are written out here once more.

use crate::pure::tls::{Alert, Meaning, Records, Unexpected};
use proptest::prelude::*;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

/// A handshake message of this type and length.
fn message(kind: u8, len: u32) -> Vec<u8> {
    let mut message = vec![kind];
    message.extend(&len.to_be_bytes()[1..]);
    // As if each byte began a key update.
    message.extend(std::iter::repeat_n(24, len as usize));
    message
}

/// What one record means on a new connection.
fn first(kind: u8, bytes: &[u8]) -> Meaning {
    Records::new().take(kind, bytes)
}

#[test]
fn an_alert_is_what_it_says() {
    assert_eq!(first(ALERT, &[1, 0]), Meaning::Closed);
    assert_eq!(first(ALERT, &[2, 0]), Meaning::Closed);
    assert_eq!(first(ALERT, &[1, 90]), Meaning::Nothing);
    for bytes in [&[][..], &[2], &[2, 80, 0], &[1, 0, 1, 0]] {
        assert_eq!(
            first(ALERT, bytes),
            Meaning::Unexpected(Unexpected::AlertSize)
        );
    }
    for (level, description, words) in [
        (2, 10, ("fatal", "unexpected_message")),
        (2, 80, ("fatal", "internal_error")),
        (1, 48, ("warning", "unknown_ca")),
        (7, 116, ("unknown level", "certificate_required")),
        (2, 1, ("fatal", "unknown alert")),
    ] {
        let Meaning::Alert(alert) = first(ALERT, &[level, description]) else {
            panic!("{description} is no alert");
        };
        assert_eq!((alert.level_name(), alert.name()), words);
        assert_eq!(alert.description, description);
    }
}

/// Each alert of the RFC's list has a name of its own.
#[test]
fn alerts_have_names() {
    let known: [u8; 25] = [
        10, 20, 22, 40, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 70, 71, 80, 86, 109, 110, 112, 113,
        115, 116, 120,
    ];
    let name = |description| match first(ALERT, &[2, description]) {
        Meaning::Alert(alert) => Alert::name(alert),
        other => panic!("{other:?}"),
    };
    let names: std::collections::BTreeSet<&str> = known.iter().map(|alert| name(*alert)).collect();
    assert_eq!(names.len(), known.len());
    assert!(!names.contains("unknown alert"));
}

#[test]
fn other_records_are_refused() {
    for kind in [0, 20, 23, 24, 25, 26, 255] {
        let meaning = Meaning::Unexpected(Unexpected::Record(kind));
        assert_eq!(first(kind, &[4, 0, 0, 0]), meaning);
    }
    assert_eq!(
        first(HANDSHAKE, &[]),
        Meaning::Unexpected(Unexpected::Empty)
    );
    // A request for a certificate, and the messages of a handshake.
    for kind in [1, 2, 5, 8, 11, 13, 15, 20, 254] {
        let meaning = Meaning::Unexpected(Unexpected::Handshake(kind));
        assert_eq!(first(HANDSHAKE, &message(kind, 3)), meaning);
    }
}

#[test]
fn a_key_update_is_found() {
    assert_eq!(first(HANDSHAKE, &message(24, 1)), Meaning::KeyUpdate);
    let behind = [message(4, 300), message(0, 0), message(24, 1)].concat();
    assert_eq!(first(HANDSHAKE, &behind), Meaning::KeyUpdate);
}

proptest! {
    /// However the messages are cut into records and parts, only a key update is one.
    #[test]
    fn messages_are_followed(
        tickets in prop::collection::vec((any::<bool>(), 0_u32..700), 0..8),
        cuts in prop::collection::vec(1_usize..300, 1..8),
        updates in any::<bool>(),
    ) {
        let messages = tickets.iter().map(|(is_ticket, len)| message(if *is_ticket { 4 } else { 0 }, *len));
        let mut stream = messages.collect::<Vec<_>>().concat();
        let harmless = stream.len();
        if updates {
            stream.extend(message(24, 1));
        }
        let mut records = Records::new();
        let mut cuts = cuts.into_iter().cycle();
        let mut at = 0;
        while at < stream.len() {
            let end = stream.len().min(at + cuts.next().unwrap());
            let meaning = records.take(HANDSHAKE, &stream[at..end]);
            // The header of the key update is whole.
            if end >= harmless + 4 {
                prop_assert_eq!(meaning, Meaning::KeyUpdate);
                break;
            }
            prop_assert_eq!(meaning, Meaning::Nothing);
            at = end;
        }
    }
}
