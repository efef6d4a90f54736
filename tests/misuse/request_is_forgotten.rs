// SPDX-License-Identifier: GPL-2.0
//! queue_rq cannot return before it has refused or started the request.

use crate::kapi::block::request::{NewRequest, QueueStatus, Status};

fn queue_rq(rq: NewRequest) -> QueueStatus {
    QueueStatus(Status::OK) //~ E0423
    //fix: rq.refuse(Status::IOERR)
}
