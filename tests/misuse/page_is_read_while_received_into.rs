// SPDX-License-Identifier: GPL-2.0
//! Nobody looks at memory that is being received into.

use crate::kapi::net::{
    iov::{IoPage, Pieces, RecvIov},
    sock::Socket,
};

fn receive(socket: &Socket, room: &mut Pieces, page: &mut IoPage) {
    let mut byte = [0];
    let mut iov = RecvIov::new(room);
    iov.push_room(page, 0, 1);
    let _ = page.read(0, &mut byte); //~ E0502
    //fix:
    let _ = socket.receive(iov);
}
