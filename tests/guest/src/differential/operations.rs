// SPDX-License-Identifier: GPL-2.0

//! What a sequence is made of: operations on two or three devices, and how they are drawn.

use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::strategy::Union;

use crate::netlink::{DESTROY_ON_DISCONNECT, DISCONNECT_ON_CLOSE};
use crate::proto::{
    CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, ROTATIONAL, SEND_FLUSH, SEND_FUA, SEND_TRIM,
    SEND_WRITE_ZEROES,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A device of the sequence's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dev {
    A,
    B,
    /// Does not exist until netlink makes it.
    New,
}

pub const DEVICES: [Dev; 3] = [Dev::A, Dev::B, Dev::New];

/// A task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Main,
    Other,
    /// Has no CAP_SYS_ADMIN.
    Nobody,
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    ReadWrite,
    Read,
    Direct,
    Exclusive,
}

/// What is given to a device as a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A connection to the device's server.
    Unix,
    Tcp,
    /// A connection whose other end has gone.
    Dead,
    /// Not connected to anything.
    Unconnected,
    Udp,
    Datagram,
    OtherFile,
    NotOpen,
    /// A number that no descriptor has.
    Number(i32),
}

/// An ioctl and its argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    SetSock(Socket),
    /// NBD_SET_SOCK with a number that no `int` holds.
    SetSockHuge(u64),
    SetBlksize(u64),
    SetSize(u64),
    SetSizeBlocks(u64),
    SetTimeout(u64),
    SetFlags(u64),
    ClearSock,
    ClearQue,
    PrintDebug,
    Disconnect,
    DoIt,
    /// One that NBD does not have, or that is not NBD's.
    Unknown(u32),
    /// The block layer's.
    GetSize64,
    GetReadOnly,
    GetBlockSize,
    SetReadOnly(i32),
    FlushBuffers,
    RereadPartitions,
    Discard(u64, u64),
    ZeroOut(u64, u64),
}

/// An attribute of a netlink message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    Size(u64),
    BlockSize(u64),
    Timeout(u64),
    DeadTimeout(u64),
    ServerFlags(u64),
    ClientFlags(u64),
    Backend(&'static str),
    Sockets(Vec<Socket>),
    /// A list of sockets in which something is no socket: an item of this kind, with a member of
    /// this kind and so many bytes.
    OddSockets(u16, u16, usize),
    /// An attribute of this kind with so many bytes.
    Bytes(u16, usize),
}

impl Attribute {
    pub fn client_flags(&self) -> Option<u64> {
        match self {
            Self::ClientFlags(flags) => Some(*flags),
            _ => None,
        }
    }
}

/// What the server of a device does with requests from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Honest,
    Refuse(u32),
    /// It takes requests and says nothing.
    Stall,
    /// It closes the connection when it is asked for something.
    Close,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Open {
        file: usize,
        device: Dev,
        how: How,
    },
    Close {
        file: usize,
    },
    Ioctl {
        who: Who,
        file: usize,
        request: Request,
    },
    /// Offset and length.
    Read {
        file: usize,
        at: u64,
        len: usize,
    },
    Write {
        file: usize,
        at: u64,
        len: usize,
    },
    Sync {
        file: usize,
    },
    Connect {
        who: Who,
        device: Option<Dev>,
        attributes: Vec<Attribute>,
    },
    Reconfigure {
        who: Who,
        device: Option<Dev>,
        attributes: Vec<Attribute>,
    },
    DisconnectByNetlink {
        who: Who,
        device: Option<Dev>,
    },
    Status {
        who: Who,
        device: Dev,
    },
    /// A signal for the last NBD_DO_IT that runs.
    Signal,
    Serve {
        device: Dev,
        manner: Manner,
    },
    /// The server ends one connection, or all.
    Kill {
        device: Dev,
        connection: Option<usize>,
    },
    /// Reads what sysfs and debugfs show.
    Look {
        device: Dev,
    },
}

pub type Sequence = Vec<Op>;

impl Op {
    /// Whether it has to do with this device, itself.
    pub fn concerns(&self, which: Dev) -> bool {
        match self {
            Op::Open { device, .. }
            | Op::Status { device, .. }
            | Op::Serve { device, .. }
            | Op::Kill { device, .. }
            | Op::Look { device } => *device == which,
            Op::Connect { device, .. }
            | Op::Reconfigure { device, .. }
            | Op::DisconnectByNetlink { device, .. } => match device {
                Some(device) => *device == which,
                // The first that is free.
                None => which != Dev::New,
            },
            Op::Close { .. }
            | Op::Ioctl { .. }
            | Op::Read { .. }
            | Op::Write { .. }
            | Op::Sync { .. }
            | Op::Signal => false,
        }
    }
}

/// A value that is mostly an ordinary one. Shrinks towards the first.
fn mostly<T: Clone + std::fmt::Debug + 'static>(
    usual: &[T],
    rare: &[T],
) -> impl Strategy<Value = T> + Clone + use<T> {
    prop_oneof![12 => select(usual.to_vec()), 1 => select(rare.to_vec())]
}

fn any_of(choices: Vec<(u32, BoxedStrategy<Op>)>) -> BoxedStrategy<Op> {
    Union::new_weighted(choices).boxed()
}

fn who() -> impl Strategy<Value = Who> + Clone {
    prop_oneof![40 => Just(Who::Main), 2 => Just(Who::Other), 1 => Just(Who::Nobody)]
}

fn device() -> impl Strategy<Value = Dev> + Clone {
    prop_oneof![8 => Just(Dev::A), 2 => Just(Dev::B), 1 => Just(Dev::New)]
}

fn file() -> impl Strategy<Value = usize> + Clone {
    prop_oneof![6 => Just(0_usize), 2 => Just(1), 1 => Just(2)]
}

fn size() -> impl Strategy<Value = u64> + Clone {
    mostly(
        &[MIB, 64 * KIB, 3 * MIB],
        &[
            0,
            512,
            1000,
            MIB + 512,
            1 << 40,
            1 << 62,
            i64::MAX as u64,
            1 << 63,
            u64::MAX,
        ],
    )
}

fn block_size() -> impl Strategy<Value = u64> + Clone {
    mostly(
        &[512, 1024, 4096],
        &[
            0,
            1,
            256,
            513,
            8192,
            64 * KIB,
            128 * KIB,
            1 << 31,
            1 << 32,
            (1 << 32) + 512,
            u64::MAX,
        ],
    )
}

fn timeout() -> impl Strategy<Value = u64> + Clone {
    mostly(&[0, 20, 60], &[1000, 1 << 33, u64::MAX])
}

fn flags() -> impl Strategy<Value = u64> + Clone {
    let all = vec![
        HAS_FLAGS,
        READ_ONLY,
        SEND_FLUSH,
        SEND_FUA,
        ROTATIONAL,
        SEND_TRIM,
        SEND_WRITE_ZEROES,
        CAN_MULTI_CONN,
    ];
    let usual = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN;
    prop_oneof![
        6 => Just(usual),
        6 => subsequence(all, 0..=8).prop_map(|bits| bits.iter().sum()),
        1 => select(vec![u64::MAX, 1 << 7, 1 << 32, 0xffff_ffff]),
    ]
}

fn client_flags() -> impl Strategy<Value = u64> + Clone {
    let both = DESTROY_ON_DISCONNECT | DISCONNECT_ON_CLOSE;
    mostly(
        &[0, DESTROY_ON_DISCONNECT, DISCONNECT_ON_CLOSE, both],
        &[4, u64::MAX],
    )
}

fn socket() -> impl Strategy<Value = Socket> + Clone {
    mostly(
        &[Socket::Unix, Socket::Tcp],
        &[
            Socket::Dead,
            Socket::Unconnected,
            Socket::Udp,
            Socket::Datagram,
            Socket::OtherFile,
            Socket::NotOpen,
            Socket::Number(-1),
            Socket::Number(i32::MIN),
            Socket::Number(i32::MAX),
        ],
    )
}

fn how() -> impl Strategy<Value = How> + Clone {
    prop_oneof![
        4 => Just(How::ReadWrite), 2 => Just(How::Read), 4 => Just(How::Direct), 1 => Just(How::Exclusive),
    ]
}

fn setting() -> impl Strategy<Value = Request> + Clone {
    prop_oneof![
        4 => socket().prop_map(Request::SetSock),
        4 => block_size().prop_map(Request::SetBlksize),
        3 => size().prop_map(Request::SetSize),
        3 => mostly(&[1024, 256], &[0, 1, 1 << 40, 1 << 53, 1 << 54, 1 << 63, u64::MAX])
            .prop_map(Request::SetSizeBlocks),
        3 => timeout().prop_map(Request::SetTimeout),
        4 => flags().prop_map(Request::SetFlags),
        1 => select(vec![1 << 31, 1 << 32, u64::MAX]).prop_map(Request::SetSockHuge),
    ]
}

fn control() -> impl Strategy<Value = Request> + Clone {
    prop_oneof![
        8 => Just(Request::DoIt),
        4 => Just(Request::Disconnect),
        4 => Just(Request::ClearSock),
        1 => Just(Request::ClearQue),
        1 => Just(Request::PrintDebug),
        1 => select(vec![0xab0b, 0xabff, 0x1_ab00, 0x5401, 0xac00]).prop_map(Request::Unknown),
    ]
}

fn generic() -> impl Strategy<Value = Request> + Clone {
    let range = || {
        (
            select(vec![0, 4096, 512, 100, 1 << 41]),
            select(vec![4096, 512, 64 * KIB, 100, 0]),
        )
    };
    prop_oneof![
        2 => Just(Request::GetSize64),
        2 => Just(Request::GetReadOnly),
        1 => Just(Request::GetBlockSize),
        1 => (0..2).prop_map(Request::SetReadOnly),
        1 => Just(Request::FlushBuffers),
        1 => Just(Request::RereadPartitions),
        2 => range().prop_map(|(at, len)| Request::Discard(at, len)),
        2 => range().prop_map(|(at, len)| Request::ZeroOut(at, len)),
    ]
}

fn ioctl() -> BoxedStrategy<Op> {
    let request = prop_oneof![4 => setting(), 4 => control(), 2 => generic()];
    (who(), file(), request)
        .prop_map(|(who, file, request)| Op::Ioctl { who, file, request })
        .boxed()
}

fn transfer() -> BoxedStrategy<Op> {
    let at = mostly(&[0, 4096, 64 * KIB - 4096], &[512, 100, MIB, 1 << 41]);
    let len = mostly(&[4096, 512, 64 << 10], &[0, 100, 4097]);
    (file(), at, len, any::<bool>())
        .prop_map(|(file, at, len, write)| {
            if write {
                Op::Write { file, at, len }
            } else {
                Op::Read { file, at, len }
            }
        })
        .boxed()
}

fn sockets() -> impl Strategy<Value = Vec<Socket>> + Clone {
    prop_oneof![
        8 => vec(socket(), 1..2),
        3 => vec(socket(), 2..4),
        1 => Just(Vec::new()),
    ]
}

fn attribute() -> impl Strategy<Value = Attribute> + Clone {
    prop_oneof![
        6 => sockets().prop_map(Attribute::Sockets),
        4 => size().prop_map(Attribute::Size),
        3 => block_size().prop_map(Attribute::BlockSize),
        3 => timeout().prop_map(Attribute::Timeout),
        2 => mostly(&[0, 1], &[1 << 40]).prop_map(Attribute::DeadTimeout),
        4 => client_flags().prop_map(Attribute::ClientFlags),
        2 => flags().prop_map(Attribute::ServerFlags),
        2 => select(vec!["a", "b", ""]).prop_map(Attribute::Backend),
        1 => (select(vec![1_u16, 0, 2]), select(vec![1_u16, 0, 2]), select(vec![4_usize, 0, 2, 8]))
            .prop_map(|(item, member, len)| Attribute::OddSockets(item, member, len)),
        1 => (1..13_u16, select(vec![0_usize, 1, 4, 8, 12]))
            .prop_map(|(kind, len)| Attribute::Bytes(kind, len)),
    ]
}

/// CONNECT as nbd-client sends it, but for what is left out, and what is added.
fn connect() -> BoxedStrategy<Op> {
    let usual = (
        weighted(0.95, size().prop_map(Attribute::Size)),
        weighted(0.5, block_size().prop_map(Attribute::BlockSize)),
        weighted(0.8, flags().prop_map(Attribute::ServerFlags)),
        weighted(0.95, sockets().prop_map(Attribute::Sockets)),
        weighted(0.3, client_flags().prop_map(Attribute::ClientFlags)),
        weighted(0.2, attribute()),
        weighted(0.2, attribute()),
    );
    (who(), weighted(0.9, device()), usual)
        .prop_map(|(who, device, (a, b, c, d, e, f, g))| Op::Connect {
            who,
            device,
            attributes: [a, b, c, d, e, f, g].into_iter().flatten().collect(),
        })
        .boxed()
}

fn reconfigure() -> BoxedStrategy<Op> {
    (who(), weighted(0.95, device()), vec(attribute(), 0..4))
        .prop_map(|(who, device, attributes)| Op::Reconfigure {
            who,
            device,
            attributes,
        })
        .boxed()
}

fn manner() -> impl Strategy<Value = Manner> + Clone {
    prop_oneof![
        4 => Just(Manner::Honest),
        6 => select(vec![5, 1, 22, 28, 95, 12, 108, 75, 0xffff_ffff]).prop_map(Manner::Refuse),
        1 => Just(Manner::Close),
        1 => Just(Manner::Stall),
    ]
}

fn single() -> BoxedStrategy<Op> {
    any_of(vec![
        (10, ioctl()),
        (5, transfer()),
        (
            5,
            (file(), device(), how())
                .prop_map(|(file, device, how)| Op::Open { file, device, how })
                .boxed(),
        ),
        (4, file().prop_map(|file| Op::Close { file }).boxed()),
        (2, file().prop_map(|file| Op::Sync { file }).boxed()),
        (3, connect()),
        (4, reconfigure()),
        (
            3,
            (who(), weighted(0.95, device()))
                .prop_map(|(who, device)| Op::DisconnectByNetlink { who, device })
                .boxed(),
        ),
        (
            1,
            (who(), device())
                .prop_map(|(who, device)| Op::Status { who, device })
                .boxed(),
        ),
        (1, Just(Op::Signal).boxed()),
        (
            2,
            (device(), manner())
                .prop_map(|(device, manner)| Op::Serve { device, manner })
                .boxed(),
        ),
        (
            2,
            (device(), weighted(0.5, 0..3_usize))
                .prop_map(|(device, connection)| Op::Kill { device, connection })
                .boxed(),
        ),
        (3, device().prop_map(|device| Op::Look { device }).boxed()),
    ])
}

/// What nbd-client does with ioctls, but for what is left out.
fn ioctl_client() -> BoxedStrategy<Sequence> {
    let set = |request: BoxedStrategy<Request>, part| weighted(part, request);
    (
        (file(), device(), how(), who()),
        set(block_size().prop_map(Request::SetBlksize).boxed(), 0.7),
        set(size().prop_map(Request::SetSize).boxed(), 0.95),
        set(Just(Request::ClearSock).boxed(), 0.4),
        set(flags().prop_map(Request::SetFlags).boxed(), 0.8),
        set(timeout().prop_map(Request::SetTimeout).boxed(), 0.4),
        set(socket().prop_map(Request::SetSock).boxed(), 0.98),
        set(socket().prop_map(Request::SetSock).boxed(), 0.2),
        set(Just(Request::DoIt).boxed(), 0.95),
    )
        .prop_map(|((file, device, how, who), a, b, c, d, e, f, g, h)| {
            let requests = [a, b, c, d, e, f, g, h].into_iter().flatten();
            let mut ops = vec![Op::Open { file, device, how }];
            ops.extend(requests.map(|request| Op::Ioctl { who, file, request }));
            ops
        })
        .boxed()
}

/// Opens a device and moves data.
fn use_it() -> BoxedStrategy<Sequence> {
    ((file(), device()), vec(transfer(), 1..3))
        .prop_map(|((file, device), transfers)| {
            let how = How::Direct;
            let mut ops = vec![Op::Open { file, device, how }];
            ops.extend(transfers);
            ops
        })
        .boxed()
}

/// Three to about 25 operations.
pub fn sequences() -> BoxedStrategy<Sequence> {
    let one = || single().prop_map(|op| vec![op]).boxed();
    let part = Union::new_weighted(vec![
        (8, one()),
        (4, ioctl_client()),
        (3, connect().prop_map(|op| vec![op]).boxed()),
        (2, use_it()),
    ]);
    vec(part, 2..7).prop_map(|parts| parts.concat()).boxed()
}
