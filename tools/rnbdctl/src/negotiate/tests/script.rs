// SPDX-License-Identifier: GPL-2.0

//! Servers that follow a script, and what they say and hear.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::stream::Stream;
use crate::wire;

/// What a server does, one after the other. It closes the connection at the end.
pub enum Act {
    Say(Vec<u8>),
    /// One byte at a time.
    Dribble(Vec<u8>, Duration),
    Hear(Vec<u8>),
    /// Says nothing until the client goes away.
    Wait,
}
use Act::*;

pub fn serve(script: Vec<Act>, patience: Duration) -> (Stream, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        for act in script {
            match act {
                // A client that has seen enough goes away.
                Say(bytes) => drop(theirs.write_all(&bytes)),
                Dribble(bytes, pause) => {
                    for byte in bytes {
                        thread::sleep(pause);
                        if theirs.write_all(&[byte]).is_err() {
                            return;
                        }
                    }
                }
                Hear(expected) => {
                    let mut heard = vec![0; expected.len()];
                    theirs.read_exact(&mut heard).unwrap();
                    assert_eq!(heard, expected);
                }
                Wait => drop(theirs.read_to_end(&mut Vec::new())),
            }
        }
    });
    (Stream::new(ours.into(), patience), server)
}

pub fn greeting(flags: u16) -> Act {
    Say([b"NBDMAGICIHAVEOPT", &flags.to_be_bytes()[..]].concat())
}

/// A greeting with both flags, and the answer to it.
pub fn greeted() -> Vec<Act> {
    vec![greeting(3), Hear(3_u32.to_be_bytes().to_vec())]
}

pub fn option(number: u32, data: &[u8]) -> Act {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    Hear(bytes)
}

/// `NBD_OPT_GO` for an export, with the block sizes.
pub fn go(name: &str) -> Act {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend([0, 1, 0, 3]);
    option(7, &data)
}

pub fn header(number: u32, kind: u32, len: u32) -> Vec<u8> {
    let mut bytes = wire::REPLY_MAGIC.to_be_bytes().to_vec();
    for field in [number, kind, len] {
        bytes.extend(field.to_be_bytes());
    }
    bytes
}

pub fn reply(number: u32, kind: u32, data: &[u8]) -> Act {
    Say([header(number, kind, data.len() as u32), data.to_vec()].concat())
}

pub fn info_export(size: u64, flags: u16) -> Vec<u8> {
    [&[0, 0], &size.to_be_bytes()[..], &flags.to_be_bytes()].concat()
}

pub fn info_blocks(minimum: u32, preferred: u32, max_payload: u32) -> Vec<u8> {
    let mut bytes = vec![0, 3];
    for field in [minimum, preferred, max_payload] {
        bytes.extend(field.to_be_bytes());
    }
    bytes
}
