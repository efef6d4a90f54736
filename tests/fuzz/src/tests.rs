// SPDX-License-Identifier: GPL-2.0
//! The same without a fuzzer: what it has found, once more, and what needs no search.

mod budgets;

use crate::{
    kapi::block::request::{Extent, Log, Op, Outcome, Request, Status, Unanswered, Unsent},
    kapi::{
        block::payload::Payload,
        net::{sock::Socket, transfer::Next},
    },
    prelude::*,
    pure::cmd::Cookie,
    pure::proto::{self as proto, Command, RequestHeader, ServerError},
    rnbd_translate::{RequestDescription, status_of, wire_of},
    stream::{Mode, Receive, Transmit, send_disconnect_on},
};
use proptest::prelude::*;
use std::fs;

/// Each is there because it goes where no other does.
#[test]
fn the_corpus_is_understood() {
    let corpus = fs::read_dir("corpus").expect("the corpus");
    let scripts = corpus.map(|entry| fs::read(entry.unwrap().path()).expect("a script"));
    let count = scripts.map(|script| crate::run(&script)).count();
    assert!(count > 10, "{count} scripts");
}

const HEADER: usize = 28;

fn extent(op: Op, len_bytes: u32) -> Extent {
    Extent {
        op,
        offset_bytes: 1 << 40,
        len_bytes,
        fua: false,
        nounmap: false,
    }
}

/// A connection's transmit side, and what it has to send.
struct Sender {
    transmit: Transmit,
    socket: Socket,
    given_back: Log,
    staged: u32,
    to_send: Vec<u8>,
}

impl Sender {
    fn new() -> Self {
        Sender {
            transmit: Transmit::new().unwrap(),
            socket: Socket::default(),
            given_back: Log::default(),
            staged: 0,
            to_send: Vec::new(),
        }
    }

    /// Stages a request whose data is in pieces of `piece_bytes`.
    fn stage(&mut self, op: Op, len_bytes: u32, piece_bytes: usize) {
        let extent = extent(op, len_bytes);
        let request = Request::new(self.staged, extent, piece_bytes, &self.given_back);
        for (at, byte) in request.data.borrow_mut().iter_mut().enumerate() {
            *byte = (at ^ (at >> 8)) as u8 ^ self.staged as u8;
        }
        let wire = wire_of(&extent, Cookie::new(7, self.staged)).unwrap();
        self.to_send.extend(wire.encode());
        if op == Op::Write {
            self.to_send.extend(&*request.data.borrow());
        }
        self.staged += 1;
        let payload = Payload::new(Unsent(request));
        self.transmit.stage(&wire, Some(payload));
    }

    /// Has the socket take at most `limit` bytes. Returns how many it took, how many requests ended in
    /// them, and whether that was all.
    fn send(&mut self, limit: usize) -> (usize, u64, bool) {
        self.send_before(limit, Next::Nothing)
    }

    /// Does the same before `next`.
    fn send_before(&mut self, limit: usize, next: Next) -> (usize, u64, bool) {
        self.socket.limit.set(limit);
        let sent = self.transmit.send(&self.socket, next).unwrap();
        (sent.bytes, sent.requests, sent.all)
    }

    fn assert_sent(&self) {
        assert!(
            *self.socket.outgoing.borrow() == self.to_send,
            "wrong bytes were sent"
        );
        assert!(self.given_back.borrow().is_empty());
    }
}

#[test]
fn sixty_four_requests_are_staged() {
    let mut sender = Sender::new();
    assert!(sender.transmit.is_empty());
    for _ in 0..64 {
        assert!(sender.transmit.can_stage());
        sender.stage(Op::Read, 512, 512);
    }
    assert!(!sender.transmit.can_stage());
    assert_eq!(sender.send(usize::MAX), (64 * HEADER, 64, true));
    assert!(sender.transmit.can_stage() && sender.transmit.is_empty());
    sender.assert_sent();
}

#[test]
fn more_is_announced_until_all_was_sent_without_that() {
    let mut sender = Sender::new();
    sender.stage(Op::Read, 512, 512);
    assert_eq!(
        sender.send_before(usize::MAX, Next::More),
        (HEADER, 1, true)
    );
    assert!(sender.transmit.announced_more());
    sender.stage(Op::Read, 512, 512);
    assert!(!sender.transmit.announced_more());
    assert_eq!(sender.send(usize::MAX), (HEADER, 1, true));
    assert!(!sender.transmit.announced_more());
}

#[test]
fn what_follows_a_disconnect_is_sent() {
    let mut sender = Sender::new();
    sender.to_send.extend(RequestHeader::DISCONNECT.encode());
    sender.transmit.stage(&RequestHeader::DISCONNECT, None);
    sender.stage(Op::Read, 512, 512);
    assert_eq!(sender.send(HEADER + 3), (HEADER + 3, 0, false));
    assert_eq!(sender.send(HEADER - 3), (HEADER - 3, 1, true));
    sender.assert_sent();
}

#[test]
fn requests_are_counted_when_their_last_byte_is_sent() {
    let mut sender = Sender::new();
    sender.stage(Op::Write, 512, 512);
    sender.stage(Op::Read, 512, 512);
    assert_eq!(sender.send(HEADER - 1), (HEADER - 1, 0, false));
    assert_eq!(sender.send(1), (1, 0, false));
    assert_eq!(sender.send(511), (511, 0, false));
    assert_eq!(sender.send(1 + HEADER - 1), (HEADER, 1, false));
    assert_eq!(sender.send(1), (1, 1, true));
    assert!(sender.transmit.is_empty());
    sender.assert_sent();
}

/// One call takes 128 pieces of memory.
#[test]
fn more_follows_what_one_call_cannot_send() {
    let mut sender = Sender::new();
    sender.stage(Op::Write, 127 * 512, 512);
    assert_eq!(sender.send(usize::MAX), (HEADER + 127 * 512, 1, true));
    assert!(!sender.socket.more.get());
    sender.stage(Op::Write, 128 * 512, 512);
    assert_eq!(sender.send(usize::MAX), (HEADER + 127 * 512, 0, true));
    assert!(sender.socket.more.get());
    assert_eq!(sender.send(usize::MAX), (512, 1, true));
    assert!(!sender.socket.more.get());
    // So it does where the caller knows.
    sender.stage(Op::Read, 512, 512);
    sender.transmit.send(&sender.socket, Next::More).unwrap();
    assert!(sender.socket.more.get());
    sender.assert_sent();
    // There is no room for the next header, although it would have no data.
    sender.stage(Op::Write, 127 * 512, 512);
    sender.stage(Op::Read, 512, 512);
    assert_eq!(sender.send(usize::MAX), (HEADER + 127 * 512, 1, true));
    assert!(sender.socket.more.get());
}

#[test]
fn what_was_not_wholly_sent_is_given_back() {
    let mut sender = Sender::new();
    for op in [Op::Write, Op::Write, Op::Read] {
        sender.stage(op, 512, 512);
    }
    let first = HEADER + 512;
    assert_eq!(sender.send(2 * first - 1), (2 * first - 1, 1, false));
    sender
        .transmit
        .stage(&proto::RequestHeader::DISCONNECT, None);
    sender.transmit.give_back(Outcome::Requeue);
    assert!(sender.transmit.is_empty());
    let given_back = sender.given_back.borrow();
    let outcomes: Vec<_> = given_back
        .iter()
        .map(|(number, how, _)| (*number, *how))
        .collect();
    assert_eq!(outcomes, [(1, Outcome::Requeue), (2, Outcome::Requeue)]);
}

#[test]
fn a_disconnect_is_no_request() {
    let mut sender = Sender::new();
    sender.stage(Op::Read, 512, 512);
    sender
        .transmit
        .stage(&proto::RequestHeader::DISCONNECT, None);
    sender
        .to_send
        .extend(proto::RequestHeader::DISCONNECT.encode());
    sender.stage(Op::Read, 512, 512);
    assert_eq!(sender.send(HEADER + 1), (HEADER + 1, 1, false));
    assert_eq!(sender.send(HEADER), (HEADER, 0, false));
    assert_eq!(sender.send(usize::MAX), (HEADER - 1, 1, true));
    sender.assert_sent();
    sender.stage(Op::Read, 512, 512);
    assert!(sender.transmit.has_requests());
    sender.send(usize::MAX);
    sender
        .transmit
        .stage(&proto::RequestHeader::DISCONNECT, None);
    assert!(!sender.transmit.has_requests());
    let socket = Socket::default();
    assert_eq!(send_disconnect_on(&socket), Err(EAGAIN));
    socket.limit.set(usize::MAX);
    assert_eq!(send_disconnect_on(&socket), Ok(()));
    assert_eq!(
        *socket.outgoing.borrow(),
        proto::RequestHeader::DISCONNECT.encode()
    );
    assert!(!socket.more.get());
}

/// It would be copied twice where it is data.
#[test]
fn little_is_received_ahead() {
    let mut receive = Receive::new(Mode::Simple).unwrap();
    assert_eq!(receive.awaited_bytes(), 0);
    let socket = Socket::default();
    assert_eq!(receive.fill(&socket), Err(EAGAIN));
    socket.incoming.borrow_mut().extend([0; 2000]);
    socket.limit.set(10);
    assert_eq!(receive.fill(&socket), Ok((10, false)));
    socket.limit.set(usize::MAX);
    assert_eq!(receive.fill(&socket), Ok((502, true)));
    // Data that is waited for goes where it belongs, and leaves as much room.
    let mut receive = Receive::new(Mode::Simple).unwrap();
    let request = Request::new(0, extent(Op::Read, 1024), 512, &Log::default());
    let data = request.data.clone();
    receive.current = Some(Payload::new(Unanswered(request)));
    assert_eq!(receive.awaited_bytes(), 1024);
    socket.incoming.borrow_mut().clear();
    socket.incoming.borrow_mut().extend([7; 1300]);
    assert_eq!(receive.fill(&socket), Ok((1300, false)));
    assert_eq!(receive.awaited_bytes(), 0);
    assert_eq!(*data.borrow(), [7; 1024]);
}

#[test]
fn flags_go_with_what_they_are_for() {
    let cookie = Cookie::new(3, 4);
    for (op, command) in [
        (Op::Read, Command::Read),
        (Op::Write, Command::Write),
        (Op::Flush, Command::Flush),
        (Op::Discard, Command::Trim),
        (Op::WriteZeroes, Command::WriteZeroes),
    ] {
        for (fua, nounmap) in [(false, false), (false, true), (true, false), (true, true)] {
            let asked = Extent {
                fua,
                nounmap,
                ..extent(op, 4096)
            };
            // NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE
            let no_hole = nounmap && op == Op::WriteZeroes;
            let expected = proto::RequestHeader {
                command,
                flags: u16::from(fua) + 2 * u16::from(no_hole),
                cookie: cookie.0,
                offset_bytes: asked.offset_bytes,
                len_bytes: 4096,
            };
            assert_eq!(wire_of(&asked, cookie), Some(expected));
        }
    }
    assert_eq!(wire_of(&extent(Op::Other, 4096), cookie), None);
}

#[test]
fn requests_have_names() {
    let named = |op, len| RequestDescription(&extent(op, len)).to_string();
    assert_eq!(named(Op::Read, 512), "read of 512 bytes at 1099511627776");
    assert_eq!(named(Op::Flush, 0), "flush");
    assert_eq!(named(Op::Other, 8), "request of 8 bytes at 1099511627776");
}

#[test]
fn errors_keep_their_meaning() {
    let ops = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];
    for op in ops {
        let unsupported = match op {
            Op::Discard | Op::WriteZeroes => Status::NOTSUPP,
            _ => Status::IOERR,
        };
        for (error, status) in [
            (ServerError::NotPermitted, Status::TARGET),
            (ServerError::Io, Status::IOERR),
            (ServerError::NoMemory, Status::IOERR),
            (ServerError::Invalid, unsupported),
            (ServerError::NoSpace, Status::NOSPC),
            (ServerError::Overflow, Status::IOERR),
            (ServerError::NotSupported, unsupported),
            (ServerError::Shutdown, Status::IOERR),
            (ServerError::Unknown, Status::IOERR),
        ] {
            assert_eq!(status_of(error, op), status, "{error:?}, {op:?}");
        }
    }
}

/// Steps of scripts in which a server answers reads by chunks.
fn chunk_steps() -> impl Strategy<Value = Vec<u8>> {
    let start = (0_u8..8, 0_u8..32).prop_map(|(slot, size)| vec![0x40, slot, size]);
    let chunk = (0_u8..8, any::<u8>(), any::<u8>())
        .prop_map(|(which, how, place)| vec![0x4b, which, how, place]);
    // Mostly content, in eighths of the read and in order or not, and the end of the reply.
    let eighth = (0_u8..2, 0_u8..8, 0_u8..2, 0_u8..4).prop_map(|(which, at, hole, last)| {
        vec![0x4b, which, (hole * 4) | ((last & 1) << 7), 0x80 | at]
    });
    let end = (0_u8..2).prop_map(|which| vec![0x4b, which, 0x85, 0]);
    let arrive = (0_u8..9, any::<u8>()).prop_map(|(high, low)| vec![0x45, high, low]);
    let fill = (0_u8..9, any::<u8>()).prop_map(|(high, low)| vec![0x46, high, low]);
    prop_oneof![2 => start, 2 => chunk, 8 => eighth, 1 => end, 2 => arrive, 2 => fill]
}

/// What a server sends in reply to one read of 4 KiB: eighths of it, in this order. Returns the outcome.
fn read_in_eighths(order: &[u8], holes: u8, wrong: u8) -> Option<Outcome> {
    use crate::rnbd_table::Structured;
    use crate::script::Script;
    // The first step is one that only says that chunks are expected.
    let mut script = vec![0x47, 0, 0, 0x40, 0, 3];
    for (index, at) in order.iter().enumerate() {
        let hole = ((holes >> index) & 1) * 4;
        let last = u8::from(index + 1 == order.len()) << 7;
        script.extend([0x4b, 0, hole | last | wrong, 0x80 | at]);
    }
    let mut session = crate::Session::new(Structured::Possible);
    let mut steps = Script::new(&script);
    while let Some(step) = steps.next_step(&session.commands()) {
        session.take(step);
    }
    session.take(crate::Step::ALL);
    let decided = session.decided.borrow();
    decided.first().map(|(_, outcome, _)| *outcome)
}

#[test]
fn content_comes_in_many_orders() {
    let done = Some(Outcome::Complete(Status::OK));
    for holes in 0..=255 {
        assert_eq!(read_in_eighths(&[0, 1, 2, 3, 4, 5, 6, 7], holes, 0), done);
        assert_eq!(read_in_eighths(&[7, 6, 5, 4, 3, 2, 1, 0], holes, 0), done);
        assert_eq!(read_in_eighths(&[6, 0, 4, 2, 3, 1, 5, 7], holes, 0), done);
    }
    // Five ranges would be too many, and what is missing or comes twice is found.
    assert_eq!(read_in_eighths(&[0, 1, 2, 3, 4, 5, 6], 0, 0), None);
    assert_eq!(read_in_eighths(&[0, 1, 2, 3, 4, 5, 6, 6], 0, 0), None);
    assert_eq!(read_in_eighths(&[0, 1, 2, 2, 4, 5, 6, 7], 255, 0), None);
}

proptest! {
    #[test]
    fn any_chunks_are_understood(steps in prop::collection::vec(chunk_steps(), 1..60)) {
        crate::run(&steps.concat());
    }

    #[test]
    fn any_script_is_understood(script in prop::collection::vec(any::<u8>(), 0..300)) {
        crate::run(&script);
    }

    /// Whatever the socket takes at a time, and however often the places are used.
    #[test]
    fn everything_is_sent_once(
        requests in prop::collection::vec((any::<bool>(), 1_u32..9, 1_usize..5), 1..200),
        limits in prop::collection::vec(1_usize..3000, 1..20),
    ) {
        let mut sender = Sender::new();
        let mut limits = limits.into_iter().cycle();
        let mut ended = 0;
        let count = requests.len() as u64;
        for (writes, sectors, piece) in requests {
            while !sender.transmit.can_stage() {
                ended += sender.send(limits.next().unwrap()).1;
            }
            let op = if writes { Op::Write } else { Op::Read };
            sender.stage(op, sectors * 512, piece * 512);
        }
        while !sender.transmit.is_empty() {
            ended += sender.send(limits.next().unwrap()).1;
        }
        prop_assert_eq!(ended, count);
        sender.assert_sent();
    }
}
