// SPDX-License-Identifier: GPL-2.0
//! What is being sent is not received into.

use crate::kapi::{
    block::{payload::Payload, request::Unsent},
    net::{
        iov::{Pieces, RecvIov, SendIov},
        page_frag::FragPool,
        sock::Socket,
        transfer::Next,
    },
};

fn receive(socket: &Socket, room: &mut Pieces, frags: &mut FragPool, write: &mut Payload<Unsent>) {
    let mut iov = RecvIov::new(room); //fix: let mut iov = SendIov::new(room);
    iov.push_payload(write); //~ E0308
    //fix: iov.push_payload(write);
    let _ = socket.receive(iov); //fix: let _ = socket.send(iov, frags, Next::Nothing);
}
