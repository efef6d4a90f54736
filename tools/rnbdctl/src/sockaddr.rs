// SPDX-License-Identifier: GPL-2.0

//! Shows a `struct sockaddr` of the kernel.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};

use crate::text::plain;

const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const AF_VSOCK: u16 = 40;

/// An address for people, or its bytes where nothing is known of it.
pub fn show(bytes: &[u8]) -> String {
    known(bytes).unwrap_or_else(|| format!("{bytes:02x?}"))
}

fn known(bytes: &[u8]) -> Option<String> {
    let (family, rest) = bytes.split_first_chunk()?;
    match u16::from_ne_bytes(*family) {
        AF_UNIX => Some(unix(rest)),
        AF_INET => {
            let (port, rest) = rest.split_first_chunk()?;
            let (address, _) = rest.split_first_chunk::<4>()?;
            let address = SocketAddrV4::new(Ipv4Addr::from(*address), u16::from_be_bytes(*port));
            Some(address.to_string())
        }
        AF_INET6 => {
            let (port, rest) = rest.split_first_chunk()?;
            let (_flow, rest) = rest.split_first_chunk::<4>()?;
            let (address, rest) = rest.split_first_chunk::<16>()?;
            let (scope, _) = rest.split_first_chunk()?;
            let port = u16::from_be_bytes(*port);
            let scope = u32::from_ne_bytes(*scope);
            let address = SocketAddrV6::new(Ipv6Addr::from(*address), port, 0, scope);
            Some(address.to_string())
        }
        AF_VSOCK => {
            let (_reserved, rest) = rest.split_first_chunk::<2>()?;
            let (port, rest) = rest.split_first_chunk()?;
            let (cid, _) = rest.split_first_chunk()?;
            let (cid, port) = (u32::from_ne_bytes(*cid), u32::from_ne_bytes(*port));
            Some(format!("vsock {cid}:{port}"))
        }
        _ => None,
    }
}

/// A socket that was not bound has no path, and an abstract name begins with NUL.
fn unix(path: &[u8]) -> String {
    let text = |bytes: &[u8]| plain(&String::from_utf8_lossy(bytes));
    match path.split_first() {
        None => "unix".into(),
        Some((0, [])) => "unix".into(),
        Some((0, name)) => format!("@{}", text(name.strip_suffix(&[0]).unwrap_or(name))),
        _ => text(path.split(|byte| *byte == 0).next().unwrap_or(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(family: u16, rest: &[u8]) -> Vec<u8> {
        [&family.to_ne_bytes(), rest].concat()
    }

    #[test]
    fn internet() {
        let v4 = [0x2a, 0x39, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(show(&with(AF_INET, &v4)), "127.0.0.1:10809");
        let mut v6 = vec![0x2a, 0x39, 0, 0, 0, 0];
        v6.extend([0; 15]);
        v6.extend([1, 0, 0, 0, 0]);
        assert_eq!(show(&with(AF_INET6, &v6)), "[::1]:10809");
    }

    #[test]
    fn unix_sockets() {
        assert_eq!(show(&with(AF_UNIX, b"/run/s\0\0\0")), "/run/s");
        assert_eq!(show(&with(AF_UNIX, b"\0name")), "@name");
        assert_eq!(show(&with(AF_UNIX, b"")), "unix");
    }

    #[test]
    fn vsock() {
        let mut rest = vec![0, 0];
        rest.extend(10809_u32.to_ne_bytes());
        rest.extend(2_u32.to_ne_bytes());
        assert_eq!(show(&with(AF_VSOCK, &rest)), "vsock 2:10809");
    }

    #[test]
    fn whatever_it_is() {
        assert_eq!(show(&[]), "[]");
        assert_eq!(show(&with(AF_INET, &[1])), "[02, 00, 01]");
        assert_eq!(show(&with(99, &[1])), "[63, 00, 01]");
    }
}
