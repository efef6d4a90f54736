// SPDX-License-Identifier: GPL-2.0

//! Tells whether an address is that of a server to which a device is connected.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;

use crate::dial::Address;

/// Whether an address may be one of those that a device is connected to, if they are known.
pub fn leads_to(address: &Address, peers: &[String]) -> bool {
    let address = address.to_string();
    peers.is_empty() || peers.iter().any(|peer| may_be(&address, peer))
}

/// Whether an address may be that of a connection. A server may know its UNIX socket by another path.
pub fn may_be(address: &str, peer: &str) -> bool {
    if address == peer {
        return true;
    }
    let is_unix = !address.starts_with("vsock ") && address.parse::<SocketAddr>().is_err();
    if !is_unix || !peer.starts_with('/') {
        return is_unix && peer == "unix";
    }
    match (fs::metadata(address), fs::metadata(peer)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_may_have_several_paths() {
        assert!(may_be("/dev/null", "/dev/../dev/null"));
        assert!(!may_be("/dev/null", "/dev/zero"));
        assert!(may_be("/dev/null", "/nonexistent/of/a/container"));
        assert!(may_be("/dev/null", "unix"));
        assert!(!may_be("/dev/null", "127.0.0.1:1"));
        assert!(!may_be("/dev/null", "@abstract"));
        // Where a lost connection may be made to is what the device may be adopted from.
        let address = Address::Unix("/dev/null".into());
        assert!(leads_to(&address, &["/dev/../dev/null".into()]));
        assert!(!leads_to(&address, &["/dev/zero".into()]));
        assert!(leads_to(&address, &[]));
    }
}
