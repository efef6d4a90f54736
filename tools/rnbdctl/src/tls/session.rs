// SPDX-License-Identifier: GPL-2.0

//! A connection that this process encrypts.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use rustls::{ClientConnection, Error, ExtractedSecrets, InvalidMessage, ProtocolVersion};

use super::{Client, Problem, kernel};
use crate::stream::is_end;

/// What a record begins with: its type, a version, and its length.
const HEADER: usize = 5;

/// What a record may have besides, at most, in bytes: 16 KiB, and what encryption adds.
const MAX_RECORD: u16 = (16 << 10) + 2048;

/// Types of records, from change_cipher_spec to application_data.
const TYPES: std::ops::RangeInclusive<u8> = 20..=23;

/// How many records are read for what a server that is gone has said: session tickets can come before it.
const LAST_RECORDS: usize = 16;

/// A connection on which the handshake of TLS is done. What carries it is passed to each call.
#[derive(Debug)]
pub struct Session {
    pub(super) connection: ClientConnection,
}

impl Session {
    /// Does the handshake.
    ///
    /// # Errors
    ///
    /// Those of `wire`; and a [`Problem`], if either side does not accept the other.
    pub fn begin(client: &Client, wire: &mut (impl Read + Write)) -> io::Result<Self> {
        let connection = client.connection().map_err(Problem::from)?;
        let mut session = Self { connection };
        session.flush(wire)?;
        while session.connection.is_handshaking() {
            session.receive(wire)?;
        }
        Ok(session)
    }

    /// As [`Read::read()`]: what the server has sent, decrypted.
    ///
    /// # Errors
    ///
    /// Those of [`Self::begin()`].
    pub fn read(&mut self, wire: &mut (impl Read + Write), bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.receive(wire)?,
                outcome => return outcome,
            }
        }
    }

    /// As [`Write::write()`].
    ///
    /// # Errors
    ///
    /// Those of [`Self::begin()`].
    pub fn write(&mut self, wire: &mut (impl Read + Write), bytes: &[u8]) -> io::Result<usize> {
        let taken = self.connection.writer().write(bytes)?;
        self.send(wire)?;
        Ok(taken)
    }

    /// Sends what is encrypted. Where the server is gone, what it said before is the better error.
    fn send(&mut self, wire: &mut (impl Read + Write)) -> io::Result<()> {
        match self.flush(wire) {
            Err(error) if is_end(&error) => {
                Err(self.last_words(wire).map_or(error, io::Error::from))
            }
            outcome => outcome,
        }
    }

    /// What a server that has closed the connection said before.
    ///
    /// It may have found fault with the first records of several. With TLS 1.3 a client may even go on
    /// before the server has seen its certificate.
    fn last_words(&mut self, wire: &mut impl Read) -> Option<Problem> {
        for _ in 0..LAST_RECORDS {
            let record = read_record(wire).ok()?;
            match self.process(&record) {
                Ok(()) => (),
                Err(error) => return error.downcast().ok(),
            }
        }
        None
    }

    /// Says goodbye. Whether that arrives does not matter.
    pub fn end(mut self, wire: &mut impl Write) {
        self.connection.send_close_notify();
        let _ = self.flush(wire);
    }

    /// Has the kernel encrypt from here on. `wire` is the socket.
    ///
    /// # Errors
    ///
    /// A [`Problem`]: the server has sent what nobody will read, or the kernel refuses. Those of `wire`.
    pub fn into_kernel(self, wire: &mut (impl Read + Write + AsFd)) -> io::Result<()> {
        let (version, secrets) = self.into_secrets(wire)?;
        kernel::install(wire, version, secrets)
    }

    /// The keys, and the numbers of the next records.
    ///
    /// A server may ask for new keys at any time (RFC 8446, section 4.6.3). The library then uses a new one,
    /// but tells the server with the next thing that is sent, which the kernel would send. So it is told now,
    /// by writing nothing.
    pub(super) fn into_secrets(
        mut self,
        wire: &mut (impl Read + Write),
    ) -> io::Result<(Option<ProtocolVersion>, ExtractedSecrets)> {
        match self.connection.reader().read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => return Err(Problem::Early.into()),
        }
        self.write(wire, &[])?;
        let version = self.connection.protocol_version();
        let secrets = self.connection.dangerous_extract_secrets();
        Ok((version, secrets.map_err(Problem::from)?))
    }

    /// Reads one record, and sends what it has to be answered with. The server is told of errors.
    fn receive(&mut self, wire: &mut (impl Read + Write)) -> io::Result<()> {
        let record = read_record(wire)?;
        match self.process(&record) {
            Ok(()) => self.send(wire),
            Err(error) => {
                let _ = self.flush(wire);
                Err(error)
            }
        }
    }

    /// Decrypts a record. Behind `close_notify` nothing counts, and the library does not take it.
    fn process(&mut self, mut record: &[u8]) -> io::Result<()> {
        while !record.is_empty() {
            if self.connection.read_tls(&mut record)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.connection
                .process_new_packets()
                .map_err(Problem::from)?;
        }
        Ok(())
    }

    fn flush(&mut self, wire: &mut impl Write) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(wire) {
                // Whoever calls would encrypt the same again.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                outcome => drop(outcome?),
            }
        }
        wire.flush()
    }
}

/// Reads a record, and nothing of what follows it.
fn read_record(wire: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut header = [0; HEADER];
    wire.read_exact(&mut header)?;
    let [kind, _, _, high, low] = header;
    let len = u16::from_be_bytes([high, low]);
    if !TYPES.contains(&kind) {
        return Err(not_tls(InvalidMessage::InvalidContentType));
    }
    if len > MAX_RECORD {
        return Err(not_tls(InvalidMessage::MessageTooLarge));
    }
    let mut record = header.to_vec();
    record.resize(HEADER + usize::from(len), 0);
    if let Some(body) = record.get_mut(HEADER..) {
        wire.read_exact(body)?;
    }
    Ok(record)
}

fn not_tls(how: InvalidMessage) -> io::Error {
    Problem::from(Error::from(how)).into()
}
