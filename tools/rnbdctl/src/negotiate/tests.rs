// SPDX-License-Identifier: GPL-2.0

//! The handshake against servers that follow a script, good and hostile ones.

mod script;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::*;
use script::Act::{self, Dribble, Hear, Say, Wait};
use script::{go, greeted, greeting, header, info_blocks, info_export, option, reply, serve};

const PATIENCE: Duration = Duration::from_secs(5);
const IMPATIENCE: Duration = Duration::from_millis(200);

fn negotiate(script: Vec<Act>, name: &str, patience: Duration) -> Result<Export, Problem> {
    let (stream, server) = serve(script, patience);
    let outcome = Handshake::begin(stream).and_then(|handshake| handshake.go(name));
    let export = outcome.map(|(socket, export)| {
        drop(socket);
        export
    });
    server.join().unwrap();
    export
}

/// A greeting, GO for the default export, and then this.
fn answered(acts: impl IntoIterator<Item = Act>) -> Result<Export, Problem> {
    let mut script = greeted();
    script.push(go(""));
    script.extend(acts);
    negotiate(script, "", PATIENCE)
}

fn broken(outcome: Result<Export, Problem>) -> &'static str {
    match outcome {
        Err(Problem::Broken(how)) => how,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_good_server() {
    let mut script = greeted();
    script.extend([
        go("disk"),
        reply(7, 3, &info_blocks(512, 4096, 1 << 20)),
        reply(7, 3, &[0, 99, 1, 2, 3]),
        reply(7, 3, &info_export(1 << 30, 0x0105)),
        reply(7, 1, &[]),
        Wait,
    ]);
    let export = negotiate(script, "disk", PATIENCE).unwrap();
    assert_eq!(export.size, 1 << 30);
    assert_eq!(export.flags, 0x0105);
    let blocks = export.block_sizes.unwrap();
    assert_eq!((blocks.minimum, blocks.preferred), (512, 4096));
    assert_eq!(blocks.max_payload, 1 << 20);
}

#[test]
fn no_time_limit_is_left_on_the_socket() {
    let mut script = greeted();
    script.extend([go(""), reply(7, 3, &info_export(512, 1)), reply(7, 1, &[])]);
    script.push(Wait);
    let (stream, server) = serve(script, PATIENCE);
    let (socket, _) = Handshake::begin(stream).unwrap().go("").unwrap();
    let socket = UnixStream::from(socket);
    assert_eq!(socket.read_timeout().unwrap(), None);
    assert_eq!(socket.write_timeout().unwrap(), None);
    drop(socket);
    server.join().unwrap();
}

#[test]
fn bytes_that_come_one_by_one() {
    let pause = Duration::from_millis(1);
    let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let first = Dribble(std::mem::take(&mut bytes), pause);
    bytes.extend(header(7, 3, 12));
    bytes.extend(info_export(4096, 1));
    bytes.extend(header(7, 1, 0));
    let script = vec![
        first,
        Hear(3_u32.to_be_bytes().to_vec()),
        go("x"),
        Dribble(bytes, pause),
        Wait,
    ];
    assert_eq!(negotiate(script, "x", PATIENCE).unwrap().size, 4096);
}

#[test]
fn a_server_that_does_not_know_go() {
    let mut script = greeted();
    script.extend([
        go("old"),
        reply(7, wire::REP_ERROR | 1, b""),
        option(1, b"old"),
        Say([&4096_u64.to_be_bytes()[..], &[0, 3]].concat()),
        Wait,
    ]);
    let export = negotiate(script, "old", PATIENCE).unwrap();
    assert_eq!((export.size, export.flags), (4096, 3));
    assert_eq!(export.block_sizes, None);
}

#[test]
fn a_server_that_is_not_fixed_sends_zeroes() {
    let script = vec![
        greeting(0),
        Hear(0_u32.to_be_bytes().to_vec()),
        option(1, b"x"),
        Say([&4096_u64.to_be_bytes()[..], &[0, 1], &[0; 124]].concat()),
        Wait,
    ];
    assert_eq!(negotiate(script, "x", PATIENCE).unwrap().size, 4096);
}

#[test]
fn an_old_server_refuses_by_going_away() {
    let script = vec![
        greeting(0),
        Hear(0_u32.to_be_bytes().to_vec()),
        option(1, b"x"),
    ];
    let outcome = negotiate(script, "x", PATIENCE);
    assert!(matches!(outcome, Err(Problem::NoSuchExport)), "{outcome:?}");
}

#[test]
fn unknown_flags_of_the_greeting_are_not_answered() {
    let script = vec![greeting(0xffff), Hear(3_u32.to_be_bytes().to_vec())];
    assert!(negotiate(script, "", PATIENCE).is_err());
}

#[test]
fn what_does_not_speak_nbd() {
    for hello in [&b"SSH-2.0-OpenSSH_10.0\r\n"[..], b"NBDMAGICwhatever"] {
        let outcome = negotiate(vec![Say(hello.to_vec()), Wait], "", PATIENCE);
        assert!(matches!(outcome, Err(Problem::NotNbd)), "{outcome:?}");
    }
    let old = [b"NBDMAGIC", &wire::OLDSTYLE.to_be_bytes()[..]].concat();
    let outcome = negotiate(vec![Say(old), Wait], "", PATIENCE);
    assert!(matches!(outcome, Err(Problem::OldStyle)), "{outcome:?}");
}

#[test]
fn a_server_that_goes_away() {
    let whole = b"NBDMAGICIHAVEOPT\0\x03";
    for len in 0..whole.len() {
        let outcome = negotiate(vec![Say(whole[..len].to_vec())], "", PATIENCE);
        let Err(Problem::Io(error)) = outcome else {
            panic!("{len}: {outcome:?}");
        };
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
    let whole = [header(7, 3, 12), info_export(4096, 1), header(7, 1, 0)].concat();
    for len in 0..whole.len() {
        let outcome = answered([Say(whole[..len].to_vec())]);
        assert!(matches!(outcome, Err(Problem::Io(_))), "{len}: {outcome:?}");
    }
}

#[test]
fn a_server_that_is_silent() {
    for script in [vec![Wait], vec![Say(b"NBDMAGIC".to_vec()), Wait]] {
        let outcome = negotiate(script, "", IMPATIENCE);
        let Err(problem) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(problem.to_string(), "the server does not answer in time");
    }
}

/// Each byte comes in time, but all of them take too long.
#[test]
fn a_server_that_is_slow_on_purpose() {
    let began = Instant::now();
    let bytes = vec![b'N'; 4].into_iter().chain([b'B'; 100]).collect();
    let outcome = negotiate(vec![Dribble(bytes, IMPATIENCE / 4), Wait], "", IMPATIENCE);
    let Err(Problem::Io(error)) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(began.elapsed() < IMPATIENCE * 10);
}

#[test]
fn refusals_have_words() {
    let outcome = answered([reply(
        7,
        wire::REP_ERROR | 6,
        b"no export called \"\x1b[2Jx\"\n",
    )]);
    let Err(problem @ Problem::Refused { .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(
        problem.to_string(),
        "the server refuses: it has no such export (NBD_REP_ERR_UNKNOWN): \
         \"no export called \"\\u{1b}[2Jx\"\""
    );
    for (kind, expected) in [
        (2, Refusal::Policy),
        (5, Refusal::TlsRequired),
        (7, Refusal::Shutdown),
        (77, Refusal::Other(77)),
    ] {
        let outcome = answered([reply(7, wire::REP_ERROR | kind, b"")]);
        let Err(Problem::Refused { refusal, words }) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!((refusal, words.as_str()), (expected, ""));
    }
}

#[test]
fn who_is_refused_says_goodbye() {
    let outcome = answered([reply(7, wire::REP_ERROR | 6, b"no"), option(2, &[])]);
    assert!(
        matches!(outcome, Err(Problem::Refused { .. })),
        "{outcome:?}"
    );
}

#[test]
fn words_are_cut_and_need_not_be_text() {
    let words = [&[0xff; 3][..], &vec![b'x'; 60_000]].concat();
    let outcome = answered([reply(7, wire::REP_ERROR | 2, &words)]);
    let Err(Problem::Refused { words, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(words.chars().count(), MAX_WORDS);
}

#[test]
fn huge_lengths() {
    for len in [MAX_REPLY + 1, u32::MAX] {
        for kind in [3, 1, wire::REP_ERROR | 6] {
            let outcome = answered([Say(header(7, kind, len)), Wait]);
            assert_eq!(broken(outcome), "a reply has more than 64 KiB");
        }
    }
}

#[test]
fn broken_replies() {
    let mut wrong_magic = header(7, 1, 0);
    wrong_magic[0] = 1;
    for (acts, how) in [
        (vec![Say(wrong_magic), Wait], "a reply has no magic number"),
        (
            vec![reply(6, 1, &[]), Wait],
            "it answers an option that was not sent",
        ),
        (vec![reply(7, 1, b"x"), Wait], "it agrees with data"),
        (
            vec![reply(7, 1, &[]), Wait],
            "it agrees without telling the size",
        ),
        (
            vec![reply(7, 2, &[0; 8]), Wait],
            "it answers with an unknown kind of reply",
        ),
        (vec![reply(7, 3, &[0]), Wait], "an information is cut short"),
        (
            vec![reply(7, 3, &info_export(1, 1)[..11]), Wait],
            "an information is cut short",
        ),
        (
            vec![reply(7, 3, &info_blocks(1, 1, 1)[..13]), Wait],
            "an information is cut short",
        ),
    ] {
        assert_eq!(broken(answered(acts)), how);
    }
}

#[test]
fn sizes_that_cannot_be() {
    let export = |size, blocks: Option<(u32, u32, u32)>| {
        let mut acts = vec![reply(7, 3, &info_export(size, 1))];
        acts.extend(blocks.map(|(a, b, c)| reply(7, 3, &info_blocks(a, b, c))));
        acts.extend([reply(7, 1, &[]), Wait]);
        answered(acts)
    };
    let wrong = "the minimum block size is no power of two up to 64 KiB";
    for minimum in [0, 3, 1 << 17, u32::MAX] {
        let outcome = export(4096, Some((minimum, 4096, u32::MAX)));
        assert_eq!(broken(outcome), wrong);
    }
    assert_eq!(
        broken(export(4096, Some((4096, 4096, 512)))),
        "the maximum payload is below the minimum"
    );
    assert_eq!(
        broken(export(u64::MAX, None)),
        "the export's size does not fit into 63 bits"
    );
    assert!(export(0, None).is_ok());
    assert!(export(4096, Some((1, 4096, u32::MAX))).is_ok());
}

fn list(acts: Vec<Act>) -> Result<Vec<Listed>, Problem> {
    let mut script = greeted();
    script.push(option(3, &[]));
    script.extend(acts);
    let (stream, server) = serve(script, PATIENCE);
    let mut handshake = Handshake::begin(stream).unwrap();
    let outcome = handshake.list();
    handshake.abort();
    server.join().unwrap();
    outcome
}

fn item(name: &str, words: &str) -> Vec<u8> {
    let len = (name.len() as u32).to_be_bytes();
    [&len, name.as_bytes(), words.as_bytes()].concat()
}

#[test]
fn lists() {
    let found = list(vec![
        reply(3, 2, &item("", "")),
        reply(3, 2, &item("disk", "the first")),
        reply(3, 1, &[]),
        option(2, &[]),
    ])
    .unwrap();
    let names: Vec<_> = found.iter().map(|listed| listed.name.as_str()).collect();
    assert_eq!(names, ["", "disk"]);
    let words: Vec<_> = found
        .iter()
        .map(|listed| listed.description.as_deref())
        .collect();
    assert_eq!(words, [None, Some("the first")]);
}

#[test]
fn broken_lists() {
    for data in [&[0, 0, 0, 1][..], &[0, 0], &[0xff, 0xff, 0xff, 0xff, 1]] {
        let outcome = list(vec![reply(3, 2, data), Wait]);
        assert!(matches!(outcome, Err(Problem::Broken(_))), "{outcome:?}");
    }
    let outcome = list(vec![reply(3, 3, &[0, 0]), Wait]);
    assert!(matches!(outcome, Err(Problem::Broken(_))), "{outcome:?}");
    let outcome = list(vec![reply(3, wire::REP_ERROR | 2, b"secret"), Wait]);
    assert!(
        matches!(outcome, Err(Problem::Refused { .. })),
        "{outcome:?}"
    );
}

#[test]
fn a_list_without_end() {
    let line = [header(3, 2, 4), vec![0; 4]].concat();
    let outcome = list(vec![Say(line.repeat(MAX_LIST / 64)), Wait]);
    assert!(
        matches!(
            outcome,
            Err(Problem::Broken("its list of exports does not end"))
        ),
        "{outcome:?}"
    );
}

#[test]
fn options_take_a_fixed_server() {
    let script = vec![greeting(0), Hear(0_u32.to_be_bytes().to_vec()), Wait];
    let (stream, server) = serve(script, PATIENCE);
    let mut handshake = Handshake::begin(stream).unwrap();
    assert!(matches!(handshake.list(), Err(Problem::NotFixed)));
    assert!(matches!(handshake.info("x"), Err(Problem::NotFixed)));
    drop(handshake);
    server.join().unwrap();
}

/// Whatever a server says, nothing panics.
#[test]
fn noise() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..500 {
        let mut bytes = Vec::new();
        for _ in 0..random() % 4 {
            let kind = [1, 2, 3, 3, wire::REP_ERROR | 6][(random() % 5) as usize];
            let len = (random() % 24) as usize;
            let mut data: Vec<u8> = (0..len).map(|_| random() as u8).collect();
            if let Some(first) = data.first_mut() {
                *first = 0;
            }
            bytes.extend(header(7, kind, len as u32 + (random() % 8 == 0) as u32));
            bytes.extend(data);
        }
        let _ = answered([Say(bytes)]);
    }
}

/// Asks for structured replies, which are answered so, and then for an export with DF among its flags.
fn structured(answer: Act) -> (Result<(), Problem>, Export) {
    let mut script = greeted();
    script.extend([
        option(8, b""),
        answer,
        go(""),
        reply(7, 3, &info_export(4096, 0x81)),
        reply(7, 1, &[]),
        Wait,
    ]);
    let (stream, server) = serve(script, PATIENCE);
    let mut handshake = Handshake::begin(stream).unwrap();
    let agreed = handshake.ask_for_structured_replies();
    let (_, export) = handshake.go("").unwrap();
    server.join().unwrap();
    (agreed, export)
}

#[test]
fn structured_replies_are_agreed_on() {
    let (agreed, export) = structured(reply(8, 1, &[]));
    assert!(agreed.is_ok() && export.structured_replies);
    assert_eq!(export.flags, 0x81);
}

#[test]
fn without_structured_replies() {
    for (error, refusal) in [(1, Refusal::Unsupported), (2, Refusal::Policy)] {
        let (agreed, export) = structured(reply(8, wire::REP_ERROR | error, b"what?"));
        match agreed {
            Err(Problem::Refused { refusal: told, .. }) => assert_eq!(told, refusal),
            other => panic!("{other:?}"),
        }
        assert!(!export.structured_replies);
        assert_eq!(export.flags, 1, "a flag that makes no sense then");
    }
}

#[test]
fn a_server_that_knows_no_options_is_not_asked_for_structured_replies() {
    let script = vec![greeting(0), Hear(0_u32.to_be_bytes().to_vec()), Wait];
    let (stream, server) = serve(script, PATIENCE);
    let mut handshake = Handshake::begin(stream).unwrap();
    let refused = handshake.ask_for_structured_replies();
    assert!(matches!(refused, Err(Problem::NotFixed)), "{refused:?}");
    drop(handshake);
    server.join().unwrap();
}
