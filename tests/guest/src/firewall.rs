// SPDX-License-Identifier: GPL-2.0

//! Something in the middle of a network's path that has forgotten the connections through it, and
//! answers a client in the server's name that there is none. The server hears nothing.

use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::time::Duration;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto, socket,
    sockopt,
};

/// In the network namespace of the thread that has made it.
pub struct Firewall {
    hears: OwnedFd,
    says: OwnedFd,
}

impl Firewall {
    pub fn new() -> Self {
        let raw = |protocol: Protocol| {
            let protocol = Some(protocol);
            socket(AddressFamily::INET, SocketType::RAW, protocol).expect("a raw socket")
        };
        let hears = raw(ipproto::TCP);
        let patience = Some(Duration::from_millis(100));
        sockopt::set_socket_timeout(&hears, sockopt::Timeout::Recv, patience).expect("a timeout");
        // Nobody repeats a packet that was not heard for want of room.
        sockopt::set_socket_recv_buffer_size_force(&hears, 8 << 20).expect("room");
        Self {
            hears,
            says: raw(ipproto::RAW),
        }
    }

    /// Answers the next packet to `port`, if there is one soon, with a reset. The client believes it
    /// where nothing of the server's has come in meanwhile.
    pub fn refuse(&self, port: u16) {
        let mut packet = vec![0; 1 << 16];
        let Ok((bytes, _)) = recv(&self.hears, &mut packet, RecvFlags::empty()) else {
            return;
        };
        let packet = SlicedPacket::from_ip(&packet[..bytes]).expect("a packet");
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) =
            (packet.net, packet.transport)
        else {
            return;
        };
        if tcp.destination_port() != port || tcp.rst() {
            return;
        }
        let (server, client) = (ip.header().destination_addr(), ip.header().source_addr());
        let (from, to) = (tcp.destination_port(), tcp.source_port());
        let mut reset = Vec::new();
        PacketBuilder::ipv4(server.octets(), client.octets(), 64)
            .tcp(from, to, tcp.acknowledgment_number(), 0)
            .rst()
            .write(&mut reset, &[])
            .expect("to write to memory");
        let to = SocketAddrV4::new(client, to);
        sendto(&self.says, &reset, SendFlags::empty(), &to).expect("to send");
    }
}
