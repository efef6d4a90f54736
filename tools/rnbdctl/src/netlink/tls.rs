// SPDX-License-Identifier: GPL-2.0

//! What the kernel tells of the TLS of a TCP connection: sock_diag(7), as "ss -tie" asks it.

use std::io::Cursor;
use std::net::{IpAddr, SocketAddr};

use neli::consts::nl::NlmF;
use neli::consts::socket::{Msg, NlFamily};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::NlSocket;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;
use neli::{FromBytes, FromBytesWithInput, ToBytes};
use serde::Serialize;

use super::{Answer, NetlinkError, inside, malformed};

/// linux/sock_diag.h, linux/inet_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const INET_DIAG_INFO: u8 = 2;
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_ULP_INFO_TLS: u16 = 2;
/// The size of `struct inet_diag_msg`, which is before the attributes.
const INET_DIAG_MSG: usize = 72;

/// linux/tls.h
const TLS_INFO_VERSION: u16 = 1;
const TLS_INFO_CIPHER: u16 = 2;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// How a connection is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tls {
    pub version: &'static str,
    pub cipher: &'static str,
}

/// A socket to ask.
pub struct SockDiag(NlSocket);

impl SockDiag {
    /// # Errors
    ///
    /// There is no such netlink.
    pub fn open() -> Result<Self, NetlinkError> {
        let socket = NlSocket::connect(NlFamily::SockOrInetDiag, None, Groups::empty())?;
        Ok(Self(socket))
    }

    /// `None`: it is not encrypted by the kernel, or not known. Connections are known in their own network namespace
    /// only, and this only to those who may administer it.
    ///
    /// # Errors
    ///
    /// The kernel does not answer, or cannot be understood.
    pub fn tls(&self, local: SocketAddr, peer: SocketAddr) -> Result<Option<Tls>, NetlinkError> {
        self.0.send(request(local, peer)?, Msg::empty())?;
        let mut bytes = vec![0; super::BUFFER];
        let (len, _) = self.0.recv(&mut bytes, Msg::empty())?;
        bytes.truncate(len);
        let answer: Nlmsghdr<u16, Buffer> =
            Nlmsghdr::from_bytes(&mut Cursor::new(bytes)).map_err(malformed)?;
        match answer.nl_payload() {
            NlPayload::Payload(payload) => found(payload.as_ref()),
            // There is no such connection.
            _ => Ok(None),
        }
    }
}

/// `struct inet_diag_req_v2` for one connection, as a message.
fn request(local: SocketAddr, peer: SocketAddr) -> Result<Vec<u8>, NetlinkError> {
    let family = match local {
        SocketAddr::V4(_) => AF_INET,
        SocketAddr::V6(_) => AF_INET6,
    };
    let scope = match peer {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(peer) => peer.scope_id(),
    };
    let mut bytes = vec![family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0];
    // In each state.
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(peer.port().to_be_bytes());
    bytes.extend(octets(local.ip()));
    bytes.extend(octets(peer.ip()));
    bytes.extend(scope.to_ne_bytes());
    // Its cookie is not known (INET_DIAG_NOCOOKIE).
    bytes.extend([0xff; 8]);
    let message = NlmsghdrBuilder::default()
        .nl_type(SOCK_DIAG_BY_FAMILY)
        .nl_flags(NlmF::REQUEST)
        .nl_payload(NlPayload::Payload(Buffer::from(bytes)))
        .build()
        .map_err(malformed)?;
    let mut bytes = Cursor::new(Vec::new());
    message.to_bytes(&mut bytes).map_err(malformed)?;
    Ok(bytes.into_inner())
}

/// In the 16 bytes that there are for it.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&address.octets());
            octets
        }
        IpAddr::V6(address) => address.octets(),
    }
}

/// Looks for it in `struct inet_diag_msg` and the attributes behind that.
fn found(bytes: &[u8]) -> Result<Option<Tls>, NetlinkError> {
    let attrs = bytes.get(INET_DIAG_MSG..).unwrap_or_default();
    let attrs =
        GenlBuffer::<u16, Buffer>::from_bytes_with_input(&mut Cursor::new(attrs), attrs.len());
    let attrs = Answer(attrs.map_err(malformed)?.as_ref().to_vec());
    let within = |answer: &Answer, kind| answer.find(kind).map(|attr| Answer(inside(attr)));
    let tls = within(&attrs, INET_DIAG_ULP_INFO).and_then(|ulp| within(&ulp, INET_ULP_INFO_TLS));
    Ok(tls.map(|tls| Tls {
        version: tls.number(TLS_INFO_VERSION).map_or("unknown", version),
        cipher: tls.number(TLS_INFO_CIPHER).map_or("unknown", cipher),
    }))
}

fn version(number: u16) -> &'static str {
    match number {
        0x303 => "1.2",
        0x304 => "1.3",
        _ => "unknown",
    }
}

/// As "ss" calls them.
fn cipher(number: u16) -> &'static str {
    match number {
        51 => "aes-gcm-128",
        52 => "aes-gcm-256",
        53 => "aes-ccm-128",
        54 => "chacha20-poly1305",
        55 => "sm4-gcm",
        56 => "sm4-ccm",
        57 => "aria-gcm-128",
        58 => "aria-gcm-256",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Attrs, attribute};
    use super::*;

    /// What the kernel answers.
    fn answer(attrs: Attrs) -> Vec<u8> {
        let mut bytes = Cursor::new(vec![0; INET_DIAG_MSG]);
        bytes.set_position(INET_DIAG_MSG as u64);
        attrs
            .0
            .into_iter()
            .collect::<GenlBuffer<u16, Buffer>>()
            .to_bytes(&mut bytes)
            .unwrap();
        bytes.into_inner()
    }

    #[test]
    fn what_is_encrypted() {
        let tls = Attrs::default()
            .with(TLS_INFO_VERSION, 0x304_u16)
            .and_then(|attrs| attrs.with(TLS_INFO_CIPHER, 52_u16));
        let ulp = Attrs::default().nest(INET_ULP_INFO_TLS, tls.unwrap());
        let all = Attrs(vec![attribute(8, 3_u8).unwrap()]).nest(INET_DIAG_ULP_INFO, ulp.unwrap());
        let tls = found(&answer(all.unwrap())).unwrap().unwrap();
        assert_eq!((tls.version, tls.cipher), ("1.3", "aes-gcm-256"));
    }

    #[test]
    fn what_is_not() {
        assert_eq!(found(&answer(Attrs::default())).unwrap(), None);
        assert_eq!(found(&[0; 10]).unwrap(), None);
    }

    #[test]
    fn a_request_has_the_kernels_layout() {
        let v4 = request(
            "127.0.0.1:4660".parse().unwrap(),
            "127.0.0.2:2".parse().unwrap(),
        );
        let v4 = v4.unwrap();
        // The header has 16 bytes.
        assert_eq!(v4.len(), 16 + 56);
        assert_eq!(v4[16..20], [2, 6, 2, 0]);
        assert_eq!(v4[24..32], [0x12, 0x34, 0, 2, 127, 0, 0, 1]);
        assert_eq!(v4[44..48], [127, 0, 0, 2]);
        let v6 = request("[::1]:1".parse().unwrap(), "[fe80::1%7]:2".parse().unwrap());
        assert_eq!(v6.unwrap()[60..64], 7_u32.to_ne_bytes());
    }
}
