// SPDX-License-Identifier: GPL-2.0
//! As much of the driver's `kapi` as the files that are fuzzed use. Requests, pages and sockets are plain memory here.

pub(crate) mod payload;
pub(crate) mod request;
pub(crate) mod sock;

pub(crate) mod errno {
    use crate::prelude::Error;

    pub(crate) const EPROTO: Error = Error::new(71);
    pub(crate) const EREMOTEIO: Error = Error::new(121);
    pub(crate) const EKEYEXPIRED: Error = Error::new(127);
}

pub(crate) mod task {
    pub(crate) fn jiffies() -> usize {
        7
    }
}

pub(crate) mod block {
    pub(crate) use super::{payload, request};
}

pub(crate) mod net {
    pub(crate) use super::{arrival, iov, page_frag, sock, transfer};
}

pub(crate) mod trace {
    use super::request::{Unanswered, Unsent};

    pub(crate) fn is_sending_traced() -> bool {
        false
    }

    pub(crate) fn header_sent(_request: &Unsent, _cookie: u64) {}

    pub(crate) fn payload_sent(_request: &Unsent, _cookie: u64) {}

    pub(crate) fn header_received(_request: &Unanswered, _cookie: u64, _error: u32) {}
}

/// Memory that several may write to: a request's, a page.
type Memory = std::rc::Rc<std::cell::RefCell<Vec<u8>>>;

fn memory(len: usize) -> Memory {
    std::rc::Rc::new(std::cell::RefCell::new(vec![0; len]))
}

/// What a request's memory has in it before anything is written there.
pub(crate) const OLD: u8 = 0xee;

/// What has come in when the socket's callback is called.
pub(crate) mod arrival {
    pub(crate) use super::sock::Segment;
    use super::sock::Socket;

    pub(crate) struct Arrival<'a> {
        pub(crate) socket: &'a Socket,
        /// How long a segment is at most.
        pub(crate) segment_bytes: usize,
    }

    impl Arrival<'_> {
        pub(crate) fn read(self, mut each: impl FnMut(&mut Segment<'_>) -> bool) -> bool {
            let mut incoming = self.socket.incoming.borrow_mut();
            while !incoming.is_empty() {
                let len = incoming.len().min(self.segment_bytes);
                let bytes = &incoming.make_contiguous()[..len];
                let mut segment = Segment(bytes);
                let goes_on = each(&mut segment);
                let left = segment.left_bytes();
                incoming.drain(..len - left);
                assert!(left == 0 || !goes_on);
                if !goes_on {
                    break;
                }
            }
            !incoming.is_empty()
        }
    }
}

pub(crate) mod iov {
    pub(crate) use super::sock::{IoPage, Iov as RecvIov, Iov as SendIov, Pieces};
}

pub(crate) mod page_frag {
    pub(crate) struct FragPool;

    impl FragPool {
        pub(crate) fn new(_capacity: usize) -> crate::prelude::Result<Self> {
            Ok(FragPool)
        }
    }
}

pub(crate) mod transfer {
    pub(crate) struct Record {
        pub(crate) kind: u8,
        pub(crate) bytes: usize,
    }

    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Next {
        More,
        Nothing,
    }
}
