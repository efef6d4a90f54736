// SPDX-License-Identifier: GPL-2.0
//! What happens, read from bytes that mean something whatever they are.

use crate::kapi::block::request::Op;
use crate::rnbd_table::Structured;

/// Places of the table.
pub(crate) const SLOTS: usize = 8;

/// A script's data is never longer than this in all.
const LONGEST: usize = 256 << 10;

/// A command that a script may refer to.
#[derive(Clone, Copy)]
pub(crate) struct Command {
    pub(crate) cookie: u64,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u32,
}

pub(crate) enum Step {
    /// A command is started, unless its slot is busy.
    Start {
        slot: usize,
        op: Op,
        len_bytes: u32,
        /// How large the pieces of its memory are.
        piece_bytes: usize,
        /// Or on another connection.
        ours: bool,
    },
    /// The server sends something.
    Serve(Vec<u8>),
    /// At most so much comes in, and is received.
    Arrive { limit: usize, reader: Reader },
    /// At most so much is sent.
    Send { limit: usize },
}

impl Step {
    /// All that the server has sent comes in.
    pub(crate) const ALL: Step = Step::Arrive {
        limit: usize::MAX,
        reader: Reader::Work,
    };
}

/// Who receives first. The work item does the rest.
#[derive(Clone, Copy)]
pub(crate) enum Reader {
    /// The callback of TCP, from segments that are no longer than this.
    Callback {
        segment_bytes: usize,
    },
    /// The task that has sent it over a UNIX socket.
    Sender,
    Work,
}

const OPS: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes];
const LENGTHS: [u32; 8] = [512, 512, 1024, 4096, 8192, 33280, 65536, 131_072];
const PIECES: [usize; 4] = [512, 4096, 4096, 65536];
const ERRORS: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];

pub(crate) struct Script<'a> {
    left: &'a [u8],
    served: usize,
    started: usize,
}

impl<'a> Script<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Script {
            left: bytes,
            served: 0,
            started: 0,
        }
    }

    /// Whether the server of this script sends structured replies.
    pub(crate) fn structured(bytes: &[u8]) -> Structured {
        match bytes.first().unwrap_or(&0) >> 6 {
            0 => Structured::No,
            3 => Structured::Required,
            _ => Structured::Possible,
        }
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, left) = self.left.split_first()?;
        self.left = left;
        Some(*first)
    }

    fn number(&mut self) -> Option<usize> {
        Some((usize::from(self.byte()?) << 8) | usize::from(self.byte()?))
    }

    /// The next step, which may refer to these commands.
    pub(crate) fn next_step(&mut self, commands: &[Command]) -> Option<Step> {
        let kind = self.byte()?;
        Some(match kind % 8 {
            0 | 1 => self.start()?,
            2 => self.serve(Self::raw)?,
            3 if kind & 8 != 0 => {
                let chunk = self.chunk(commands)?;
                self.serve(|_| Some(chunk))?
            }
            3 | 4 => {
                let reply = self.reply(commands)?;
                self.serve(|_| Some(reply))?
            }
            5 => Step::Arrive {
                limit: self.number()?,
                reader: Reader::Callback {
                    segment_bytes: if kind & 8 == 0 { 64 << 10 } else { 61 },
                },
            },
            6 => Step::Arrive {
                limit: self.number()?,
                reader: match kind & 8 {
                    0 => Reader::Work,
                    _ => Reader::Sender,
                },
            },
            _ => Step::Send {
                limit: self.number()?,
            },
        })
    }

    fn start(&mut self) -> Option<Step> {
        let (what, size) = (self.byte()?, self.byte()?);
        let len_bytes = LENGTHS[usize::from(size % 8)];
        self.started += len_bytes as usize;
        if self.started > LONGEST {
            return None;
        }
        Some(Step::Start {
            slot: usize::from(what) % SLOTS,
            op: OPS[usize::from(what / 8) % OPS.len()],
            len_bytes,
            piece_bytes: PIECES[usize::from(size / 8) % PIECES.len()],
            ours: size < 0xf0,
        })
    }

    fn serve(&mut self, bytes: impl FnOnce(&mut Self) -> Option<Vec<u8>>) -> Option<Step> {
        let bytes = bytes(self)?;
        self.served += bytes.len();
        (self.served <= LONGEST).then_some(Step::Serve(bytes))
    }

    /// Bytes as they are in the script.
    fn raw(&mut self) -> Option<Vec<u8>> {
        let len = usize::from(self.byte()?).min(self.left.len());
        let (bytes, left) = self.left.split_at(len);
        self.left = left;
        Some(bytes.to_vec())
    }

    /// A reply, mostly to one of the commands, and data, mostly as much as some read wants.
    fn reply(&mut self, commands: &[Command]) -> Option<Vec<u8>> {
        let (which, how, size) = (self.byte()?, self.byte()?, self.byte()?);
        let command = commands.get(usize::from(which) % commands.len().max(1));
        let mut cookie = command.map_or(0, |command| command.cookie);
        let mut magic = 0x6744_6698_u32;
        let mut error = 0;
        match how % 16 {
            0 => cookie ^= 1 << (size % 64),
            1 => cookie = cookie.wrapping_add(1 << 32),
            2 => cookie = cookie.wrapping_sub(1 << 32),
            3 => magic ^= 1 << (size % 32),
            4 => magic = 0x668e_33ef,
            5 | 6 => error = ERRORS[usize::from(size) % 8],
            7 => error = u32::from(size) << (how / 16 * 2),
            _ => {}
        }
        let mut reply = magic.to_be_bytes().to_vec();
        reply.extend(error.to_be_bytes());
        reply.extend(cookie.to_be_bytes());
        let data = match how / 32 {
            0..4 => 0,
            4 | 5 => LENGTHS[usize::from(size % 8)] as usize,
            6 => usize::from(size),
            _ => LENGTHS[usize::from(size % 8)] as usize - usize::from(size / 8),
        };
        reply.extend((0..data).map(|at| (at ^ (at >> 8)) as u8 ^ which));
        Some(reply)
    }

    /// A chunk, mostly of the reply to one of the commands, and mostly with content that it wants.
    fn chunk(&mut self, commands: &[Command]) -> Option<Vec<u8>> {
        let (which, how, place) = (self.byte()?, self.byte()?, self.byte()?);
        let command = commands.get(usize::from(which) % commands.len().max(1))?;
        let unit = match place >> 6 {
            0 => command.len_bytes,
            1 => command.len_bytes / 2,
            2 => command.len_bytes / 8,
            _ => 1,
        };
        let (at, count) = (u32::from(place & 7), u32::from((place >> 3) & 7));
        let mut offset = command.offset_bytes + u64::from(at.min(7) * unit);
        let mut len = (count + 1) * unit;
        if unit == command.len_bytes {
            // All of it, most of the time.
            let odd = place & 0x30 == 0x30;
            offset = command.offset_bytes + u64::from(if odd { at } else { 0 });
            len = unit;
        }
        let mut kind: u16 = [1, 1, 1, 2, 2, 0, 0x8001, 0x8002][usize::from(how % 8)];
        let mut error = ERRORS[usize::from(count as u8) % 8];
        let mut text = usize::from(which >> 3) * 8;
        let mut after = 0;
        match (how >> 3) & 15 {
            1 => kind = (u16::from(place) << 8) | 7,
            2 => offset = u64::MAX - u64::from(at),
            3 => error = 0,
            4 => after = usize::from(at as u8),
            5 => text = 3 << 8,
            6 => len = 0,
            _ => {}
        }
        let mut body = Vec::new();
        match kind {
            0 => {}
            1 => {
                body.extend(offset.to_be_bytes());
                body.extend((0..len).map(|at| (at ^ (at >> 8)) as u8 ^ which));
            }
            2 => {
                body.extend(offset.to_be_bytes());
                body.extend(len.to_be_bytes());
            }
            _ => {
                body.extend(error.to_be_bytes());
                body.extend((text as u16).to_be_bytes());
                // A length that is in the wrong order has no such text.
                body.extend((0..text % (3 << 8)).map(|at| at as u8 ^ place));
                if kind == 0x8002 {
                    body.extend(offset.to_be_bytes());
                }
            }
        }
        body.extend(vec![which; after]);
        let mut chunk = 0x668e_33ef_u32.to_be_bytes().to_vec();
        chunk.extend(u16::from(how >> 7).to_be_bytes());
        chunk.extend(kind.to_be_bytes());
        chunk.extend(command.cookie.to_be_bytes());
        chunk.extend((body.len() as u32).to_be_bytes());
        chunk.extend(body);
        Some(chunk)
    }
}
