// SPDX-License-Identifier: GPL-2.0
//! What is being sent is not received into.

use crate::kapi::{
    iov::{Pieces, RecvIov, SendIov},
    mq::Unsent,
    payload::Payload,
    sock::Socket,
};

fn receive(socket: &Socket, room: &mut Pieces, write: &mut Payload<Unsent>) {
    let mut iov = RecvIov::new(room); //fix: let mut iov = SendIov::new(room);
    iov.push_payload(write); //~ E0308
    //fix: iov.push_payload(write);
    let _ = socket.receive(iov); //fix: let _ = socket.send(iov, false);
}
