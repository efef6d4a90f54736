// SPDX-License-Identifier: GPL-2.0
//! What became of a request is said by the call of queue_rq that was given it.

use crate::kapi::block::request::{NewRequest, QueueStatus, Status};

fn elsewhere(_what: impl Send) {}

fn queue_rq(rq: NewRequest) {
    elsewhere(rq.refuse(Status::IOERR)); //~ E0277
    //fix: let _ = rq.refuse(Status::IOERR);
}
