// SPDX-License-Identifier: GPL-2.0
//! queue_rq cannot return before it has refused or started the request.

use crate::kapi::block::request::{NewRequest, Queued, Status};

fn queue_rq(rq: NewRequest) -> Queued {
    Queued(Status::OK) //~ E0423
    //fix: rq.refuse(Status::IOERR)
}
