// SPDX-License-Identifier: GPL-2.0

//! The fixed newstyle handshake of NBD, from the client's side.
//!
//! What a server announces is checked before anything is allocated for it, and no step can take longer
//! than the stream's patience.

#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use crate::stream::{Stream, is_end};
use crate::text::plain;
use crate::tls;
use crate::wire::{self, Fields, Opt, Refusal};

/// What a reply to an option may have at most, in bytes.
const MAX_REPLY: u32 = 64 << 10;

/// What a list of exports may have at most, all its replies together, in bytes.
const MAX_LIST: usize = 4 << 20;

/// How many letters of an error's text are shown.
const MAX_WORDS: usize = 500;

/// Why a handshake has failed.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("{}", io_text(.0))]
    Io(io::Error),
    #[error(transparent)]
    Tls(tls::Problem),
    #[error("what answers there does not speak NBD")]
    NotNbd,
    #[error("the server speaks the old style of the protocol only")]
    OldStyle,
    #[error("the server does not speak the fixed newstyle protocol, which this takes")]
    NotFixed,
    #[error("the server breaks the protocol: {0}")]
    Broken(&'static str),
    #[error("the server refuses: {refusal}{}", words_text(.words))]
    Refused { refusal: Refusal, words: String },
    #[error("the server has closed the connection, which is how this old server refuses an export")]
    NoSuchExport,
}

/// What TLS has to say comes through reading and writing as well.
impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        error.downcast().map_or_else(Self::Io, Self::Tls)
    }
}

fn io_text(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => "the server does not answer in time".into(),
        _ if is_end(error) => "the server has closed the connection".into(),
        _ => error.to_string(),
    }
}

fn words_text(words: &str) -> String {
    match words {
        "" => String::new(),
        words => format!(": \"{}\"", plain(words)),
    }
}

/// What a server says of block sizes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    pub minimum: u32,
    pub preferred: u32,
    pub max_payload: u32,
}

/// What a server says of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    pub size: u64,
    pub flags: u16,
    pub block_sizes: Option<BlockSizes>,
    pub description: Option<String>,
    /// Whether structured replies were agreed on.
    pub structured_replies: bool,
}

#[cfg(test)]
impl Export {
    /// One of 1 MiB, with these flags and this smallest block.
    pub fn of(flags: u16, minimum: u32) -> Self {
        Self {
            size: 1 << 20,
            flags,
            block_sizes: Some(BlockSizes {
                minimum,
                preferred: 4096,
                max_payload: 1 << 20,
            }),
            ..Export::default()
        }
    }
}

/// One line of a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub description: Option<String>,
}

/// A connection whose server has greeted, and waits for options.
#[derive(Debug)]
pub struct Handshake {
    stream: Stream,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
}

impl Handshake {
    /// Reads the greeting and answers it.
    ///
    /// # Errors
    ///
    /// Nobody greets, or it is no server of the newstyle protocol.
    pub fn begin(mut stream: Stream) -> Result<Self, Problem> {
        stream.begin_step();
        let magic = read_u64(&mut stream)?;
        if magic != wire::MAGIC {
            return Err(Problem::NotNbd);
        }
        match read_u64(&mut stream)? {
            wire::NEWSTYLE => (),
            wire::OLDSTYLE => return Err(Problem::OldStyle),
            _ => return Err(Problem::NotNbd),
        }
        let mut flags = [0; 2];
        stream.read_exact(&mut flags)?;
        let agreed = u16::from_be_bytes(flags) & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        stream.write_all(&u32::from(agreed).to_be_bytes())?;
        Ok(Self {
            stream,
            fixed: agreed & wire::FIXED_NEWSTYLE != 0,
            no_zeroes: agreed & wire::NO_ZEROES != 0,
            structured: false,
        })
    }

    /// Asks for TLS (`NBD_OPT_STARTTLS`), which must come before any other option.
    ///
    /// # Errors
    ///
    /// As those of the others: the server refuses, or breaks the protocol, or is gone.
    pub fn ask_for_tls(&mut self) -> Result<(), Problem> {
        self.send(Opt::StartTls, &[])?;
        match self.reply(Opt::StartTls)? {
            None => Ok(()),
            Some(_) => Err(Problem::Broken("it answers STARTTLS with something else")),
        }
    }

    /// Does the handshake of TLS, for which the server waits after [`Self::ask_for_tls()`].
    ///
    /// Nothing that was received before counts any more: the stream has no buffer in which it could have
    /// come too early, and nothing but the greeting was asked for.
    ///
    /// # Errors
    ///
    /// One of the two does not accept the other, or the server is gone. The connection cannot be used then.
    pub fn start_tls(&mut self, client: &tls::Client) -> Result<(), Problem> {
        Ok(self.stream.start_tls(client)?)
    }

    /// Asks for structured replies (`NBD_OPT_STRUCTURED_REPLY`). If the server agrees, it may use them as soon as an
    /// export is chosen.
    ///
    /// # Errors
    ///
    /// The server refuses, or knows no options; it can be asked for an export nevertheless. Or it breaks the protocol,
    /// or is gone.
    pub fn ask_for_structured_replies(&mut self) -> Result<(), Problem> {
        self.send(Opt::StructuredReply, &[])?;
        match self.reply(Opt::StructuredReply)? {
            None => {
                self.structured = true;
                Ok(())
            }
            Some(_) => Err(Problem::Broken(
                "it answers STRUCTURED_REPLY with something else",
            )),
        }
    }

    /// Chooses an export and ends the handshake: the socket is ready for requests then.
    ///
    /// A server that does not know `NBD_OPT_GO` is asked with `NBD_OPT_EXPORT_NAME`.
    ///
    /// # Errors
    ///
    /// The server refuses, or breaks the protocol, or is gone.
    pub fn go(mut self, name: &str) -> Result<(OwnedFd, Export), Problem> {
        match self.choose(name) {
            Ok(export) => Ok((self.stream.into_socket()?, export)),
            Err(problem) => {
                // To a server that refuses politely.
                if matches!(problem, Problem::Refused { .. }) {
                    self.abort();
                }
                Err(problem)
            }
        }
    }

    fn choose(&mut self, name: &str) -> Result<Export, Problem> {
        if !self.fixed {
            return self.export_name(name);
        }
        match self.describe(Opt::Go, name, &[wire::INFO_BLOCK_SIZE]) {
            Err(Problem::Refused {
                refusal: Refusal::Unsupported,
                ..
            }) => self.export_name(name),
            outcome => outcome,
        }
    }

    /// Describes an export, without choosing it.
    ///
    /// # Errors
    ///
    /// The server refuses, or breaks the protocol, or is gone.
    pub fn info(&mut self, name: &str) -> Result<Export, Problem> {
        let wanted = [wire::INFO_BLOCK_SIZE, wire::INFO_DESCRIPTION];
        self.describe(Opt::Info, name, &wanted)
    }

    /// Lists the exports.
    ///
    /// # Errors
    ///
    /// The server refuses, or breaks the protocol, or is gone, or the list is too long.
    pub fn list(&mut self) -> Result<Vec<Listed>, Problem> {
        self.send(Opt::List, &[])?;
        let mut list = Vec::new();
        let mut total = 0_usize;
        while let Some((kind, data)) = self.reply(Opt::List)? {
            if kind != wire::REP_SERVER {
                return Err(Problem::Broken("it answers LIST with something else"));
            }
            // What each line costs besides its text, too.
            total = total.saturating_add(data.len()).saturating_add(64);
            if total > MAX_LIST {
                return Err(Problem::Broken("its list of exports does not end"));
            }
            let listed = parse_listed(&data);
            list.push(listed.ok_or(Problem::Broken("an item of its list is cut short"))?);
        }
        Ok(list)
    }

    /// Says goodbye. The answer does not matter.
    pub fn abort(mut self) {
        let _ = self.send(Opt::Abort, &[]);
        self.stream.end();
    }

    /// `NBD_OPT_GO`, or `NBD_OPT_INFO`, which has the same form.
    fn describe(&mut self, option: Opt, name: &str, wanted: &[u16]) -> Result<Export, Problem> {
        let mut request = length(name.len()).to_be_bytes().to_vec();
        request.extend(name.as_bytes());
        request.extend((wanted.len() as u16).to_be_bytes());
        request.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
        self.send(option, &request)?;
        let (mut export, mut has_size) = (Export::default(), false);
        while let Some((kind, data)) = self.reply(option)? {
            if kind != wire::REP_INFO {
                return Err(Problem::Broken("it answers with an unknown kind of reply"));
            }
            let about = parse_info(&data, &mut export);
            let about = about.ok_or(Problem::Broken("an information is cut short"))?;
            has_size |= about == wire::INFO_EXPORT;
        }
        if !has_size {
            return Err(Problem::Broken("it agrees without telling the size"));
        }
        self.checked(export)
    }

    /// `NBD_OPT_EXPORT_NAME`, which old servers know. There is no way to refuse it but to go away.
    fn export_name(&mut self, name: &str) -> Result<Export, Problem> {
        self.send(Opt::ExportName, name.as_bytes())?;
        let size = match read_u64(&mut self.stream) {
            Err(Problem::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(Problem::NoSuchExport);
            }
            size => size?,
        };
        let mut flags = [0; 2];
        self.stream.read_exact(&mut flags)?;
        if !self.no_zeroes {
            self.stream.read_exact(&mut [0; 124])?;
        }
        let export = Export {
            size,
            flags: u16::from_be_bytes(flags),
            ..Export::default()
        };
        self.checked(export)
    }

    /// An export that makes sense, with what was agreed on before.
    fn checked(&self, mut export: Export) -> Result<Export, Problem> {
        check(&export)?;
        export.structured_replies = self.structured;
        if !self.structured {
            // It tells drivers that replies are structured.
            export.flags &= !wire::SEND_DF;
        }
        Ok(export)
    }

    /// Begins a step.
    fn send(&mut self, option: Opt, data: &[u8]) -> Result<(), Problem> {
        if !self.fixed && option != Opt::ExportName {
            return Err(Problem::NotFixed);
        }
        self.stream.begin_step();
        let mut message = wire::NEWSTYLE.to_be_bytes().to_vec();
        message.extend((option as u32).to_be_bytes());
        message.extend(length(data.len()).to_be_bytes());
        message.extend(data);
        Ok(self.stream.write_all(&message)?)
    }

    /// The next reply to an option; `None` is the last one, by which the server agrees.
    fn reply(&mut self, option: Opt) -> Result<Option<(u32, Vec<u8>)>, Problem> {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header)?;
        let mut fields = Fields(&header);
        if fields.u64() != Some(wire::REPLY_MAGIC) {
            return Err(Problem::Broken("a reply has no magic number"));
        }
        if fields.u32() != Some(option as u32) {
            return Err(Problem::Broken("it answers an option that was not sent"));
        }
        let (Some(kind), Some(len)) = (fields.u32(), fields.u32()) else {
            return Err(Problem::Broken("a reply is cut short"));
        };
        if len > MAX_REPLY {
            return Err(Problem::Broken("a reply has more than 64 KiB"));
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        match kind {
            wire::REP_ACK if data.is_empty() => Ok(None),
            wire::REP_ACK => Err(Problem::Broken("it agrees with data")),
            kind if kind & wire::REP_ERROR != 0 => Err(refused(kind, &data)),
            kind => Ok(Some((kind, data))),
        }
    }
}

fn refused(kind: u32, words: &[u8]) -> Problem {
    let words = String::from_utf8_lossy(words);
    Problem::Refused {
        refusal: kind.into(),
        words: words.trim().chars().take(MAX_WORDS).collect(),
    }
}

/// A length of something of ours, all of which is short.
fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn read_u64(stream: &mut Stream) -> Result<u64, Problem> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

/// `NBD_REP_SERVER`: a name with its length, and perhaps words for people.
fn parse_listed(data: &[u8]) -> Option<Listed> {
    let mut fields = Fields(data);
    let len = fields.u32()?;
    let name = String::from_utf8_lossy(fields.bytes(len)?).into_owned();
    let description = Some(fields.text()).filter(|words| !words.is_empty());
    Some(Listed { name, description })
}

/// `NBD_REP_INFO`. Returns what it is about; what is not known is ignored, as it has to be.
fn parse_info(data: &[u8], export: &mut Export) -> Option<u16> {
    let mut fields = Fields(data);
    let about = fields.u16()?;
    match about {
        wire::INFO_EXPORT => {
            export.size = fields.u64()?;
            export.flags = fields.u16()?;
        }
        wire::INFO_BLOCK_SIZE => {
            export.block_sizes = Some(BlockSizes {
                minimum: fields.u32()?,
                preferred: fields.u32()?,
                max_payload: fields.u32()?,
            });
        }
        wire::INFO_DESCRIPTION => export.description = Some(fields.text()),
        _ => (),
    }
    Some(about)
}

/// What no server may say.
fn check(export: &Export) -> Result<(), Problem> {
    if i64::try_from(export.size).is_err() {
        return Err(Problem::Broken(
            "the export's size does not fit into 63 bits",
        ));
    }
    let Some(sizes) = export.block_sizes else {
        return Ok(());
    };
    if !sizes.minimum.is_power_of_two() || sizes.minimum > 64 << 10 {
        return Err(Problem::Broken(
            "the minimum block size is no power of two up to 64 KiB",
        ));
    }
    if sizes.max_payload < sizes.minimum {
        return Err(Problem::Broken("the maximum payload is below the minimum"));
    }
    Ok(())
}
