// SPDX-License-Identifier: GPL-2.0

//! The generic netlink family "nbd" (linux/nbd-netlink.h), and a device that is connected with it.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, Cursor};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

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

use crate::device::{SOON, USUAL_FLAGS, open};
use crate::harness::wait_until;
use crate::proto;
use crate::server::{Server, Transport};
use crate::sys::SysResult;

/// Commands.
pub const CONNECT: u8 = 1;
pub const DISCONNECT: u8 = 2;
pub const RECONFIGURE: u8 = 3;
pub const LINK_DEAD: u8 = 4;
pub const STATUS: u8 = 5;

/// Attributes of a message.
pub const INDEX: u16 = 1;
pub const SIZE_BYTES: u16 = 2;
pub const BLOCK_SIZE_BYTES: u16 = 3;
pub const TIMEOUT: u16 = 4;
pub const SERVER_FLAGS: u16 = 5;
pub const CLIENT_FLAGS: u16 = 6;
pub const SOCKETS: u16 = 7;
pub const DEAD_CONN_TIMEOUT: u16 = 8;
const DEVICE_LIST: u16 = 9;
pub const BACKEND_IDENTIFIER: u16 = 10;

/// What lists have in them.
pub const SOCK_ITEM: u16 = 1;
pub const SOCK_FD: u16 = 1;
const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// Flags of a client.
pub const DESTROY_ON_DISCONNECT: u64 = 1 << 0;
pub const DISCONNECT_ON_CLOSE: u64 = 1 << 1;
/// Disconnects the device when the socket that sent the command is closed. nbd.ko does not have it.
pub const DISCONNECT_ON_RELEASE: u64 = 1 << 32;

/// What the kernel says yes and no with, and ends a list with (linux/netlink.h).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The bytes of struct nlmsghdr.
const HEADER_LEN: usize = 16;

/// The family of families (linux/genetlink.h).
const CTRL: u16 = 0x10;
const CTRL_GETFAMILY: u8 = 3;
const CTRL_VERSION: u8 = 2;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
const CTRL_FAMILY_VERSION: u16 = 3;
const CTRL_HEADER_SIZE: u16 = 4;
const CTRL_MAX_ATTR: u16 = 5;
const CTRL_OPS: u16 = 6;
const CTRL_MCAST_GROUPS: u16 = 7;
const CTRL_OP_ID: u16 = 1;
const CTRL_OP_FLAGS: u16 = 2;
const CTRL_GROUP_NAME: u16 = 1;
const CTRL_GROUP_ID: u16 = 2;

pub type Attr = Nlattr<u16, Buffer>;
pub type Message = Genlmsghdr<u8, u16>;

pub fn attr(kind: u16, payload: impl Size + ToBytes) -> Attr {
    let kind = AttrTypeBuilder::default().nla_type(kind).build();
    NlattrBuilder::default()
        .nla_type(kind.expect("a type"))
        .nla_payload(payload)
        .build()
        .expect("an attribute")
}

pub fn nested(kind: u16, items: &[Attr]) -> Attr {
    items.iter().fold(attr(kind, Buffer::new()), |list, item| {
        list.nest(item).expect("a nested attribute")
    })
}

/// The number that the first attribute of this kind has.
pub fn number<T: FromBytes>(attrs: &[Attr], kind: u16) -> Option<T> {
    let attr = find(attrs, kind)?;
    Some(attr.get_payload_as().expect("a number"))
}

pub fn find(attrs: &[Attr], kind: u16) -> Option<&Attr> {
    attrs
        .iter()
        .find(|attr| *attr.nla_type().nla_type() == kind)
}

pub fn text(attrs: &[Attr], kind: u16) -> Option<String> {
    let text = find(attrs, kind)?.payload().as_ref();
    let text = text.strip_suffix(&[0]).expect("a terminated string");
    Some(String::from_utf8(text.to_vec()).expect("text"))
}

fn items(list: &Attr) -> Vec<Attr> {
    let list = list.get_attr_handle::<u16>().expect("attributes");
    list.iter().cloned().collect()
}

/// A family as the kernel describes it.
pub struct Family {
    pub id: u16,
    pub version: u32,
    pub header_size: u32,
    pub max_attr: u32,
    /// Commands, and what they need and can do.
    pub ops: Vec<(u32, u32)>,
    pub groups: Vec<(String, u32)>,
}

/// A socket to talk to the driver with.
pub struct Netlink {
    socket: NlSocket,
    pub family: Family,
    sequence: Cell<u32>,
    /// What the kernel said to the last command that it refused, if it was to say something.
    words: RefCell<Option<String>>,
}

impl Netlink {
    pub fn open() -> Self {
        Self::try_open().expect("the family nbd")
    }

    /// As [`Self::open`], where the driver may not be loaded.
    pub fn try_open() -> SysResult<Self> {
        Self::try_open_family("nbd")
    }

    /// Opens a socket to talk to a family.
    pub fn try_open_family(name: &str) -> SysResult<Self> {
        let socket = NlSocket::connect(NlFamily::Generic, None, Groups::empty());
        let mut netlink = Self {
            socket: socket.expect("a netlink socket"),
            family: Family {
                id: CTRL,
                version: CTRL_VERSION.into(),
                header_size: 0,
                max_attr: 0,
                ops: Vec::new(),
                groups: Vec::new(),
            },
            sequence: Cell::new(0),
            words: RefCell::default(),
        };
        netlink.family = netlink.resolve(name)?;
        Ok(netlink)
    }

    /// Hears the driver's messages to everybody from now on.
    pub fn listen() -> Self {
        Self::listen_to("nbd")
    }

    /// Hears what a family tells everybody from now on.
    pub fn listen_to(family: &str) -> Self {
        let netlink = Self::try_open_family(family).expect("the family");
        let (_, group) = netlink.family.groups[0];
        let joined = netlink
            .socket
            .add_mcast_membership(Groups::new_groups(&[group]));
        joined.expect("to join the group");
        netlink
    }

    fn resolve(&self, name: &str) -> SysResult<Family> {
        let answer = self.ask(CTRL_GETFAMILY, vec![attr(CTRL_FAMILY_NAME, name)])?;
        let attrs = answer.expect("a description").attrs().as_ref().to_vec();
        let list = |kind| find(&attrs, kind).map_or(Vec::new(), items);
        let op = |op: &Attr| {
            let attrs = items(op);
            let number = |kind| number(&attrs, kind).expect("a number");
            (number(CTRL_OP_ID), number(CTRL_OP_FLAGS))
        };
        let group = |group: &Attr| {
            let attrs = items(group);
            let name = text(&attrs, CTRL_GROUP_NAME).expect("a group's name");
            (name, number(&attrs, CTRL_GROUP_ID).expect("a group"))
        };
        Ok(Family {
            id: number(&attrs, CTRL_FAMILY_ID).expect("an id"),
            version: number(&attrs, CTRL_FAMILY_VERSION).expect("a version"),
            header_size: number(&attrs, CTRL_HEADER_SIZE).expect("a size"),
            max_attr: number(&attrs, CTRL_MAX_ATTR).expect("a number"),
            ops: list(CTRL_OPS).iter().map(op).collect(),
            groups: list(CTRL_MCAST_GROUPS).iter().map(group).collect(),
        })
    }

    /// Sends a command and answers what the kernel said to it, if it said more than yes or no.
    pub fn ask(&self, command: u8, attrs: Vec<Attr>) -> SysResult<Option<Message>> {
        let sequence = self.send(command, attrs, NlmF::ACK);
        let mut answer = None;
        loop {
            let received = self.receive().expect("an answer of the kernel");
            assert_eq!(*received.nl_seq(), sequence, "{received:?}");
            match received.nl_payload() {
                NlPayload::Payload(payload) => answer = Some(payload.clone()),
                NlPayload::Ack(_) => return Ok(answer),
                NlPayload::Err(error) => {
                    let mut attrs = error.ext_ack().iter();
                    let words = attrs.find(|a| *a.nla_type().nla_type() == NlmsgerrAttr::Msg);
                    let words = words.map(|words| {
                        let words = words.payload().as_ref().strip_suffix(&[0]);
                        String::from_utf8_lossy(words.expect("a terminated string")).into_owned()
                    });
                    self.words.replace(words);
                    return Err(Errno::from_raw_os_error(-error.error()));
                }
                other => panic!("the kernel said {other:?}"),
            }
        }
    }

    /// Sends a command. The kernel has carried it out when this returns.
    fn send(&self, command: u8, attrs: Vec<Attr>, flags: NlmF) -> u32 {
        let sequence = self.sequence.get() + 1;
        self.sequence.set(sequence);
        let message: Message = GenlmsghdrBuilder::default()
            .cmd(command)
            .version(self.family.version as u8)
            .attrs(attrs.into_iter().collect::<GenlBuffer<u16, Buffer>>())
            .build()
            .expect("a message");
        let message = NlmsghdrBuilder::default()
            .nl_type(self.family.id)
            .nl_flags(NlmF::REQUEST | flags)
            .nl_seq(sequence)
            .nl_payload(NlPayload::Payload(message))
            .build()
            .expect("a message");
        let mut bytes = Cursor::new(Vec::new());
        message.to_bytes(&mut bytes).expect("a message");
        let sent = self.socket.send(bytes.into_inner(), Msg::empty());
        sent.expect("to send to the kernel");
        sequence
    }

    /// Has the kernel list something: the attributes of each entry.
    pub fn list(&self, command: u8, attrs: Vec<Attr>) -> SysResult<Vec<Vec<Attr>>> {
        self.begin_list(command, attrs);
        let mut entries = Vec::new();
        while !self.receive_part(&mut entries)? {}
        Ok(entries)
    }

    /// Asks for a list. The kernel then makes its first part.
    pub fn begin_list(&self, command: u8, attrs: Vec<Attr>) {
        self.send(command, attrs, NlmF::DUMP);
    }

    /// Receives a part of a list. Answers whether it was the last one.
    pub fn receive_part(&self, entries: &mut Vec<Vec<Attr>>) -> SysResult<bool> {
        let mut bytes = vec![0; 32 << 10];
        let (len, _) = self.socket.recv(&mut bytes, Msg::empty()).expect("a part");
        let mut rest = &bytes[..len];
        while let Some((header, _)) = rest.split_first_chunk::<HEADER_LEN>() {
            let len = u32::from_ne_bytes(header[..4].try_into().unwrap()) as usize;
            let kind = u16::from_ne_bytes(header[4..6].try_into().unwrap());
            let message = &rest[..len];
            if [NLMSG_ERROR, NLMSG_DONE].contains(&kind) {
                let errno = i32::from_ne_bytes(message[HEADER_LEN..][..4].try_into().unwrap());
                return match errno {
                    0 => Ok(true),
                    errno => Err(Errno::from_raw_os_error(-errno)),
                };
            }
            let message: Nlmsghdr<u16, Message> =
                Nlmsghdr::from_bytes(&mut Cursor::new(message.to_vec())).expect("a message");
            let payload = message.get_payload().expect("an entry");
            entries.push(payload.attrs().as_ref().to_vec());
            rest = &rest[len.next_multiple_of(4)..];
        }
        Ok(false)
    }

    /// Sends whatever bytes, and answers with the errnos that the kernel has said to them; 0 is yes. It
    /// says nothing to what it does not take for a message.
    pub fn send_bytes(&self, bytes: &[u8]) -> Vec<i32> {
        let mut errnos = Vec::new();
        // What is no message at all may be refused here.
        let sent = self.socket.send(bytes, Msg::empty());
        errnos.extend(sent.err().and_then(|error| error.raw_os_error()));
        let mut answer = vec![0; 64 << 10];
        while let Ok((len, _)) = self.socket.recv(&mut answer, Msg::DONTWAIT) {
            let number = |at: usize| i32::from_ne_bytes(answer[at..at + 4].try_into().unwrap());
            // struct nlmsghdr and, in NLMSG_ERROR, the errno.
            if len >= 20 && answer[4..6] == NLMSG_ERROR.to_ne_bytes() {
                errnos.push(-number(16));
            }
        }
        errnos
    }

    /// The next message that is there.
    fn receive(&self) -> Option<Nlmsghdr<u16, Message>> {
        let mut bytes = vec![0; 32 << 10];
        let len = match self.socket.recv(&mut bytes, Msg::DONTWAIT) {
            Ok((len, _)) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => panic!("netlink: {error}"),
        };
        bytes.truncate(len);
        Some(Nlmsghdr::from_bytes(&mut Cursor::new(bytes)).expect("a netlink message"))
    }

    /// What a family has told everybody, if anything is left: its command and its attributes.
    ///
    /// ENOBUFS: something was lost.
    pub fn told(&self) -> SysResult<Option<(u8, Vec<Attr>)>> {
        let mut bytes = vec![0; 32 << 10];
        let len = match self.socket.recv(&mut bytes, Msg::DONTWAIT) {
            Ok((len, _)) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => {
                let errno = error.raw_os_error().expect("an errno");
                return Err(Errno::from_raw_os_error(errno));
            }
        };
        bytes.truncate(len);
        let message: Nlmsghdr<u16, Message> =
            Nlmsghdr::from_bytes(&mut Cursor::new(bytes)).expect("a netlink message");
        let payload = message.get_payload().expect("a message");
        Ok(Some((*payload.cmd(), payload.attrs().as_ref().to_vec())))
    }

    /// The answer is the device's index.
    pub fn connect(&self, setup: &Setup) -> SysResult<u32> {
        self.connect_with(setup.attrs())
    }

    /// As [`Self::connect`], whatever the message has in it.
    pub fn connect_with(&self, attrs: Vec<Attr>) -> SysResult<u32> {
        let answer = self.ask(CONNECT, attrs)?.expect("a reply");
        assert_eq!(*answer.cmd(), CONNECT);
        Ok(number(answer.attrs().as_ref(), INDEX).expect("an index"))
    }

    pub fn reconfigure(&self, setup: &Setup) -> SysResult<()> {
        self.ask(RECONFIGURE, setup.attrs()).map(drop)
    }

    pub fn disconnect(&self, index: u32) -> SysResult<()> {
        self.ask(DISCONNECT, vec![attr(INDEX, index)]).map(drop)
    }

    /// Disconnects a device if it has this image.
    pub fn disconnect_backend(&self, index: u32, backend: &[u8]) -> SysResult<()> {
        let setup = Setup::change(index).backend_bytes(backend);
        self.ask(DISCONNECT, setup.attrs()).map(drop)
    }

    /// Has the kernel explain why it refuses a command; see [`Self::ext_ack`].
    pub fn request_ext_ack(&self) {
        self.socket.enable_ext_ack(true).expect("NETLINK_EXT_ACK");
    }

    /// The extack message about the last command that was refused.
    pub fn ext_ack(&self) -> Option<String> {
        self.words.take()
    }

    /// The devices, or one of them, and whether they are connected.
    pub fn status(&self, index: Option<u32>) -> Vec<(u32, bool)> {
        self.try_status(index).expect("a status")
    }

    pub fn try_status(&self, index: Option<u32>) -> SysResult<Vec<(u32, bool)>> {
        let attrs = index.map(|index| attr(INDEX, index)).into_iter().collect();
        let answer = self.ask(STATUS, attrs)?.expect("a reply");
        assert_eq!(*answer.cmd(), STATUS);
        let list = find(answer.attrs().as_ref(), DEVICE_LIST).map(items);
        let device = |item: &Attr| {
            assert_eq!(*item.nla_type().nla_type(), DEVICE_ITEM);
            let attrs = items(item);
            let connected: u8 = number(&attrs, DEVICE_CONNECTED).expect("a state");
            (
                number(&attrs, DEVICE_INDEX).expect("an index"),
                connected == 1,
            )
        };
        Ok(list.expect("a list").iter().map(device).collect())
    }

    /// Waits until device `index` is disconnected and nobody has it open.
    pub fn wait_free(&self, index: u32) {
        let free = wait_until(SOON, || self.status(Some(index)) == [(index, false)]);
        assert!(free.is_ok(), "nbd{index} is still in use");
    }

    /// Waits for the news that a connection of a device has died.
    pub fn expect_dead_link(&self) -> u32 {
        let mut news = None;
        let heard = wait_until(SOON, || {
            news = self.dead_link();
            news.is_some()
        });
        assert!(heard.is_ok(), "no news of a dead connection");
        news.unwrap()
    }

    /// The device of which there is news that a connection has died, if any.
    pub fn dead_link(&self) -> Option<u32> {
        let received = self.receive()?;
        let message = received.get_payload().expect("a message");
        assert_eq!(*message.cmd(), LINK_DEAD);
        Some(number(message.attrs().as_ref(), INDEX).expect("an index"))
    }
}

/// What a message asks for.
#[derive(Clone, Default)]
pub struct Setup {
    attrs: Vec<Attr>,
    /// Open until the message has been sent.
    _sockets: Arc<Vec<OwnedFd>>,
}

impl Setup {
    /// An ordinary server's export, and no socket yet.
    pub fn new(size: u64) -> Self {
        Self::default()
            .size(size)
            .block_size(512)
            .flags(USUAL_FLAGS)
    }

    /// What changes a device.
    pub fn change(index: u32) -> Self {
        Self::default().index(index)
    }

    pub fn attrs(&self) -> Vec<Attr> {
        self.attrs.clone()
    }

    /// An attribute replaces an earlier one.
    fn with(mut self, new: Attr) -> Self {
        self = self.without(*new.nla_type().nla_type());
        self.attrs.push(new);
        self
    }

    pub fn without(mut self, kind: u16) -> Self {
        self.attrs
            .retain(|attr| *attr.nla_type().nla_type() != kind);
        self
    }

    /// Whatever it is.
    pub fn attr(self, attr: Attr) -> Self {
        self.with(attr)
    }

    pub fn index(self, index: u32) -> Self {
        self.with(attr(INDEX, index))
    }

    pub fn size(self, size: u64) -> Self {
        self.with(attr(SIZE_BYTES, size))
    }

    pub fn block_size(self, block_size: u64) -> Self {
        self.with(attr(BLOCK_SIZE_BYTES, block_size))
    }

    pub fn flags(self, flags: u64) -> Self {
        self.with(attr(SERVER_FLAGS, flags | proto::HAS_FLAGS))
    }

    pub fn client_flags(self, flags: u64) -> Self {
        self.with(attr(CLIENT_FLAGS, flags))
    }

    pub fn timeout(self, seconds: u64) -> Self {
        self.with(attr(TIMEOUT, seconds))
    }

    pub fn dead_timeout(self, seconds: u64) -> Self {
        self.with(attr(DEAD_CONN_TIMEOUT, seconds))
    }

    pub fn backend(self, name: &str) -> Self {
        self.with(attr(BACKEND_IDENTIFIER, name))
    }

    /// As [`Self::backend`], with nothing behind the bytes.
    pub fn backend_bytes(self, name: &[u8]) -> Self {
        self.with(attr(BACKEND_IDENTIFIER, Buffer::from(name)))
    }

    pub fn sockets(self, sockets: impl IntoIterator<Item = OwnedFd>) -> Self {
        let sockets: Vec<OwnedFd> = sockets.into_iter().collect();
        let numbers: Vec<i32> = sockets.iter().map(descriptor).collect();
        Self {
            _sockets: Arc::new(sockets),
            ..self.descriptors(&numbers)
        }
    }

    pub fn descriptors(self, numbers: &[i32]) -> Self {
        let item = |number: &i32| nested(SOCK_ITEM, &[attr(SOCK_FD, *number)]);
        let list: Vec<Attr> = numbers.iter().map(item).collect();
        self.with(nested(SOCKETS, &list))
    }

    /// Connects a device, with one connection to a new, honest server.
    pub fn attach(&self) -> Link {
        self.attach_over(&[Transport::Unix])
    }

    /// Connects a device, with these connections to a new, honest server.
    pub fn attach_over(&self, transports: &[Transport]) -> Link {
        self.try_attach_over(transports).expect("to connect")
    }

    /// As [`Self::attach`], where it may fail.
    pub fn try_attach(&self) -> SysResult<Link> {
        self.try_attach_over(&[Transport::Unix])
    }

    /// As [`Self::attach_over`], where it may fail.
    pub fn try_attach_over(&self, transports: &[Transport]) -> SysResult<Link> {
        self.try_attach_to(Server::new(), transports)
    }

    /// Connects a device to `server`, with these connections.
    pub fn try_attach_to(&self, server: Server, transports: &[Transport]) -> SysResult<Link> {
        let sockets = transports
            .iter()
            .map(|transport| server.connect(*transport));
        let netlink = Netlink::open();
        let index = netlink.connect(&self.clone().sockets(sockets))?;
        Ok(Link {
            server,
            netlink,
            index,
        })
    }
}

/// A server, and a device that netlink has connected to it.
pub struct Link {
    pub server: Server,
    pub netlink: Netlink,
    pub index: u32,
}

impl Link {
    /// Has the partitions looked for, which the first to open a device does.
    pub fn settle(self) -> Self {
        drop(File::open(format!("/dev/nbd{}", self.index)).expect("the device"));
        self.server.forget_requests();
        self
    }

    /// Opens the device for direct I/O.
    pub fn direct(&self) -> File {
        open(self.index, libc::O_DIRECT).expect("the device")
    }

    pub fn disconnect(&self) -> SysResult<()> {
        self.netlink.disconnect(self.index)
    }

    /// Ends every connection, and waits for the driver to know of one.
    pub fn kill_server(&self) {
        let news = Netlink::listen();
        self.server.kill();
        assert_eq!(news.expect_dead_link(), self.index);
    }

    /// Makes a new connection and puts it in a dead one's place.
    pub fn revive(&self) -> SysResult<()> {
        let socket = self.server.connect(Transport::Unix);
        let setup = Setup::change(self.index).sockets([socket]);
        self.netlink.reconfigure(&setup)
    }

    /// Waits until the device is free again.
    pub fn wait_free(&self) {
        self.netlink.wait_free(self.index);
    }

    /// Disconnects the device, and waits until it is free again.
    pub fn disconnect_and_wait(&self) {
        self.disconnect().expect("to disconnect");
        self.wait_free();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Sets free whoever waits for the server.
        self.server.kill();
        // It may be gone.
        let _ = self.netlink.disconnect(self.index);
    }
}

/// The number of a descriptor, for [`Setup::descriptors`].
pub fn descriptor(file: impl AsFd) -> i32 {
    file.as_fd().as_raw_fd()
}
