// SPDX-License-Identifier: GPL-2.0

//! Structured replies: what chunks look like, and a server that chooses at random by which ones it answers.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;

use fastrand::Rng;

use super::{Conn, ok};
use crate::proto::{CMD_FLAG_DF, Command, Request};

const MAGIC: u32 = 0x668e_33ef;

/// The flag of the last chunk of a reply.
pub const DONE: u16 = 1 << 0;

/// Types of chunks. An unknown one with the highest bit is an error as well.
pub const NONE: u16 = 0;
pub const OFFSET_DATA: u16 = 1;
pub const OFFSET_HOLE: u16 = 2;
pub const ERROR: u16 = 0x8001;
pub const ERROR_OFFSET: u16 = 0x8002;

/// How many separate intervals of a request a client has to keep in mind at most, while chunks come in an
/// order of this server's choice.
pub const MOST_INTERVALS: usize = 4;

/// A longer list of pieces is sent in ascending order.
const MOST_SHUFFLED: usize = 64;

/// The header of a chunk, whatever it says.
pub fn header(flags: u16, kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    let mut bytes = MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// A chunk with any payload.
pub fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(flags, kind, cookie, payload.len() as u32);
    bytes.extend(payload);
    bytes
}

pub fn none(flags: u16, cookie: u64) -> Vec<u8> {
    chunk(flags, NONE, cookie, &[])
}

/// Data that belongs at `offset` of the device.
pub fn data(flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    chunk(
        flags,
        OFFSET_DATA,
        cookie,
        &[&offset.to_be_bytes(), data].concat(),
    )
}

/// `len` zeroes at `offset` of the device.
pub fn hole(flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let payload = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    chunk(flags, OFFSET_HOLE, cookie, &payload)
}

/// An error, with words.
pub fn error(flags: u16, cookie: u64, number: u32, words: &[u8]) -> Vec<u8> {
    chunk(flags, ERROR, cookie, &error_payload(number, words))
}

/// An error, with words and the place on the device.
pub fn error_at(flags: u16, cookie: u64, number: u32, words: &[u8], offset: u64) -> Vec<u8> {
    let mut payload = error_payload(number, words);
    payload.extend(offset.to_be_bytes());
    chunk(flags, ERROR_OFFSET, cookie, &payload)
}

fn error_payload(number: u32, words: &[u8]) -> Vec<u8> {
    let mut payload = number.to_be_bytes().to_vec();
    payload.extend((words.len() as u16).to_be_bytes());
    payload.extend(words);
    payload
}

/// The script of a connection: takes it over with its first request. Chunks of up to so many requests are
/// mixed.
pub fn serve(conn: &mut Conn, first: &Request, random: &mut Rng) -> io::Result<()> {
    const MIXED: usize = 16;
    let mut pending = vec![reply(conn, first, random)?];
    loop {
        let more = pending.len() < MIXED && conn.readable_within(std::time::Duration::ZERO)?;
        if more || pending.is_empty() {
            let request = conn.next_request()?;
            if request.command == Command::Disconnect {
                return conn.close();
            }
            pending.push(reply(conn, &request, random)?);
            continue;
        }
        let at = random.usize(..pending.len());
        if let Some(chunk) = pending[at].pop_front() {
            conn.send(&chunk)?;
        }
        if pending[at].is_empty() {
            pending.swap_remove(at);
        }
    }
}

/// Does what is asked. The reply is in pieces, between which anything else may be sent.
fn reply(conn: &mut Conn, request: &Request, random: &mut Rng) -> io::Result<VecDeque<Vec<u8>>> {
    if request.command == Command::Read {
        let data = conn.stored(request);
        return Ok(cut(random, request, &data).into());
    }
    conn.answer(request)?;
    let whole = match random.bool() {
        true => none(DONE, request.cookie),
        false => ok(request).to_vec(),
    };
    Ok([whole].into())
}

/// The chunks of a reply to a read of `data`: pieces of random sizes in a random order. Zeroes are a hole,
/// most often.
pub fn cut(random: &mut Rng, request: &Request, data: &[u8]) -> Vec<Vec<u8>> {
    // Such a client has asked for one piece.
    let pieces = match request.flags & CMD_FLAG_DF {
        0 => {
            let pieces = pieces(random, data);
            shuffle(random, pieces)
        }
        _ => std::iter::once(0..data.len()).collect(),
    };
    let last_is_none = random.u8(..3) == 0;
    let last = pieces.len() - 1;
    let mut chunks = Vec::new();
    for (index, piece) in pieces.into_iter().enumerate() {
        let flags = if index == last && !last_is_none {
            DONE
        } else {
            0
        };
        let (offset, piece) = (request.offset + piece.start as u64, &data[piece]);
        let zeroes = piece.iter().all(|byte| *byte == 0) && random.u8(..8) > 0;
        chunks.push(match zeroes {
            true => hole(flags, request.cookie, offset, piece.len() as u32),
            false => self::data(flags, request.cookie, offset, piece),
        });
    }
    if last_is_none {
        chunks.push(none(DONE, request.cookie));
    }
    chunks
}

/// Where the data of a read is cut: anywhere, and where zeroes begin and end.
fn pieces(random: &mut Rng, data: &[u8]) -> Vec<Range<usize>> {
    const PAGE: usize = 4096;
    let mut cuts = vec![0, data.len()];
    for _ in 0..random.u8(..8) {
        let cut = random.usize(..data.len());
        cuts.push(if random.bool() { cut } else { cut & !511 });
    }
    let zeroes = data
        .chunks(PAGE)
        .map(|page| page.iter().all(|byte| *byte == 0));
    let zeroes: Vec<bool> = zeroes.collect();
    let edges = zeroes
        .windows(2)
        .enumerate()
        .filter(|(_, two)| two[0] != two[1]);
    cuts.extend(edges.map(|(page, _)| (page + 1) * PAGE));
    cuts.sort_unstable();
    cuts.dedup();
    cuts.windows(2).map(|ends| ends[0]..ends[1]).collect()
}

/// A random order by which no more than [`MOST_INTERVALS`] have to be kept in mind.
fn shuffle(random: &mut Rng, mut left: Vec<Range<usize>>) -> Vec<Range<usize>> {
    if left.len() > MOST_SHUFFLED || random.u8(..4) == 0 {
        return left;
    }
    let mut order: Vec<Range<usize>> = Vec::new();
    while !left.is_empty() {
        let allowed = |piece: &Range<usize>| {
            let mut sent = order.clone();
            sent.push(piece.clone());
            intervals(sent) <= MOST_INTERVALS
        };
        let allowed: Vec<usize> = (0..left.len()).filter(|at| allowed(&left[*at])).collect();
        let at = *random.choice(&allowed).expect("the next to what was sent");
        order.push(left.remove(at));
    }
    order
}

/// How many there are when those that touch are joined.
fn intervals(mut ranges: Vec<Range<usize>>) -> usize {
    ranges.sort_unstable_by_key(|range| range.start);
    let apart = ranges.windows(2).filter(|two| two[0].end != two[1].start);
    apart.count() + 1
}
