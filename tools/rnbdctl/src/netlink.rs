// SPDX-License-Identifier: GPL-2.0

//! Generic netlink: a family of the kernel, its commands and its dumps.

pub mod listener;
pub mod tls;

use std::cell::Cell;
use std::io::{self, Cursor};

use neli::attr::Attribute;
use neli::consts::nl::{NlmF, NlmsgerrAttr};
use neli::consts::socket::{Msg, NlFamily};
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::NlSocket;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use neli::{FromBytes, Size, ToBytes};
use rustix::io::Errno;

use crate::failure::{Exit, Failure, refused_by_kernel};

/// The family of families (linux/genetlink.h).
const CTRL: u16 = 0x10;
const CTRL_VERSION: u8 = 2;
const CTRL_GETFAMILY: u8 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
const CTRL_FAMILY_VERSION: u16 = 3;
const CTRL_GETPOLICY: u8 = 10;
const CTRL_POLICY: u16 = 8;
const CTRL_OP: u16 = 10;

/// The longest message that the kernel sends in answer to such a buffer.
const BUFFER: usize = 32 << 10;

type Attr = Nlattr<u16, Buffer>;
type Message = Genlmsghdr<u8, u16>;

/// Why there is no answer of the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("the kernel refuses: {}", io::Error::from(*.errno))]
    Refused {
        errno: Errno,
        /// What it adds (extack).
        words: Option<String>,
    },
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("a netlink message cannot be made or understood: {0}")]
    Malformed(String),
}

impl NetlinkError {
    /// For people, with the step in which it happened.
    pub fn during(self, step: &str) -> Failure {
        match self {
            Self::Refused { errno, words } => refused_by_kernel(step, errno, words.as_deref()),
            other => Failure::new(Exit::Failed, step, other),
        }
    }
}

/// The libraries' many kinds of errors are all the same to the reader.
fn malformed(error: impl std::fmt::Display) -> NetlinkError {
    NetlinkError::Malformed(error.to_string())
}

/// Attributes to be sent.
#[derive(Clone, Default)]
pub struct Attrs(Vec<Attr>);

impl Attrs {
    /// Adds an attribute.
    ///
    /// # Errors
    ///
    /// `Malformed`: it does not fit into an attribute.
    pub fn with(mut self, kind: u16, value: impl Size + ToBytes) -> Result<Self, NetlinkError> {
        if value.unpadded_size() > usize::from(u16::MAX) - 8 {
            return Err(malformed("an attribute is too long"));
        }
        self.0.push(attribute(kind, value)?);
        Ok(self)
    }

    /// As [`Self::with`], where there may be no value.
    ///
    /// # Errors
    ///
    /// Those of [`Self::with`].
    pub fn with_some(
        self,
        kind: u16,
        value: Option<impl Size + ToBytes>,
    ) -> Result<Self, NetlinkError> {
        match value {
            Some(value) => self.with(kind, value),
            None => Ok(self),
        }
    }

    /// Adds an attribute that contains others.
    ///
    /// # Errors
    ///
    /// `Malformed`: they do not fit into an attribute.
    pub fn nest(mut self, kind: u16, inner: Self) -> Result<Self, NetlinkError> {
        let mut outer = attribute(kind, Buffer::new())?;
        for attr in &inner.0 {
            outer = outer.nest(attr).map_err(malformed)?;
        }
        self.0.push(outer);
        Ok(self)
    }
}

fn attribute(kind: u16, value: impl Size + ToBytes) -> Result<Attr, NetlinkError> {
    let kind = AttrTypeBuilder::default().nla_type(kind).build();
    NlattrBuilder::default()
        .nla_type(kind.map_err(malformed)?)
        .nla_payload(value)
        .build()
        .map_err(malformed)
}

/// Attributes that the kernel has sent.
#[derive(Debug, Default)]
pub struct Answer(Vec<Attr>);

#[cfg(test)]
impl From<Attrs> for Answer {
    fn from(attrs: Attrs) -> Self {
        Self(attrs.0)
    }
}

impl Answer {
    fn find(&self, kind: u16) -> Option<&Attr> {
        self.0
            .iter()
            .find(|attr| *attr.nla_type().nla_type() == kind)
    }

    pub fn number<T: FromBytes>(&self, kind: u16) -> Option<T> {
        self.find(kind)?.get_payload_as().ok()
    }

    pub fn text(&self, kind: u16) -> Option<String> {
        self.bytes(kind).map(text)
    }

    pub fn bytes(&self, kind: u16) -> Option<&[u8]> {
        Some(self.find(kind)?.payload().as_ref())
    }

    /// The attributes of each item of a list.
    pub fn lists(&self, kind: u16) -> Vec<Self> {
        let items = self.find(kind).map(inside).unwrap_or_default();
        items.iter().map(|item| Self(inside(item))).collect()
    }

    pub fn has(&self, kind: u16) -> bool {
        self.find(kind).is_some()
    }
}

/// The attributes that an attribute contains; none where it contains something else.
fn inside(attr: &Attr) -> Vec<Attr> {
    let handle = attr.get_attr_handle::<u16>();
    handle.map_or_else(|_| Vec::new(), |inside| inside.iter().cloned().collect())
}

fn text(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).into_owned()
}

/// A socket to talk to a family with.
pub struct Family {
    socket: NlSocket,
    id: u16,
    version: u8,
    sequence: Cell<u32>,
}

impl Family {
    /// `None`: the kernel has no such family.
    ///
    /// # Errors
    ///
    /// There is no generic netlink, or the kernel's answer cannot be understood.
    pub fn open(name: &str) -> Result<Option<Self>, NetlinkError> {
        let ctrl = Self::of_families()?;
        match ctrl.describe(name)? {
            Some(described) => ctrl.described_by(&described).map(Some),
            None => Ok(None),
        }
    }

    fn of_families() -> Result<Self, NetlinkError> {
        let socket = NlSocket::connect(NlFamily::Generic, None, Groups::empty())?;
        socket.enable_ext_ack(true)?;
        Ok(Self {
            socket,
            id: CTRL,
            version: CTRL_VERSION,
            sequence: Cell::new(0),
        })
    }

    /// Whether one of the family's commands takes an attribute.
    ///
    /// # Errors
    ///
    /// Those of [`Self::open`].
    pub fn knows(&self, command: u8, attribute: u16) -> Result<bool, NetlinkError> {
        let attrs = Attrs::default()
            .with(CTRL_FAMILY_ID, self.id)?
            .with(CTRL_OP, u32::from(command))?;
        match Self::of_families()?.dump(CTRL_GETPOLICY, attrs) {
            Ok(policies) => Ok(policies.iter().any(|policy| {
                let lists = policy.lists(CTRL_POLICY);
                lists.iter().any(|known| known.has(attribute))
            })),
            // It has no such command.
            Err(NetlinkError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Asks the family of families what it knows of another one. `None`: there is no such family.
    fn describe(&self, name: &str) -> Result<Option<Answer>, NetlinkError> {
        let attrs = Attrs::default().with(CTRL_FAMILY_NAME, name)?;
        match self.ask(CTRL_GETFAMILY, attrs) {
            Err(NetlinkError::Refused {
                errno: Errno::NOENT,
                ..
            }) => Ok(None),
            answer => answer.map(Some),
        }
    }

    /// The same socket, to talk to the family that was described.
    fn described_by(self, described: &Answer) -> Result<Self, NetlinkError> {
        let id = described.number(CTRL_FAMILY_ID);
        let version: Option<u32> = described.number(CTRL_FAMILY_VERSION);
        Ok(Self {
            id: id.ok_or_else(|| malformed("a family has no number"))?,
            version: version.unwrap_or(1) as u8,
            ..self
        })
    }

    /// Sends a command. When this returns the kernel has carried it out.
    ///
    /// # Errors
    ///
    /// `Refused`: the kernel says no. Others: the kernel's answer does not arrive or cannot be understood.
    pub fn ask(&self, command: u8, attrs: Attrs) -> Result<Answer, NetlinkError> {
        let mut answers = self.exchange(command, NlmF::ACK, attrs)?;
        Ok(answers.pop().unwrap_or_default())
    }

    /// Sends a command that lists something.
    ///
    /// # Errors
    ///
    /// Those of [`Self::ask`].
    pub fn dump(&self, command: u8, attrs: Attrs) -> Result<Vec<Answer>, NetlinkError> {
        self.exchange(command, NlmF::DUMP, attrs)
    }

    fn exchange(
        &self,
        command: u8,
        flags: NlmF,
        attrs: Attrs,
    ) -> Result<Vec<Answer>, NetlinkError> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        self.send(command, flags, sequence, attrs)?;
        let mut answers = Vec::new();
        loop {
            for message in self.receive()? {
                if *message.nl_seq() != sequence {
                    continue;
                }
                match message.nl_payload() {
                    NlPayload::Payload(payload) => {
                        answers.push(Answer(payload.attrs().as_ref().to_vec()));
                    }
                    NlPayload::Ack(_) | NlPayload::Empty => return Ok(answers),
                    NlPayload::DumpExtAck(end) if *end.error() == 0 => return Ok(answers),
                    NlPayload::DumpExtAck(end) => {
                        return Err(refused(*end.error(), end.ext_ack()));
                    }
                    NlPayload::Err(error) => return Err(refused(*error.error(), error.ext_ack())),
                }
            }
        }
    }

    fn send(
        &self,
        command: u8,
        flags: NlmF,
        sequence: u32,
        attrs: Attrs,
    ) -> Result<(), NetlinkError> {
        let message: Message = GenlmsghdrBuilder::default()
            .cmd(command)
            .version(self.version)
            .attrs(attrs.0.into_iter().collect::<GenlBuffer<u16, Buffer>>())
            .build()
            .map_err(malformed)?;
        let message = NlmsghdrBuilder::default()
            .nl_type(self.id)
            .nl_flags(NlmF::REQUEST | flags)
            .nl_seq(sequence)
            .nl_payload(NlPayload::Payload(message))
            .build()
            .map_err(malformed)?;
        let mut bytes = Cursor::new(Vec::new());
        message.to_bytes(&mut bytes).map_err(malformed)?;
        self.socket.send(bytes.into_inner(), Msg::empty())?;
        Ok(())
    }

    /// The messages of one datagram.
    fn receive(&self) -> Result<Vec<Nlmsghdr<u16, Message>>, NetlinkError> {
        let mut bytes = vec![0; BUFFER];
        let (len, _) = self.socket.recv(&mut bytes, Msg::empty())?;
        bytes.truncate(len);
        let mut rest = Cursor::new(bytes);
        let mut messages = Vec::new();
        while rest.position() < len as u64 {
            messages.push(Nlmsghdr::from_bytes(&mut rest).map_err(malformed)?);
        }
        Ok(messages)
    }
}

fn refused(error: i32, words: &GenlBuffer<NlmsgerrAttr, Buffer>) -> NetlinkError {
    let words = words
        .iter()
        .find(|attr| *attr.nla_type().nla_type() == NlmsgerrAttr::Msg);
    NetlinkError::Refused {
        errno: Errno::from_raw_os_error(error.saturating_abs()),
        words: words.map(|attr| text(attr.payload().as_ref())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes() {
        let attrs = Attrs::default()
            .with(1, 7_u32)
            .and_then(|attrs| attrs.with(2, "text"))
            .and_then(|attrs| attrs.with_some(3, None::<u64>));
        let answer = Answer::from(attrs.unwrap());
        assert_eq!(answer.number(1), Some(7_u32));
        assert_eq!(answer.number::<u64>(1), None, "it has 32 bits");
        assert_eq!(answer.text(2).as_deref(), Some("text"));
        assert_eq!(answer.bytes(2), Some(&b"text\0"[..]));
        assert!(!answer.has(3));
    }

    #[test]
    fn attributes_have_a_limit() {
        assert!(
            Attrs::default()
                .with(1, "x".repeat(70_000).as_str())
                .is_err()
        );
    }
}
